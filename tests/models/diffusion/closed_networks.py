"""Networks in closed form: what they predict is known, and they compile in no time."""

import dataclasses

import jax
import jax.numpy as jnp

from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.process import at, target
from gen_jax.models.diffusion.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class GaussianNetwork:
    """The exact predictor for pixels drawn from N(0, deviation^2).

    Its parameters are the deviation, and what it predicts for a variance that is learned, so that
    one program serves all of them.
    """

    process: DiffusionConfig

    def init(self, key, height, width):
        del key, height, width
        params = {"deviation": jnp.float32(1.0)}
        learned = self.process.variance == "learned"
        return params | ({"variance": jnp.float32(0.0)} if learned else {})

    def __call__(self, params, x, t, label=None, keys=None):
        schedule = Schedule(self.process)
        alpha_bar = at(schedule.alpha_bar, t)
        total = alpha_bar * params["deviation"] ** 2 + 1 - alpha_bar
        epsilon = jnp.sqrt(1 - alpha_bar) * x / total
        x0 = jnp.sqrt(alpha_bar) * params["deviation"] ** 2 * x / total
        output = target(schedule, x0, t, epsilon)
        if self.process.variance != "learned":
            return output
        return jnp.concatenate([output, params["variance"] + 0 * x], axis=-1)


@dataclasses.dataclass(frozen=True)
class _Classes:
    classes: int


@dataclasses.dataclass(frozen=True)
class LabelledNetwork:
    """Not linear in x, other at every time step and for every class, with dropout-like noise.

    Attributes:
      config: says how many classes there are.
      learned: whether it predicts a variance too.
    """

    config: _Classes = _Classes(3)
    learned: bool = False

    def init(self, key, height, width):
        del height, width
        # Row `classes` is that of no class.
        table = jax.random.normal(key, (self.config.classes + 1,))
        return {"slope": jnp.float32(0.3), "table": table}

    def __call__(self, params, x, t, label=None, keys=None):
        label = jnp.full(t.shape, -1) if label is None else label
        shift = params["table"][jnp.where(label < 0, self.config.classes, label)]
        shift = shift + 0.1 * jnp.sin(t / 37.0)
        output = params["slope"] * x + 0.1 * jnp.sin(3 * x) + 0.2 * shift[:, None, None, None]
        if self.learned:
            output = jnp.concatenate([output, jnp.tanh(output + x)], axis=-1)
        return output


@dataclasses.dataclass(frozen=True)
class FunctionNetwork:
    """A function (params, x, t, label) -> output as a network."""

    function: object

    def init(self, key, height, width):
        del key, height, width
        return {"scale": jnp.float32(1.0)}

    def __call__(self, params, x, t, label=None, keys=None):
        return self.function(params, x, t, label)
