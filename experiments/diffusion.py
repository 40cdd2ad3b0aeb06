"""The diffusion family: its configuration, and what its runs do in each phase.

Presets are in the experiments. jax is imported by the phases, not by this module.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments import images as image_files
from experiments import run
from gen_jax import config as config_lib
from gen_jax import data, pictures
from gen_jax.config import DistributedConfig, TrainConfig, to_dict
from gen_jax.data import DataConfig, ShapesSet
from gen_jax.models.diffusion.config import DiffusionConfig, SolverConfig
from gen_jax.models.diffusion.time_grid import TimeGrid
from gen_jax.nn.config import UNetConfig


@dataclasses.dataclass(frozen=True)
class SampleConfig(run.SampleConfig, SolverConfig):
    """What to draw, and how."""

    label: int = -1
    """Class of all samples of a conditional model; -1 for all classes in turn."""

    def __post_init__(self):
        SolverConfig.__post_init__(self)
        run.SampleConfig.__post_init__(self)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to measure."""

    images: int = 256
    """Test images for bits per dimension (all of them when there are fewer)."""
    draws: int = 32
    """Stratified draws of the time step per image; 0 for all T terms of the bound."""
    batch: int = 64
    """Images at a time."""

    def __post_init__(self):
        if self.images < 1 or self.batch < 1 or self.draws < 0:
            raise ValueError("evaluate.images and .batch must be at least 1, .draws at least 0")


@dataclasses.dataclass(frozen=True)
class Config:
    """A diffusion experiment from data to samples."""

    workdir: str
    """Directory of the run: records, checkpoints, pictures. A run in it is resumed."""
    data: DataConfig = DataConfig()
    model: UNetConfig = UNetConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    distributed: DistributedConfig = DistributedConfig()
    conditional: bool = False
    """Condition on the labels of the data (set model.classes to their number)."""
    pretrained: str = ""
    """Folder of a UNet2DModel of diffusers: train starts from it, sample draws from it."""

    def __post_init__(self):
        TimeGrid(self.sample.steps, self.sample.spacing).timesteps(
            self.diffusion.timesteps, skip_last=self.sample.solver == "dpm_solver_pp"
        )
        if self.conditional != bool(self.model.classes):
            raise ValueError(
                "conditional and model.classes go together: set both or neither "
                f"(conditional is {self.conditional}, model.classes is {self.model.classes})"
            )
        if self.sample.guidance != 1.0 and not self.conditional:
            raise ValueError("sample.guidance needs a conditional model")
        if self.sample.guidance != 1.0 and not self.diffusion.label_dropout:
            raise ValueError("sample.guidance needs a model trained with diffusion.label_dropout")
        learned = self.diffusion.variance == "learned"
        if self.model.out_channels != self.model.channels * (2 if learned else 1):
            raise ValueError(
                f"model.out_channels must be {self.model.channels * (2 if learned else 1)} with "
                f"diffusion.variance {self.diffusion.variance}, got {self.model.out_channels}"
            )
        if not -1 <= self.sample.label < max(self.model.classes, 1):
            raise ValueError(f"sample.label must be -1 or a class, got {self.sample.label}")
        if self.data.palette:
            raise ValueError("a diffusion model takes RGB images: leave data.palette off")


