"""Gates of a comparison: what they let pass, and the planted faults that they catch."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gen_jax import operations, sampling
from gen_jax.comparison import gates
from gen_jax.comparison.gates import GateError, Pieces
from gen_jax.comparison.judges import drawn_so_far
from gen_jax.comparison.network import evaluations_alone
from gen_jax.condition import Condition
from gen_jax.config import frozen
from gen_jax.models.autoregressive import (
    AutoregressiveModel,
    AutoregressiveSampler,
    SpeculativeSampler,
    UncachedSampler,
)
from gen_jax.models.diffusion import (
    DDIM,
    DiffusionConfig,
    DiffusionModel,
    DiffusionSampler,
    ExactNetwork,
)
from gen_jax.models.masked import (
    AbsorbingDiffusion,
    MaskedModel,
    MaskGIT,
    MaskPredict,
    OrderedGroups,
    Repair,
)
from gen_jax.models.next_scale import NextScaleModel, NextScaleSampler, network_sizes
from gen_jax.models.parallel import LatentConfig, ParallelModel, ParallelSampler, one_shot
from gen_jax.nn.config import TransformerConfig, UNetConfig
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.nn.unet import UNetNetwork
from gen_jax.testing import counting_evaluations
from random_networks import random_params

SIZES = TransformerConfig(
    vocabulary=5, context=12, layers=1, width=16, heads=2, tied=False, extra_inputs=1
)
MASKED = MaskedModel(TokenNetwork(dataclasses.replace(SIZES, causal=False)))
CAUSAL = AutoregressiveModel(TokenNetwork(SIZES))
ROUNDS = (MaskGIT, MaskPredict, OrderedGroups, AbsorbingDiffusion, Repair)


def pieces(sampler, params, batch=8):
    """The loop of a sampler taken apart."""
    keys = sampling.sample_keys(0, 0, batch)
    return Pieces(sampler, sampler.prepare(params), keys, Condition())


def masks_of(sampler, params, batch=8):
    """How many tokens are hidden after each round."""
    states = sampling.stream(sampler, params, sampling.sample_keys(0, 0, batch))
    return np.stack([drawn_so_far(sampler, s, i)[1].sum(1) for i, s in enumerate(states)])


def masked_params():
    return random_params(MASKED.network.config)


@pytest.mark.parametrize("kind", ROUNDS)
def test_samplers_in_rounds_pass(kind):
    sampler, params = kind(MASKED, 12, 4), masked_params()
    gates.check_evaluations(pieces(sampler, params))
    gates.check_schedule(sampler, masks_of(sampler, params))
    gates.check_cache(pieces(sampler, params))


def next_scale():
    """A sampler from small to large, and its parameters."""
    sizes = dataclasses.replace(SIZES, **network_sizes(5, (1, 2, 4)))
    model = NextScaleModel(TokenNetwork(sizes), (1, 2, 4))
    return NextScaleSampler(model), random_params(sizes)


def test_evaluations_are_counted_in_every_kind_of_loop():
    params = random_params(SIZES)
    assert gates.evaluations(pieces(AutoregressiveSampler(CAUSAL, 0, 12), params)) == 12
    assert gates.evaluations(pieces(UncachedSampler(CAUSAL, 0, 12), params)) == 12
    prompted = AutoregressiveSampler(CAUSAL, 0, 30)  # beyond the context
    assert gates.evaluations(pieces(prompted, params)) >= 30
    longer = dataclasses.replace(SIZES, context=20)
    model = AutoregressiveModel(TokenNetwork(longer))
    both = {"target": random_params(longer), "draft": random_params(longer, 2)}
    gates.check_evaluations(pieces(SpeculativeSampler(model, model, 0, 12, 3), both))
    gates.check_evaluations(pieces(*next_scale()))
    latent = ParallelModel(MASKED.network, 12, "eos", LatentConfig("gaussian", 3))
    sampler = ParallelSampler(latent, one_shot(latent))
    gates.check_evaluations(pieces(sampler, latent.init(jax.random.key(0))))
    unet = UNetNetwork(UNetConfig(widths=(8,), blocks=1, attention=(), groups=4))
    model = DiffusionModel(unet, DiffusionConfig(timesteps=20), (4, 4, 3))
    gates.check_evaluations(
        pieces(DiffusionSampler(model, DDIM(steps=5)), model.init(jax.random.key(0)))
    )


@frozen
class _Mislabelled(MaskGIT):
    """A mutant that says it takes half as many evaluations."""

    @property
    def nfe(self):
        return self.rounds // 2


@frozen
class _Hasty(MaskGIT):
    """A mutant that ignores its schedule: everything is revealed in the first round."""

    def step(self, params, state, i):
        tokens, log_prob, _ = self._fill(params, state, i, self.temperature, 0.0)
        return self._reveal(state, tokens, log_prob, True)


@frozen
class _Forgetful(UncachedSampler):
    """A mutant whose cache is not used."""


def test_a_mislabelled_number_of_evaluations_is_caught():
    with pytest.raises(GateError, match="nfe says 2, and the program has 4 evaluations"):
        gates.check_evaluations(pieces(_Mislabelled(MASKED, 12, 4), masked_params()))


def test_a_schedule_that_is_ignored_is_caught():
    sampler = _Hasty(MASKED, 12, 4)
    with pytest.raises(GateError, match="after round 1 the schedule says 11 hidden tokens"):
        gates.check_schedule(sampler, masks_of(sampler, masked_params()))


def test_a_cache_that_is_not_used_is_caught(monkeypatch):
    params = random_params(SIZES)
    gates.check_cache(pieces(AutoregressiveSampler(CAUSAL, 0, 12), params))
    monkeypatch.setattr(gates, "UncachedSampler", type("Other", (), {}))
    with pytest.raises(GateError, match="the cache is not used"):
        gates.check_cache(pieces(_Forgetful(CAUSAL, 0, 12), params))


def test_a_loss_below_that_of_a_perfect_network_is_caught():
    gates.check_law({})
    gates.check_law({"kl": 1.0, "kl_perfect": 1.0})
    with pytest.raises(GateError, match="less than a perfect network"):
        gates.check_law({"kl": 0.9, "kl_perfect": 1.0})


def test_samples_that_differ_are_caught():
    tokens = np.arange(40).reshape(4, 10)
    gates.check_same("again", tokens, tokens.copy())
    with pytest.raises(GateError, match="again: 2 of 4 samples differ"):
        gates.check_same("again", tokens, np.where(np.arange(4)[:, None] < 2, 0, tokens))
    with pytest.raises(GateError, match="again"):
        gates.check_same("again", tokens, tokens.astype(np.float32))


def test_sampling_without_a_cache_draws_the_same():
    params, keys = random_params(SIZES), sampling.sample_keys(3, 0, 16)
    cached = sampling.generate(AutoregressiveSampler(CAUSAL, 0, 12), params, keys)
    again = sampling.generate(UncachedSampler(CAUSAL, 0, 12), params, keys)
    gates.check_same("without a cache", np.asarray(cached), np.asarray(again))
    with pytest.raises(ValueError, match="longer than the context"):
        UncachedSampler(CAUSAL, 0, 13)


def test_the_exact_network_draws_the_images_it_knows():
    process = DiffusionConfig(timesteps=100, schedule="cosine", prediction="v")
    images = np.sign(np.random.default_rng(0).normal(size=(7, 4, 4, 3))).astype(np.float32)
    model = DiffusionModel(ExactNetwork(process, 7), process, (4, 4, 3))
    sampler = DiffusionSampler(model, DDIM(steps=20, spacing="trailing"))
    drawn = sampling.generate(sampler, {"images": images}, sampling.sample_keys(0, 0, 64))
    errors = np.square(np.asarray(drawn)[:, None] - images[None]).mean((2, 3, 4))
    assert errors.min(1).max() < 1e-3
    assert len(np.unique(errors.argmin(1))) == 7
    with pytest.raises(ValueError, match="mean alone"):
        ExactNetwork(DiffusionConfig(variance="learned"), 7)


@pytest.mark.parametrize(
    "kind", ["rounds", "one by one", "uncached", "next scale", "diffusion", "latent"]
)
def test_the_evaluations_of_a_loop_stand_alone(kind):
    """They take all operations of the network, and nothing else."""
    if kind == "rounds":
        sampler, params = MaskGIT(MASKED, 12, 4), masked_params()
    elif kind == "one by one":
        sampler, params = AutoregressiveSampler(CAUSAL, 0, 12), random_params(SIZES)
    elif kind == "uncached":
        sampler, params = UncachedSampler(CAUSAL, 0, 12), random_params(SIZES)
    elif kind == "next scale":
        sampler, params = next_scale()
    elif kind == "latent":
        model = ParallelModel(MASKED.network, 12, "eos", LatentConfig("gaussian", 3))
        sampler, params = ParallelSampler(model, one_shot(model)), model.init(jax.random.key(0))
    else:
        unet = UNetNetwork(UNetConfig(widths=(8,), blocks=1, attention=(), groups=4))
        model = DiffusionModel(unet, DiffusionConfig(timesteps=20), (4, 4, 3))
        sampler, params = DiffusionSampler(model, DDIM(steps=5)), model.init(jax.random.key(0))
    whole = pieces(sampler, params, 2)
    alone = operations.count(evaluations_alone(sampler), whole.prepared, whole.state)
    assert 0.9 * whole.operations <= alone <= 1.1 * whole.operations


def test_the_rounds_of_a_draft_stand_alone():
    """One round takes all operations of draft and model; there are as many as the state had."""
    longer = dataclasses.replace(SIZES, context=20)
    model = AutoregressiveModel(TokenNetwork(longer))
    sampler = SpeculativeSampler(model, model, 0, 12, 3)
    params = {"target": random_params(longer), "draft": random_params(longer, 2)}
    keys = sampling.sample_keys(0, 0, 2)
    (state,) = sampling.stream(sampler, params, keys, every=12)
    alone, prepared = evaluations_alone(sampler), sampler.prepare(params)
    one_round = operations.count(sampler.step, prepared, state, np.int32(0))
    assert operations.count(alone, prepared, state) == one_round
    counted, calls = counting_evaluations(sampler, lambda: calls.append(None)), []
    jax.block_until_ready(jax.jit(evaluations_alone(counted))(prepared, state))
    jax.effects_barrier()
    assert len(calls) == int(state.rounds.max()) < 12


def test_scales_are_written_out_and_count_their_own_operations():
    """A step of a number that is known has no branches, and fewer positions at coarse scales."""
    sampler, params = next_scale()
    whole = pieces(sampler, params, 1)
    assert sampling.written_out(sampler)
    traced = jax.ShapeDtypeStruct((), np.int32)
    largest = operations.count(sampler.step, whole.prepared, whole.state, traced)
    each = [
        operations.count(functools.partial(sampler.step, i=i), whole.prepared, whole.state)
        for i in range(3)
    ]
    assert each == sorted(each)
    assert each[0] < each[2] / 8
    assert each[2] == largest
    assert whole.operations == sum(each) < 3 * largest / 2
