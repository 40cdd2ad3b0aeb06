"""Kernels for GPUs where there is none: lowered, interpreted, and with planted mistakes.

What they compute is checked by their cases, where the interpreter of GPUs is (jax 0.12).
"""

import contextlib
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kernels
from kernels import dispatch, gpu, testing

pytestmark = [
    pytest.mark.skipif(
        jax.default_backend() == "gpu", reason="it is about GPUs that are not there"
    ),
    pytest.mark.long,
]
interpreted = pytest.mark.skipif(
    not testing.gpus_are_interpreted(), reason="needs jax 0.12, which interprets them"
)
SUITES = {op: s for op, s in testing.suites().items() if "gpu" in s.implementations()}
SMALL = {
    "decode_attention": "768 columns, 1 of 4 heads of 64",
    "diffusion_step": "2 x 8 x 16 x 3 noise history clip",
    "group_norm_silu": "gradients of a rest",
    "mask_scores": "8 positions, 300 tokens",
    "nearest_code": "ties across tiles",
    "quantized_linear": "extreme",
    "sample_logits": "three rows, temperature 0",
    "sample_token": "2 of 600 tokens",
}


def case_of(op, name):
    return next(case for case in SUITES[op].cases if str(case).startswith(name))


def test_there_is_a_small_case_of_every_kernel():
    assert SMALL.keys() == SUITES.keys()


@contextlib.contextmanager
def an_absent_gpu():
    """What jax 0.10 must know of it to lower a kernel."""
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("one",), abstract_device=device)
    with dispatch.any_platform(), jax.sharding.use_abstract_mesh(mesh):
        yield


def lowered(function, *arguments):
    with an_absent_gpu():
        traced = jax.jit(lambda *arguments: function(*arguments)).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


LOWERED = [
    pytest.param(suite, case, id=f"{suite.op}: {case}")
    for suite in SUITES.values()
    for case in suite.estimated[:1]
]


@pytest.mark.parametrize(("suite", "case"), LOWERED)
def test_it_is_lowered_for_cuda(suite, case):
    run, arrays = testing.program(functools.partial(suite.call, implementation="gpu"), case)
    kernel = "sample_logits" if suite.op == "sample_token" else suite.op
    text = lowered(run, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays))
    assert "mosaic_gpu" in text
    assert kernel in text


def test_none_is_a_default_before_it_has_run_on_a_gpu():
    for suite in SUITES.values():
        assert not suite.implementations()["gpu"].default_on


