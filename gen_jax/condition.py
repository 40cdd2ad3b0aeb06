"""What a sample is conditioned on, in one type for all samplers.

A sampler translates a condition into what its network reads: a class label is a token of its own
for an autoregressive model, an embedding for a diffusion model. Those who call a sampler need not
know how.
"""

import dataclasses
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Shaped

__all__ = ["Condition"]


@no_type_check  # jax also makes trees of this class whose leaves are no arrays
@flax.struct.dataclass
class Condition:
    """What each of B samples is conditioned on; every field is an array [B, ...], or None.

    Attributes:
      label: a class, from 0 up.
      prompt: tokens that the sample goes on from, aligned at their ends: row b holds its prompt in
        its last `prompt_length[b]` columns.
      prompt_length: of each prompt; None where all are as long as `prompt` is wide.
      source: tokens of a sequence to be translated, from its first column on.
      source_length: of each source; None where all are as long as `source` is wide.
      length: of the sample, where it is known beforehand.
      given: values of the sample that are known beforehand, at their positions.
      is_given: which values of `given` are known; the others are not read.
    """

    label: Int[jax.Array | np.ndarray, " B"] | None = None
    prompt: Int[jax.Array | np.ndarray, "B P"] | None = None
    prompt_length: Int[jax.Array | np.ndarray, " B"] | None = None
    source: Int[jax.Array | np.ndarray, "B M"] | None = None
    source_length: Int[jax.Array | np.ndarray, " B"] | None = None
    length: Int[jax.Array | np.ndarray, " B"] | None = None
    given: Shaped[jax.Array | np.ndarray, "B ..."] | None = None
    is_given: Bool[jax.Array | np.ndarray, "B ..."] | None = None

    def fields(self) -> dict[str, jax.Array | np.ndarray]:
        """The arrays that there are, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def check(self, taker: str, accepted: tuple[str, ...], batch: int) -> None:
        """Refuses what a sampler does not take.

        Args:
          taker: the name of the sampler, for the message.
          accepted: the names of the fields that it reads.
          batch: B, the number of samples.

        Raises:
          ValueError: a field is not accepted, is no array of integers where it must be, has another
            number of rows than there are samples, or comes without the field that it belongs to.
        """
        fields = self.fields()
        for name, value in fields.items():
            if name not in accepted:
                takes = f"it takes {', '.join(accepted)}" if accepted else "it takes none"
                raise ValueError(f"{taker} has no use for the condition {name!r}: {takes}")
            if not hasattr(value, "shape") or not value.shape or value.shape[0] != batch:
                shape = list(value.shape) if hasattr(value, "shape") else type(value).__name__
                raise ValueError(
                    f"the condition {name!r} must be an array of {batch} rows, one for each "
                    f"sample, not {shape}"
                )
            if name == "is_given":
                if value.dtype != bool:
                    raise ValueError(f"the condition 'is_given' must be bool, not {value.dtype}")
            elif name != "given" and not jnp.issubdtype(value.dtype, jnp.integer):
                raise ValueError(f"the condition {name!r} must be integers, not {value.dtype}")
        for name, whole in _BELONGS_TO.items():
            if name in fields and whole not in fields:
                raise ValueError(f"the condition {name!r} goes with {whole!r}: give both")


_BELONGS_TO = {
    "prompt_length": "prompt",
    "source_length": "source",
    "is_given": "given",
    "given": "is_given",
}


def is_concrete(value) -> bool:
    """Whether the values of an array are known now, that is, not traced by jax."""
    return value is not None and not isinstance(value, jax.core.Tracer)
