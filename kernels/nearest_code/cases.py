"""Cases of nearest_code: ties, blocks with a rest, and the sizes of published codebooks."""

import functools

import jax.numpy as jnp
import numpy as np

from kernels.nearest_code import nearest_code
from kernels.testing import Case, Suite

__all__ = ["SUITES", "example"]


def example(
    number: int, codes: int, width: int, seed: int = 0, dtype: str = "float32", copies: int = 1
) -> tuple:
    """Vectors, and a codebook whose every entry is there `copies` times, so that all are ties.

    Entries are small multiples of 1/4 and vectors are near one of them, so that all scores are
    exact and the nearest entry is known beyond rounding.
    """
    generator = np.random.default_rng(seed)
    distinct = _distinct(generator, codes // copies, width)
    codebook = np.tile(distinct, (copies, 1))
    x = distinct[generator.integers(0, len(distinct), number)]
    x = x + generator.choice([-0.0625, 0.0625], x.shape)
    return jnp.asarray(x, dtype), jnp.asarray(codebook, dtype)


def _distinct(generator, number, width):
    """Different rows of multiples of 1/4."""
    digits = np.arange(number)[:, None] // 16.0 ** np.arange(width)[None] % 16
    return generator.permutation(digits, axis=1) / 4 - 2


def _pairs(number, codes, width, seed):
    """Pairs of near codes of which bfloat16 could not say which is nearer."""
    generator = np.random.default_rng(seed)
    codebook = np.repeat(generator.normal(size=(codes // 2, width)), 2, axis=0)
    codebook += generator.normal(scale=0.05, size=codebook.shape)
    x = codebook[generator.integers(0, codes, number)]
    x = x + generator.normal(scale=0.01, size=x.shape)
    x[0] = 0  # whose scores are all positive: less than any is what should not be there
    return jnp.asarray(x, jnp.float32), jnp.asarray(codebook, jnp.float32)


def _definition(x, codebook):
    x, codebook = np.asarray(x, np.float64), np.asarray(codebook, np.float64)
    squares, found = (codebook**2).sum(1), []
    for rows in np.array_split(x, -(-len(x) // 512)):
        distances = (rows**2).sum(1)[:, None] + squares - 2 * rows @ codebook.T
        found.append((distances.argmin(1), distances.min(1)))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def _shortlisted(x, codebook, *, shortlist):
    """Of cases whose scores are exact in bfloat16 the nearest code is a candidate."""
    return _definition(x, codebook)


def _naive(x, codebook):
    """The formula as it is usually written, with all distances in memory."""
    squares = jnp.square(x).sum(1)[:, None] + jnp.square(codebook).sum(1)[None]
    distances = squares - 2 * x @ codebook.T
    return jnp.argmin(distances, axis=1).astype(jnp.int32), distances.min(axis=1)


def _case(name, *shape, gradient=(), large=False, shortlist=0, **options):
    arguments = functools.partial(example, *shape, **options)
    choice = {"shortlist": shortlist} if shortlist else {}
    return Case(name, arguments, choice, atol=(0.0, 1e-4), gradient=gradient, large=large)


SUITES = (
    Suite(
        "nearest_code",
        nearest_code,
        cases=(
            _case("one of one", 1, 1, 3),
            _case("every entry twice", 37, 24, 5, copies=2),
            _case("ties of one sublane", 40, 32, 5, copies=2),
            _case("ties across blocks", 700, 2 * 1100, 6, copies=2, large=True),
            _case("a rest of both", 1030, 1500, 4, large=True),
            _case("ties across tiles", 200, 2 * 192, 40, copies=2),
            _case("bfloat16", 64, 32, 4, dtype="bfloat16"),
            Case("full precision", functools.partial(_pairs, 500, 200, 9), atol=(0.0, 1e-4)),
            _case("gradients", 20, 18, 6, gradient=(0, 1)),
        ),
        timed=(
            _case("16,384 vectors, 8,192 codes of 64", 16_384, 8192, 64),
            _case("16,384 vectors, 512 codes of 64", 16_384, 512, 64),
            _case("4,096 vectors, 1,024 codes of 256", 4096, 1024, 256),
        ),
        estimated=tuple(
            _case(
                f"65,536 vectors, 16,384 codes of {width}, {dtype}",
                65_536,
                16_384,
                width,
                dtype=dtype,
            )
            for width, dtype in ((32, "bfloat16"), (32, "float32"), (256, "bfloat16"))
        ),
        definition=_definition,
        peers={"naive": _naive},
    ),
    Suite(
        "shortlisted_code",
        nearest_code,
        cases=(
            _case("a code of one", 1, 1, 3, shortlist=8),
            _case("every entry twice", 37, 24, 5, copies=2, shortlist=2),
            _case("ties of one sublane", 40, 32, 5, copies=2, shortlist=1),
            _case("ties across blocks", 700, 2 * 1100, 6, copies=2, shortlist=3),
            _case("bfloat16", 64, 30, 4, dtype="bfloat16", shortlist=4),
            _case("gradients", 20, 18, 6, gradient=(0, 1), shortlist=2),
        ),
        timed=(_case("16,384 vectors, 8,192 codes of 64", 16_384, 8192, 64, shortlist=2),),
        definition=_shortlisted,
    ),
)
