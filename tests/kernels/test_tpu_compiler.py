"""Programs for TPUs that are not there, by their real compiler: kernels, loops, estimates."""

import collections
import dataclasses
import functools
import importlib.metadata
import json
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import kernels
from experiments.benchmarks import absent_tpu
from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.models.autoregressive import (
    AutoregressiveModel,
    AutoregressiveSampler,
    SamplingOptions,
)
from gen_jax.models.diffusion import DiffusionModel, DiffusionSampler
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.solvers import DDIM
from gen_jax.models.masked import MaskedModel, MaskGIT
from gen_jax.models.two_stage import TwoStageSampler
from gen_jax.models.vq import make_autoencoder
from gen_jax.models.vq.config import AutoencoderOptions, CodebookOptions
from gen_jax.nn.config import AutoencoderConfig, TransformerConfig, UNetConfig
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.nn.unet import UNetNetwork
from kernels import dispatch, estimate, testing
from kernels.machine.chips import CHIPS
from kernels.machine.compiling import Workshop, missing

WHY_NOT = missing()
if WHY_NOT is None and os.environ.get("JAX_PLATFORMS") != "cpu":
    WHY_NOT = "libtpu is for programs of absent TPUs alone where JAX_PLATFORMS=cpu is set"
pytestmark = [pytest.mark.tpu_compiler, pytest.mark.skipif(bool(WHY_NOT), reason=str(WHY_NOT))]
if not WHY_NOT:
    Workshop.open()  # before anything else loads libtpu
SUITES = {op: suite for op, suite in testing.suites().items() if suite.estimated_for("tpu")}
FIRST = [(op, suite.estimated[0]) for op, suite in SUITES.items()]
V5E, V6E = CHIPS["v5e"], CHIPS["v6e"]


@pytest.fixture(scope="module")
def workshop():
    return Workshop.open()


@functools.cache
def compiled(op, case, chip):
    """The program of a kernel, which takes seconds to be counted."""
    with dispatch.any_platform():
        return estimate.compiled(SUITES[op], case, "tpu", chip)


def product(x, y, *, rows, depth, columns):
    """The matrix product of the documentation of JAX, in blocks."""

    def body(x, y, z, total):
        @pl.when(pl.program_id(2) == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        total[...] += jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            z[...] = total[...].astype(z.dtype)

    grid = x.shape[0] // rows, y.shape[1] // columns, x.shape[1] // depth
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], y.shape[1]), x.dtype),
        grid=grid,
        in_specs=[
            pl.BlockSpec((rows, depth), lambda i, j, k: (i, k)),
            pl.BlockSpec((depth, columns), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
    )(x, y)


SMALL = functools.partial(product, rows=128, depth=128, columns=128)
LARGE = functools.partial(product, rows=512, depth=1024, columns=1024)


@pytest.mark.parametrize(
    ("function", "size", "timed"),
    [
        (jnp.matmul, 1024, 119.4),
        (jnp.matmul, 4096, 827.3),
        (SMALL, 1024, 297.7),
        (LARGE, 1024, 127.1),
        (LARGE, 4096, 889.1),
    ],
    ids=["XLA 1024", "XLA 4096", "128 1024", "512 1024", "512 4096"],
)
def test_cycles_are_those_that_were_timed_on_a_v5e(workshop, function, size, timed):
    """Against docs/pallas/tpu/matmul of JAX, in us, where 105 us of dispatch are in them."""
    operand = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    program = workshop.compile(function, operand, operand, chip=V5E)
    assert V5E.microseconds(program.cycles) + 105 == pytest.approx(timed, rel=0.06)
    assert not program.unknown


@pytest.mark.parametrize("chip", CHIPS.values(), ids=str)
@pytest.mark.parametrize(("op", "case"), FIRST, ids=[op for op, _ in FIRST])
def test_a_kernel_fits_and_does_not_spill_or_copy(op, case, chip):
    program = compiled(op, case, chip)
    assert 'custom_call_target="tpu_custom_call"' in program.text
    assert op in program.walks or any(name.startswith(f"{op}.") for name in program.walks)
    # Registers that go to memory in under one of ten bundles; no arrays beside the arguments.
    assert program.spills < program.total("bundles") / 10
    assert program.temporaries < 1 << 20
    # Moved are the arguments and results, and the codebook again for each block of vectors.
    moved = program.arguments + program.results
    assert program.hbm_bytes < 1.6 * moved + (1 << 20)
    if case.donated:
        assert program.aliased > 0.9 * program.results


def test_the_reference_compares_codes_in_float32(workshop):
    """XLA:TPU keeps the minimum of an arg-min in bfloat16 where nobody reads it."""
    x, codes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1024, 32), (16384, 32)))

    def minima(function):
        text = workshop.compile(function, x, codes, chip=V5E, count=False).text
        return re.findall(r"= \(([a-z0-9]+)\[[^=]*?\) reduce\(", text)

    def index_alone(x, codes):
        product = jnp.dot(x, codes.T, precision="highest")
        return jnp.argmin((codes**2).sum(1)[None] - 2 * product, axis=1)

    def index(x, codes):
        return kernels.nearest_code(x, codes, implementation="reference")[0]

    assert "bf16" in minima(index_alone)
    found = minima(index)
    assert found
    assert set(found) <= {"f32", "s32"}