class Run(run.Run):
    """One run of a diffusion experiment."""

    results = ("samples.png", "samples.npz", "samples", "trajectory.png", "trajectory.gif")

    @functools.cached_property
    def train_set(self) -> data.Images:
        """The training split of the data."""
        return data.load(self.config.data, "train")

    @functools.cached_property
    def test_set(self) -> data.Images:
        """The test split of the data."""
        return data.load(self.config.data, "test")

    @functools.cached_property
    def network(self):
        """The network, as pure functions."""
        from gen_jax.nn.unet import Denoiser

        return Denoiser(self.config.model)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images that the restored parameters are for."""
        return tuple(self.stored["image_shape"])

    def check(self) -> None:
        """Refuses images that the network does not take."""
        for split in self.splits:
            _check_data(self.config, self.train_set if split == "train" else self.test_set)

    def init_params(self, key):
        """Initial parameters for images of the training split."""
        return self.network.init(key, *self.train_set.images.shape[1:3])

    def loss(self, params, batch, keys):
        """As `training.Loss`."""
        from gen_jax.models.diffusion import losses as diffusion

        return diffusion.loss(self.config.diffusion, self.network, params, batch, keys)

    def train_batch(self, step, shard):
        """Images, and labels for a conditional model."""
        train, flip = self.config.train, self.config.data.flip
        whole = self.train_set.batch(train.seed, step, train.batch, flip=flip, shard=shard)
        return whole if self.config.conditional else {"image": whole["image"]}

    def record(self) -> dict:
        """The shape of the images."""
        return {"image_shape": self.train_set.images.shape[1:]}

    def template(self, record):
        """Shapes and dtypes of the parameters for images of the shape in the record."""
        import jax

        from gen_jax import keys

        sides = record["image_shape"][:2]
        return jax.eval_shape(lambda: self.network.init(keys.root(0, "init"), *sides))

    def published(self):
        """Weights of a UNet2DModel of diffusers, which must be our network."""
        from gen_jax import interop

        unet, params = interop.load_diffusers_unet(self.config.pretrained)
        ours = dataclasses.replace(self.config.model, dropout=0.0, dtype="float32")
        differing = config_lib.differences(to_dict(ours), to_dict(unet.config), ("dropout",))
        if differing:
            raise ValueError(
                f"{self.config.pretrained} is another network than model ({'; '.join(differing)})"
            )
        folder = Path(self.config.pretrained)
        folder = folder if (folder / "config.json").exists() else folder / "unet"  # a pipeline's
        side = json.loads((folder / "config.json").read_text()).get("sample_size")
        return params, {"image_shape": (side, side, self.config.model.channels)}

    def export(self, params) -> dict:
        """Writes the averaged parameters as a folder of diffusers."""
        from gen_jax import interop

        path = self.workdir.path / "diffusers"
        interop.save_diffusers_unet(path, self.config.model, params, sample_size=self.shape[0])
        return {"exported": str(path)}

    def sample(self, params) -> dict:
        """Draws the samples and the pictures; rates and latency."""
        from gen_jax.models.diffusion.samplers import make_sampler

        choice = self.config.sample
        sampler = make_sampler(self.network, self.config.diffusion, self.shape, choice)
        samples, report = self.draw(sampler, params, self._labels)
        self._write_samples(samples, sampler.nfe)
        self._write_trajectory(sampler, params)
        return {"solver": choice.solver} | report

    def evaluate(self, params) -> dict:
        """Bits per dimension on the test set, and the quality of the samples drawn last."""
        images = self.kept_samples()["images"]
        report = self.validate(params)
        if self.config.data.name == "shapes":
            entropy = ShapesSet(self.config.data.size).entropy
            report["bits_per_dim_floor"] = entropy / np.log(2) / np.prod(self.shape)
        return report | image_files.score(images, self.config.data, self.test_set)

    def validate(self, params) -> dict:
        """The variational bound on test images: its mean, parts and standard error."""
        import jax

        from gen_jax import keys, parallel

        choice, test_set, mesh = self.config.evaluate, self.test_set, parallel.local_mesh()
        number = min(choice.images, len(test_set))
        rows = test_set.indices(0, 0, number)
        parts = []
        size = -(-min(choice.batch, number) // mesh.size) * mesh.size
        params = parallel.replicate(mesh, jax.device_get(params))
        hidden = not sys.stderr.isatty()
        for first in tqdm(range(0, number, size), "evaluating", unit="batch", disable=hidden):
            chosen = rows[np.minimum(np.arange(first, first + size), number - 1)]
            batch = {"image": test_set.images[chosen]}
            if self.config.conditional:
                batch["label"] = test_set.labels[chosen]
            batch = parallel.split(mesh, batch)
            part = self._bound(params, batch, keys.stream(0, "evaluate", first, size))
            part = jax.device_get(part)
            parts.append({name: value[: number - first] for name, value in part.items()})
        values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        report = {
            name if name == "bits_per_dim" else f"bits_{name}": float(value.mean(dtype=np.float64))
            for name, value in values.items()
        }
        error = values["bits_per_dim"].std(ddof=1) / np.sqrt(number) if number > 1 else np.nan
        return report | {"bits_per_dim_standard_error": float(error), "test_images": number}

    @functools.cached_property
    def _bound(self):
        import jax

        from gen_jax.models.diffusion import losses as diffusion

        draws = self.config.evaluate.draws or None
        return jax.jit(
            functools.partial(
                diffusion.bits_per_dim, self.config.diffusion, self.network, draws=draws
            )
        )

    def _labels(self, number):
        if not self.config.conditional:
            return None
        return image_files.labels(number, self.config.sample.label, self.config.model.classes)

    def _write_samples(self, samples, nfe):
        image_files.save_samples(self.workdir.path, pictures.to_uint8(samples))
        labels = self._labels(len(samples))
        self.keep_samples(images=samples, nfe=nfe, **({} if labels is None else {"labels": labels}))

    def _write_trajectory(self, sampler, params):
        from gen_jax import sampling

        keys = sampling.sample_keys(self.config.sample.seed, 0, 8)
        _, states = sampling.generate(sampler, params, keys, self._labels(8), trajectory=True)
        columns = np.unique(np.linspace(0, sampler.steps - 1, 10).round().astype(int))
        noisy, clean = np.asarray(states.x), np.asarray(states.x0)
        rows = [frames[columns, i] for i in range(4) for frames in (noisy, clean)]
        scale = image_files.scale(self.shape[0])
        picture = pictures.grid(
            pictures.to_uint8(np.concatenate(rows)), columns=len(columns), scale=scale
        )
        pictures.save_png(self.workdir.path / "trajectory.png", picture)
        moments = np.unique(np.linspace(0, sampler.steps - 1, 40).round().astype(int))
        frames = [
            pictures.grid(
                pictures.to_uint8(np.concatenate([noisy[m], clean[m]])), columns=8, scale=scale
            )
            for m in moments
        ]
        pictures.save_gif(self.workdir.path / "trajectory.gif", frames, 80)


def _check_data(config, images):
    height, width, channels = images.images.shape[1:]
    if channels != config.model.channels:
        raise ValueError(f"the images have {channels} channels, model.channels is "
                         f"{config.model.channels}")  # fmt: skip
    stride = config.model.stride
    if height % stride or width % stride:
        raise ValueError(
            f"images of {height} x {width} do not fit the model: height and width must be "
            f"multiples of {stride} (model.patch x 2 per level of model.widths)"
        )
    heights = [
        height // config.model.patch // 2**level for level in range(len(config.model.widths))
    ]
    if not set(config.model.attention) <= set(heights):
        raise ValueError(
            f"model.attention {config.model.attention} names feature maps that are not there; "
            f"their heights are {heights}"
        )
    if config.conditional and config.model.classes != len(images.label_names):
        raise ValueError(
            f"the data has {len(images.label_names)} classes, model.classes is "
            f"{config.model.classes}"
        )
