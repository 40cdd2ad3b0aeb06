"""The configuration of autoencoders of images, and their data; importing this loads no jax."""

import pathlib

from gen_jax import data as image_data
from gen_jax.config import RunConfig, frozen
from gen_jax.data import DataConfig, Images
from gen_jax.models.vq.config import AutoencoderOptions, CodebookOptions, QuantiserOptions
from gen_jax.nn.config import AutoencoderConfig

__all__ = ["AutoencoderRunConfig", "EvaluateConfig", "check_images"]


@frozen
class EvaluateConfig:
    """What to measure."""

    images: int = 1024
    """Test images to encode and decode (all of them when there are fewer)."""
    batch: int = 64
    """Images at a time."""
    shown: int = 12
    """Test images in reconstruction.png and codes.png."""

    def __post_init__(self):
        if min(self.images, self.batch, self.shown) < 1:
            raise ValueError("evaluate.images, .batch and .shown must be at least 1")


def check_images(
    images: Images,
    model: AutoencoderConfig,
    quantiser: QuantiserOptions,
    objective: AutoencoderOptions,
) -> None:
    """Raises a ValueError where an autoencoder of these sizes cannot take the images."""
    height, width, channels = images.images.shape[1:]
    if channels != model.channels:
        raise ValueError(f"the images have {channels} channels, the model takes {model.channels}")
    model.check_size(height, width)
    quantiser.check_size(height // model.stride, width // model.stride)
    objective.critic.check_size(height, width)


@frozen
class AutoencoderRunConfig(RunConfig):
    """An autoencoder from data to codes and back."""

    data: DataConfig = DataConfig()
    model: AutoencoderConfig = AutoencoderConfig()
    quantiser: QuantiserOptions = CodebookOptions()
    """What stands between encoder and decoder."""
    objective: AutoencoderOptions = AutoencoderOptions()
    evaluate: EvaluateConfig = EvaluateConfig()

    task = "autoencoder"
    make_task = "gen_jax.tasks.autoencoder.task:make"
    commands = ("train", "evaluate", "export")

    def __post_init__(self):
        if self.data.palette:
            raise ValueError("an autoencoder takes RGB images: leave data.palette off")
        self.objective.critic.check(self.train)

    def load(self, workdir: pathlib.Path, phases: tuple[str, ...]) -> dict[str, Images]:
        """The images of the splits that the phases need; refuses those that do not fit."""
        splits = {split: image_data.load(self.data, split) for split in self.splits(phases)}
        for images in splits.values():
            check_images(images, self.model, self.quantiser, self.objective)
        return splits
