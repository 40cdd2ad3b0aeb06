"""What a strategy loses when its network is perfect: exact laws and their KL divergences.

A strategy draws groups of positions one after the other, the positions of a group in parallel,
each from its exact conditional distribution given the earlier groups. Its law is q; the loss is
KL(p || q), in nats, the sum over groups of the total correlation given the groups before.
"""

from collections.abc import Callable
from functools import partial
from itertools import combinations
from math import comb, prod

import numpy as np
from jaxtyping import Float, Float64

from gen_jax.data.exact import Enumerated

__all__ = [
    "Groups",
    "any_order_bound",
    "checkerboard_groups",
    "code_groups",
    "coverage",
    "dyadic_groups",
    "eos_hazards",
    "half_groups",
    "kl",
    "kl_of_groups",
    "law_of_groups",
    "law_of_rounds",
    "lengths_of_hazards",
    "lengths_of_law",
    "random_order_gap",
    "total_variation",
    "valid_mass",
    "valid_mass_of_groups",
]

Groups = tuple[tuple[int, ...], ...]


def kl_of_groups(dist: Enumerated, groups: Groups) -> float:
    """KL(p || q) in nats of drawing ordered groups, each in parallel.

    sum over s of TC(group s | earlier groups): Huang et al. (2022, arXiv 2206.05975).

    Args:
      dist: p.
      groups: a partition of the positions 0..L-1, in the order in which they are drawn.

    Raises:
      ValueError: the groups are no partition.
    """
    _check_partition(groups, dist.length)
    earlier, total = (), 0.0
    for group in groups:
        total += dist.total_correlation(tuple(group), earlier)
        earlier = (*earlier, *group)
    return total


def law_of_groups(dist: Enumerated, groups: Groups) -> Float64[np.ndarray, "*V"]:
    """The law q of drawing ordered groups, each in parallel.

    After groups that cannot occur together, which a parallel draw may give, tokens are uniform,
    as in `Enumerated.conditionals`.

    Args:
      dist: p, with at most 2**24 sequences over its vocabulary.
      groups: a partition of the positions 0..L-1, in the order in which they are drawn.

    Returns:
      One axis per position, as `Enumerated.dense`.

    Raises:
      ValueError: the groups are no partition, or the sequences are too many.
    """
    _check_partition(groups, dist.length)
    law, earlier = np.ones_like(dist.dense()), set()
    for group in groups:
        for position in group:
            law = law * dist.conditional_table(position, earlier)
        earlier |= set(group)
    return law


def law_of_rounds(dist: Enumerated, sizes: tuple[int, ...]) -> Float64[np.ndarray, "*V"]:
    """The law of drawing groups of given sizes, the positions of each chosen at random.

    Args:
      dist: p, with at most 2**24 sequences over its vocabulary.
      sizes: positions per round, each from 1 up, with sum L.

    Returns:
      The mean of `law_of_groups` over all such groups. Its KL divergence is at most
      `random_order_gap`, the mean of theirs, because the order is not seen in the sample.

    Raises:
      ValueError: the sizes are no composition of L.
    """
    _check_sizes(sizes, dist.length)
    everything, known = frozenset(range(dist.length)), 0
    laws = {frozenset(): np.ones_like(dist.dense())}  # by the set of positions that are known
    for size in sizes:
        chance, known, longer = 1 / comb(dist.length - known, size), known + size, {}
        for earlier, law in laws.items():
            rest = everything - earlier
            tables = {i: dist.conditional_table(i, set(earlier)) for i in rest}
            for group in combinations(sorted(rest), size):
                drawn = prod((tables[i] for i in group), start=law * chance)
                later = earlier | set(group)
                longer[later] = longer[later] + drawn if later in longer else drawn
        laws = longer
    return laws[everything]


def kl(p: Float[np.ndarray, "*V"], q: Float[np.ndarray, "*V"]) -> float:
    """KL(p || q) in nats of two tables of probabilities of one shape; inf where q misses p."""
    seen = p > 0
    if not (q[seen] > 0).all():
        return float("inf")
    return float(p[seen] @ np.log(p[seen] / q[seen]))