def test_a_default_is_the_kernel_on_a_tpu_alone():
    logits = jax.ShapeDtypeStruct((8, 1000), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    traced = jax.jit(functools.partial(kernels.sample_logits, top_k=5)).trace(logits, keys)
    for platform, calls in (("tpu", 1), ("cpu", 0), ("cuda", 0)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("tpu_custom_call") == calls, platform


@pytest.mark.parametrize(
    ("batch", "kernel", "number"), [(8, "decode_layers", 1), (16, "decode_attention", 12)]
)
@pytest.mark.parametrize("chip", CHIPS.values(), ids=str)
def test_a_step_of_decoding_holds_the_kernels_and_no_copy_of_a_cache(chip, batch, kernel, number):
    step = absent_tpu.gpt2(batch)
    program = absent_tpu.compiled(step, chip.name)
    calls = collections.Counter()
    for name, times in program.calls.items():
        calls[name.split(".")[0]] += times
    assert {name: calls[name] for name in calls if name.startswith("decode")} == {kernel: number}
    assert calls["sample_token"] == 1
    assert not program.strange
    caches = batch * 12 * 2 * 768 * 1024 * 2
    assert program.aliased >= caches
    shapes = rf"{batch},(?:12,64,1024|12,1024,64|768,1024)"
    assert not re.findall(rf"= bf16\[{shapes}\]\S* copy\(", program.text)


def test_a_whole_loop_on_four_chips(workshop):
    """Every device decodes its share of the batch in one loop, and keeps its caches in place."""
    config = TransformerConfig(
        vocabulary=512, context=256, layers=2, width=256, heads=4, dtype="bfloat16"
    )
    model = AutoregressiveModel(TokenNetwork(config))
    sampler = AutoregressiveSampler(model, 1, 256, SamplingOptions(top_k=20))
    mesh = jax.sharding.Mesh(workshop.devices(V5E, 4), "data")
    each, every = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (["data"], [])
    )
    params = jax.eval_shape(model.network.init, jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 16))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(every.spec, each.spec),
        out_specs=each.spec,
        check_vma=False,  # as in gen_jax.sampling
    )
    def generate(params, keys):
        prompt = Condition(prompt=jnp.zeros((keys.shape[0], 1), jnp.int32))
        params = sampler.prepare(params)
        state = sampler.init(params, keys, prompt)
        state = jax.lax.fori_loop(0, 256, lambda i, s: sampler.step(params, s, i), state)
        return sampler.finish(params, state)

    def placed(tree, sharding):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    program = workshop.compile(
        generate, placed(params, every), placed(keys, each), chip=V5E, count=False
    )
    assert len(re.findall(r"\bwhile\(", program.text)) == 1
    # The names of the calls: the text also names the files of the source.
    calls = re.findall(r"%(decode_\w+)\S* = .*tpu_custom_call", program.text)
    assert set(calls) == {"decode_layers"}
    assert not re.findall(r"= bf16\[4,(?:4,64,256|4,256,64|256,256)\]\S* copy\(", program.text)
    assert not re.findall(r"all-(?:reduce|gather)", program.text)


