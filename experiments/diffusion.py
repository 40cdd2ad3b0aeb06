"""How a diffusion experiment runs: train, sample from the average, evaluate, summarise.

The configuration is here too; presets are in the experiments. jax is imported by the commands,
not by this module, so that bad options are refused first.
"""

import dataclasses
import functools
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from experiments import common
from gen_jax import data, pictures
from gen_jax.config import DistributedConfig, TrainConfig, to_dict
from gen_jax.data import DataConfig, ShapesSet
from gen_jax.models.config import DiffusionConfig, SolverConfig
from gen_jax.nn.config import UNetConfig
from gen_jax.workdir import Workdir, WorkdirError


@dataclasses.dataclass(frozen=True)
class SampleConfig(SolverConfig):
    """What to draw, and how."""

    number: int = 64
    """Samples to draw."""
    seed: int = 0
    """Seed of the samples; sample i depends on the seed and i alone."""
    micro_batch: int = 64
    """Samples drawn at a time; 1 gives the lowest latency."""
    label: int = -1
    """Class of all samples of a conditional model; -1 for all classes in turn."""

    def __post_init__(self):
        super().__post_init__()
        if self.number < 1 or self.micro_batch < 1:
            raise ValueError("sample.number and sample.micro_batch must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"sample.seed must be in [0, 2**32), got {self.seed}")


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

    def __post_init__(self):
        if self.sample.steps + (self.sample.solver == "dpm_solver_pp") > self.diffusion.timesteps:
            raise ValueError(
                f"sample.steps ({self.sample.steps}) do not fit in diffusion.timesteps "
                f"({self.diffusion.timesteps})"
            )
        if self.conditional != bool(self.model.classes):
            raise ValueError(
                "conditional and model.classes go together: set both or neither "
                f"(conditional is {self.conditional}, model.classes is {self.model.classes})"
            )
        if self.sample.guidance != 1.0 and not self.conditional:
            raise ValueError("sample.guidance needs a conditional model")
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


# What may change when a run is resumed: how long, how often, how to sample; not what is learned.
FREE = (
    "workdir", "sample.", "evaluate.", "distributed.", "data.dir", "train.log_every",
    "train.checkpoint_every", "train.evaluate_every", "train.keep", "train.max_skipped",
)  # fmt: skip


def free_keys(config: Config) -> tuple[str, ...]:
    """Keys that may change on resume; the number of steps too when the rate does not hang on it."""
    return FREE + (("train.steps",) if config.train.decay == "constant" else ())


class Run:
    """One run of an experiment in its work directory.

    Args:
      name: of the experiment's module.
      config: the whole configuration.
      workdir: its directory, locked by the caller.
      reading: whether the command needs a checkpoint that is there already.

    Raises:
      ValueError, FileNotFoundError: the data or the directory do not fit the configuration.
    """

    def __init__(self, name: str, config: Config, workdir: Workdir):
        self.name, self.config, self.workdir = name, config, workdir
        self.began = time.perf_counter()
        self.train_set = data.load(config.data, "train")
        self.shape = self.train_set.images.shape[1:]
        _check_data(config, self.train_set)
        workdir.write_config(to_dict(config), free_keys(config))
        from gen_jax import parallel
        from gen_jax.nn.unet import Denoiser

        parallel.start(config.distributed)
        self.network = Denoiser(config.model)
        import jax

        self.main = jax.process_index() == 0
        if self.main:
            print(f"{name}: {parallel.device_banner()}; {len(self.train_set)} images of "
                  f"{'x'.join(map(str, self.shape))}; {workdir.path}")  # fmt: skip

    def train(self) -> dict:
        """Trains from where the work directory left off; what it took."""
        import jax

        from gen_jax import parallel, training
        from gen_jax.models import diffusion

        config, train = self.config, self.config.train
        shard = (jax.process_index(), jax.process_count())

        def batch(step):
            whole = self.train_set.batch(
                train.seed, step, train.batch, flip=config.data.flip, shard=shard
            )
            return whole if config.conditional else {"image": whole["image"]}

        def loss(params, batch, keys):
            return diffusion.loss(config.diffusion, self.network, params, batch, keys)

        params = self.network.init(jax.random.key(train.seed), *self.shape[:2])
        try:
            trained = training.fit(
                train, loss, params, batch, self.workdir,
                mesh=parallel.data_mesh(), record={"config": to_dict(config)},
                evaluate=lambda state: self.bits_per_dim(state.ema),
            )  # fmt: skip
        except training.Interrupted as stop:
            print(f"{stop}; saved. Resume with:\n  {common.resume_command(self.name, config)}",
                  file=sys.stderr)  # fmt: skip
            raise SystemExit(128 + stop.signum) from None
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "steps": int(trained.state.step),
            "train_compile_seconds": trained.compile_seconds,
            "train_seconds": trained.seconds,
            "images_per_second": trained.examples_per_second,
        }

    def restore(self, step: int | None = None) -> dict:
        """The averaged parameters of the latest checkpoint, or of one step."""
        import jax

        from gen_jax import checkpoint

        template = jax.eval_shape(lambda: self.network.init(jax.random.key(0), *self.shape[:2]))
        restored = checkpoint.restore(self.workdir.checkpoints, {"ema": template}, step=step)
        self.step = restored.step
        return jax.device_put(restored.trees["ema"])

    def sample(self, params) -> dict:
        """Draws the samples and the pictures; rates and latency."""

        from gen_jax import parallel, sampling
        from gen_jax.models.diffusion_samplers import make_sampler

        config, choice = self.config, self.config.sample
        sampler = make_sampler(self.network, config.diffusion, self.shape, choice)
        labels = self._labels(choice.number)
        mesh = parallel.local_mesh()
        chunks = list(
            sampling.generate_many(
                sampler, params, choice.seed, choice.number, cond=labels,
                micro_batch=choice.micro_batch, mesh=mesh if mesh.size > 1 else None,
            )
        )  # fmt: skip
        samples = np.concatenate([chunk.samples for chunk in chunks])
        one = list(
            sampling.generate_many(
                sampler, params, choice.seed, 3, cond=self._labels(3), micro_batch=1,
                progress=False,
            )
        )  # fmt: skip
        self._write_samples(samples, labels, sampler.nfe)
        self._write_trajectory(sampler, params)
        seconds = sum(chunk.seconds for chunk in chunks)
        return {
            "solver": choice.solver,
            "nfe": sampler.nfe,
            "samples": choice.number,
            "sample_compile_seconds": sum(c.compile_seconds for c in chunks + one),
            "sampling_latency_seconds": float(np.median([chunk.seconds for chunk in one])),
            "samples_per_second": choice.number / seconds,
        }

    def evaluate(self, params) -> dict:
        """Bits per dimension on the test set, and the quality of the samples drawn last."""
        path = self.workdir.path / "samples.npz"
        if not path.exists():
            raise FileNotFoundError(
                f"no samples in {self.workdir.path}; run the command `sample` first"
            )
        with np.load(path) as file:
            images = file["images"]
        report = self.bits_per_dim(params)
        if self.config.data.name == "shapes":
            from gen_jax.metrics import shapes

            world = ShapesSet(self.config.data.size)
            report["bits_per_dim_floor"] = world.entropy / np.log(2) / np.prod(self.shape)
            report |= shapes.score(images, world)
        else:
            report["frechet_pooled_pixels"] = _pooled_frechet(images, self.test_set.images)
        return report

    def bits_per_dim(self, params) -> dict:
        """The variational bound on test images: its mean, parts and standard error."""
        import jax

        from gen_jax import sampling

        choice, test_set = self.config.evaluate, self.test_set
        number = min(choice.images, len(test_set))
        rows = test_set.indices(0, 0, number)
        parts = []
        size = min(choice.batch, number)
        for first in range(0, number, size):
            chosen = rows[np.minimum(np.arange(first, first + size), number - 1)]
            batch = {"image": test_set.images[chosen]}
            if self.config.conditional:
                batch["label"] = test_set.labels[chosen]
            part = jax.device_get(self._bound(params, batch, sampling.sample_keys(0, first, size)))
            parts.append({name: value[: number - first] for name, value in part.items()})
        values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        report = {
            name if name == "bits_per_dim" else f"bits_{name}": float(value.mean(dtype=np.float64))
            for name, value in values.items()
        }
        error = values["bits_per_dim"].std(ddof=1) / np.sqrt(number) if number > 1 else np.nan
        return report | {"bits_per_dim_standard_error": float(error), "test_images": number}

    @functools.cached_property
    def test_set(self) -> data.Images:
        """The test split of the data."""
        return data.load(self.config.data, "test")

    @functools.cached_property
    def _bound(self):
        import jax

        from gen_jax.models import diffusion

        draws = self.config.evaluate.draws or None
        return jax.jit(
            functools.partial(
                diffusion.bits_per_dim, self.config.diffusion, self.network, draws=draws
            )
        )

    def _labels(self, number):
        if not self.config.conditional:
            return None
        if self.config.sample.label >= 0:
            return np.full(number, self.config.sample.label, np.int32)
        return np.arange(number, dtype=np.int32) % self.config.model.classes

    def _write_samples(self, samples, labels, nfe):
        path, images = self.workdir.path, pictures.to_uint8(samples)
        shown = images[:64]
        pictures.save_png(path / "samples.png", pictures.grid(shown, scale=_scale(self.shape)))
        shutil.rmtree(path / "samples", ignore_errors=True)
        pictures.save_images(path / "samples", images)
        arrays = {"images": samples, "step": self.step, "seed": self.config.sample.seed, "nfe": nfe}
        if labels is not None:
            arrays["labels"] = labels
        temporary = path / ".samples.npz"
        np.savez(temporary, **arrays)
        temporary.replace(path / "samples.npz")

    def _write_trajectory(self, sampler, params):
        from gen_jax import sampling

        keys = sampling.sample_keys(self.config.sample.seed, 0, 8)
        _, states = sampling.generate(sampler, params, keys, self._labels(8), trajectory=True)
        columns = np.unique(np.linspace(0, sampler.steps - 1, 10).round().astype(int))
        noisy, clean = np.asarray(states.x), np.asarray(states.x0)
        rows = [frames[columns, i] for i in range(4) for frames in (noisy, clean)]
        scale = _scale(self.shape)
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


