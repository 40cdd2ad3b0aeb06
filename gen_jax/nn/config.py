"""Sizes of the networks, as frozen dataclasses; importing this loads nothing heavy."""

import dataclasses
from typing import Literal

from gen_jax.config import frozen

__all__ = [
    "DEEPEST",
    "LARGEST",
    "AutoencoderConfig",
    "DiscriminatorConfig",
    "TransformerConfig",
    "UNetConfig",
]

# Larger sizes are no networks: memory, or the compiler, would end the process.
LARGEST, DEEPEST = 2**20, 2**8


@frozen
class UNetConfig:
    """The UNet of Ho et al. 2020 (2006.11239); the defaults are its CIFAR-10 network."""

    widths: tuple[int, ...] = (128, 256, 256, 256)
    """Channels at each resolution, finest first; the resolution halves from one to the next."""
    blocks: int = 2
    """Residual blocks at each resolution on the way down (one more on the way up)."""
    attention: tuple[int, ...] = (16,)
    """Heights of the feature maps that get self-attention, beside the middle."""
    head_width: int = 0
    """Channels of one attention head; 0 for a single head."""
    groups: int = 32
    """Groups of the group normalisation."""
    norm_epsilon: float = 1e-6
    """Added to the variance in group normalisation."""
    dropout: float = 0.1
    """Dropout rate inside the residual blocks."""
    patch: int = 1
    """Side of the square of pixels folded into channels before the network."""
    channels: int = 3
    """Channels of the image."""
    out_channels: int = 3
    """Channels predicted; twice the image's when the variance is learned."""
    classes: int = 0
    """Number of classes; 0 for an unconditional network."""
    null_class: bool = True
    """A network with classes also knows "no class", which guidance needs."""
    time_shift: float = 1.0
    """The embedding of time has frequencies 1e4 ** (-i / (D / 2 - time_shift)), D the width."""
    time_order: Literal["sin_cos", "cos_sin"] = "sin_cos"
    """Whether the sines or the cosines come first in that embedding."""
    downsampling: Literal["end", "both"] = "end"
    """Where strided convolutions pad: at the end of each axis, or at both sides."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of convolutions and matrix products; parameters and statistics stay float32."""

    def __post_init__(self):
        _check_convolutional(self, ("blocks", "groups", "patch", "channels", "out_channels"))
        if self.widths[0] < 4 or self.widths[0] % 2:
            raise ValueError(
                f"the first width, that of the time embedding, must be even and at least 4, "
                f"got {self.widths}"
            )
        if self.classes < 0:
            raise ValueError(f"classes must not be negative, got {self.classes}")
        if not 0 <= self.time_shift < self.widths[0] // 2:
            raise ValueError(
                f"time_shift must be in [0, {self.widths[0] // 2}), half of the first width, got "
                f"{self.time_shift}"
            )
        if min(self.attention, default=1) < 1:
            raise ValueError(f"attention is at heights of at least 1, got {self.attention}")

    @property
    def stride(self) -> int:
        """The factor by which the coarsest feature map is smaller than the image."""
        return self.patch * 2 ** (len(self.widths) - 1)


@frozen
class AutoencoderConfig:
    """The convolutional autoencoder of VQGAN (2012.09841) and latent diffusion (2112.10752)."""

    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    """Channels at each resolution, finest first; the resolution halves from one to the next."""
    blocks: int = 2
    """Residual blocks at each resolution of the encoder (one more in the decoder)."""
    attention: tuple[int, ...] = ()
    """Levels, 0 for the finest, that get self-attention after each block."""
    middle_attention: bool = True
    """Self-attention at the coarsest level, between two more blocks."""
    head_width: int = 0
    """Channels of one attention head; 0 for a single head."""
    groups: int = 32
    """Groups of the group normalisation."""
    norm_epsilon: float = 1e-6
    """Added to the variance in group normalisation."""
    dropout: float = 0.0
    """Dropout rate inside the residual blocks."""
    patch: int = 1
    """Side of the square of pixels folded into channels before the network."""
    channels: int = 3
    """Channels of the image."""
    latent_channels: int = 0
    """Channels of the encoder's output before it is projected to what the quantiser reads; 0 for as
    many."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of convolutions and matrix products; parameters and statistics stay float32."""

    def __post_init__(self):
        _check_convolutional(self, ("blocks", "groups", "patch", "channels"))
        if self.latent_channels < 0:
            raise ValueError(f"latent_channels must not be negative, got {self.latent_channels}")
        if not set(self.attention) <= set(range(len(self.widths))):
            raise ValueError(
                f"attention names levels from 0 to {len(self.widths) - 1}, got {self.attention}"
            )

    @property
    def stride(self) -> int:
        """The factor by which the latent is smaller than the image."""
        return self.patch * 2 ** (len(self.widths) - 1)

    def check_size(self, height: int, width: int) -> None:
        """Raises a ValueError where images of this size do not fit."""
        if height % self.stride or width % self.stride or not min(height, width):
            raise ValueError(
                f"images of {height} x {width} do not fit the autoencoder: height and width must "
                f"be multiples of {self.stride} (patch x 2 per level of widths)"
            )


