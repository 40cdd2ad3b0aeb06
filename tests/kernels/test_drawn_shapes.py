"""Every operation at drawn shapes, types and values: all implementations compute the same.

`kernels.testing.check` compares them with the definition and with the reference, as it does for
the cases that somebody thought of. Kernels of other platforms are interpreted where they are
marked `slow`, and run where there is an accelerator (marked `gpu`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import testing
from kernels.conv_3x3.cases import example as features
from kernels.decode_attention.cases import example as attention
from kernels.decode_layers.cases import example as transformer
from kernels.diffusion_step.cases import example as step
from kernels.group_norm_silu.cases import example as channels
from kernels.mask_scores.cases import example as positions
from kernels.nearest_code.cases import example as codes
from kernels.quantized_linear.cases import example as quantized
from kernels.sample_token.cases import rows

SUITES = testing.suites()
SEEDS = st.integers(0, 2**32 - 1)
TYPES = st.sampled_from(["float32", "bfloat16"])
# No rational numbers of few tokens: what is on an edge may be rounded to either side.
CHOICES = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0, 0.6, 1.0, 2.3]),
        "top_k": st.integers(0, 12),
        "top_p": st.sampled_from([1.0, 0.5137, 0.9379]),
        "min_p": st.sampled_from([0.0, 0.2171]),
    }
)


def upto(most, least=1):
    return st.integers(least, most)


def case(arguments, seed, options=None, **rest):
    """What makes the case: not in a strategy, where nothing may be random, as beartype is."""
    return functools.partial(
        testing.Case, "drawn", lambda _: arguments(seed=seed), options or {}, **rest
    )


@st.composite
def convolutions(draw, prepared=True):
    shape = [draw(upto(most)) for most in (3, 9, 9, 9, 9)]
    dtype = draw(TYPES)
    read = {"read": True} if prepared and dtype == "float32" and draw(st.booleans()) else {}
    arguments = functools.partial(features, *shape, dtype=dtype, **read)
    gradient = () if read else draw(st.sampled_from([(), (0, 1)]))
    atol = 4e-5 if dtype == "float32" else 0.06
    return case(arguments, draw(SEEDS), atol=atol, dtype=dtype, gradient=gradient)


@st.composite
def attentions(draw):
    batch, new, dtype, causal = draw(upto(3)), draw(upto(3)), draw(TYPES), draw(st.booleans())
    kv_heads, length = draw(upto(3)), draw(upto(140, new))
    columns = draw(st.lists(upto(length - new, 0), min_size=batch, max_size=batch))
    first = draw(st.none() | st.just([draw(upto(column, 0)) for column in columns]))
    if draw(st.booleans()):
        column, least = jnp.int32(columns[0]), [columns[0]] * batch
    else:
        column, least = jnp.asarray(columns, jnp.int32), columns
    if first is not None:
        first = jnp.asarray(np.minimum(first, least), jnp.int32)
    shape = {"batch": batch, "new": new, "kv_heads": kv_heads, "heads": kv_heads * draw(upto(3))}
    shape |= {"width": 8 * draw(upto(3)), "length": length, "dtype": dtype}
    options = {"causal": causal, "window": draw(upto(length, 0)) if causal else 0}
    atol = (4e-5 if dtype == "float32" else 0.06, 0.0)
    return case(
        lambda seed: (*attention(seed, **shape), column, first),
        draw(SEEDS),
        options,
        atol=atol,
        dtype=dtype,
    )


@st.composite
def transformers(draw):
    batch, heads, length, dtype = draw(upto(3)), draw(upto(4)), draw(upto(140)), draw(TYPES)
    shape = {"batch": batch, "heads": heads, "width": heads * draw(upto(9)), "length": length}
    if draw(st.booleans()):  # what fills registers, as the kernel wants it
        shape |= {"width": 128, "heads": 2**heads, "length": 128 * draw(upto(3))}
    columns = draw(st.lists(upto(shape["length"] - 1, 0), min_size=batch, max_size=batch))
    first = jnp.asarray([draw(upto(column, 0)) for column in columns], jnp.int32)
    shape |= {"layers": draw(upto(3)), "inner": 128 * draw(upto(4)), "bias": draw(st.booleans())}
    options = {"heads": shape["heads"], "epsilon": 1e-3, "window": draw(upto(length, 0))}
    return case(
        lambda seed: (*transformer(seed, dtype=dtype, **shape), jnp.asarray(columns), first),
        draw(SEEDS),
        options,
        atol=5e-4 if dtype == "float32" else 0.4,
        dtype=dtype,
    )


@st.composite
def steps(draw):
    shape = draw(st.lists(upto(9), min_size=1, max_size=4).map(tuple))
    parts = draw(st.sets(st.sampled_from(["noise", "history", "traced"])))
    options = draw(st.sampled_from([{}, {"clip": 0.5}]))
    arguments = functools.partial(step, shape, sorted(parts))
    return case(arguments, draw(SEEDS), options, atol=4e-6, rtol=1e-6)


@st.composite
def norms(draw):
    groups, dtype, dims = draw(upto(6)), draw(TYPES), draw(st.lists(upto(6), max_size=2))
    shape = draw(upto(3)), *dims, 4, groups * draw(upto(5, 4))
    options = {"groups": groups, "silu": draw(st.booleans())}
    options["epsilon"] = draw(st.sampled_from([1e-6, 1e-3, 0.5]))
    arguments = functools.partial(
        channels, shape, dtype=dtype, offset=draw(st.sampled_from([0.0, 3.0]))
    )
    gradient = draw(st.sampled_from([(), (0, 1, 2)])) if dtype == "float32" else ()
    atol = 1e-4 if dtype == "float32" else 0.08
    return case(
        arguments, draw(SEEDS), options, atol=atol, rtol=1e-4, dtype=dtype, gradient=gradient
    )


@st.composite
def confidences(draw):
    values = [-np.inf, -3e38, -1.0, -1e-20, -0.0, 0.0, 1e-20, 1.0, 1.0000001, np.inf]
    shape = draw(upto(5)), draw(upto(150))

    def arguments(seed):
        generator = np.random.default_rng(seed)
        count = generator.integers(-1, shape[1] + 2, shape[0])
        return jnp.asarray(generator.choice(values, shape), jnp.float32), jnp.asarray(count)

    return case(arguments, draw(SEEDS))


@st.composite
def scores(draw):
    shape = {"batch": draw(upto(3)), "length": draw(upto(9)), "vocabulary": draw(upto(200))}
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    options = {"temperature": draw(CHOICES)["temperature"]}
    options["noise"] = draw(st.sampled_from([0.0, 1.5]))
    arguments = functools.partial(positions, dtype=dtype, **shape)
    return case(arguments, draw(SEEDS), options, atol=4e-6, rtol=2e-6)


@st.composite
def codebooks(draw, shortlist=None):
    copies, width, dtype = draw(upto(3)), draw(upto(9, 3)), draw(TYPES)
    number, entries = draw(upto(700)), copies * draw(upto(500))
    options = {} if shortlist is None else {"shortlist": draw(shortlist)}
    arguments = functools.partial(codes, number, entries, width, dtype=dtype, copies=copies)
    gradient = draw(st.sampled_from([(), (0, 1)])) if dtype == "float32" else ()
    return case(arguments, draw(SEEDS), options, atol=(0.0, 1e-4), gradient=gradient)


@st.composite
def products(draw):
    dtype = draw(TYPES)
    arguments = functools.partial(quantized, *(draw(upto(most)) for most in (20, 150, 300)))
    gradient = draw(st.sampled_from([(), (0,)])) if dtype == "float32" else ()
    return case(
        functools.partial(arguments, dtype=dtype),
        draw(SEEDS),
        atol=3e-5,
        rtol=3e-5,
        gradient=gradient,
    )


@st.composite
def logits(draw):
    vocabulary, number = draw(upto(300)), draw(upto(20))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))

    def arguments(seed):
        found = jnp.asarray(rows(vocabulary, number, seed), dtype)
        return found, jax.random.split(jax.random.key(seed), len(found))

    return case(arguments, draw(SEEDS), draw(CHOICES))


@st.composite
def heads(draw):
    batch, width, vocabulary, dtype = draw(upto(20)), draw(upto(40)), draw(upto(300)), draw(TYPES)

    def arguments(seed):
        generator = np.random.default_rng(seed)
        hidden = jnp.asarray(generator.normal(size=(batch, width)), jnp.float32)
        head = jnp.asarray(3 * generator.normal(size=(width, vocabulary)) / width, dtype)
        return hidden, head, jax.random.split(jax.random.key(seed), batch)

    return case(arguments, draw(SEEDS), draw(CHOICES))


DRAWN = {
    "conv_3x3": convolutions(),
    "decode_attention": attentions(),
    "decode_layers": transformers(),
    "diffusion_step": steps(),
    "group_norm_silu": norms(),
    "keep_most_confident": confidences(),
    "mask_scores": scores(),
    "nearest_code": codebooks(),
    "quantized_linear": products(),
    "sample_logits": logits(),
    "sample_token": heads(),
    "shortlisted_code": codebooks(upto(8, 3)),
    "upsample_conv_3x3": convolutions(prepared=False),
}
every_operation = pytest.mark.parametrize("op", DRAWN)


def test_every_operation_is_drawn():
    assert DRAWN.keys() == SUITES.keys()


def check(op, number, interpreted=False, **options):
    """As many draws, with the implementations that run here, or with all that can be interpreted.

    Where a reference would be compared with nothing, the kernel for TPUs is interpreted anyway.
    """
    suite = SUITES[op]
    able = [name for name, entry in suite.implementations().items() if entry.runs_here]
    if suite.definition is None and able == ["reference"]:
        able.append("tpu")

    @settings(
        max_examples=number,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        **options,
    )
    @given(DRAWN[op])
    def drawn(make):
        case = make()
        for name in suite.implementations() if interpreted else able:
            testing.check(suite, case, name)

    drawn()


@every_operation
def test_a_few_draws(op):
    check(op, 3, derandomize=True, database=None)


@pytest.mark.slow
@every_operation
def test_many_draws_with_interpreted_kernels(op):
    check(op, 30, interpreted=True, print_blob=True)


@pytest.mark.gpu
@every_operation
def test_many_draws_on_an_accelerator(op):
    assert jax.default_backend() != "cpu", "no accelerator: run this on a machine that has one"
    with jax.default_matmul_precision("highest"):
        check(op, 30, print_blob=True)