def total_variation(p: Float[np.ndarray, "*V"], q: Float[np.ndarray, "*V"]) -> float:
    """Half the sum of |p - q| over two tables of probabilities of one shape: in [0, 1]."""
    return float(0.5 * np.abs(p - q).sum())


def valid_mass(dist: Enumerated, law: Float[np.ndarray, "*V"]) -> float:
    """The probability under a law of a sequence that can occur."""
    return float(law[tuple(dist.support.T)].sum())


def valid_mass_of_groups(dist: Enumerated, groups: Groups) -> float:
    """The probability that ordered groups, each drawn in parallel, give what can occur.

    It follows from the support alone: the vocabulary may be large, and the sequences long.

    Args:
      dist: p.
      groups: a partition of the positions 0..L-1, in the order in which they are drawn.

    Raises:
      ValueError: the groups are no partition.
    """
    _check_partition(groups, dist.length)
    earlier, log_q = (), np.zeros(len(dist.support))
    for group in groups:
        context = dist.agreement(earlier)
        reached = np.bincount(context, dist.prob)[context]
        for position in group:
            alone = dist.agreement((*earlier, position))
            log_q += np.log(np.bincount(alone, dist.prob)[alone] / reached)
        earlier = (*earlier, *group)
    return float(np.exp(log_q).sum())


def coverage(dist: Enumerated, law: Float[np.ndarray, "*V"]) -> float:
    """The part of p, by its probability, that a law can give at all."""
    return float(dist.prob[law[tuple(dist.support.T)] > 0].sum())


def random_order_gap(profile: Float64[np.ndarray, " L_plus_1"], sizes: tuple[int, ...]) -> float:
    """The mean over random orders of KL(p || q), in nats, with given numbers of parallel draws.

    sum over rounds of g [f(m + 1) - f(m)] - [f(m + g) - f(m)], g the size of the round and m the
    number of positions known before it.

    Args:
      profile: f, the `Enumerated.entropy_profile`, in nats.
      sizes: positions per round, each from 1 up, with sum L.

    Raises:
      ValueError: the sizes are no composition of L.
    """
    _check_sizes(sizes, len(profile) - 1)
    cost, known, total = _round_costs(profile), 0, 0.0
    for size in sizes:
        total += cost[known, known + size]
        known += size
    return float(total)


def any_order_bound(
    dist: Enumerated, denoise: Callable[[np.ndarray], np.ndarray] | None = None
) -> float:
    """The bound that absorbing diffusion trains, in nats per sequence, over all masks exactly.

    sum over n = 1..L of the mean over sets of n masked positions of (1 / n) sum over the masked
    i of E[-ln q(x_i | the unmasked)]. With the exact denoiser it is H(x): the bound is that of
    any-order autoregression (Hoogeboom et al., 2021, arXiv 2110.02037; without time as an input,
    Ou et al., 2024, arXiv 2406.03736).

    Args:
      dist: p, with at most 16 positions.
      denoise: int32 [B, L], masked tokens being V, to float64 [B, L, V], the distribution of
        each token; None for the exact conditionals.

    Raises:
      ValueError: there are more than 16 positions.
    """
    length, mask_id = dist.length, dist.vocabulary
    if length > 16:
        raise ValueError(f"{length} positions have too many masks; at most 16 do")
    if denoise is None:
        denoise = partial(dist.conditionals, mask_id=mask_id)
    sums, counts = np.zeros(length + 1), np.zeros(length + 1)
    for index in range(1, 1 << length):
        masked = (index >> np.arange(length) & 1).astype(bool)
        contexts, which = np.unique(
            np.where(masked, np.int32(mask_id), dist.support), axis=0, return_inverse=True
        )
        rows = denoise(contexts)[which.reshape(-1)]
        own = np.take_along_axis(rows, dist.support[:, :, None], axis=2)[:, masked, 0]
        with np.errstate(divide="ignore"):
            sums[masked.sum()] -= dist.prob @ np.log(own).mean(axis=1)
        counts[masked.sum()] += 1
    return float((sums[1:] / counts[1:]).sum())


