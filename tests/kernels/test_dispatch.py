"""The registry: what is chosen, what is refused, and all that a new implementation gets."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import kernels
from kernels import bench, dispatch, testing

X, OUTPUT = np.random.default_rng(0).normal(size=(2, 2, 8, 128)).astype(np.float32)
COEFFICIENTS = kernels.StepCoefficients(1.5, -0.7, 0.6, 0.3, -0.2, 0.4, 0.9)


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten after it; diffusion_step has the reference alone."""
    for operation in dispatch.operations().values():
        operation.implementations()
    copy = {op: dict(entries) for op, entries in dispatch._REGISTRY.items()}
    copy["diffusion_step"] = {"reference": copy["diffusion_step"]["reference"]}
    monkeypatch.setattr(dispatch, "_REGISTRY", copy)
    monkeypatch.setattr(dispatch, "_OPERATIONS", dict(dispatch._OPERATIONS))


def small_suite(op):
    """Some cases of an operation, so that a bench of them is quick."""
    suite = testing.suites()[op]
    return testing.Suite(op, suite.call, suite.cases[:3], suite.cases[:2], suite.definition)


def register_toy():
    def refusal(x, output, coefficients, *, keys, history, clip):
        return None if history is None else "knows no history"

    @dispatch.register("diffusion_step", "toy", refusal=refusal)
    def toy(x, output, coefficients, *, keys, history, clip):
        c, draw = coefficients, jax.random.normal
        x0 = c.x0_x * x + c.x0_output * output
        x0 = x0 if clip is None else jnp.maximum(jnp.minimum(x0, clip), -clip)
        following = c.next_x0 * x0 + c.next_x * x + c.next_output * output
        if keys is not None:
            following += c.next_noise * jax.vmap(lambda key: draw(key, x.shape[1:]))(keys)
        return following, x0


def test_a_new_implementation_runs_the_cases_or_says_why_not(registry):
    register_toy()
    suite = testing.suites()["diffusion_step"]
    assert tuple(suite.implementations()) == ("reference", "toy")
    reasons = {str(case): testing.check(suite, case, "toy") for case in suite.cases[:3]}
    assert list(reasons.values()) == [None, None, "knows no history"]


def test_a_new_implementation_is_a_row_of_the_bench(registry, monkeypatch, capsys, tmp_path):
    register_toy()
    suites = {"diffusion_step": small_suite("diffusion_step")}
    monkeypatch.setattr(testing, "suites", lambda: suites)
    bench.main(["diffusion_step", "--repeats", "2", "--out", str(tmp_path / "new" / "bench")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "diffusion_step"
    assert sum(" toy " in line for line in lines) == 2
    result = json.loads(lines[-1])
    assert result["jax"] == jax.__version__
    assert result["platform"] == jax.default_backend()
    rows = result["results"]["diffusion_step"][0]["rows"]
    assert [row["name"] for row in rows] == ["reference", "toy"]
    assert all(0 < row["low_ms"] <= row["ms"] <= row["high_ms"] for row in rows)
    written = tmp_path / "new" / "bench"
    assert json.loads((written / "bench.json").read_text()) == result
    assert (written / "bench.txt").read_text().splitlines() == lines[:-1]


def test_the_bench_refuses_a_file_for_a_folder(capsys, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as refused:
        bench.main(["--out", str(tmp_path / "file" / "bench")])
    assert refused.value.code == 2
    assert capsys.readouterr().err.startswith("error: --out")


def test_the_bench_shows_refusals_and_compares_before_it_times(registry):
    register_toy()
    suite = small_suite("diffusion_step")
    row = bench.bench(suite, suite.cases[2], repeats=1)[1]
    assert row == {"name": "toy", "refuses": "knows no history"}

    @dispatch.register("diffusion_step", "wrong")
    def wrong(x, output, coefficients, *, keys, history, clip):
        return x, output

    with pytest.raises(AssertionError, match="wrong"):
        bench.bench(suite, suite.cases[0], repeats=1)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["conv"], "error: there is no operation 'conv'; there are conv_3x3, decode_attention"),
        (["--repeats", "0"], "error: argument --repeats: '0' is not a positive number"),
        (["--repeat"], "error: "),
    ],
)
def test_the_bench_refuses_in_one_line(arguments, line, capsys):
    with pytest.raises(SystemExit) as refused:
        bench.main(arguments)
    assert refused.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(line)
    assert err.count("\n") == 1


