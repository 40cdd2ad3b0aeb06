"""What else is known exactly: closed forms, each beside what a sampler or a network gives.

A fact is a dictionary with "claim", "exact" and, where something was run, "run" and "error".
"""

import dataclasses

import jax
import numpy as np
import optax
from jaxtyping import Float

from gen_jax import evaluation, sampling
from gen_jax import keys as key_streams
from gen_jax.data import gaussian_process as gaussian
from gen_jax.data.exact import Enumerated
from gen_jax.data.exact_sets import (
    EOS,
    BinaryPyramid,
    NoisyMixture,
    binary_chain,
    even_parity,
    lengths,
    modes,
    permutations,
)
from gen_jax.metrics import gaps, repair
from gen_jax.models.masked import ExactDenoiser, OrderedGroups
from gen_jax.models.parallel import ParallelModel
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.tasks.exact.config import ExactConfig
from gen_jax.tasks.exact.measure import Measure, Strategy

__all__ = ["facts", "one_law"]


def facts(config: ExactConfig) -> list[dict]:
    """All of them, in the order of the table.

    Args:
      config: of the experiment; says how many samples are drawn.
    """
    makers = (
        lambda: _modes(config),
        _conditioning,
        _permutations,
        lambda: _signals(config),
        _pyramid,
        _bound,
        lambda: _repair(config),
        lambda: _lengths(config),
    )
    kept = (evaluation.kept_figures(lambda m=make: {"facts": list(m())}, ()) for make in makers)
    return [fact for some in kept for fact in some["facts"]]


def _fact(claim, exact, run=None, error=None):
    fact = {"claim": claim, "exact": float(exact)}
    if run is not None:
        fact |= {"run": float(run), "error": float(error)}
    return fact


def _at_once(dist, number, seed):
    """Samples of the one-shot sampler with exact conditionals, int32 [number, L]."""
    sampler = OrderedGroups(ExactDenoiser(dist.vocabulary), dist.length, 1)
    params = {"support": dist.support, "prob": dist.prob}
    keys = sampling.sample_keys(seed, 0, number)
    return np.asarray(sampling.generate(sampler, params, keys))


def _modes(config):
    """K modes that differ everywhere: (L - 1) H(pi) nats, and K ** (1 - L) is valid."""
    found = []
    for weights, length in (((0.5,) * 2, 2), ((0.5,) * 2, 4), ((0.25,) * 4, 8), ((0.7, 0.3), 2)):
        dist = modes(weights, length)
        law = gaps.law_of_groups(dist, (tuple(range(length)),))
        name = f"{len(weights)} modes {weights[0]:.2g}, {length} positions, at once"
        found.append(_fact(f"{name}: KL", dist.total_correlation()))
        valid = np.isfinite(dist.log_prob(_at_once(dist, config.samples, config.seed)))
        error = valid.std() / len(valid) ** 0.5
        found.append(_fact(f"{name}: valid mass", gaps.valid_mass(dist, law), valid.mean(), error))
    return found


def _conditioning():
    """The mode revealed, or one mode kept: no gap, and the coverage that it costs."""
    one = modes((1.0,), 4)
    both = modes((0.5, 0.5), 4)
    return [
        _fact("2 modes, the mode given as a condition: KL", one.total_correlation()),
        _fact("2 modes, distilled to one of them: KL to the distilled", one.total_correlation()),
        _fact("2 modes, distilled to one of them: coverage", gaps.coverage(both, one_law(both))),
    ]


def one_law(dist: Enumerated) -> Float[np.ndarray, "..."]:
    """The law of the first sequence alone."""
    law = np.zeros_like(dist.dense())
    law[tuple(dist.support[0])] = 1.0
    return law


def _permutations():
    dist = permutations(4)
    ways = {
        "at once": ((0, 1, 2, 3),),
        "two and two": ((0, 1), (2, 3)),
        "one, then three": ((0,), (1, 2, 3)),
        "1, 1, 2": ((0,), (1,), (2, 3)),
    }
    return [
        _fact(f"permutations of 4, {name}: KL", gaps.kl_of_groups(dist, groups))
        for name, groups in ways.items()
    ]


def _signals(config):
    """Real values suffer too; a triangular map of noise repairs it in one step."""
    pair = gaussian.correlated_pair(0.9)
    wave = gaussian.sinusoid(64, 4, 0.01)
    drawn = wave.one_step(np.random.default_rng(config.seed).standard_normal((config.samples, 64)))
    exact, values = -wave.log_prob(drawn), wave.entropy
    error = exact.std() / len(exact) ** 0.5
    return [
        _fact("Gaussian pair, correlation 0.9, at once: KL", pair.one_shot_gap),
        _fact("sinusoid of 64 samples, noise 0.01, at once: KL", wave.one_shot_gap),
        _fact("the same by one step of a triangular map: entropy", values, exact.mean(), error),
    ]


