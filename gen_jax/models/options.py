"""What the options of several families share; importing this loads nothing heavy."""

from typing import ClassVar

from gen_jax.config import Choice, frozen

__all__ = ["Usual", "UsualSampler", "check_not_negative", "check_temperature"]


class Usual(Choice):
    """The choice that names no sampler."""


@frozen
class UsualSampler(Usual):
    """The sampler that is usual for the strategy."""

    name: ClassVar[str] = "usual"


_LEAST_TEMPERATURE = 1e-6  # that the kernels divide logits by


def check_temperature(name: str, value: int | float) -> None:
    """Refuses a temperature of tokens that is neither 0 nor at least 1e-6.

    Raises:
      ValueError: it is neither.
    """
    if value and not value >= _LEAST_TEMPERATURE:
        raise ValueError(f"{name} must be 0 or at least {_LEAST_TEMPERATURE}, got {value}")


def check_not_negative(name: str, value: int | float) -> None:
    """Refuses a number that is not at least 0.

    Raises:
      ValueError: it is below 0, or not a number.
    """
    if not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")