@contextlib.contextmanager
def strict():
    """Finds races of the warpgroups and of their copies."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpreter = importlib.import_module(
        "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call"
    )
    options = plgpu.InterpretGPUParams(detect_races=True)
    with dispatch.any_platform(), plgpu.force_gpu_interpret_mode(options):
        yield
    races = interpreter.get_races()
    assert races is not None
    assert not races.races_found


def results(suite, case, implementation):
    run = functools.partial(suite.call, implementation=implementation)
    jitted, arrays = testing.program(run, case)
    return jax.tree.leaves(jax.block_until_ready(jitted(*arrays)))


@interpreted
@pytest.mark.parametrize("op", sorted(SMALL.keys() - {"sample_logits"}))  # is in sample_token
def test_without_races(op):
    suite, case = SUITES[op], case_of(op, SMALL[op])
    expected = results(suite, case, "reference")
    jax.clear_caches()  # of the same kernel, traced without a search for races
    with strict():
        got = results(suite, case, "gpu")
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float64), np.asarray(other, np.float64), atol=0.06
        )


def gradient_of_norm(implementation):
    suite = SUITES["group_norm_silu"]
    case = case_of(suite.op, SMALL[suite.op])
    run = functools.partial(suite.call, implementation=implementation, **case.options)
    arguments = case.arguments(0)
    return jax.jit(lambda *a: jax.vjp(run, *a)[1](a[0])), arguments


@interpreted
def test_a_gradient_without_races():
    jax.clear_caches()
    run, arguments = gradient_of_norm("gpu")
    with strict():
        got = jax.block_until_ready(run(*arguments))
    run, arguments = gradient_of_norm("reference")
    for one, other in zip(got, run(*arguments), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_a_gradient_is_lowered_for_cuda():
    run, arguments = gradient_of_norm("gpu")
    text = lowered(run, *arguments)
    assert "group_norm_silu_gradient" in text


def search(x, codebook, implementation="gpu"):
    return kernels.nearest_code(x, codebook, implementation=implementation)


@interpreted
def test_under_vmap_and_scan():
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(2, 16, 5)), jnp.float32)
    codebook = jnp.asarray(generator.normal(size=(2, 12, 5)), jnp.float32)
    expected = np.stack([search(a, b, "reference")[0] for a, b in zip(x, codebook, strict=True)])

    def scanned(x, codebook):
        return jax.lax.scan(lambda _, pair: (None, search(*pair)), None, (x, codebook))[1]

    entry = SUITES["nearest_code"].implementations()["gpu"]
    with testing.interpreted_elsewhere(entry):
        for run in (jax.vmap(search), scanned):
            np.testing.assert_array_equal(jax.jit(run)(x, codebook)[0], expected)


def test_under_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.shard_map(
        search, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P("data"))
    )
    x, codebook = jnp.zeros((128, 32)), jnp.zeros((64, 32))
    with dispatch.any_platform():
        text = jax.jit(run).trace(x, codebook).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


# Processors, so that one has several blocks.
FEW = {"decode_attention": 4, "nearest_code": 2, "quantized_linear": 4}


@interpreted
@pytest.mark.parametrize("op", FEW)
def test_with_few_blocks_of_threads(op, monkeypatch):
    monkeypatch.setattr(gpu, "PROCESSORS", FEW[op])
    assert testing.check(SUITES[op], case_of(op, SMALL[op]), "gpu") is None


MISTAKES = [
    # op, the line, and what it is changed to
    ("nearest_code", "better = scores < least", "better = scores <= least"),
    ("nearest_code", "code = tile * _TILE +", "code = tile * 2 * _ROWS +"),
    ("decode_attention", "(columns <= own)", "(columns < own)"),
    ("decode_attention", "first = first + split * share", "pass"),
    ("decode_attention", "mass * shrink", "mass"),
    ("diffusion_step", "ids = first + jax", "ids = jax"),
    ("diffusion_step", "jnp.maximum(clean, -most)", "clean"),
    ("group_norm_silu", "jnp.where(is_there, square, 0)", "square"),
    ("group_norm_silu", "self.group + i * _GROUPS", "self.group"),
    ("group_norm_silu", "level - own * slope", "level"),
    ("mask_scores", "jnp.where(ids >= i * size, ", "jnp.where(ids >= 0, "),
    ("mask_scores", "jnp.uint32(vocabulary)", "jnp.uint32(vocabulary + 1)"),
    ("quantized_linear", "(-channels % _CHANNELS if", "(0 if"),
    ("quantized_linear", "first = split_ * each", "first = split_"),
    ("quantized_linear", "block * _CHANNELS, weight.shape[0] - _CHANNELS", "0, 0"),
    ("sample_token", "ids = first + jax", "ids = jax"),
]


@interpreted
@pytest.mark.parametrize(("op", "line", "mistake"), MISTAKES)
def test_a_planted_mistake_is_caught(op, line, mistake, plant, monkeypatch):
    suite = SUITES[op]
    monkeypatch.setattr(gpu, "PROCESSORS", FEW.get(op, gpu.PROCESSORS))
    plant(suite.implementations()["gpu"], line, mistake)
    with pytest.raises(AssertionError, match=r"not as defined|not the reference|gradient"):
        testing.check(suite, case_of(op, SMALL[op]), "gpu")


@pytest.mark.parametrize(
    ("platform", "capability", "reason"),
    [
        ("cuda", "9.0", None),
        ("cuda", "8.0", "needs a GPU of compute capability 9.0 (Hopper), not 8.0"),
        ("cuda", "10.0", "needs a GPU of compute capability 9.0 (Hopper), not 10.0"),
        ("cpu", None, None),
    ],
)
def test_gpus_of_other_kinds_are_refused(platform, capability, reason, monkeypatch):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(gpu, "platform", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert gpu.unfit() == reason


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: search(jnp.zeros((8, 400)), jnp.zeros((8, 400))),
            "has no room for vectors of 400",
        ),
        (
            lambda: kernels.sample_logits(
                jnp.zeros((1, 60_000)), jax.random.split(jax.random.key(0), 1), implementation="gpu"
            ),
            "has room for 57,344 tokens, not 60,000",
        ),
        (
            lambda: kernels.group_norm_silu(
                jnp.zeros((1, 64, 64, 256)),
                jnp.zeros(256),
                jnp.zeros(256),
                groups=32,
                implementation="gpu",
            ),
            "has no room for 4,096 positions of 8 channels of float32, and as many cotangents",
        ),
    ],
)
def test_what_does_not_fit_on_the_chip_is_refused(run, message):
    with dispatch.any_platform(), pytest.raises(dispatch.Refusal, match=message):
        run()
