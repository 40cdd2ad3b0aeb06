"""Times one round of decoding masked positions: scores, and the choice of what stays.

    python -m kernels.mask_scores.bench

`mask_scores` beside log_softmax, jax.random.categorical and a gather; the implementations of
`keep_most_confident` beside each other. Results are compared first; medians, interleaved.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import kernels

SCORES = ((16, 64, 32), (1, 256, 512), (16, 64, 1024), (4, 64, 8192))  # (B, L, V)
CHOICES = ((1, 64), (1, 256), (64, 64), (64, 256), (16, 1024), (4096, 8))  # (B, L)


def medians(runs: dict, *arguments, repeats: int = 15) -> dict:
    """Median milliseconds of each of the functions `runs`, compiled before."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            seconds[name].append(time.perf_counter() - began)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def plain_scores(logits, tokens, masked, keys):
    """What `mask_scores` computes without noise, of the functions of jax."""
    log_probs = jax.nn.log_softmax(logits)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    log_prob = jnp.take_along_axis(log_probs, drawn[..., None], axis=-1)[..., 0]
    return (
        jnp.where(masked, drawn, tokens),
        jnp.where(masked, log_prob, 0),
        jnp.where(masked, log_prob, jnp.inf),
    )


def bench_scores(batch: int, length: int, vocabulary: int) -> dict:
    """Median milliseconds of `plain` and `reference`.

    Raises:
      AssertionError: they differ, but for rounding.
    """
    key = jax.random.key(vocabulary)
    logits = jax.random.normal(key, (batch, length, vocabulary))
    tokens = jnp.zeros((batch, length), jnp.int32)
    masked = jax.random.bernoulli(key, 0.5, tokens.shape)
    arguments = (logits, tokens, masked, jax.random.split(key, batch))
    runs = {"plain": jax.jit(plain_scores), "reference": jax.jit(kernels.mask_scores)}
    for got, expected in zip(*(run(*arguments) for run in runs.values()), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    return medians(runs, *arguments)


def bench_choice(batch: int, length: int) -> dict:
    """Median milliseconds of each implementation of `keep_most_confident`.

    Raises:
      AssertionError: they differ.
    """
    keys = jax.random.split(jax.random.key(length), 3)
    known = jax.random.bernoulli(keys[0], 0.3, (batch, length))
    confidence = jnp.where(known, jnp.inf, jax.random.normal(keys[1], known.shape))
    count = jax.random.randint(keys[2], (batch,), 0, length + 1)
    runs = {
        name: jax.jit(
            lambda confidence, count, name=name: kernels.keep_most_confident(
                confidence, count, implementation=name
            )
        )
        for name in ("reference", "threshold")
    }
    np.testing.assert_array_equal(*(run(confidence, count) for run in runs.values()))
    return medians(runs, confidence, count, repeats=101)


def main() -> None:
    """Prints a table for each operation."""
    print("mask_scores\nbatch  length  vocabulary  plain ms  reference ms  ratio")
    for batch, length, vocabulary in SCORES:
        times = bench_scores(batch, length, vocabulary)
        print(
            f"{batch:>5}  {length:>6}  {vocabulary:>10}  {times['plain']:>8.2f}  "
            f"{times['reference']:>12.2f}  {times['plain'] / times['reference']:>5.2f}"
        )
    print("keep_most_confident\nbatch  length  reference ms  threshold ms  ratio")
    for batch, length in CHOICES:
        times = bench_choice(batch, length)
        print(
            f"{batch:>5}  {length:>6}  {times['reference']:>12.3f}  {times['threshold']:>12.3f}  "
            f"{times['reference'] / times['threshold']:>5.2f}"
        )


if __name__ == "__main__":
    main()
