"""Conditions of samplers in rounds: how they are made, and what is refused before a loop starts.

Shapes are always known. Values are checked where they are: inside of another program they are
traced, and are not.
"""

from collections.abc import Sequence

import numpy as np

from gen_jax.condition import Condition, is_concrete
from gen_jax.models.masked.denoisers import Denoiser

__all__ = ["check_given", "check_lengths", "check_source", "infill"]


def infill(
    model: Denoiser,
    length: int,
    templates: Sequence[Sequence[int | None]] | None = None,
    lengths: Sequence[int] | None = None,
    number: int | None = None,
) -> Condition:
    """The condition of samplers in rounds: which tokens are given, and how long sequences are.

    In-painting gives tokens around holes; a prefix gives the first ones.

    Args:
      model: decides which ids there are.
      length: L, positions of the sampler.
      templates: for each sample ids, and None for each hole; positions that a template does not
        reach are holes too. None for holes alone.
      lengths: of each sample, 1 to L; None for L.
      number: of samples, where neither of the others tells.

    Returns:
      `given` int32 [B, L], `is_given` bool [B, L], and `length` int32 [B] where one is below L.

    Raises:
      ValueError: a length is not in 1 .. L, a token is given beyond the length of its sequence or
        is not in the vocabulary, or numbers of samples differ.
    """
    numbers = {len(some) for some in (templates, lengths) if some is not None}
    numbers |= set() if number is None else {number}
    if len(numbers) != 1:
        raise ValueError(
            f"templates, lengths and number must be of as many samples, not {sorted(numbers)}"
        )
    rows = numbers.pop()
    given, is_given = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    lengths = [length] * rows if lengths is None else lengths
    for row, own in enumerate(lengths):
        if not 1 <= own <= length:
            raise ValueError(f"a length of {own} is not possible: it must be in 1 to {length}")
        for place, token in enumerate([] if templates is None else templates[row]):
            if token is None:
                continue
            _check_token(model, place, token, own)
            given[row, place], is_given[row, place] = token, True
    same = all(own == length for own in lengths)
    return Condition(
        given=given, is_given=is_given, length=None if same else np.array(lengths, np.int32)
    )


def _check_token(model, place, token, length):
    if place >= length:
        raise ValueError(
            f"position {place} is given, but the length is {length}: give fewer tokens or a "
            "larger length"
        )
    if not 0 <= token < model.vocabulary:
        raise ValueError(f"the token {token} is given; the model knows 0 to {model.vocabulary - 1}")


def check_lengths(cond: Condition, length: int) -> None:
    """Refuses lengths of samples that are not in 1 .. `length`.

    Raises:
      ValueError: one is not.
    """
    if is_concrete(cond.length):
        _check_range("lengths", np.asarray(cond.length), 1, length)


def check_given(cond: Condition, length: int, vocabulary: int) -> None:
    """Refuses given tokens that do not fit samples of `length` positions.

    Raises:
      ValueError: `given` or `is_given` is not [B, length], or a given token is not in the
        vocabulary or is beyond the length of its sample.
    """
    if cond.given is None:
        return
    for name in ("given", "is_given"):
        shape = getattr(cond, name).shape
        if len(shape) != 2 or shape[1] != length:
            raise ValueError(
                f"the condition {name!r} has the shape {list(shape)}; the sampler needs "
                f"[{shape[0]}, {length}]"
            )
    if not np.issubdtype(cond.given.dtype, np.integer):
        raise ValueError(f"the condition 'given' must be integers, not {cond.given.dtype}")
    if not (is_concrete(cond.given) and is_concrete(cond.is_given)):
        return
    is_given = np.asarray(cond.is_given)
    _check_range("given tokens", np.asarray(cond.given)[is_given], 0, vocabulary - 1)
    if is_concrete(cond.length):
        beyond = np.arange(length)[None] >= np.asarray(cond.length)[:, None]
        if (is_given & beyond).any():
            raise ValueError("a token is given beyond the length of its sample")


def check_source(cond: Condition, vocabulary: int) -> None:
    """Refuses a model's source that is missing or cannot be read.

    Raises:
      ValueError: there is no source, its length is not in 1 .. M, or a token of it is not in the
        vocabulary.
    """
    if cond.source is None:
        raise ValueError("the model reads a source: give the condition 'source'")
    number = cond.source.shape[1]
    inside = None
    if cond.source_length is None:
        inside = np.ones(cond.source.shape, bool)
    elif is_concrete(cond.source_length):
        length = np.asarray(cond.source_length)
        _check_range("source lengths", length, 1, number)
        inside = np.arange(number)[None] < length[:, None]
    if inside is not None and is_concrete(cond.source):
        _check_range("tokens of the source", np.asarray(cond.source)[inside], 0, vocabulary - 1)


def _check_range(what, values, low, high):
    if values.size and (values.min() < low or values.max() > high):
        raise ValueError(f"{what} must be in {low} to {high}, got {values.min()} to {values.max()}")
