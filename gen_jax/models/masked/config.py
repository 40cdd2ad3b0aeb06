"""Choices of masked models and of samplers in rounds; importing this loads nothing heavy."""

from typing import ClassVar, Literal

from gen_jax.config import Choice, frozen
from gen_jax.models.options import check_not_negative, check_temperature

__all__ = [
    "AbsorbingDiffusionOptions",
    "HaltonOptions",
    "IterativeOptions",
    "MaskConfig",
    "MaskGITOptions",
    "MaskPredictOptions",
    "RandomOrderOptions",
    "RepairOptions",
    "ScheduleName",
]

ScheduleName = Literal[
    "cosine", "linear", "square", "cubic", "square_root", "exponential", "logarithmic"
]
"""Names of `schedules.SCHEDULES`."""


@frozen
class MaskConfig:
    """How a masked model is trained."""

    counts: Literal["uniform", "cosine", "all"] = "uniform"
    """How many of L tokens are hidden: uniform over 1 .. L (Mask-Predict; the loss is then the
    bound of absorbing diffusion), or L cos(pi u / 2), rounded up, u uniform (MaskGIT), or all (for
    one round alone)."""
    halton: float = 0.0
    """Share of the sequences of which the last tokens in Halton's order are hidden, for
    --sampler halton, below 1; of the others random ones are, for all samplers."""

    def __post_init__(self):
        if not 0 <= self.halton < 1:
            raise ValueError(f"mask.halton must be in [0, 1), got {self.halton}")
        if self.halton and self.counts == "all":
            raise ValueError("with all tokens hidden there is no order: set mask.halton to 0")


@frozen
class IterativeOptions(Choice):
    """What the options of all samplers in rounds share.

    The class attribute `name` is the choice on the command line, and `make` names the function
    (options, model, length) -> sampler.
    """

    make: ClassVar[str]

    rounds: int = 10
    """Rounds of decoding. A sampler of fewer positions than this has one round for each."""

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")


@frozen
class MaskPredictOptions(IterativeOptions):
    """Mask-Predict (Ghazvininejad et al. 2019): likeliest tokens, the least sure masked again."""

    name: ClassVar[str] = "mask_predict"
    make: ClassVar[str] = "gen_jax.models.masked.samplers:MaskPredict.from_options"

    schedule: ScheduleName = "linear"
    """How many tokens are masked after each round."""


@frozen
class MaskGITOptions(IterativeOptions):
    """MaskGIT (Chang et al. 2022): drawn tokens, of which the most confident stay."""

    name: ClassVar[str] = "maskgit"
    make: ClassVar[str] = "gen_jax.models.masked.samplers:MaskGIT.from_options"

    schedule: ScheduleName = "cosine"
    """How many tokens are masked after each round."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest tokens."""
    choice_temperature: float = 4.5
    """Scale of the Gumbel noise of the confidence before the first round; 0 for none."""

    def __post_init__(self):
        super().__post_init__()
        check_temperature("temperature", self.temperature)
        check_not_negative("choice_temperature", self.choice_temperature)


@frozen
class _GroupOptions(IterativeOptions):
    schedule: ScheduleName = "cosine"
    """How many tokens are masked after each round."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest tokens."""

    def __post_init__(self):
        super().__post_init__()
        check_temperature("temperature", self.temperature)


@frozen
class RandomOrderOptions(_GroupOptions):
    """Groups of positions in a random order, another for each sample."""

    name: ClassVar[str] = "random_order"
    make: ClassVar[str] = "gen_jax.models.masked.samplers:OrderedGroups.from_options"


@frozen
class HaltonOptions(_GroupOptions):
    """Groups of positions in the order of Halton's sequence (Besnier et al. 2025)."""

    name: ClassVar[str] = "halton"
    make: ClassVar[str] = "gen_jax.models.masked.samplers:OrderedGroups.halton"

    schedule: ScheduleName = "cubic"
    """How many tokens are masked after each round."""


@frozen
class AbsorbingDiffusionOptions(IterativeOptions):
    """Ancestral sampling of absorbing diffusion (Austin et al. 2021), with remasking or without."""

    name: ClassVar[str] = "absorbing"
    make: ClassVar[str] = "gen_jax.models.masked.samplers:AbsorbingDiffusion.from_options"

    schedule: ScheduleName = "linear"
    """Expected share of tokens that are masked after each round."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest tokens."""
    remask: float = 0.0
    """Share of the largest rate of remasking that keeps the schedule (Wang et al. 2025), 0 to 1."""

    def __post_init__(self):
        super().__post_init__()
        check_temperature("temperature", self.temperature)
        if not 0 <= self.remask <= 1:
            raise ValueError(f"remask must be in [0, 1], got {self.remask}")


@frozen
class RepairOptions(IterativeOptions):
    """A one-shot draft, then rounds that erase tokens and draw them anew."""

    name: ClassVar[str] = "repair"
    make: ClassVar[str] = "gen_jax.models.masked.samplers:Repair.from_options"

    erase: Literal["random", "least_likely"] = "random"
    """Which tokens are erased: random ones, or the one that is the least likely given the rest."""
    count: int = 1
    """How many random tokens a round erases."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest tokens."""

    def __post_init__(self):
        super().__post_init__()
        check_temperature("temperature", self.temperature)
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.erase == "least_likely" and self.count > 1:
            raise ValueError("the least likely token is erased alone: set count to 1")