CODES = dataclasses.replace(absent_tpu.CODES, layers=2, width=256, heads=4)  # compiled sooner


def autoencoder():
    """Images of 32 x 32 pixels as 16 x 16 codes out of 1,024."""
    sizes = AutoencoderConfig(
        widths=(64,), blocks=1, patch=2, middle_attention=False, dtype="bfloat16"
    )
    parts = sizes, CodebookOptions(codes=1024, width=32), AutoencoderOptions()
    return make_autoencoder(*parts, (32, 32, 3))


def masked_loop():
    model = MaskedModel(TokenNetwork(dataclasses.replace(CODES, causal=False)))
    return MaskGIT(model, 256, 8), model.init


def diffusion_loop():
    network = UNetNetwork(UNetConfig(widths=(64,), blocks=1, dropout=0.0, dtype="bfloat16"))
    model = DiffusionModel(network, DiffusionConfig(), (32, 32, 3))
    return DiffusionSampler(model, DDIM(steps=50)), model.init


def two_stage_loop():
    model, coder = AutoregressiveModel(TokenNetwork(CODES)), autoencoder()
    sampler = TwoStageSampler(AutoregressiveSampler(model, 0, 256), coder)
    return sampler, lambda key: {"prior": model.init(key), "autoencoder": coder.init(key)}


@pytest.mark.parametrize(
    ("loop", "kernels_in_it", "loops"),
    [
        (masked_loop, {"mask_scores"}, 2),  # the counts of each round are found in another
        (diffusion_loop, set(), 1),  # on TPUs XLA's own program is the default: nothing beats it
        (two_stage_loop, {"decode_attention"}, 1),
    ],
)
@pytest.mark.parametrize(
    ("chip", "number"),
    [(V5E, 1), pytest.param(V6E, 4, marks=pytest.mark.slow)],
    ids=["v5e", "four of v6e"],
)
def test_what_samples_many_is_one_program(
    loop, kernels_in_it, loops, chip, number, workshop, unchecked_types
):
    """As `generate_many` compiles it, for 16 samples a chip; of keys there are only the shapes."""
    sampler, init = loop()
    mesh = jax.sharding.Mesh(workshop.devices(chip, number), "data")
    params = jax.eval_shape(lambda key: sampler.prepare(init(key)), jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 16 * number))
    program = sampling.compile_generate(sampler, params, keys, mesh=mesh)
    text = program.as_text()
    calls = re.findall(r"%([a-z_]+?)(?:\.\d+)? = .*tpu_custom_call", text)
    assert set(calls) == kernels_in_it
    assert len(re.findall(r"\bwhile\(", text)) == loops
    assert not re.findall(r"all-(?:reduce|gather)|all-to-all|collective-permute", text)
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 64 << 20


@pytest.mark.parametrize("chip", [V5E, pytest.param(V6E, marks=pytest.mark.slow)], ids=str)
def test_images_are_encoded_by_the_kernel(chip, workshop):
    """What an autoencoder makes of 64 images, and images of their codes."""
    coder = autoencoder()
    params = jax.eval_shape(lambda key: coder.prepare(coder.init(key)), jax.random.key(0))
    images = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32)
    codes = jax.ShapeDtypeStruct((64, 16, 16), jnp.int32)

    def encode(params, images):
        return coder.encode(params, images).code

    def decode(params, codes):
        return coder.decode_code(params, codes)

    encoded = workshop.compile(encode, params, images, chip=chip, count=False).text
    assert len(re.findall(r"%nearest_code\S* = .*tpu_custom_call", encoded)) == 1
    assert not re.findall(r"\[16384,1024\]", encoded), "a distance to each entry is in memory"
    decoded = workshop.compile(decode, params, codes, chip=chip, count=False).text
    assert "tpu_custom_call" not in decoded


