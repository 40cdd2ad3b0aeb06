"""Strategies of one's own, of which two do not work; see test_compare."""

import dataclasses

import jax.numpy as jnp

from gen_jax.comparison.strategy import Strategy
from gen_jax.config import frozen
from gen_jax.models.masked import MaskGIT


@frozen
class LeftToRight(MaskGIT):
    """Confidence is higher further to the left."""

    def step(self, params, state, i):
        """Fills all masked positions, and keeps the first ones."""
        tokens, log_prob, _ = self._fill(params, state, i, self.temperature)
        keep = jnp.arange(self.length)[None] < self.length - self._masked_after(state, i)[:, None]
        return self._reveal(state, tokens, log_prob, keep)


@frozen
class Short(LeftToRight):
    """Forgets half of the sample."""

    def finish(self, params, state):
        """The first half."""
        return super().finish(params, state)[:, : self.length // 2]


def of(kind):
    """What makes a sampler of this kind of the masked run."""

    def make(loaded):
        run = loaded["masked"]
        return kind(run.model, run.sampler.length, 2), run.params

    return make


def broken(loaded):
    """A defect of the plugin."""
    raise RuntimeError("this plugin has a defect")


_BASE = Strategy(
    name="left",
    title="left to right",
    group="mine",
    does="Reveals the left half first.",
    loses="What the left half shares.",
    runs=("masked",),
    make=of(LeftToRight),
)
STRATEGIES = (
    _BASE,
    dataclasses.replace(_BASE, name="short", title="half of it", make=of(Short)),
    dataclasses.replace(_BASE, name="broken", title="broken", make=broken),
)
