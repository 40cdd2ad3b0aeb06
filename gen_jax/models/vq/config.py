"""Choices of quantisers and how an autoencoder is trained; importing this loads nothing heavy."""

import math
from itertools import pairwise
from typing import ClassVar, Literal

from gen_jax.config import Choice, TrainConfig, frozen
from gen_jax.models.options import check_not_negative
from gen_jax.nn.config import DiscriminatorConfig

__all__ = [
    "AutoencoderOptions",
    "CodebookOptions",
    "CriticOptions",
    "FSQOptions",
    "GaussianOptions",
    "QuantiserOptions",
]


@frozen
class CriticOptions:
    """The second player of VQGAN (2012.09841, eq. 5 to 7): a critic of patches of images."""

    weight: float = 0.0
    """Of the adversarial term, beside its adaptive weight; 0 for no critic. VQGAN's code has 0.8
    for ImageNet."""
    start: int = 10_000
    """Steps without the adversarial term, in which the critic rests too."""
    learning_rate: float = 2e-4
    """Peak rate of the critic. Its optimiser, warm-up, decay, clipping and decay of weights are
    those of the autoencoder, counted from `start`."""
    beta1: float = 0.5
    """Decay of its first moment."""
    beta2: float = 0.9
    """Decay of its second moment."""
    network: DiscriminatorConfig = DiscriminatorConfig()

    def __post_init__(self):
        for name in ("weight", "start", "learning_rate"):
            check_not_negative(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def check(self, train: TrainConfig) -> None:
        """Raises a ValueError where training ends before the critic starts."""
        if self.weight and self.start >= train.steps:
            raise ValueError(
                f"the critic starts at step {self.start}, and training ends at {train.steps}: "
                "start it earlier, or set critic.weight to 0"
            )

    def check_size(self, height: int, width: int) -> None:
        """Raises a ValueError where images of this size are too small for the critic."""
        if self.weight:
            self.network.logits_shape(height, width)


@frozen
class AutoencoderOptions:
    """The loss of an autoencoder."""

    loss: Literal["mse", "l1"] = "mse"
    """Error of reconstruction in [-1, 1]: squared (VQ-VAE) or absolute (VQGAN, latent diffusion);
    a mean over values."""
    perceptual: float = 0.0
    """Weight of the distance of features, those of a Laplacian pyramid unless others are given from
    Python; 0 for none."""
    critic: CriticOptions = CriticOptions()

    def __post_init__(self):
        check_not_negative("perceptual", self.perceptual)


@frozen
class QuantiserOptions(Choice):
    """What stands between encoder and decoder.

    The class attribute `name` is the choice on the command line, and `make` names the class of
    `models.vq` whose only field is these options; `scales` are the sides of its maps, coarse to
    fine, where it has some.
    """

    make: ClassVar[str]
    scales: ClassVar[tuple[int, ...]] = ()

    def check_size(self, height: int, width: int) -> None:
        """Raises a ValueError where maps of latents of this size cannot be quantised."""


@frozen
class CodebookOptions(QuantiserOptions):
    """A table of K vectors, the nearest of which stands for the encoder's (VQ-VAE); or several."""

    name: ClassVar[str] = "codebook"
    make: ClassVar[str] = "gen_jax.models.vq.codebook:Codebook"

    codes: int = 512
    """Entries K of each table."""
    width: int = 64
    """Width D of the vectors."""
    depth: int = 1
    """Tables R; each after the first quantises what the ones before have left."""
    scales: tuple[int, ...] = ()
    """Sides of the square maps that a table each quantises, coarse to fine, the last one that of
    the latents (next-scale prediction); each divides the next, and may be the same. Empty for
    `depth` whole maps."""
    commitment: float = 0.25
    """Weight beta of the term that draws the encoder's vectors to their entries."""
    update: Literal["moving_average", "gradient"] = "moving_average"
    """Whether an entry is the moving average of the vectors that it stood for, or is trained by the
    gradient of its distance to them."""
    decay: float = 0.99
    """Of the moving averages."""
    epsilon: float = 1e-5
    """Laplace smoothing of the counts that the averages are divided by."""
    restart_every: int = 100
    """Steps after which entries that stood for no vector are put on vectors of the batch, first
    before step 0; 0 for never."""

    def __post_init__(self):
        for name in ("codes", "width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.scales and self.depth > 1:
            raise ValueError("there is one table a scale: leave depth at 1")
        if any(side < 1 for side in self.scales) or any(
            fine < coarse or fine % coarse for coarse, fine in pairwise(self.scales)
        ):
            raise ValueError(
                f"scales go from coarse to fine, and each divides the next: got {self.scales}"
            )
        if self.codes < 2:
            raise ValueError("a codebook of one entry tells nothing: codes must be at least 2")
        for name in ("commitment", "restart_every"):
            check_not_negative(name, getattr(self, name))
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if self.epsilon <= 0:
            raise ValueError(f"epsilon must be positive, got {self.epsilon}")

    @property
    def tables(self) -> int:
        """Tables R."""
        return len(self.scales) or self.depth

    def check_size(self, height: int, width: int) -> None:
        """Refuses latents whose sides are not those of the last scale."""
        if self.scales and {height, width} != {self.scales[-1]}:
            raise ValueError(
                f"the scales {self.scales} end at {self.scales[-1]} x {self.scales[-1]}, and the "
                f"latents are {height} x {width}"
            )


@frozen
class FSQOptions(QuantiserOptions):
    """Finite scalar quantisation: each of a few channels is rounded, and there is no table."""

    name: ClassVar[str] = "fsq"
    make: ClassVar[str] = "gen_jax.models.vq.fsq:FSQ"

    levels: tuple[int, ...] = (8, 8, 8)
    """Values of each channel, at least 2; K is their product, and D their number."""

    def __post_init__(self):
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels must be at least 2 each, and not none, got {self.levels}")
        if math.prod(self.levels) >= 2**31:
            raise ValueError(f"the codes of levels {self.levels} do not fit in 32 bits")


@frozen
class GaussianOptions(QuantiserOptions):
    """A continuous latent: the encoder gives mean and variance (the VAE of latent diffusion)."""

    name: ClassVar[str] = "kl"
    make: ClassVar[str] = "gen_jax.models.vq.gaussian:Gaussian"

    width: int = 4
    """Channels D of the latent."""
    weight: float = 1e-6
    """Of the divergence from the standard normal, summed over the latent, in a loss that is summed
    over the values of the image."""

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")
        check_not_negative("weight", self.weight)
