"""The strategies, and their three gaps on each set: exact, of the sampler, of a trained network."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from gen_jax import sampling
from gen_jax.data.exact import Enumerated
from gen_jax.data.exact_sets import NoisyMixture, binary_chain, even_parity
from gen_jax.metrics import gaps, repair
from gen_jax.models.masked import (
    AbsorbingDiffusion,
    Denoiser,
    ExactDenoiser,
    MaskGIT,
    OrderedGroups,
    Repair,
    log_prob_in_order,
)
from gen_jax.models.masked.schedules import Fixed, Schedule
from gen_jax.sampling import Sampler
from gen_jax.tasks.exact.config import ExactConfig
from gen_jax.tasks.exact.networks import Networks

__all__ = ["Measure", "Strategy", "known_sets", "mixtures", "strategies"]

_ROUNDS = (2, 3, 4)
_REPAIRS = {"random": "random_one", "least_likely": "confidence_one"}


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A way to spend sequential evaluations.

    Attributes:
      name: for the table.
      family: for the figure.
      nfe: sequential evaluations for one sample.
      groups: positions of each round, where the order is fixed.
      sizes: positions of each round, where the order is random.
      sampler: made of a denoiser, a length and the NFE, where neither of them says it.
      erase: what is erased, for rounds of repair.
      network: the family of trained networks that it is measured with.
      schedule: name of the schedule of the sizes, where they follow one.
    """

    name: str
    family: str
    nfe: int
    groups: gaps.Groups | None = None
    sizes: tuple[int, ...] | None = None
    sampler: Callable[[Denoiser, int, int], Sampler] | None = None
    erase: str = ""
    network: str = "masked"
    schedule: str = ""

    def make(self, denoiser: Denoiser, length: int) -> Sampler:
        """The sampler with this denoiser."""
        if self.groups is not None:
            return OrderedGroups.of_groups(denoiser, self.groups)
        if self.sizes is not None:
            return OrderedGroups(denoiser, length, self.nfe, Fixed(self.sizes))
        if self.erase:
            return Repair(denoiser, length, self.nfe - 1, self.erase)
        return self.sampler(denoiser, length, self.nfe)

    @property
    def order_and_sizes(self) -> tuple[np.ndarray, tuple[int, ...]]:
        """All positions, first to last, and how many each group has."""
        order = np.array([position for group in self.groups for position in group])
        return order, tuple(len(group) for group in self.groups)

    def law(self, dist: Enumerated) -> np.ndarray | None:
        """The law [V, ..., V] with exact conditionals, where it is known."""
        if self.groups is not None:
            return gaps.law_of_groups(dist, self.groups)
        if self.sizes is not None:
            return gaps.law_of_rounds(dist, self.sizes)
        if self.erase:
            return repair.repair_curve(dist, _REPAIRS[self.erase], (self.nfe - 1,))[0]
        return None

    def gap(self, dist: Enumerated) -> float | None:
        """KL(p || q) in nats, given the order, where it is known."""
        if self.groups is not None:
            return gaps.kl_of_groups(dist, self.groups)
        if self.sizes is not None:
            return gaps.random_order_gap(dist.entropy_profile, self.sizes)
        return gaps.kl(dist.dense(), self.law(dist)) if self.erase else None


def mixtures(config: ExactConfig) -> dict[str, NoisyMixture]:
    """The distributions that a latent of two codes can express, by name."""
    return {
        "two modes": NoisyMixture(2, config.length, 2, 0.0),
        "modes behind noise": NoisyMixture(2, config.length, 2, config.noise),
    }


def known_sets(config: ExactConfig) -> dict[str, Enumerated]:
    """The distributions, by name."""
    length = config.length
    return {name: mixture.data for name, mixture in mixtures(config).items()} | {
        "Markov chain": binary_chain(length, config.stay),
        "even parity": even_parity(length),
    }


