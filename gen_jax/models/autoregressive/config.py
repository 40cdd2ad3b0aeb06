"""How tokens are chosen, as frozen dataclasses; importing this module loads no jax."""

from typing import ClassVar, Literal

from gen_jax.config import Choice, frozen
from gen_jax.models.options import check_temperature

__all__ = ["BeamSearchOptions", "DecodingOptions", "SamplingOptions", "SpeculativeOptions"]


class DecodingOptions(Choice):
    """The choice of a strategy of decoding.

    Attributes:
      make: "module:function", which makes the sampler from (options, model, prompt_length, tokens,
        eos): an `AutoregressiveModel`, the numbers of given and of new tokens, and the token that
        ends a sample, or None.
      deterministic: whether the strategy is a search, which draws nothing at random.
    """

    make: ClassVar[str]
    deterministic: ClassVar[bool]


@frozen
class SamplingOptions(DecodingOptions):
    """How the next token is drawn from its distribution; the defaults draw from it as it is.

    The filters apply in this order: temperature, top_k, top_p (of what top_k kept), min_p.
    """

    temperature: float = 1.0
    """The logits are divided by it; 0 takes the most probable token (greedy)."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens with this mass (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Keep tokens at least this share as probable as the most probable one (Nguyen et al. 2024)."""
    weights: Literal["own", "int8"] = "own"
    """Type of the matrices that every token reads: that of the network, or int8 with a scale for
    each output channel, which is another distribution, a little, and is read in less time on
    accelerators."""

    name: ClassVar[str] = "sample"
    make: ClassVar[str] = (
        "gen_jax.models.autoregressive.samplers:AutoregressiveSampler.from_options"
    )
    deterministic: ClassVar[bool] = False

    def __post_init__(self):
        check_temperature("temperature", self.temperature)
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; 1 keeps all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}; 0 keeps all tokens")

    @property
    def choice(self) -> dict[str, int | float]:
        """The same as arguments of `kernels.sample_logits`."""
        names = ("temperature", "top_k", "top_p", "min_p")
        return {name: getattr(self, name) for name in names}


@frozen
class SpeculativeOptions(SamplingOptions):
    """Speculative decoding (Leviathan et al. 2023, 2211.17192): a smaller model drafts tokens,
    which are kept or replaced so that the distribution is the larger one's."""

    draft: str = ""
    """Work directory of the run of the smaller model, of the same tokens."""
    drafted: int = 4
    """Tokens drafted in one round."""

    name: ClassVar[str] = "speculative"
    make: ClassVar[str] = (
        "gen_jax.models.autoregressive.speculative:SpeculativeSampler.from_options"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.drafted < 1:
            raise ValueError(f"drafted must be at least 1, got {self.drafted}")


@frozen
class BeamSearchOptions(DecodingOptions):
    """Beam search for the most probable continuation."""

    beams: int = 4
    """Hypotheses kept."""
    length_penalty: float = 1.0
    """Exponent of the length that log-probabilities are divided by; 0 for none."""

    name: ClassVar[str] = "beam_search"
    make: ClassVar[str] = "gen_jax.models.autoregressive.beam_search:BeamSearchSampler.from_options"
    deterministic: ClassVar[bool] = True

    def __post_init__(self):
        if self.beams < 1:
            raise ValueError(f"beams must be at least 1, got {self.beams}")
