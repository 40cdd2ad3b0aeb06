"""Sizes of the networks, as frozen dataclasses; importing this loads nothing heavy."""

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
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
    compute: Literal["float32", "bfloat16"] = "float32"
    """Type of convolutions and matrix products; parameters and statistics stay float32."""

    def __post_init__(self):
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be positive and not empty, got {self.widths}")
        if self.widths[0] < 4 or self.widths[0] % 2:
            raise ValueError(
                f"the first width, that of the time embedding, must be even and at least 4, "
                f"got {self.widths}"
            )
        for name in ("blocks", "groups", "patch", "channels", "out_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("head_width", "classes", "norm_epsilon"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite, not negative, got {getattr(self, name)}")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"groups ({self.groups}) must divide every width {self.widths}")
            if self.head_width and width % self.head_width:
                raise ValueError(
                    f"head_width ({self.head_width}) must divide every width {self.widths}"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def stride(self) -> int:
        """The factor by which the coarsest feature map is smaller than the image."""
        return self.patch * 2 ** (len(self.widths) - 1)