def strategies(length: int, schedules: dict[str, Schedule]) -> list[Strategy]:
    """All strategies over `length` = 2**m + 1 positions.

    Args:
      length: L.
      schedules: of the random orders, by name.
    """
    whole = tuple(range(length))
    every = [
        Strategy("all at once", "all at once", 1, groups=(whole,), network="one_shot"),
        Strategy(
            "one by one", "one by one", length, groups=tuple((i,) for i in whole), network="ar"
        ),
    ]
    orders = (
        ("halves", "halves", gaps.half_groups(length)),
        ("every other one", "every other one", gaps.checkerboard_groups(length)),
        ("small to large", "small to large", gaps.dyadic_groups(length)),
        (
            "small to large, ends together",
            "small to large",
            gaps.dyadic_groups(length, ends_together=True),
        ),
        ("code of every 2nd, then the rest", "code", gaps.code_groups(length, 2)),
        ("code of every 4th, then the rest", "code", gaps.code_groups(length, 4)),
    )
    every += [Strategy(name, family, len(g), groups=g) for name, family, g in orders]
    for name, schedule in schedules.items():
        for rounds in (r for r in _ROUNDS if r <= length):
            label, sizes = name.replace("_", " "), schedule.sizes(length, rounds)
            every.append(
                Strategy(
                    f"random order, {label}",
                    f"random, {label}",
                    rounds,
                    sizes=sizes,
                    schedule=label,
                )
            )
    for erase, name, rounds in (
        ("random", "repair at random", (4, 16, 64)),
        ("least_likely", "repair of the least likely", (1, 4, 16)),
    ):
        every += [Strategy(name, name, 1 + r, erase=erase) for r in rounds]
    few = [rounds for rounds in (2, 4) if rounds <= length]
    every += [Strategy("MaskGIT", "MaskGIT", r, sampler=MaskGIT) for r in few]
    for name, remask in (("absorbing diffusion", 0.0), ("absorbing diffusion, remasking", 1.0)):
        sampler = functools.partial(AbsorbingDiffusion, remask=remask)
        every.append(Strategy(name, "absorbing diffusion", few[-1], sampler=sampler))
    return every


