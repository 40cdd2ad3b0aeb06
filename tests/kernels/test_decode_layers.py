"""decode_layers: what is refused, and what is read of the caches. Values are in its cases."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import kernels
from kernels import dispatch, testing
from kernels.decode_layers.cases import example

ENTRY = dispatch.operations()["decode_layers"].implementations()["tpu"]


def shapes(**sizes):
    return jax.eval_shape(functools.partial(example, 0, **sizes))


def reason(heads=4, **sizes):
    arguments = (*shapes(layers=1, heads=heads, **sizes), 0, None)
    return ENTRY.refusal(*arguments, heads=heads, epsilon=1e-5, window=0)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, None),
        ({"batch": 8}, None),
        ({"batch": 9}, "takes at most 8 rows, not 9"),
        ({"dtype": "float16"}, "takes all in float32 or all in bfloat16, not float16"),
        ({"heads": 32}, "needs heads of a multiple of 8, not 4"),
        ({"width": 96}, "needs a multiple of 128 as width, not 96"),
        ({"inner": 200}, "needs a multiple of 128 as inner width, not 200"),
        ({"length": 200}, "needs a multiple of 128 as cache length, not 200"),
        ({"width": 1664, "heads": 8, "inner": 4096, "length": 2048}, "has room for 112 MB"),
    ],
)
def test_what_the_kernel_takes(sizes, expected):
    found = reason(**sizes)
    assert found == expected or found.startswith(expected)


def test_heads_that_share_keys_and_mixed_types_are_refused():
    x, weights, vectors, caches = shapes(layers=1)
    options = {"heads": 8, "epsilon": 1e-5, "window": 0}
    found = ENTRY.refusal(x, weights, vectors, caches, 0, None, **options)
    assert found == "needs heads that make up the width, not 4 of 32 for 8"
    other = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    found = ENTRY.refusal(other, weights, vectors, caches, 0, None, **options)
    assert found == "takes all in float32 or all in bfloat16, not bfloat16 and float32"


def test_the_memory_is_that_of_the_tpu_which_is_there(monkeypatch):
    """GPT-2 small fits into the 128 MB of a v5e, and not everywhere."""
    sizes = {"width": 768, "heads": 12, "inner": 3072, "length": 1024, "dtype": "bfloat16"}
    assert reason(**sizes) is None
    monkeypatch.setattr(sys.modules[ENTRY.run.__module__], "platform", lambda: "tpu")
    small = types.SimpleNamespace(vmem_capacity_bytes=32 << 20)
    monkeypatch.setattr(pltpu, "get_tpu_info", lambda: small)
    assert reason(**sizes).startswith("has room for 16 MB on the chip, and two layers need 39")


def test_what_does_not_go_together_is_refused():
    x, weights, vectors, caches = example(0, layers=2)
    run = functools.partial(kernels.decode_layers, x, heads=4)
    with pytest.raises(ValueError, match="weights of 1, vectors of 2 and caches of 2 layers"):
        run(weights[:1], vectors, caches, 0)
    with pytest.raises(ValueError, match="vectors have 384 columns here, not 256"):
        run(weights, vectors[:, :, :256], caches, 0)
    with pytest.raises(ValueError, match="column 128 does not fit into caches of 128"):
        run(weights, vectors, caches, 128)


def test_blocks_that_a_row_does_not_see_are_not_read():
    """Columns of other blocks are NaN, and would be in all that they are multiplied with."""
    arguments = example(3, layers=1, length=384, inner=128)
    x, weights, vectors, caches = arguments
    hidden = (jnp.arange(384) < 128) | (jnp.arange(384) >= 256)
    poisoned = (
        kernels.KVCache(
            jnp.where(hidden[None, None, None], jnp.nan, caches[0].keys),
            jnp.where(hidden[None, None, :, None], jnp.nan, caches[0].values),
        ),
    )
    column, first = jnp.asarray([200, 255]), jnp.asarray([130, 128])

    @jax.jit
    def step(caches):
        call = functools.partial(kernels.decode_layers, heads=4, implementation="tpu")
        return call(x, weights, vectors, caches, column, first)

    with testing.interpreted_elsewhere(ENTRY):
        (clean, _), (out, _) = step(caches), step(poisoned)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out, clean)