def dyadic_groups(length: int, *, ends_together: bool = False) -> Groups:
    """From coarse to fine: the first position, the last, then all midpoints of each scale at once.

    Exact for a Markov chain, in m + 2 rounds for 2**m + 1 positions.

    Args:
      length: 2**m + 1, from 2 up.
      ends_together: whether the first and the last are drawn in parallel, which is not exact.

    Raises:
      ValueError: the length is another.
    """
    gap = length - 1
    if gap < 1 or gap & (gap - 1):
        raise ValueError(f"length is {length}; dyadic midpoints need 2**m + 1 positions")
    groups = [(0, gap)] if ends_together else [(0,), (gap,)]
    while gap > 1:
        groups.append(tuple(range(gap // 2, length, gap)))
        gap //= 2
    return tuple(groups)


def code_groups(length: int, every: int) -> Groups:
    """Every d-th position one after the other, as a code, then all others in parallel.

    Args:
      length: L, from 1 up.
      every: d, from 1 up; 1 is autoregression.

    Raises:
      ValueError: an argument is out of range.
    """
    _check_length(length)
    if every < 1:
        raise ValueError(f"every is {every}; give a distance of at least 1")
    others = tuple(i for i in range(length) if i % every)
    return (*((i,) for i in range(0, length, every)), *((others,) if others else ()))


def checkerboard_groups(length: int) -> Groups:
    """Every other position in parallel, then those between them.

    Raises:
      ValueError: the length is below 2.
    """
    _check_length(length, 2)
    return tuple(range(0, length, 2)), tuple(range(1, length, 2))


def half_groups(length: int) -> Groups:
    """The first half in parallel, with the middle where L is odd, then the others.

    Raises:
      ValueError: the length is below 2.
    """
    _check_length(length, 2)
    return tuple(range(-(-length // 2))), tuple(range(-(-length // 2), length))


def lengths_of_law(
    law: Float64[np.ndarray, "*V"], eos: int
) -> Float64[np.ndarray, " {law.ndim}+1"]:
    """The distribution of the number of tokens before the first EOS.

    Args:
      law: one axis per position.
      eos: the token that ends a sequence; what follows it is cut off.

    Returns:
      The probability of each length 0..L; a sequence without EOS has length L.
    """
    result = np.zeros(law.ndim + 1)
    running = law
    for i in range(law.ndim):
        result[i] = running[eos].sum()
        running = np.delete(running, eos, axis=0).sum(axis=0)
    result[-1] = running
    return result


def eos_hazards(dist: Enumerated, eos: int) -> Float64[np.ndarray, " {dist.length}"]:
    """What each position learns of EOS where the loss after the first EOS is masked.

    Args:
      dist: p.
      eos: the token that ends a sequence.

    Returns:
      The probability of EOS given none before; 1 where there always is one.
    """
    lengths = lengths_of_law(dist.dense(), eos)
    reached = lengths[::-1].cumsum()[::-1][:-1]
    return np.where(reached > 0, lengths[:-1] / np.where(reached > 0, reached, 1), 1)


def lengths_of_hazards(hazards: Float[np.ndarray, " L"]) -> Float[np.ndarray, " L+1"]:
    """The lengths of sequences whose positions, each on its own, hold EOS with given probability.

    Args:
      hazards: that probability for each position, in [0, 1].

    Returns:
      The distribution of the number of tokens before the first EOS, 0..L.
    """
    reached = np.append(1, np.cumprod(1 - hazards))
    return reached * np.append(hazards, 1)


def _round_costs(profile: np.ndarray) -> np.ndarray:
    """float64 [L + 1, L + 1]: the gap of one round from m known positions to n."""
    known = np.arange(len(profile))
    gain = np.append(np.diff(profile), 0)
    joint = profile - profile[:, None]
    return (known - known[:, None]) * gain[:, None] - joint


def _check_partition(groups: Groups, length: int) -> None:
    if sorted(i for group in groups for i in group) != list(range(length)):
        raise ValueError(f"groups {groups} must name each position of 0..{length - 1} once")


def _check_sizes(sizes: tuple[int, ...], length: int) -> None:
    if sum(sizes) != length or min(sizes, default=0) < 1:
        raise ValueError(f"sizes {sizes} must be at least 1 each and add up to {length}")


def _check_length(length: int, least: int = 1) -> None:
    if length < least:
        raise ValueError(f"length is {length}; give at least {least} positions")