class Measure:
    """The three gaps of strategies on one set.

    Args:
      config: of the experiment.
      dist: the set.
      networks: the trained ones of this set; None where none is measured.
    """

    def __init__(self, config: ExactConfig, dist: Enumerated, networks: Networks | None):
        self.config, self.dist, self.networks = config, dist, networks
        self.dense = dist.dense()
        shape = self.dense.shape
        self.every = np.array(list(np.ndindex(*shape)), np.int32)  # all sequences

    def row(self, strategy: Strategy) -> dict:
        """The gaps of a strategy: KL and total variation, each exact, drawn, and of a network."""
        row = {"strategy": strategy.name, "family": strategy.family, "nfe": strategy.nfe}
        row |= {"network": strategy.network, "schedule": strategy.schedule}
        law, gap = strategy.law(self.dist), strategy.gap(self.dist)
        if law is not None:
            row |= {"kl": max(gap, 0.0), "tv": gaps.total_variation(self.dense, law)}
            row["valid"] = gaps.valid_mass(self.dist, law)
        return row | self.drawn(strategy, law) | self._trained(strategy)

    def drawn(self, strategy: Strategy, law: np.ndarray | None) -> dict:
        """The gaps with exact conditionals, by Monte Carlo, with standard errors.

        Total variation is that of samples. KL is the mean of log p - log q over data in the order
        of the strategy; over samples its weights p / q would have a tail too heavy to average.
        """
        dist, number, seed = self.dist, self.config.samples, self.config.seed
        denoiser = ExactDenoiser(dist.vocabulary)
        params = {"support": self.every, "prob": self.dense.reshape(-1)}
        keys = sampling.sample_keys(seed, 0, number)
        sampler = strategy.make(denoiser, dist.length)
        tokens = np.asarray(sampling.generate(sampler, params, keys))
        found = {"drawn_valid": float(np.isfinite(dist.log_prob(tokens)).mean())}
        found["drawn_tv"], found["drawn_tv_error"] = self._variation(tokens, law)
        if strategy.groups is None and strategy.sizes is None:
            return found
        random = np.random.default_rng(seed)
        data = dist.sample(seed, number)
        if strategy.groups is not None:
            order, sizes = strategy.order_and_sizes
        else:
            order = random.permuted(np.tile(np.arange(dist.length), (number, 1)), axis=1)
            sizes = strategy.sizes
        log_q = np.asarray(self._in_order(denoiser, params, data, order, sizes), np.float64)
        return found | _mean_kl(dist.log_prob(data) - log_q)

    @functools.cached_property
    def _in_order(self):
        return jax.jit(log_prob_in_order, static_argnums=(0, 4))

    def _variation(self, tokens, law):
        """Total variation from samples, and its standard error.

        It is q(A) - p(A) for the A where q > p: that of the law where it is known; else that of one
        half of the samples, which gives a lower bound, measured on the other half.
        """
        place = np.ravel_multi_index(tuple(tokens.T), self.dense.shape)
        p = self.dense.reshape(-1)
        if law is None:
            half = len(place) // 2
            counts = np.bincount(place[:half], minlength=len(p))
            inside, place = counts / half > p, place[half:]
        else:
            inside = law.reshape(-1) > p + 1e-12
        hits = inside[place]
        chance = hits.mean() if law is None else np.clip(law.reshape(-1)[inside].sum(), 0, 1)
        error = (chance * (1 - chance) / len(hits)) ** 0.5
        return float(hits.mean() - p[inside].sum()), float(error)

    def _trained(self, strategy):
        """Of a trained network: exact where its law can be summed up, else from samples."""
        networks, config = self.networks, self.config
        if strategy.network != "masked":
            return self._of_law(networks.log_prob(strategy.network, self.every))
        if strategy.groups is not None:
            return self._of_law(networks.log_prob_in_order(self.every, *strategy.order_and_sizes))
        if strategy.sizes is not None:
            random = np.random.default_rng(config.seed)
            orders = [random.permutation(self.dist.length) for _ in range(config.orders)]
            laws = [
                networks.log_prob_in_order(self.every, order, strategy.sizes) for order in orders
            ]
            kls = [self._of_law(law)["network_kl"] for law in laws]
            error = np.std(kls) / len(kls) ** 0.5
            return {"network_kl": float(np.mean(kls)), "network_kl_error": float(error)}
        if strategy.erase:
            rule, rounds = _REPAIRS[strategy.erase], strategy.nfe - 1
            law = networks.law_of_repair(self.every, rule, rounds)
            return self._of_law(np.log(np.maximum(law, 1e-300)))
        tokens = networks.sample(strategy, config.network_samples, config.seed)
        tv, error = self._variation(tokens, None)
        return {"network_tv": tv, "network_tv_error": error}

    def latent(self, mixture: NoisyMixture | None) -> dict:
        """The row of the shared latent.

        Args:
          mixture: what the set is, where two codes can express it: the gap is then zero, and the
            sampler draws the code and, given it, all positions at once.
        """
        log_q = self.networks.log_prob("latent", self.every)
        row = {"strategy": "shared latent", "family": "shared latent", "nfe": 2}
        row |= {"network": "latent", "schedule": ""}
        if mixture is not None:
            row |= {"kl": 0.0, "tv": 0.0, "valid": 1.0} | self._drawn_by_code(mixture)
        return row | self._of_law(log_q)

    def _drawn_by_code(self, mixture):
        """As `drawn`, over the codes and the sequences behind them."""
        joint, number, seed = mixture.joint, self.config.samples, self.config.seed
        denoiser = ExactDenoiser(joint.vocabulary)
        params = {"support": joint.support, "prob": joint.prob}
        sampler = OrderedGroups.of_groups(denoiser, ((0,), tuple(range(1, joint.length))))
        keys = sampling.sample_keys(seed, 0, number)
        tokens = np.asarray(sampling.generate(sampler, params, keys))[:, 1:]
        data = self.dist.sample(seed, number)
        order, sizes = np.arange(joint.length), (1, joint.length - 1)
        log_q = [
            self._in_order(denoiser, params, np.insert(data, 0, code, axis=1), order, sizes)
            for code in range(mixture.number)
        ]
        tv, error = self._variation(tokens, None)
        valid = float(np.isfinite(self.dist.log_prob(tokens)).mean())
        terms = self.dist.log_prob(data) - np.logaddexp.reduce(np.float64(log_q))
        return {"drawn_valid": valid, "drawn_tv": tv, "drawn_tv_error": error} | _mean_kl(terms)

    def limits(self, rounds: int) -> dict[str, float]:
        """Total variation after many rounds of each repair, with exact conditionals."""
        laws = {
            name: repair.repair_curve(self.dist, rule, (rounds,))[0]
            for name, rule in _REPAIRS.items()
        }
        words = {"random": "repair at random", "least_likely": "repair of the least likely"}
        return {words[name]: gaps.total_variation(self.dense, law) for name, law in laws.items()}

    def _of_law(self, log_q):
        p = self.dense.reshape(-1)
        seen = p > 0
        kl = (p[seen] * (np.log(p[seen]) - log_q[seen])).sum()
        tv = 0.5 * np.abs(np.exp(log_q) - p).sum()
        return {
            "network_kl": float(kl),
            "network_tv": float(tv),
            "network_valid": float(np.exp(log_q[seen]).sum()),
        }


def _mean_kl(terms):
    """The mean of log p - log q over data, with its standard error."""
    error = terms.std() / len(terms) ** 0.5
    return {"drawn_kl": float(terms.mean()), "drawn_kl_error": float(error)}
