"""Random streams of batches: what a step draws, and which of its examples are a shard's."""

import numpy as np
from jaxtyping import Integer

__all__ = [
    "check_batch",
    "check_range",
    "check_tokens",
    "generator",
    "shard_of_step",
    "shard_slice",
]


def generator(seed: int, stream: int) -> np.random.Generator:
    """Random numbers of one stream of a seed: Philox with the key (seed, stream)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raises a ValueError where value is not in [low, high)."""
    if not low <= value < high:
        raise ValueError(f"{name} is {value}; it must be at least {low} and below {high}")


def check_batch(seed: int, step: int, size: int) -> None:
    """Raises a ValueError where one of them is out of the range that batches take."""
    check_range("seed", seed, 0, 1 << 64)
    check_range("step", step, 0, 1 << 60)
    check_range("batch size", size, 1, 1 << 40)


def check_tokens(tokens: Integer[np.ndarray, "..."], vocabulary: int) -> None:
    """Raises a ValueError where a token is not in [0, vocabulary)."""
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocabulary):
        raise ValueError(
            f"tokens span {tokens.min()}..{tokens.max()}; they must lie in 0..{vocabulary - 1}"
        )


def shard_slice(size: int, shard: tuple[int, int]) -> slice:
    """Which examples of a batch of `size` are those of shard (index, count).

    Raises:
      ValueError: the index is out of range, or count does not divide size.
    """
    index, count = shard
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"shard is {shard}; give (index, count) with 0 <= index < count")
    if size % count:
        raise ValueError(
            f"batch size {size} is not a multiple of the {count} shards; "
            f"choose {max(size // count, 1) * count} for example"
        )
    return slice(index * size // count, (index + 1) * size // count)


def shard_of_step(
    seed: int, step: int, size: int, shard: tuple[int, int]
) -> tuple[np.random.Generator, slice]:
    """The random numbers of a training step, and which examples of its batch are this shard's.

    Args:
      seed: in [0, 2**64).
      step: from 0 up.
      size: examples per global batch, over all shards.
      shard: (index, count).

    Raises:
      ValueError: an argument is out of range, or count does not divide size.
    """
    check_batch(seed, step, size)
    return generator(seed, step), shard_slice(size, shard)