def register_pallas():
    def body(x_ref, output_ref, x0_ref, *, a, b):
        x0_ref[...] = a * x_ref[...] + b * output_ref[...]

    @dispatch.register("diffusion_step", "pallas", default_on=("tpu",), only_on=("tpu",))
    def step(x, output, coefficients, *, keys, history, clip):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        a, b = coefficients.x0_x, coefficients.x0_output  # floats: they stay static
        x0 = pl.pallas_call(functools.partial(body, a=a, b=b), out_shape=shape)(x, output)
        c = coefficients
        return c.next_x0 * x0 + c.next_x * x + c.next_output * output, x0


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="it is about other platforms")
def test_a_pallas_kernel_for_tpus(registry):
    register_pallas()

    def step(x, output, implementation=None):
        return kernels.diffusion_step(x, output, COEFFICIENTS, implementation=implementation)

    # The default of one platform alone, when a program is lowered for it.
    traced = jax.jit(step).trace(X, OUTPUT)
    for platform, calls in (("tpu", 1), ("cpu", 0), ("cuda", 0)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("tpu_custom_call") == calls, platform
    # Forced where it cannot run.
    with pytest.raises(NotImplementedError, match="pallas is compiled for tpu only; available: r"):
        step(X, OUTPUT, "pallas")
    with dispatch.any_platform():
        traced = jax.jit(functools.partial(step, implementation="pallas")).trace(X, OUTPUT)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    # Its cases run here all the same, and the bench says why there are no times.
    case = testing.Case("plain", lambda seed: (X, OUTPUT, COEFFICIENTS, None, None), atol=1e-5)
    suite = small_suite("diffusion_step")
    assert testing.check(suite, case, "pallas") is None
    row = bench.bench(suite, case, repeats=1)[1]
    assert row == {"name": "pallas", "refuses": "runs on tpu only"}


def defaults(op, *arguments, **options):
    chosen = dispatch.operations()[op].defaults(*arguments, **options)
    return {platform: entry.name for platform, entry in chosen.items()}


def test_what_the_operations_choose_today():
    x, kernel, prepared = jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2)), jnp.zeros((36, 2, 2))
    sliced = {"default": "reference", "cpu": "sliced"}
    assert defaults("conv_3x3", x, kernel, None) == sliced
    assert defaults("conv_3x3", x.astype("bfloat16"), kernel, None) == {"default": "reference"}
    with_weights = {"default": "reference", "cpu": "winograd"}
    assert defaults("conv_3x3", x, kernel, prepared) == with_weights
    assert defaults("conv_3x3", x[:, 1:], kernel, prepared) == with_weights
    for shape, name in (
        ((2, 2, 2, 2), "dense"),
        ((1, 2, 2, 512), "sliced"),
        ((1, 1, 1, 512), "dense"),
        ((2, 2, 3, 2), "sliced"),
    ):
        features, weights = jnp.zeros(shape), jnp.zeros((3, 3, shape[-1], 512))
        assert defaults("conv_3x3", features, weights, None)["cpu"] == name, shape
    assert defaults("conv_3x3", x[:, :2, :2], kernel, prepared)["cpu"] == "dense"
    assert defaults("upsample_conv_3x3", x, kernel) == {"default": "reference", "cpu": "phases"}
    logits, hidden, head = jnp.zeros((8, 9)), jnp.zeros((8, 4)), jnp.zeros((4, 9))
    for temperature, top_k, name in (
        (1.0, 3, {"default": "indices", "tpu": "tpu"}),
        (1.0, 0, {"default": "reference"}),
        (1.0, 9, {"default": "reference"}),
        (0, 3, {"default": "reference"}),
    ):
        choice = {"temperature": temperature, "top_k": top_k, "top_p": 1.0, "min_p": 0.0}
        assert defaults("sample_logits", logits, None, **choice) == name
        assert defaults("sample_token", hidden, head, None, **choice) == name
    nucleus = {"temperature": 1.0, "top_k": 0, "top_p": 0.5, "min_p": 0.0}
    assert defaults("sample_logits", logits, None, **nucleus)["tpu"] == "tpu"
    assert defaults("sample_logits", logits[1:], None, **nucleus) == {"default": "reference"}
    for shape, name in (((1, 64), "reference"), ((1, 65), "threshold"), ((64, 8), "threshold")):
        assert defaults("keep_most_confident", jnp.zeros(shape), None) == {"default": name}
    for number, name in ((512, "reference"), (513, "blocks")):
        codes = jnp.zeros((number, 2)), jnp.zeros((1024, 2))
        assert defaults("nearest_code", *codes) == {"default": name, "tpu": "tpu"}
    wide = jnp.zeros((2, 400)), jnp.zeros((4, 400))  # six products of 400 fit no block
    assert defaults("nearest_code", *wide) == {"default": "reference"}
    for rows, channels, names in (
        (1, 1024, {"tpu": "tpu"}),
        (63, 1023, {}),
        (128, 1023, {"tpu": "tpu"}),
        (129, 1024, {}),
    ):
        names = {"default": "reference", "cpu": "floats"} | names
        weight = jnp.zeros((channels, 2**14), jnp.int8), jnp.zeros(channels)
        assert defaults("quantized_linear", jnp.zeros((rows, 2**14)), *weight) == names
    for length, new, names in (
        (256, 1, {"default": "buckets", "tpu": "tpu"}),
        (256, 2, {"default": "buckets"}),
        (200, 1, {"default": "buckets"}),
    ):
        token, cache = jnp.zeros((1, new, 2, 8)), kernels.make_kv_cache(1, 2, length, 8)
        arguments = token, token, token, cache, 0, None
        assert defaults("decode_attention", *arguments, window=0, causal=True) == names
    for vocabulary, names in (
        (1024, {"default": "reference", "tpu": "tpu"}),
        (1025, {"default": "reference"}),
    ):
        arguments = jnp.zeros((1, 4, vocabulary)), None, None, None
        assert defaults("mask_scores", *arguments, temperature=1.0, noise=None) == names
    for op in ("diffusion_step", "group_norm_silu"):
        assert defaults(op) == {"default": "reference"}