def commands(name: str) -> dict:
    """The commands of a diffusion experiment: all, train, sample, evaluate."""

    def command(*phases):
        return lambda config: _run(name, config, phases)

    return {
        "all": command("train", "sample", "evaluate"),
        "train": command("train"),
        "sample": command("sample"),
        "evaluate": command("evaluate"),
    }


def _run(name, config, phases):
    path = Path(config.workdir).expanduser()
    if "train" not in phases and not (path / "config.json").exists():
        raise WorkdirError(f"no run in {path}; train one first, or give its --workdir")
    workdir = Workdir(path)
    with workdir.lock():
        run = Run(name, config, workdir)
        report = run.train() if "train" in phases else {}
        if run.main and phases != ("train",):
            params = run.restore()
            report["step"] = run.step
            if "sample" in phases:
                report |= run.sample(params)
            if "evaluate" in phases:
                report |= run.evaluate(params)
        if run.main:
            report["wall_seconds"] = time.perf_counter() - run.began
            if phases == ("train", "sample", "evaluate"):
                workdir.write_json("summary.json", report)
            common.print_summary(f"{name}: {', '.join(phases)}", report)
            print(f"\nin {workdir.path}: {', '.join(_results(workdir.path))}")


def _results(path: Path):
    names = ("config.json", "metrics.jsonl", "samples.png", "samples.npz", "samples",
             "trajectory.png", "trajectory.gif", "summary.json")  # fmt: skip
    return [name for name in names if (path / name).exists()]


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
    if config.conditional and config.model.classes != len(images.label_names):
        raise ValueError(
            f"the data has {len(images.label_names)} classes, model.classes is "
            f"{config.model.classes}"
        )


def _pooled_frechet(samples, reference):
    """Frechet distance of 4 x 4 averages of pixels: a check without weights, not an FID."""
    from gen_jax.metrics import frechet

    def pooled(images):  # [B, H, W, C] in [-1, 1] -> [B, H W C / 16]
        count, height, width, channels = images.shape
        blocks = images.reshape(count, height // 4, 4, width // 4, 4, channels)
        return blocks.mean(axis=(2, 4)).reshape(count, -1)

    return frechet.frechet_distance(
        *frechet.gaussian_statistics(pooled(np.clip(samples, -1, 1))),
        *frechet.gaussian_statistics(pooled(reference / 127.5 - 1)),
    )


def _scale(shape):
    return max(1, 64 // shape[0])