def whole_loop(sampler, batch):
    """A function of parameters and keys, and the shapes of both."""

    def generate(params, keys):
        prompt = Condition(prompt=jnp.zeros((batch, sampler.prompt_length), jnp.int32))
        params = sampler.prepare(params)
        state = sampler.init(params, keys, prompt)
        return jax.lax.fori_loop(0, sampler.steps, lambda i, s: sampler.step(params, s, i), state)

    params = jax.eval_shape(sampler.model.network.init, jax.random.key(0))
    return generate, params, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))


def test_a_loop_keeps_no_cache_on_the_chip(workshop):
    """Else XLA has room for some, and copies them to memory and back at every step."""
    config = TransformerConfig(vocabulary=50257, dtype="bfloat16")
    model = AutoregressiveModel(TokenNetwork(config))
    sampler = AutoregressiveSampler(model, 16, 1009, SamplingOptions(top_k=50))
    text = workshop.compile(*whole_loop(sampler, 1), chip=V5E, count=False).text
    loop, _ = text.split("\nENTRY ")
    assert re.search(r"%decode_layers\S* = .*tpu_custom_call", loop)
    moved = re.findall(r"= \(?bf16\[([\d,]+)\]\S* .*copy(?:-start)?\(", loop)
    assert not {"1,12,64,1024", "1,12,1024,64", "1,768,1024"} & set(moved)


@pytest.mark.parametrize("batch", [1, 64])
def test_weights_in_int8_are_int8_in_the_loop(batch, workshop):
    """What a step reads is what saves its time: no copy in another type is made before the loop."""
    config = TransformerConfig(
        vocabulary=512, context=256, layers=1, width=256, heads=4, dtype="bfloat16"
    )
    model = AutoregressiveModel(TokenNetwork(config))
    sampler = AutoregressiveSampler(model, 1, 256, SamplingOptions(top_k=20, weights="int8"))
    text = workshop.compile(*whole_loop(sampler, batch), chip=V5E, count=False).text
    (carried,) = re.findall(r"= \((.*)\) while\(", text)
    found = collections.Counter(re.findall(r"(\w+)\[(?:768|1024|512|256),(?:256|1024)\]", carried))
    # The matrices of a block and the head; the tables of tokens and of positions.
    assert found == {"s8": 4 + 1, "bf16": 2}


def test_stored_cycles_are_not_exceeded(capsys):
    """Of every kernel, case and chip; for the version of libtpu that they were counted with."""
    stored = json.loads(estimate.BUDGETS.read_text(encoding="utf-8"))
    version = importlib.metadata.version("libtpu")
    assert stored["libtpu"] == version, "the extra `tpu` pins the version of the figures"
    cycles = {}
    for op, suite in SUITES.items():
        for case in suite.estimated:
            for chip in CHIPS.values():
                cycles[f"{op}, {case}, tpu, {chip}"] = compiled(op, case, chip).cycles
    assert not estimate.exceeded(cycles, stored["cycles"])
    assert set(stored["cycles"]) == set(cycles), "figures of cases that are no more"


KERNELS = {op: suite for op, suite in testing.suites().items() if "tpu" in suite.implementations()}
CASES = [(op, case) for op, suite in KERNELS.items() for case in suite.cases]


@pytest.mark.parametrize(("op", "case"), CASES, ids=[f"{op}: {case}" for op, case in CASES])
def test_a_kernel_takes_every_shape_that_it_does_not_refuse(op, case, workshop):
    run = functools.partial(KERNELS[op].call, implementation="tpu", **case.options)
    arrays, rest = dispatch.split_static(case.arguments(0))

    def program(*arrays):
        return run(*dispatch.fill_static(arrays, rest))

    with dispatch.any_platform():
        try:
            made = workshop.compile(program, *arrays, chip=V5E, count=False)
        except dispatch.Refusal:
            return
    assert "tpu_custom_call" in made.text