def new_operation(**backends):
    """An operation that multiplies by a number, each backend by another one."""
    operation = dispatch.Operation("multiply", "kernels.conv_3x3")
    for factor, (name, entry) in enumerate({"reference": {}, **backends}.items(), start=1):
        dispatch.register("multiply", name, **entry)(_times(factor))
    return operation


def _times(factor):
    def multiply(x, size, *, power):
        assert isinstance(size, int)  # numbers stay static in every branch
        return {"y": factor * x[:size] ** power}

    return multiply


def test_a_platform_comes_before_everywhere_and_refused_ones_are_left_out(registry):
    operation = new_operation(
        b={"default_on": dispatch.EVERYWHERE, "refusal": _needs_a_square},
        c={"default_on": ("cuda", "rocm"), "default_when": lambda x, size, power: size > 1},
        d={"default_on": ("cuda", "tpu")},
        e={},
    )
    chosen = operation.defaults(X, 3, power=2)
    names = {platform: entry.name for platform, entry in chosen.items()}
    assert names == {"default": "b", "cuda": "c", "rocm": "c", "tpu": "d"}
    chosen = operation.defaults(X, 1, power=3)
    names = {platform: entry.name for platform, entry in chosen.items()}
    assert names == {"default": "reference", "cuda": "d", "tpu": "d"}
    traced = jax.jit(lambda x: operation(None, x, 3, power=2)).trace(X)
    for platform, factor in (("cpu", 2), ("cuda", 3), ("rocm", 3), ("tpu", 4)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert f"dense<{factor}.000000e+00>" in text
    np.testing.assert_array_equal(operation(None, X, 1, power=3)["y"], X[:1] ** 3)
    with pytest.raises(NotImplementedError, match="multiply: b needs power 2, not 3; available: r"):
        operation("b", X, 1, power=3)
    with pytest.raises(NotImplementedError, match="'f'; known: reference, b, c, d, e"):
        operation("f", X, 1, power=3)


def _needs_a_square(x, size, *, power):
    return None if power == 2 else f"needs power 2, not {power}"


def test_one_choice_for_all_platforms_leaves_no_trace(registry):
    operation = new_operation(b={"default_on": dispatch.EVERYWHERE})
    chosen = jax.make_jaxpr(lambda x: operation(None, x, 3, power=2))(X)
    forced = jax.make_jaxpr(lambda x: operation("b", x, 3, power=2))(X)
    assert str(chosen) == str(forced)
    assert "platform_index" not in str(chosen)


def test_a_caller_may_have_another_reference(registry):
    """It is taken where the reference would be by default, and nowhere else."""
    operation = new_operation(b={"default_on": ("tpu",)})
    run = functools.partial(operation.or_else, lambda x, size, *, power: {"y": 7 * x[:size]})
    np.testing.assert_array_equal(run(X, 2, power=2)["y"], 7 * X[:2])
    np.testing.assert_array_equal(operation(None, X, 2, power=2)["y"], X[:2] ** 2)
    traced = jax.jit(lambda x: run(x, 3, power=2)).trace(X)
    for platform, factor in (("cpu", 7), ("tpu", 2)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert f"dense<{factor}.000000e+00>" in text


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"default_on": ("gpu",)}, "'gpu', which is none of cpu, cuda, rocm, tpu"),
        ({"only_on": ("everywhere",)}, "'everywhere', which is none of"),
        ({"default_on": ("cpu",), "only_on": ("tpu",)}, "the default where it cannot run"),
        ({"default_on": ("everywhere",), "only_on": ("tpu",)}, "the default where it cannot run"),
    ],
)
def test_registrations_that_make_no_sense(registry, entry, message):
    with pytest.raises(ValueError, match=message):
        dispatch.register("diffusion_step", "b", **entry)(lambda x: x)


def test_a_name_is_registered_once(registry):
    with pytest.raises(ValueError, match="diffusion_step has two implementations 'reference'"):
        dispatch.register("diffusion_step", "reference")(lambda x: x)


def test_backends_are_the_files_of_the_folder(registry, tmp_path, monkeypatch):
    folder = tmp_path / "toy_op"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "cases.py").write_text("raise ImportError('not a backend')")
    for name in ("reference", "another"):
        (folder / f"{name}.py").write_text(
            "from kernels.dispatch import register\n\n"
            f"@register('toy_op', '{name}')\ndef run(x):\n    return '{name}', x\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    operation = dispatch.Operation("toy_op", "toy_op")
    assert not any(name.startswith("toy_op") for name in sys.modules)
    assert tuple(operation.implementations()) == ("reference", "another")
    assert operation(None, 1) == ("reference", 1)
    assert operation("another", 1) == ("another", 1)


def test_arrays_and_numbers_are_taken_apart_and_put_together():
    tree = ((X, 3, None, kernels.KVCache(X, OUTPUT)), {"a": np.float32(2), "b": "text"})
    arrays, rest = dispatch.split_static(tree)
    assert len(arrays) == 4
    back = dispatch.fill_static(arrays, rest)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True))
