"""The configuration of priors over the codes of an autoencoder; importing this loads no jax."""

import pathlib
from typing import Annotated, Literal

from gen_jax import data as image_data
from gen_jax.config import Choice, RunConfig, TrainConfig, frozen
from gen_jax.data import DataConfig, Images
from gen_jax.models.autoregressive.config import (
    DecodingOptions,
    SamplingOptions,
    SpeculativeOptions,
)
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.solvers import DDIM, Solver
from gen_jax.models.masked.config import IterativeOptions, MaskConfig, MaskGITOptions
from gen_jax.models.options import Usual, UsualSampler
from gen_jax.models.vq.config import (
    AutoencoderOptions,
    CodebookOptions,
    GaussianOptions,
    QuantiserOptions,
)
from gen_jax.nn.config import AutoencoderConfig, TransformerConfig, UNetConfig
from gen_jax.tasks.autoencoder.config import check_images
from gen_jax.tasks.images.config import LabelledSampleConfig, check_label

__all__ = ["EvaluateConfig", "Prior", "TwoStageConfig"]

Prior = Literal["ar", "masked", "one_shot", "next_scale", "diffusion"]

_SAMPLERS = {
    "ar": (SamplingOptions(), SamplingOptions),
    "masked": (MaskGITOptions(rounds=8, choice_temperature=0.5), IterativeOptions),
    "one_shot": (MaskGITOptions(rounds=1), MaskGITOptions),
    "next_scale": (SamplingOptions(), SamplingOptions),
    "diffusion": (DDIM(steps=20, spacing="trailing", clip=False), Solver),
}  # the usual one, and all that fit


@frozen
class EvaluateConfig:
    """What to measure."""

    images: int = 1024
    """Test images for the likelihood (all of them when there are fewer)."""
    draws: int = 16
    """Masked priors: stratified draws of the number of hidden codes, per image."""
    batch: int = 64
    """Images at a time."""

    def __post_init__(self):
        if min(self.images, self.draws, self.batch) < 1:
            raise ValueError("evaluate.images, .draws and .batch must be at least 1")


@frozen
class TwoStageConfig(RunConfig):
    """A prior over the codes or latents of an autoencoder, from data to samples."""

    prior: Prior = "ar"
    """Codes one at a time; in rounds; all at once; a scale at a time, for a codebook with scales;
    or latents by diffusion."""
    data: DataConfig = DataConfig()
    autoencoder: str = ""
    """Work directory of a trained autoencoder; empty to train one first, as `coder`, `quantiser`,
    `objective` and `coder_train` say."""
    coder: AutoencoderConfig = AutoencoderConfig()
    quantiser: QuantiserOptions = CodebookOptions()
    """What stands between encoder and decoder."""
    objective: AutoencoderOptions = AutoencoderOptions()
    coder_train: TrainConfig = TrainConfig()
    model: TransformerConfig = TransformerConfig()
    """Of code sequences. Vocabulary and context come from the autoencoder."""
    mask: MaskConfig = MaskConfig()
    unet: UNetConfig = UNetConfig()
    """Of latents. Channels come from the autoencoder."""
    diffusion: DiffusionConfig = DiffusionConfig()
    conditional: bool = False
    """Condition on the classes of the data."""
    sample: LabelledSampleConfig = LabelledSampleConfig()
    sampler: Annotated[Choice, Usual, DecodingOptions, IterativeOptions, Solver] = UsualSampler()
    """How the prior is drawn from; it must fit the prior. The usual one draws codes as they are, or
    takes MaskGIT in 8 rounds (choice_temperature 0.5) or one, or DDIM in 20 steps."""
    evaluate: EvaluateConfig = EvaluateConfig()

    task = "two_stage"
    make_task = "gen_jax.tasks.two_stage.task:make"
    commands = ("train", "sample", "evaluate", "export")
    resumable = (*RunConfig.resumable, "autoencoder")

    def __post_init__(self):
        model = self.model
        own = model.vocabulary or model.extra_inputs or model.memory or model.window
        if own or model.groups:
            raise ValueError(
                "model.vocabulary, extra_inputs, memory, window and groups follow from the codes "
                "and the prior: leave them as they are"
            )
        _, fitting = _SAMPLERS[self.prior]
        speculative = isinstance(self.sampler, SpeculativeOptions)
        if speculative or not isinstance(self.sampler, UsualSampler | fitting):
            raise ValueError(f"--sampler {self.sampler.name} is not for --prior {self.prior}")
        if self.mask.halton and self.prior != "masked":
            raise ValueError(f"mask.halton is for --prior masked, not for --prior {self.prior}")
        if self.prior == "one_shot" and getattr(self.sampler, "rounds", 1) != 1:
            raise ValueError("--prior one_shot draws in one round: set sampler.rounds to 1")
        if self.prior == "diffusion":
            self.decoding.check(self.diffusion)
            if self.decoding.clip:
                raise ValueError("latents are not in [-1, 1]: set --no-sampler.clip")
            if self.decoding.guidance != 1.0 and not self.conditional:
                raise ValueError("sampler.guidance needs a conditional prior")
            if self.diffusion.variance == "learned":
                raise ValueError(
                    "diffusion of latents has no bound for a learned variance: choose a fixed one"
                )
        elif isinstance(self.quantiser, GaussianOptions) and not self.autoencoder:
            raise ValueError(f"--prior {self.prior} is over codes, and a kl latent has none")
        if self.prior == "next_scale" and not (self.quantiser.scales or self.autoencoder):
            raise ValueError(
                "--prior next_scale is over the codes of scales: set quantiser.scales, as in 1 2 4"
            )
        if self.data.palette:
            raise ValueError("an autoencoder takes RGB images: leave data.palette off")
        if not self.autoencoder:
            self.objective.critic.check(self.coder_train)
        check_label(self.sample.label, self.conditional, 0)

    @property
    def decoding(self) -> Choice:
        """The options of the sampler, the usual one of the prior where none is named."""
        usual, _ = _SAMPLERS[self.prior]
        return usual if isinstance(self.sampler, UsualSampler) else self.sampler

    def load(self, workdir: pathlib.Path, phases: tuple[str, ...]) -> dict[str, Images]:
        """The images of the splits that the phases need; refuses those that do not fit.

        The training set is needed to evaluate, too, for what the decoder leaves.
        """
        splits = self.splits(phases)
        splits += ("train",) if "test" in splits and "train" not in splits else ()
        images = {split: image_data.load(self.data, split) for split in splits}
        if not self.autoencoder:
            for some in images.values():
                check_images(some, self.coder, self.quantiser, self.objective)
        return images
