"""Kernels for GPUs, compiled for an H100 that is not there (extra `cuda`)."""

import functools

import jax
import jax.numpy as jnp
import pytest

import kernels
from kernels import dispatch, inspection, testing
from kernels.machine import cuda

pytestmark = [
    pytest.mark.cuda_compiler,
    pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing())),
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="programs are compiled on a CPU"),
]
SUITES = {op: s for op, s in testing.suites().items() if "gpu" in s.implementations()}
CASES = [
    pytest.param(suite, case, id=f"{op}: {case}")
    for op, suite in SUITES.items()
    for case in suite.estimated
]
WITH_PRODUCTS = ("decode_attention", "nearest_code", "quantized_linear")
WITH_COPIES = (*WITH_PRODUCTS, "group_norm_silu")


@pytest.mark.parametrize(("suite", "case"), CASES)
def test_every_case_fits_into_registers(suite, case):
    rows = {row["name"]: row for row in inspection.inspect(suite, case)}
    (kernel,) = rows["gpu"]["kernels"]
    assert kernel.name == ("sample_logits" if suite.op == "sample_token" else suite.op)
    assert kernel.spills == 0
    assert kernel.shared <= 227 * 1024
    assert (kernel.instructions.get("HGMMA", 0) > 0) == (suite.op in WITH_PRODUCTS)
    assert (kernel.instructions.get("UTMALDG", 0) > 0) == (suite.op in WITH_COPIES)


def test_nearest_code_keeps_no_scores():
    suite = SUITES["nearest_code"]
    rows = {row["name"]: row for row in inspection.inspect(suite, suite.estimated[0])}
    assert rows["reference"]["temporaries"] > 4e9
    assert rows["gpu"]["temporaries"] < 1e6


@pytest.mark.parametrize("case", SUITES["group_norm_silu"].estimated, ids=str)
def test_the_gradient_of_group_norm_is_one_kernel(case):
    def gradient(implementation):
        def of(x, scale, bias, cotangent):
            run = functools.partial(
                kernels.group_norm_silu, implementation=implementation, **case.options
            )
            return jax.vjp(run, x, scale, bias)[1](cotangent)

        x, *rest = case.arguments(0)
        return cuda.Workshop.open().compile(of, x, *rest, x)

    with dispatch.any_platform():
        ours, plain = gradient("gpu"), gradient("reference")
    (kernel,) = ours.kernels  # statistics are computed anew, and the result is not
    assert kernel.name == "group_norm_silu_gradient"
    assert kernel.spills == 0
    assert kernel.shared <= 227 * 1024
    assert kernel.instructions["UTMALDG"] == 2
    assert ours.launches < plain.launches / 2


def test_mask_scores_keeps_no_noise():
    suite = SUITES["mask_scores"]
    rows = {row["name"]: row for row in inspection.inspect(suite, suite.estimated[0])}
    assert rows["gpu"]["temporaries"] < rows["reference"]["temporaries"] / 500


def test_a_loop_of_kernels_updates_its_cache_in_place():
    batch, heads, width, length = 8, 12, 64, 1024

    def step(carry, _):
        cache, q, column = carry
        q, cache = kernels.decode_attention(q, q, q, cache, column, implementation="gpu")
        return (cache, q, column + 1), None

    def loop(cache, q):
        return jax.lax.scan(step, (cache, q, jnp.int32(0)), None, length=length)[0]

    half = jnp.bfloat16
    cache = kernels.KVCache(
        jax.ShapeDtypeStruct((batch, heads, width, length), half),
        jax.ShapeDtypeStruct((batch, heads, length, width), half),
    )
    q = jax.ShapeDtypeStruct((batch, 1, heads, width), half)
    with dispatch.any_platform():
        program = cuda.Workshop.open().compile(loop, cache, q, donate=(0,))
    assert [kernel.name for kernel in program.kernels] == ["decode_attention"]
    assert program.temporaries < 2 * batch * heads * width * length / 4, "the cache is copied"
