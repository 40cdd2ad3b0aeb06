"""The sampling loop with samplers that may stop early, and streams of any sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax import sampling
from gen_jax.condition import Condition


def identity(state):
    return state


@dataclasses.dataclass(frozen=True)
class Countdown:
    """Counts each sample down to nothing and adds up noise; `trips` counts the steps."""

    steps: int = 10
    nfe: int = 10
    conditions = ("length",)

    def check(self, params, cond):
        pass

    def prepare(self, params):
        return params

    def init(self, params, keys, cond):
        return {
            "left": cond.length,
            "sum": jnp.zeros(len(keys)),
            "keys": keys,
            "trips": jnp.int32(0),
        }

    def step(self, params, state, i):
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i)))(state["keys"])
        going = state["left"] > 0
        return state | {
            "left": state["left"] - going,
            "sum": state["sum"] + jnp.where(going, noise, 0) * params,
            "trips": state["trips"] + 1,
        }

    def finish(self, params, state):
        return jnp.stack([state["sum"], jnp.broadcast_to(state["trips"], len(state["sum"]))])


@dataclasses.dataclass(frozen=True)
class StoppingCountdown(Countdown):
    def stopped(self, state):
        return (state["left"] == 0).all()


def test_a_loop_that_may_stop_takes_no_further_steps():
    keys = sampling.sample_keys(0, 0, 4)
    for left, trips in (([0, 0, 0, 0], 0), ([1, 6, 0, 2], 6), ([12, 0, 0, 0], 10)):
        left = Condition(length=jnp.array(left))
        whole = np.asarray(sampling.generate(Countdown(), 2.0, keys, left))
        early = np.asarray(sampling.generate(StoppingCountdown(), 2.0, keys, left))
        np.testing.assert_array_equal(early[0], whole[0])
        assert (whole[1] == 10).all()
        assert (early[1] == trips).all()
        samples, _ = sampling.generate(StoppingCountdown(), 2.0, keys, left, trajectory=identity)
        np.testing.assert_array_equal(samples[0], whole[0])


@pytest.mark.parametrize("every", [1, 4, 11])
@pytest.mark.parametrize("sampler", [Countdown(), StoppingCountdown()])
def test_a_stream_of_any_sampler(sampler, every):
    keys, left = sampling.sample_keys(0, 0, 4), Condition(length=jnp.array([1, 6, 0, 2]))
    whole = np.asarray(sampling.generate(sampler, 2.0, keys, left))
    for state in sampling.stream(sampler, 2.0, keys, left, every=every):
        last = np.asarray(sampler.finish(2.0, state))
    np.testing.assert_array_equal(last, whole)
    np.testing.assert_array_equal(left.length, [1, 6, 0, 2])


@pytest.mark.parametrize("every", [0, -1])
def test_a_stream_refuses_to_show_nothing(every):
    keys, left = sampling.sample_keys(0, 0, 1), Condition(length=jnp.array([1]))
    with pytest.raises(ValueError):
        next(sampling.stream(Countdown(), 2.0, keys, left, every=every), None)
