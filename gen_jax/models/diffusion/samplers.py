"""The sampler of diffusion models: one loop, whatever the solver."""

import functools
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

import kernels
from gen_jax.condition import Condition
from gen_jax.config import frozen
from gen_jax.keys import fold_in_each
from gen_jax.models.contract import check_label, check_params
from gen_jax.models.diffusion.losses import DiffusionModel
from gen_jax.models.diffusion.schedule import step_variances
from gen_jax.models.diffusion.solvers import Solver
from kernels.threefry import normal_each, split_each

__all__ = ["DiffusionSampler", "DiffusionState"]


@no_type_check  # jax also makes trees of this class whose leaves are no arrays
@flax.struct.dataclass
class DiffusionState:
    """What there is between two steps.

    Attributes:
      x: the noisy image, float32.
      x0: the clean image that was predicted in the last step, float32.
      keys: one per sample, from which the noise of every step is drawn.
      label: int32, or None.
    """

    x: Float[Array, "B height width C"]
    x0: Float[Array, "B height width C"]
    keys: Key[Array, " B"]
    label: Int[Array, " B"] | None


@frozen
class DiffusionSampler:
    """Draws images with a trained model; see `gen_jax.sampling.Sampler`.

    With guidance (2207.12598) the conditional and the unconditional prediction are one evaluation
    of twice the batch.

    Attributes:
      model: the network and its process.
      solver: the time steps, how to go from one to the next, clipping and guidance.

    Raises:
      ValueError: at construction, where the solver does not fit the process (see
        `Solver.check`).
    """

    model: DiffusionModel
    solver: Solver

    def __post_init__(self):
        self.solver.check(self.model.process)

    @property
    def nfe(self) -> int:
        """Sequential evaluations of the network."""
        return self.solver.steps

    @property
    def steps(self) -> int:
        """Trips of the loop."""
        return self.solver.steps

    @property
    def conditions(self) -> tuple[str, ...]:
        """The label, where the network has classes."""
        return ("label",) if self.model.classes else ()

    @functools.cached_property
    def timesteps(self) -> Int[np.ndarray, " S"]:
        """The time steps visited, [steps] int64, decreasing."""
        return self.solver.timesteps(self.model.process.timesteps)

    @functools.cached_property
    def coefficients(self) -> kernels.StepCoefficients:
        """The update of every step, each entry [steps] float32."""
        table = self.solver.table(self.model.process)._asdict()
        return kernels.StepCoefficients(
            **{name: np.asarray(entry, np.float32) for name, entry in table.items()}
        )

    def check(self, params: Any, cond: Condition) -> None:
        """Refuses what does not fit, before the loop; see `Sampler`.

        Raises:
          ValueError: the parameters are those of another network, a label is no class of the
            model, or there are none where guidance or the network needs them.
        """
        check_params(self.model, params)
        check_label(cond, self.model.classes)
        if self.model.classes and not self.model.null_class and cond.label is None:
            raise ValueError("the network needs a label for each sample: give Condition(label=...)")
        if self.solver.guidance != 1.0 and cond.label is None:
            raise ValueError(
                f"guidance {self.solver.guidance} needs a label for each sample: give "
                "Condition(label=...) to a model with classes, or leave guidance at 1"
            )

    def prepare(self, params: Any) -> Any:
        """The network's own preparation, where it has one; see `Sampler`."""
        prepare = getattr(self.model.network, "prepare", None)
        return params if prepare is None else prepare(params)

    def init(self, params: Any, keys: Key[Array, " B"], cond: Condition) -> DiffusionState:
        """Noise x_T from the first half of each key; see `Sampler`."""
        del params
        noise_keys, keys = split_each(keys, 2)
        x = normal_each(noise_keys, self.model.shape)
        label = None if cond.label is None else jnp.asarray(cond.label).astype(jnp.int32)
        return DiffusionState(x=x, x0=jnp.zeros_like(x), keys=keys, label=label)

    def step(self, params: Any, state: DiffusionState, i: int | Int[Array, ""]) -> DiffusionState:
        """One evaluation of the network and one update; see `Sampler`."""
        coefficients = jax.tree.map(lambda column: jnp.asarray(column)[i], self.coefficients)
        t = jnp.full(state.x.shape[:1], jnp.asarray(self.timesteps, jnp.int32)[i])
        output, variance_output = self._predict(params, state.x, t, state.label)
        if self.solver.reverse_variance and variance_output is not None:
            deviation = self._learned_deviation(i, variance_output)
            coefficients = coefficients._replace(next_noise=coefficients.next_noise * deviation)
        x, x0 = kernels.diffusion_step(
            state.x,
            output,
            coefficients,
            keys=fold_in_each(state.keys, i) if self.solver.noisy else None,
            history=state.x0 if self.solver.multistep else None,
            clip=1.0 if self.solver.clip else None,
        )
        return state.replace(x=x, x0=x0)

    def finish(self, params: Any, state: DiffusionState) -> Float[Array, "B height width C"]:
        """The images, float32, about in [-1, 1]; see `Sampler`."""
        del params
        return state.x

    @staticmethod
    def trajectory(
        state: DiffusionState,
    ) -> tuple[Float[Array, "B height width C"], Float[Array, "B height width C"]]:
        """(x, x0) of a state: what `sampling.generate(..., trajectory=sampler.trajectory)` keeps.

        It is one function for all samplers, so that it does not compile anew.
        """
        return state.x, state.x0

    def _predict(self, params, x, t, label):
        if self.solver.guidance == 1.0:
            return self.model.predict(params, x, t, label)
        pair = jnp.concatenate([label, jnp.full_like(label, -1)])
        twice = jnp.concatenate([x, x]), jnp.concatenate([t, t])
        both, variance_output = self.model.predict(params, *twice, pair)
        conditional, unconditional = jnp.split(both, 2)
        guided = unconditional + self.solver.guidance * (conditional - unconditional)
        if variance_output is not None:  # guidance is of the mean, not of the variance
            variance_output = jnp.split(variance_output, 2)[0]
        return guided, variance_output

    def _learned_deviation(self, i, variance_output):
        # 2102.09672 eq. 15, for the betas of the sub-sequence.
        small, large = step_variances(*self.solver.alpha_bars(self.model.process))
        small[-1] = large[-1]  # the last step adds no noise; keep the logarithm finite
        log_small, log_large = (jnp.asarray(np.log(v), jnp.float32)[i] for v in (small, large))
        share = (variance_output + 1) / 2
        return jnp.exp(0.5 * (share * log_large + (1 - share) * log_small))
