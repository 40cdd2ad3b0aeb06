"""Cases of mask_scores (temperatures, noise, dtypes) and keep_most_confident (ties, infinities)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.mask_scores import keep_most_confident, mask_scores
from kernels.testing import Case, Suite

__all__ = ["SUITES", "example", "kept_by_sorting"]


def example(
    seed: int,
    batch: int = 24,
    length: int = 10,
    vocabulary: int = 33,
    excluded: float = 0.3,
    dtype: str = "float32",
) -> tuple:
    """Logits with excluded tokens, tokens that no logit stands for, a mask, and keys."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(batch, length, vocabulary)).astype(np.float32)
    logits[generator.random(logits.shape) < excluded] = -np.inf
    logits[..., 0] = 0.1
    tokens = generator.integers(1000, 2000, size=(batch, length)).astype(np.int32)
    masked = generator.random((batch, length)) < 0.6
    arrays = (jnp.asarray(logits, dtype), jnp.asarray(tokens), jnp.asarray(masked))
    return *arrays, jax.random.split(jax.random.key(seed), batch)


def _keyless(seed):
    return *example(seed)[:3], None


def _plain(logits, tokens, masked, keys):
    """What one writes with jax.nn and jax.random."""
    log_probs = jax.nn.log_softmax(logits)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    log_prob = jnp.take_along_axis(log_probs, drawn[..., None], axis=-1)[..., 0]
    return (
        jnp.where(masked, drawn, tokens),
        jnp.where(masked, log_prob, 0),
        jnp.where(masked, log_prob, jnp.inf),
    )


def _confidence(shape, seed):
    """Random rows, rows with ties, and rows with infinities of either sign."""
    generator = np.random.default_rng(seed)
    batch, length = shape
    confidence = 10.0 ** generator.uniform(-30, 30, shape)
    confidence *= generator.choice([-1, 1], shape)
    kind = np.arange(batch)[:, None] % 4
    confidence = np.where(kind == 1, np.round(generator.normal(size=shape)), confidence)
    few = generator.random(shape) < 0.3
    confidence = np.where((kind == 2) & few, np.inf, confidence)
    confidence = np.where((kind == 3) & few, -np.inf, confidence)
    count = generator.integers(0, length + 1, batch)
    count[::8], count[4::8] = 0, length
    count[1::16], count[5::16] = -1, 2**31 - 1
    return jnp.asarray(confidence, jnp.float32), jnp.asarray(count, jnp.int32)


def _known_and_confidence(shape, seed):
    """As a round of decoding has them: what is known is at infinity."""
    generator = np.random.default_rng(seed)
    confidence = np.where(generator.random(shape) < 0.3, np.inf, generator.normal(size=shape))
    count = generator.integers(0, shape[1] + 1, shape[0])
    return jnp.asarray(confidence, jnp.float32), jnp.asarray(count, jnp.int32)


def _one_count(seed):
    return jnp.asarray([[0, 2, 1, 2], [5, 5, 5, -np.inf]], jnp.float32), jnp.int32(3)


def kept_by_sorting(confidence, count) -> np.ndarray:
    """The definition of keep_most_confident: the first `count` in falling order, of each row."""
    confidence = np.asarray(confidence)
    kept = np.zeros(confidence.shape, bool)
    count = np.broadcast_to(count, len(kept))
    for row, values, number in zip(kept, confidence, count, strict=True):
        row[np.lexsort((np.arange(len(values)), -values))[: max(number, 0)]] = True
    return kept


def _scores(name, temperature=1.0, noise=0.0, make=example, large=True, **shape):
    arguments = functools.partial(make, **shape)
    options = {"temperature": temperature, "noise": noise}
    return Case(name, arguments, options, seeds=2, rtol=1e-6, atol=2e-6, large=large)


SUITES = (
    Suite(
        "mask_scores",
        mask_scores,
        cases=(
            _scores("drawn"),
            _scores("drawn with noise", 0.7, 1.5),
            _scores("the most probable", 0, make=_keyless),
            _scores("the most probable with noise", 0, 2.0),
            _scores("bfloat16", 3.0, dtype="bfloat16"),
            _scores("float16", 3.0, dtype="float16"),
            _scores("one position", batch=1, length=1, vocabulary=2, excluded=0.0, large=False),
            _scores(
                "8 positions, 300 tokens", 0.8, 0.5, batch=2, length=4, vocabulary=300, large=False
            ),
            _scores("5 positions, 512 tokens", batch=1, length=5, vocabulary=512, large=False),
            _scores("384 positions", 1.0, 0.5, batch=2, length=384, vocabulary=130),
        ),
        estimated=tuple(
            Case(
                f"{batch} x {length} of {vocabulary} tokens, noise",
                functools.partial(
                    example, batch=batch, length=length, vocabulary=vocabulary, excluded=0.0
                ),
                {"noise": 1.0},
                atol=2e-5,
            )
            for batch, length, vocabulary in ((64, 256, 1024), (1, 256, 1024))
        ),
        timed=tuple(
            Case(
                f"{batch} x {length} of {vocabulary} tokens",
                functools.partial(
                    example, batch=batch, length=length, vocabulary=vocabulary, excluded=0.0
                ),
                atol=1e-5,
            )
            for batch, length, vocabulary in (
                (16, 64, 32),
                (1, 256, 512),
                (16, 64, 1024),
                (4, 64, 8192),
            )
        ),
        peers={"plain": _plain},
    ),
    Suite(
        "keep_most_confident",
        keep_most_confident,
        cases=(
            *(
                Case(f"64 x {length}", functools.partial(_confidence, (64, length)), seeds=2)
                for length in (1, 64, 1000)
            ),
            Case("one count for all rows", _one_count),
        ),
        timed=tuple(
            Case(f"{batch} x {length}", functools.partial(_known_and_confidence, (batch, length)))
            for batch, length in ((1, 64), (1, 256), (64, 64), (64, 256), (16, 1024), (4096, 8))
        ),
        definition=kept_by_sorting,
    ),
)