@frozen
class DiscriminatorConfig:
    """The critic of patches of pix2pix (1611.07004), as VQGAN has it (2012.09841)."""

    width: int = 64
    """Channels of the first layer; they double from one to the next, up to eight times as many."""
    layers: int = 3
    """Convolutions of stride 2. A logit sees patches of 16, 34, 70 or 142 pixels with 1 to 4."""
    groups: int = 32
    """Groups of the group normalisation, which stands in all layers but the first and the last."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of convolutions; parameters, statistics and logits stay float32."""

    def __post_init__(self):
        for name in ("width", "layers", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _check_largest(self)
        if 2 * self.width % self.groups:
            raise ValueError(f"groups ({self.groups}) must divide twice the width ({self.width})")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each layer but the last, which has one for the logit."""
        return tuple(self.width * min(2**i, 8) for i in range(self.layers + 1))

    def logits_shape(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the logits of an image of this size.

        Raises:
          ValueError: the image is too small to have any.
        """
        shape = (height >> self.layers) - 2, (width >> self.layers) - 2
        if min(shape) < 1:
            raise ValueError(
                f"images of {height} x {width} are too small for a discriminator of {self.layers} "
                f"layers, which needs {3 * 2**self.layers} pixels a side: take fewer layers"
            )
        return shape


def _check_largest(config):
    """Refuses whole numbers that are larger than those of any network."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        most = DEEPEST if field.name in ("layers", "blocks") else LARGEST
        largest = max(value, default=0) if isinstance(value, tuple) else value
        if isinstance(largest, int) and largest > most:
            raise ValueError(f"{field.name} must be at most {most}, got {value}")


def _check_convolutional(config, at_least_one):
    """What both networks of images ask of their sizes."""
    if not config.widths or min(config.widths) < 1:
        raise ValueError(f"widths must be positive and not empty, got {config.widths}")
    for name in at_least_one:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    _check_largest(config)
    for name in ("head_width", "norm_epsilon"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")
    for width in config.widths:
        if width % config.groups:
            raise ValueError(f"groups ({config.groups}) must divide every width {config.widths}")
        if config.head_width and width % config.head_width:
            raise ValueError(
                f"head_width ({config.head_width}) must divide every width {config.widths}"
            )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {config.dropout}")


@frozen
class TransformerConfig:
    """A pre-norm transformer; the defaults are the form of GPT-2 (Radford et al. 2019).

    The modern form (Llama: Touvron et al. 2023, 2302.13971) is position="rotary", norm="rms",
    activation="swiglu", bias=False, tied=False.
    """

    vocabulary: int = 0
    """Tokens V; 0 where the data decides, which no network can be made of."""
    context: int = 1024
    """Longest sequence of inputs L."""
    layers: int = 12
    """Blocks of attention and feed-forward network."""
    width: int = 768
    """Width D of the residual stream."""
    heads: int = 12
    """Heads H of the queries."""
    kv_heads: int = 0
    """Heads Hkv of keys and values, each of heads / kv_heads queries; 0 for as many as heads."""
    head_width: int = 0
    """Width Dh of one head; 0 for width / heads."""
    mlp_dim: int = 0
    """Size of the feed-forward network; 0 for 4 x width."""
    position: Literal["learned", "rotary", "both", "none"] = "learned"
    """Table of positions added to the tokens, rotation of queries and keys, both, or neither."""
    rotary_base: float = 10_000.0
    """Longest wavelength of the rotation, over 2 pi."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm, or RMSNorm (Zhang & Sennrich 2019)."""
    norm_epsilon: float = 1e-5
    """Added to the variance, or the mean square."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """GELU in its tanh form, or a gate with SiLU (Shazeer 2020)."""
    bias: bool = True
    """Biases in matrix products and in LayerNorm."""
    tied: bool = True
    """Predict with the transposed table of tokens rather than with a matrix of its own."""
    causal: bool = True
    """A position sees itself and those before it; else all."""
    window: int = 0
    """Inputs that a position sees, its own included; 0 for all. Causal networks only."""
    groups: tuple[int, ...] = ()
    """Sizes of groups of inputs, first to last: a position sees its own group and those before.
    Empty for groups of one. Causal networks only."""
    extra_inputs: int = 0
    """Tokens from V up that are read but never predicted: a start, or one per class, or a mask."""
    memory: bool = False
    """Cross-attention to a second sequence in every block."""
    dropout: float = 0.0
    """Dropout rate of embeddings and of the output of each branch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products; parameters, normalisation, softmax and logits stay float32."""

    def __post_init__(self):
        for name in ("context", "layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _check_largest(self)
        for name in ("vocabulary", "kv_heads", "head_width", "mlp_dim", "window", "extra_inputs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("norm_epsilon", "rotary_base"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.head_width and self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        if self.heads % self.key_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.window and not self.causal:
            raise ValueError("window is for causal networks; set it to 0")
        if self.groups and (not self.causal or self.window):
            raise ValueError("groups are for causal networks without a window; leave them empty")
        if self.groups and (min(self.groups) < 1 or sum(self.groups) != self.context):
            raise ValueError(
                f"groups must be at least 1 each, and make up the context of {self.context}: got "
                f"{self.groups}"
            )
        if self.position in ("rotary", "both") and self.head_size % 2:
            raise ValueError(f"rotary positions need an even head width, got {self.head_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def key_heads(self) -> int:
        """Heads Hkv of keys and values."""
        return self.kv_heads or self.heads

    @property
    def head_size(self) -> int:
        """Width Dh of one head."""
        return self.head_width or self.width // self.heads

    @property
    def mlp_size(self) -> int:
        """Size of the feed-forward network."""
        return self.mlp_dim or 4 * self.width
