"""Images token by token in raster order: PixelCNN's factorisation (van den Oord et al. 2016,
1601.06759) with a transformer, as Image GPT (Chen et al. 2020) and Sparse Transformer (Child et
al. 2019, 1904.10509) do.

    python -m experiments.gpt_pixels
        Preset tiny: 16-pixel shapes of 7 colours, two CPU cores, no network. The likelihood is
        exact, and so is its floor, ln 648 = 6.474 nats per image.

    python -m experiments.gpt_pixels --preset cifar --data.dir DIR
        CIFAR-10, 3072 tokens of 256 values, for as long as a CPU can be spared.

    python -m experiments.gpt_pixels --preset cifar_gpu --data.dir DIR
        CIFAR-10 for one accelerator, with dense attention and 51M parameters. Published for
        Sparse Transformer, which has 59M in 128 layers: 2.80 bits/dim.

DIR holds cifar-10-batches-bin. What was measured, with hardware and time, is in docs/results.md.
"""

import dataclasses
import functools
import sys

import numpy as np

from experiments import autoregressive, common, run
from experiments import images as image_files
from gen_jax import data, pictures
from gen_jax.config import DistributedConfig, TrainConfig
from gen_jax.data import DataConfig, PixelSequences, ShapesSet
from gen_jax.data.shapes import PALETTE
from gen_jax.models.autoregressive.config import TokenChoice
from gen_jax.nn.config import TransformerConfig

_MOMENTS, _ROWS, _EMPTY = 8, 4, 64  # of trajectory.png: columns, rows, what is not drawn yet


