"""Kernels for TPUs where there is none: races, memory, transformations, and planted mistakes.

What they compute is checked by their cases, in the plain interpret mode of Pallas.
"""

import contextlib
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import kernels
from kernels import dispatch, testing

pytestmark = [
    pytest.mark.skipif(jax.default_backend() == "tpu", reason="it is about the interpret mode"),
    pytest.mark.long,
]
SUITES = {op: s for op, s in testing.suites().items() if "tpu" in s.implementations()}
SMALL = {
    "decode_attention": "384 columns, ragged, window 140",
    "decode_layers": "384 columns",
    "mask_scores": "one position",
    "nearest_code": "ties across blocks",
    "quantized_linear": "blocks of rows",
    "sample_logits": "bfloat16, temperature 0.7, top_k 4",
    "sample_token": "300 tokens",
    "shortlisted_code": "every entry twice",
}


def case_of(op, name):
    return next(case for case in SUITES[op].cases if str(case) == name)


def test_there_is_a_small_case_of_every_kernel():
    assert SMALL.keys() == SUITES.keys()


@contextlib.contextmanager
def strict(mode):
    """Two cores, memory of NaN until it is written, nothing read out of bounds; finds races."""
    interpreter = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    options = pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        dma_execution_mode=mode,
        num_cores_or_threads=2,
    )
    try:
        with dispatch.any_platform(), pltpu.force_tpu_interpret_mode(options):
            yield
        found = interpreter.get_races if hasattr(interpreter, "get_races") else None
        assert not (found() if found else interpreter.races).races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("mode", ["on_wait", "eager"])
@pytest.mark.parametrize("op", SMALL)
def test_without_races_and_within_memory(op, mode):
    suite, case = SUITES[op], case_of(op, SMALL[op])
    arguments = case.arguments(0)
    expected = suite.call(*arguments, implementation="reference", **case.options)
    with strict(mode):
        run, arrays = testing.program(functools.partial(suite.call, implementation="tpu"), case)
        got = jax.block_until_ready(run(*arrays))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float64), np.asarray(other, np.float64), atol=1e-4
        )


def interpreted(function):
    @functools.wraps(function)
    def run(*arguments):
        with dispatch.any_platform(), pltpu.force_tpu_interpret_mode():
            return jax.block_until_ready(function(*arguments))

    return run


def search(x, codebook, implementation="tpu"):
    return kernels.nearest_code(x, codebook, implementation=implementation)


@pytest.fixture
def grids_may_grow(monkeypatch):
    """The interpreter, unlike the compiler, wants a semantics of the axis that vmap adds."""
    params = pltpu.CompilerParams
    monkeypatch.setattr(
        pltpu, "CompilerParams", lambda dimension_semantics, **options: params(**options)
    )
    jax.clear_caches()  # of the same kernel, traced before


def test_under_vmap_scan_and_shard_map(grids_may_grow):
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(8, 16, 5)), jnp.float32)
    codebook = jnp.asarray(generator.normal(size=(8, 12, 5)), jnp.float32)
    expected = [search(a, b, "reference")[0] for a, b in zip(x, codebook, strict=True)]
    mapped = interpreted(jax.jit(jax.vmap(search)))(x, codebook)
    np.testing.assert_array_equal(mapped[0], np.stack(expected))

    def scanned(x, codebook):
        return jax.lax.scan(lambda _, pair: (None, search(*pair)), None, (x, codebook))[1]

    np.testing.assert_array_equal(interpreted(jax.jit(scanned))(x, codebook)[0], mapped[0])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "data")
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(
        jax.vmap(search),
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=(spec, spec),
        check_vma=False,  # the interpreter knows no axes
    )
    np.testing.assert_array_equal(
        interpreted(jax.jit(sharded))(x[:2], codebook[:2])[0], expected[:2]
    )


