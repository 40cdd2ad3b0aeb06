"""What every model is: a frozen dataclass with the same few methods, whatever its family."""

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from gen_jax import keys as key_streams
from gen_jax.condition import Condition, is_concrete
from gen_jax.trees import named_leaves

__all__ = ["Model", "abstract_params", "check_label", "check_params"]


@runtime_checkable
class Model(Protocol):
    """A model: frozen and hashable, so that it is static under `jit`.

    Models whose likelihood is exact also have `log_prob(params, batch) -> float32 [B]`, in nats. A
    model whose loss compares every example with the same further arrays of the batch names those in
    an attribute `shared`.
    """

    def init(self, key: Key[Array, ""]) -> Any:
        """Fresh float32 parameters."""

    def loss(
        self, params: Any, batch: dict[str, Array], keys: Key[Array, " B"]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean loss over the examples of a batch, and further metrics.

        Args:
          params: of `init`.
          batch: arrays [B, ...] by name; each family says which it reads.
          keys: one per example, for all that is random in the loss.
        """


@functools.lru_cache(maxsize=64)
def abstract_params(model: Model) -> Any:
    """The shapes and dtypes of the parameters of a model, without any computation."""
    return jax.eval_shape(lambda: model.init(key_streams.root(0, "init")))


def check_params(model: Model, params: Any) -> None:
    """Refuses a tree that is not of the parameters of a model.

    Raises:
      ValueError: a leaf is missing, unknown, or of another shape; the first of them is named.
    """
    expected, given = (
        {name: np.shape(leaf) for name, leaf in named_leaves(tree).items()}
        for tree in (abstract_params(model), params)
    )
    name = type(model).__name__
    if expected and given.keys() == {f"params.{leaf}" for leaf in expected}:
        raise ValueError(
            f'parameters of {name} were given as {{"params": ...}}: pass what is in it'
        )
    problems = [f"{leaf} is missing" for leaf in expected if leaf not in given]
    problems += [f"{leaf} is unknown" for leaf in given if leaf not in expected]
    problems += [
        f"{leaf} has the shape {list(given[leaf])}, not {list(shape)}"
        for leaf, shape in expected.items()
        if leaf in given and given[leaf] != shape
    ]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ValueError(f"parameters do not fit the {name}: {problems[0]}{more}")


def check_label(cond: Condition, classes: int) -> None:
    """Refuses labels that are not in [0, classes), where their values are known.

    Raises:
      ValueError: the model has no classes, or a label is none of them.
    """
    if cond.label is None:
        return
    if not classes:
        raise ValueError("a label was given, but the model has no classes")
    if is_concrete(cond.label):
        label = jnp.asarray(cond.label)
        if bool((label < 0).any() | (label >= classes).any()):
            raise ValueError(
                f"labels must be in 0 to {classes - 1}, got {int(label.min())} to "
                f"{int(label.max())}"
            )