@dataclasses.dataclass(frozen=True)
class SampleConfig(run.SampleConfig, TokenChoice):
    """What to draw, and how."""

    label: int = -1
    """Class of all samples of a conditional model; -1 for all classes in turn."""

    def __post_init__(self):
        TokenChoice.__post_init__(self)
        run.SampleConfig.__post_init__(self)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to measure."""

    images: int = 648
    """Test images for the likelihood (all of them when there are fewer)."""
    batch: int = 64
    """Images at a time."""

    def __post_init__(self):
        if self.images < 1 or self.batch < 1:
            raise ValueError("evaluate.images and evaluate.batch must be at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """A model of pixels from data to samples."""

    workdir: str
    """Directory of the run: records, checkpoints, pictures. A run in it is resumed."""
    data: DataConfig = DataConfig()
    model: TransformerConfig = TransformerConfig(extra_inputs=1)
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    distributed: DistributedConfig = DistributedConfig()
    conditional: bool = False
    """Begin each image with the input of its class (set model.extra_inputs to their number)."""

    pretrained = ""  # no field: there are no weights of this form to start from

    @property
    def vocabulary(self) -> int:
        """Values of a token."""
        return len(PALETTE) if self.data.palette else 256

    def __post_init__(self):
        model = self.model
        if not model.causal or model.memory:
            raise ValueError("a model of pixels is causal and without memory: leave model.causal "
                             "and model.memory as they are")  # fmt: skip
        if model.vocabulary not in (0, self.vocabulary):
            raise ValueError(f"model.vocabulary must be {self.vocabulary}, or 0 for the same, got "
                             f"{model.vocabulary}")  # fmt: skip
        if not self.conditional and model.extra_inputs != 1:
            raise ValueError("model.extra_inputs must be 1, the start of every image, got "
                             f"{model.extra_inputs}; more are for --conditional")  # fmt: skip
        if self.conditional and model.extra_inputs < 1:
            raise ValueError("conditional needs model.extra_inputs, the number of classes")
        classes = model.extra_inputs if self.conditional else 0
        if not -1 <= self.sample.label < max(classes, 1):
            raise ValueError(f"sample.label must be -1 or a class, got {self.sample.label}")


class Run(autoregressive.Run):
    """One run of an experiment with pixels."""

    results = ("samples.png", "samples.npz", "samples", "trajectory.png")

    @functools.cached_property
    def train_set(self) -> PixelSequences:
        """The training split of the data."""
        return PixelSequences(data.load(self.config.data, "train"))

    @functools.cached_property
    def test_set(self) -> PixelSequences:
        """The test split of the data."""
        return PixelSequences(data.load(self.config.data, "test"))

    @property
    def model(self) -> TransformerConfig:
        """The network, with the vocabulary of the data."""
        return dataclasses.replace(self.config.model, vocabulary=self.config.vocabulary)

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C), or (H, W) of palette indices, of the images that were trained on."""
        return tuple(self.stored["image_shape"])

    def check(self) -> None:
        """Refuses images that are not of the network's length or classes."""
        for split in self.splits:
            sequences = self.train_set if split == "train" else self.test_set
            if sequences.length != self.model.context:
                raise ValueError(
                    f"the images have {sequences.length} tokens "
                    f"({' x '.join(map(str, sequences.shape))}), model.context is "
                    f"{self.model.context}: set it to the same"
                )
            classes = len(sequences.images.label_names)
            if self.config.conditional and classes != self.model.extra_inputs:
                raise ValueError(
                    f"the data has {classes} classes, model.extra_inputs is "
                    f"{self.model.extra_inputs}"
                )

    def train_batch(self, step, shard):
        """Images as tokens, and labels for a conditional model."""
        train, flip = self.config.train, self.config.data.flip
        whole = self.train_set.batch(train.seed, step, train.batch, flip=flip, shard=shard)
        return whole if self.config.conditional else {"tokens": whole["tokens"]}

    def record(self) -> dict:
        """The shape of the images."""
        return {"image_shape": self.train_set.shape}

    def validate(self, params) -> dict:
        """The exact likelihood of test images, its standard error, and its floor where known."""
        choice, images = self.config.evaluate, self.test_set.images
        number = min(choice.images, len(images))
        rows = images.indices(0, 0, number)
        label = images.labels[rows] if self.config.conditional else None
        tokens = self.test_set.tokens_of(images.images[rows])
        nats = self.nats(params, tokens, batch=choice.batch, label=label)
        bits = 1 / np.log(2) / tokens.shape[1]
        error = nats.std(ddof=1) / np.sqrt(number) if number > 1 else np.nan
        report = {
            "bits_per_dim": float(nats.mean() * bits),
            "bits_per_dim_standard_error": float(error * bits),
            "nats_per_image": float(nats.mean()),
            "test_images": number,
        }
        if self.config.data.name == "shapes":
            floor = ShapesSet(self.config.data.size).entropy
            if self.config.conditional:  # the label tells one of equally many images
                floor -= np.log(self.model.extra_inputs)
            report |= {
                "bits_per_dim_floor": float(floor * bits),
                "nats_per_image_floor": float(floor),
                "nats_over_floor": float(nats.mean() / floor),
            }
        return report

    def evaluate(self, params) -> dict:
        """The likelihood of the test set, and the quality of the samples drawn last."""
        images = self.kept_samples()["images"]
        if not self.config.data.palette:
            images = images / np.float32(127.5) - 1
        report = self.validate(params)
        return report | image_files.score(images, self.config.data, self.test_set.images)

    def sample(self, params) -> dict:
        """Draws the samples and the pictures; rates and latency."""
        from gen_jax.models.autoregressive.losses import AutoregressiveSampler

        sampler = AutoregressiveSampler(self.network, 1, self.model.context, self.choice)
        tokens, report = self.draw(sampler, params, self._starts)
        images = tokens.reshape(-1, *self.shape).astype(np.uint8)
        labels = {"labels": self._labels(len(images))} if self.config.conditional else {}
        self.keep_samples(images=images, nfe=sampler.nfe, **labels)
        image_files.save_samples(self.workdir.path, to_rgb(images))
        picture = filling(images[:_ROWS], image_files.scale(self.shape[0]))
        pictures.save_png(self.workdir.path / "trajectory.png", picture)
        rate = report["samples_per_second"] * sampler.tokens
        return report | {"sampled_tokens_per_second": rate}

    def _labels(self, number):
        if not self.config.conditional:
            return np.zeros(number, np.int32)
        return image_files.labels(number, self.config.sample.label, self.model.extra_inputs)

    def _starts(self, number):
        from gen_jax.models.autoregressive import losses as autoregressive

        starts = self.model.vocabulary + self._labels(number)
        return autoregressive.pad_prompts(self.network, starts[:, None])


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Images uint8 [B, H, W, C] as they are, palette indices uint8 [B, H, W] by their colours."""
    return PALETTE[images] if images.ndim == 3 else images


def filling(images: np.ndarray, scale: int) -> np.ndarray:
    """A row for each image, which fills up in raster order from left to right.

    Args:
      images: uint8 [B, H, W, C], or palette indices uint8 [B, H, W].
      scale: pixels drawn for one of an image.

    Returns:
      uint8 [H', W', 3]; what is not drawn yet is grey.
    """
    drawn = to_rgb(images)
    height, width = drawn.shape[1:3]
    place = np.arange(height * width).reshape(height, width, 1)
    ends = np.linspace(0, height * width, _MOMENTS + 1).round().astype(int)[1:]
    frames = np.stack([np.where(place < end, drawn, _EMPTY) for end in ends], axis=1)
    frames = frames.reshape(-1, *drawn.shape[1:]).astype(np.uint8)
    return pictures.grid(frames, columns=_MOMENTS, scale=scale)


TINY = Config(
    workdir="runs/gpt_pixels_tiny",
    data=DataConfig(name="shapes", size=16, palette=True),
    model=TransformerConfig(
        vocabulary=7, context=256, layers=3, width=64, heads=2, position="both", rotary_base=1000.0,
        tied=False, extra_inputs=1,
    ),
    train=TrainConfig(
        steps=3000, batch=8, learning_rate=3e-3, warmup=100, decay="cosine", final_rate=0.02,
        beta2=0.98, ema=0.98, ema_warmup=True, log_every=50, checkpoint_every=1000,
    ),
    sample=SampleConfig(number=256, micro_batch=128),
)  # fmt: skip

CIFAR = Config(
    workdir="runs/gpt_pixels_cifar",
    data=DataConfig(name="cifar10", flip=True),
    model=TransformerConfig(
        vocabulary=256, context=3072, window=192, layers=4, width=128, heads=4, extra_inputs=1,
        position="both", bias=False,
    ),
    train=TrainConfig(
        steps=2000, batch=4, learning_rate=2e-3, warmup=100, decay="cosine", final_rate=0.05,
        beta2=0.99, weight_decay=0.01, ema=0.995, ema_warmup=True, log_every=10,
        checkpoint_every=100, evaluate_every=400,
    ),
    sample=SampleConfig(number=16, micro_batch=16),
    evaluate=EvaluateConfig(images=64, batch=4),
)  # fmt: skip

CIFAR_GPU = Config(
    workdir="runs/gpt_pixels_cifar_gpu",
    data=DataConfig(name="cifar10", flip=True),
    model=TransformerConfig(
        vocabulary=256, context=3072, layers=16, width=512, heads=4, extra_inputs=1, dropout=0.1,
        position="both", dtype="bfloat16",
    ),
    train=TrainConfig(
        steps=48_000, batch=128, accumulate=16, learning_rate=4e-4, warmup=5000, decay="cosine",
        beta2=0.99, weight_decay=0.01, ema=0.999, ema_warmup=True, checkpoint_every=1000,
        evaluate_every=2000,
    ),
    sample=SampleConfig(number=256, micro_batch=256),
    evaluate=EvaluateConfig(images=10_000, batch=16),
)  # fmt: skip

EXPERIMENT = common.Experiment(
    name="gpt_pixels",
    about="Images pixel by pixel: the embedded shapes set (the default), or CIFAR-10.",
    presets={"tiny": TINY, "cifar": CIFAR, "cifar_gpu": CIFAR_GPU},
    commands=run.commands("gpt_pixels", Run, ("train", "sample", "evaluate")),
)


def main() -> int:
    """Runs the command line; the exit code."""
    return common.main(EXPERIMENT)


if __name__ == "__main__":
    sys.exit(main())