def test_a_loop_that_owns_its_cache():
    """Tokens one after the other, with the cache as the state of a scan, against all at once."""
    generator = np.random.default_rng(1)
    q, k, v = (jnp.asarray(generator.normal(size=(2, 132, 2, 8)), jnp.float32) for _ in range(3))
    attend = functools.partial(kernels.decode_attention, implementation="reference")
    empty = kernels.make_kv_cache(2, 2, 256, 8)
    whole, filled = attend(q, k, v, empty, 0)
    _, begun = attend(q[:, :124], k[:, :124], v[:, :124], empty, 0)

    def step(cache, token):
        column, *token = token
        token = [x[:, None] for x in token]
        out, cache = kernels.decode_attention(*token, cache, column, implementation="tpu")
        return cache, out[:, 0]

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(cache, q, k, v):
        tokens = jnp.arange(124, 132), *(x[:, 124:].swapaxes(0, 1) for x in (q, k, v))
        return jax.lax.scan(step, cache, tokens)

    cache, out = interpreted(loop)(begun, q, k, v)
    np.testing.assert_allclose(out.swapaxes(0, 1), whole[:, 124:], atol=1e-5)
    for one, other in zip(cache, filled, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("reference", 200_000),
        ("indices", 200_000),
        ("tpu", 10_000),
        pytest.param("tpu", 200_000, marks=pytest.mark.slow),
    ],
)
def test_draws_follow_the_exact_law(name, number):
    """Chi-square of draws with top_k against the probabilities."""
    logits, kept = np.linspace(-1, 1.5, 11).astype(np.float32), 6
    keys = jax.random.split(jax.random.key(3), number)
    run = jax.jit(functools.partial(kernels.sample_logits, top_k=kept, implementation=name))
    drawn = interpreted(run)(jnp.tile(logits, (number, 1)), keys)
    counts = np.bincount(np.asarray(drawn), minlength=11)
    weights = np.where(np.arange(11) >= 11 - kept, np.exp(logits), 0)
    expected = number * weights / weights.sum()
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 20.5  # of 5 degrees of freedom: once in a thousand


MISTAKES = [
    # op, cases that see it, the line, and what it is changed to
    ("nearest_code", "ties of one sublane", "better = ours < least", "better = ours <= least"),
    ("nearest_code", "full precision", "constant_values=jnp.inf", "constant_values=0"),
    ("nearest_code", "full precision", "for _, j in PAIRS]", "for j, _ in PAIRS]"),
    ("nearest_code", "a rest of both", "place[...] * _SUBLANES", "place[...] * _PACKED"),
    ("decode_attention", "384 columns", "(columns < own)", "(columns <= own)"),
    ("decode_attention", "384 columns, ragged", "& (columns >= start)", ""),
    ("decode_attention", "384 columns", "first(b), last + 1", "first(b), last"),
    (
        "decode_attention",
        "384 columns",
        "total[...] = shrink * total[...]",
        "total[...] = total[...]",
    ),
    (
        "decode_attention",
        "384 columns",
        "        for copy in fetched(b, place, slot):\n            copy.wait()\n",
        "",
    ),
    ("decode_attention", "384 columns", "tpu.LANES), 1) == lane", "tpu.LANES), 1) >= lane"),
    ("decode_layers", "384 columns", "@pl.loop(0, layers)", "@pl.loop(0, layers - 1)"),
    ("decode_layers", "384 columns", '    copies.whole("out", slot).wait()\n', ""),
    ("decode_layers", "384 columns", "is_own = lanes == rem(", "is_own = lanes == 1 + rem("),
    ("decode_layers", "384 columns", "self.targets[name][layer]", "self.targets[name][0]"),
    ("decode_layers", "384 columns", "slot, following)", "slot, following - 1)"),
    ("sample_token", "300 tokens", "pl.multiple_of(v * tile, tile)", "0"),
    ("sample_logits", "top_k 3", "top_k - _count(", "top_k + 1 - _count("),
    ("sample_logits", "top_k 3", "(ids <= last)", "(ids < last)"),
    (
        "sample_logits",
        "top_p 0.8",
        "total.sum(axis=1, keepdims=True)",
        "total.max(axis=1, keepdims=True)",
    ),
    (
        "sample_logits",
        "temperature 0.5",
        "ours = ours / temperature",
        "ours = (ours / temperature).astype(jnp.bfloat16).astype(jnp.float32)",
    ),
    ("quantized_linear", "primes beyond blocks", "range(parts)", "range(parts - 1)"),
    ("quantized_linear", "blocks of rows", "lambda r, v: (0, r, 0)", "lambda r, v: (0, 0, 0)"),
    ("quantized_linear", "primes", ") * scale[...]", ")"),
    ("quantized_linear", "one row", "lambda r, v: (0, v)", "lambda r, v: (0, 0)"),
    ("mask_scores", "drawn", "positions * vocabulary + ids", "positions * (vocabulary + 1) + ids"),
    ("mask_scores", "384 positions", "pl.program_id(1) * block + start", "start"),
    (
        "mask_scores",
        "drawn",
        "jnp.log(mass.sum(axis=1, keepdims=True))",
        "jnp.log(mass.max(axis=1, keepdims=True))",
    ),
]


@pytest.mark.parametrize(
    ("op", "name", "line", "mistake"), MISTAKES, ids=[f"{m[0]}: {m[3][:40]}" for m in MISTAKES]
)
def test_a_planted_mistake_is_caught(op, name, line, mistake, plant):
    suite = SUITES[op]
    plant(suite.implementations()["tpu"], line, mistake)
    with pytest.raises(AssertionError, match=r"not as defined|not the reference"):
        testing.check(suite, case_of(op, name), "tpu")