def _pyramid():
    pyramid = BinaryPyramid(4, 0.1)
    leaves = BinaryPyramid(3, 0.1).leaves
    return [
        _fact("pyramid 1-2-4-8, flips 0.1, all scales at once: KL", pyramid.one_shot_gap),
        _fact("its 4 x 4 image alone, at once: KL", leaves.total_correlation()),
    ]


def _bound():
    """The ELBO of absorbing diffusion with an exact denoiser is the entropy."""
    sets = {"even parity, 8 bits": even_parity(8), "Markov chain, 8 bits": binary_chain(8, 0.9)}
    return [
        _fact(
            f"{name}: bound of absorbing diffusion, entropy {dist.entropy:.6f}",
            gaps.any_order_bound(dist),
        )
        for name, dist in sets.items()
    ]


def _repair(config):
    """Total variation after rounds of repair, for 2 modes over 4 bits behind noise 0.1."""
    dist = NoisyMixture(2, 4, 2, 0.1).data
    measure, found = Measure(config, dist, None), []
    rules = {"random": "one at random", "least_likely": "the least likely"}
    names = {"random": "random_one", "least_likely": "confidence_one"}
    for erase, label in rules.items():
        for rounds in (0, 1, 4, 16, 64):
            law = repair.repair_curve(dist, names[erase], (rounds,))[0]
            exact = gaps.total_variation(measure.dense, law)
            strategy = Strategy("", "", 1 + rounds, erase=erase)
            drawn = measure.drawn(strategy, law)
            claim = f"repair of {label}, {rounds} rounds: total variation"
            found.append(_fact(claim, exact, drawn["drawn_tv"], drawn["drawn_tv_error"]))
    half = repair.repair_curve(dist, "random_half", (64,))[0]
    claim = "repair of a random half, 64 rounds: total variation"
    return [*found, _fact(claim, gaps.total_variation(measure.dense, half))]


def _lengths(config):
    """Lengths uniform on 1 to 4: predicted; by EOS, all columns trained; by EOS, up to it."""
    dist = lengths(4)
    law = gaps.law_of_groups(dist, ((0, 1, 2, 3),))
    wanted = gaps.lengths_of_law(dist.dense(), EOS)
    cut = gaps.lengths_of_law(law, EOS)
    hazards = gaps.lengths_of_hazards(gaps.eos_hazards(dist, EOS))
    learned = _learned_lengths(config, dist)
    rows = {
        "length": ("predicted first", wanted),
        "eos": ("cut at EOS", cut),
        "eos_masked": ("cut at EOS, loss masked after it", hazards),
    }
    found = [_fact("lengths 1 to 4 by EOS, at once: KL before the cut", dist.total_correlation())]
    for ending, (name, exact) in rows.items():
        for measure, of in (("KL", gaps.kl), ("total variation", gaps.total_variation)):
            run = of(wanted, learned[ending])
            found.append(_fact(f"lengths 1 to 4, {name}: {measure}", of(wanted, exact), run, 0.0))
    return found


def _learned_lengths(config, dist):
    """The laws of the lengths of trained one-shot decoders, by how they end."""
    sizes = {"vocabulary": 2, "context": 4, "extra_inputs": 1, "causal": False, "layers": 1}
    network = TokenNetwork(dataclasses.replace(config.model, **sizes))
    ends = dist.support == EOS
    content = np.where(ends.any(1), ends.argmax(1), dist.length)
    found = {}
    for ending in ("length", "eos", "eos_masked"):
        model = ParallelModel(network, dist.length, ending)
        counted = content if ending == "length" else np.minimum(content + 1, dist.length)
        batch = {"tokens": dist.support, "length": counted.astype(np.int32)}
        params = model.init(key_streams.root(config.seed, "init"))
        found[ending] = _lengths_of(model, _descend(model, params, batch))
    return found


def _descend(model, params, batch):
    """The parameters after Adam on the whole of a tiny set."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 1500))
    keys = jax.random.split(jax.random.key(0), len(batch["tokens"]))

    def step(carry, _):
        params, state = carry
        gradients = jax.grad(lambda params: model.loss(params, batch, keys)[0])(params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=1500)[0])
    return run((params, optimizer.init(params)))[0]


def _lengths_of(model, params):
    """The law float64 [L + 1] of the number of tokens before EOS."""
    if model.ending == "length":
        logits = model.length_logits(
            params, np.zeros((1, model.network.config.width)), np.zeros(1, np.int32)
        )
        return np.append(0.0, np.asarray(jax.nn.softmax(logits[0]), np.float64))
    blank = np.full((1, model.max_length), model.denoiser.mask, np.int32)
    logits = model.network(params["network"], blank)[0]
    return gaps.lengths_of_hazards(np.asarray(jax.nn.softmax(logits), np.float64)[:, EOS])
