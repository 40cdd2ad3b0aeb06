"""How a diffusion experiment runs: train, sample from the average, evaluate, summarise.

The configuration is here too; presets are in the experiments. jax is imported by the commands,
not by this module, so that bad options are refused first.
"""

import contextlib
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments import common
from gen_jax import config as config_lib
from gen_jax import data, pictures
from gen_jax.config import DistributedConfig, TrainConfig, to_dict
from gen_jax.data import DataConfig, ShapesSet
from gen_jax.models.config import DiffusionConfig, SolverConfig
from gen_jax.models.time_grid import TimeGrid
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
    checkpoint: int = -1
    """Step of the checkpoint to sample and evaluate; -1 for the latest that is whole."""

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


# What may change when a run is resumed: how long, how often, how to sample; not what is learned.
FREE = (
    "workdir", "sample.", "evaluate.", "distributed.", "data.dir", "pretrained", "train.log_every",
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
      phases: those to come; the data that they need is read, and checked, at once.

    Raises:
      ValueError, FileNotFoundError: the data or the directory do not fit the configuration.
    """

    def __init__(self, name: str, config: Config, workdir: Workdir, phases: tuple[str, ...]):
        self.name, self.config, self.workdir = name, config, workdir
        self.began = time.perf_counter()
        if "train" in phases:
            _check_data(config, self.train_set)
        if "evaluate" in phases or ("train" in phases and config.train.evaluate_every):
            _check_data(config, self.test_set)
        from gen_jax import parallel
        from gen_jax.nn.unet import Denoiser

        self.network = Denoiser(config.model)
        if is_main(config):
            print(f"{name}: {parallel.device_banner()}; {workdir.path}")

    @functools.cached_property
    def train_set(self) -> data.Images:
        """The training split of the data."""
        return data.load(self.config.data, "train")

    @functools.cached_property
    def test_set(self) -> data.Images:
        """The test split of the data."""
        return data.load(self.config.data, "test")

    def train(self) -> dict:
        """Trains from where the work directory left off; what it took."""
        import jax

        from gen_jax import keys, parallel, training
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

        shape = self.train_set.images.shape[1:]
        params = self.network.init(keys.root(train.seed, "init"), *shape[:2])
        if config.pretrained:
            params = self._pretrained()
        try:
            trained = training.fit(
                train, loss, params, batch, self.workdir,
                mesh=parallel.data_mesh(),
                record={"config": to_dict(config), "image_shape": shape},
                evaluate=lambda state: self.bits_per_dim(state.ema),
            )  # fmt: skip
        except training.Interrupted as stop:
            print(f"{stop}; saved. Resume with:\n  {common.resume_command(self.name, config)}",
                  file=sys.stderr)  # fmt: skip
            raise SystemExit(128 + stop.signum) from None
        report = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "steps": int(trained.state.step),
        }
        if trained.start == report["steps"]:  # nothing was left to do
            return report
        return report | {
            "train_compile_seconds": trained.compile_seconds,
            "train_seconds": trained.seconds,
            "images_per_second": trained.examples_per_second,
        }

    def restore(self) -> dict:
        """The averaged parameters to sample from, on the device; sets `step` and `shape`."""
        import jax

        from gen_jax import checkpoint, keys

        if self.config.pretrained and not checkpoint.steps(self.workdir.checkpoints):
            self.step, self.shape = 0, self._pretrained_shape()
            return jax.device_put(self._pretrained())
        chosen = self.config.sample.checkpoint
        step = None if chosen < 0 else chosen
        record = checkpoint.restore(self.workdir.checkpoints, {}, step=step).record
        self.shape = tuple(record["image_shape"])
        template = jax.eval_shape(lambda: self.network.init(keys.root(0, "init"), *self.shape[:2]))
        restored = checkpoint.restore(self.workdir.checkpoints, {"ema": template}, step=step)
        self.step = restored.step
        return jax.device_put(restored.trees["ema"])

    def export(self, params) -> dict:
        """Writes the averaged parameters as a folder of diffusers."""
        from gen_jax import interop

        path = self.workdir.path / "diffusers"
        interop.save_diffusers_unet(path, self.config.model, params, sample_size=self.shape[0])
        return {"exported": str(path)}

    def _pretrained(self):
        from gen_jax import interop

        unet, params = interop.load_diffusers_unet(self.config.pretrained)
        ours = dataclasses.replace(self.config.model, dropout=0.0, compute="float32")
        differing = config_lib.differences(to_dict(ours), to_dict(unet.config), ("dropout",))
        if differing:
            raise ValueError(
                f"{self.config.pretrained} is another network than model ({'; '.join(differing)})"
            )
        return params

    def _pretrained_shape(self):
        folder = Path(self.config.pretrained)
        folder = folder if (folder / "config.json").exists() else folder / "unet"  # a pipeline's
        side = json.loads((folder / "config.json").read_text())["sample_size"]
        return side, side, self.config.model.channels

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
            images, step = file["images"], int(file["step"])
        if step != self.step:
            raise ValueError(
                f"{path} was drawn at step {step}, the checkpoint is of step {self.step}; "
                "run the command `sample` again"
            )
        report = self.bits_per_dim(params)
        if self.config.data.name == "shapes":
            from gen_jax.metrics import shapes

            world = ShapesSet(self.config.data.size)
            report["bits_per_dim_floor"] = world.entropy / np.log(2) / np.prod(self.shape)
            report |= shapes.score(images, world)
        elif min(len(images), len(self.test_set)) > 1:
            reference = self.test_set.images / np.float32(127.5) - 1
            report["frechet_pooled_pixels"] = _pooled_frechet(images, reference)
        return report

    def bits_per_dim(self, params) -> dict:
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
        for old in (path / "samples").glob("[0-9]" * 6 + ".png"):
            old.unlink()
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
    """The commands of a diffusion experiment."""

    def command(*phases):
        return lambda config: _run(name, config, phases)

    return {
        "all": command("train", "sample", "evaluate"),
        "train": command("train"),
        "sample": command("sample"),
        "evaluate": command("evaluate"),
        "export": command("export"),
    }


def is_main(config: Config) -> bool:
    """Whether this process is the one that writes; it does not load jax to tell of one alone."""
    if not config.distributed.coordinator:
        return True
    import jax

    return jax.process_index() == 0


def _run(name, config, phases):
    training, path = "train" in phases, Path(config.workdir).expanduser()
    if not training and not (path / "config.json").exists() and not config.pretrained:
        raise WorkdirError(f"no run in {path}; train one first, or give its --workdir")
    if config.distributed.coordinator:
        if phases != ("train",):
            raise ValueError("several hosts train together; sample and evaluate on one of them")
        from gen_jax import parallel

        parallel.start(config.distributed)
    workdir = Workdir(path)
    with workdir.lock() if is_main(config) else contextlib.nullcontext():
        if not training:
            workdir.check_config(to_dict(config), free_keys(config))
        elif is_main(config):
            workdir.write_config(to_dict(config), free_keys(config))
        run = Run(name, config, workdir, phases)
        report = run.train() if training else {}
        if phases != ("train",):
            params = run.restore()
            report["step"] = run.step
        for phase in phases:
            if phase != "train":
                report |= getattr(run, phase)(params)
        if is_main(config):
            report["wall_seconds"] = time.perf_counter() - run.began
            _summarise(name, phases, workdir, report)


def _summarise(name, phases, workdir, report):
    """Adds what was measured to summary.json, which keeps what was not measured again."""
    path = workdir.path / "summary.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if "wall_seconds" in known and "images_per_second" not in report:
        report = report | {"wall_seconds": known["wall_seconds"]}  # that of the training
    workdir.write_json("summary.json", known | report)
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


def _pooled_frechet(samples, reference):
    """Frechet distance of means over 4 x 4 pixels: a check that needs no weights, not an FID."""
    from gen_jax.metrics import frechet

    statistics = [
        frechet.gaussian_statistics(frechet.pooled_pixels(images))
        for images in (np.clip(samples, -1, 1), reference)
    ]
    return frechet.frechet_distance(*statistics[0], *statistics[1])


def _scale(shape):
    return max(1, 64 // shape[0])
