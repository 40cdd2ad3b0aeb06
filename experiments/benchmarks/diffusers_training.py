"""Times our training step against PyTorch's on the UNet of diffusers, the same weights in one run.

    python -m experiments.benchmarks.diffusers_training

Needs the extra `oracles` (PyTorch and diffusers). The networks are those of the presets tiny (with
attention at 8 x 8 besides) and cpu of `experiments.ddpm_cifar`, without folding images into
patches. Random weights are made by diffusers and read through `gen_jax.interop`; before anything is
timed, both sides must agree on the loss and on all gradients of one batch.

A step of PyTorch is a draw of noise and times, `add_noise`, the loss, its gradient, clipping, and
Adam; a step of ours is that, the moving average of parameters and the guard against values that
are not finite. Compiling and warming up are apart, runs of the two sides alternate, and the table
gives medians. The last line is one JSON object.
"""

import copy
import dataclasses
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from experiments.benchmarks.diffusers import COMMON, converted
from gen_jax import parallel
from gen_jax.config import TrainConfig
from gen_jax.trainables import ModelTrainable
from gen_jax.training_step import init_state, make_step
from gen_jax.trees import named_leaves

diffusers, torch = timing.Peer("diffusers"), timing.Peer("torch")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time."""

    networks: tuple[str, ...] = ("tiny", "cpu")
    """The networks of these presets."""
    batches: tuple[int, ...] = (32, 64)
    """The size of a batch for each network."""
    steps: int = 10
    """Steps of each timed run."""
    repeats: int = 9
    """Timed runs of each side."""
    compiled: bool = True
    """Time torch.compile too (it compiles for minutes)."""
    threads: int = os.cpu_count() or 1
    """Threads of PyTorch; XLA takes all cores."""
    tolerance: float = 1e-3
    """Largest difference between both sides' gradients of a leaf, by the largest of its entries."""

    def __post_init__(self):
        for name in self.networks:
            if name not in NETWORKS:
                raise ValueError(f"networks are {', '.join(NETWORKS)}, not {name!r}")
        if len(self.batches) != len(self.networks):
            raise ValueError(
                f"give one batch for each network, not {len(self.batches)} for "
                f"{len(self.networks)} of them"
            )
        if min((*self.batches, self.steps, self.repeats)) < 1:
            raise ValueError("batches, steps and repeats must be at least 1")


_SHARED = COMMON | {
    "in_channels": 12,
    "out_channels": 12,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
NETWORKS = {
    "tiny": _SHARED
    | {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    },
    "cpu": _SHARED
    | {
        "sample_size": 16,
        "block_out_channels": (32, 64, 128),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
}
TRAIN = TrainConfig(learning_rate=1e-3, warmup=0, ema=0.999)


class Sides:
    """One network with the same weights on both sides, and what trains it."""

    def __init__(self, name: str, batch: int, config: Config):
        torch.manual_seed(0)
        torch.set_num_threads(config.threads)
        self.name, self.batch, self.config = name, batch, config
        self.device = timing.torch_device()
        self.unet = diffusers.UNet2DModel(**NETWORKS[name]).to(self.device)
        self.scheduler = diffusers.DDPMScheduler()
        self.model, self.params = converted(self.unet)
        self.parameters = sum(p.numel() for p in self.unet.parameters())
        generator = np.random.default_rng(0)
        shape = (batch, *self.model.shape)
        self.images = generator.integers(0, 256, shape, np.uint8)

    def check(self) -> float:
        """The largest difference of gradients, of all leaves, at the same noise and times.

        Raises:
          FloatingPointError: it is above the tolerance.
        """
        generator = np.random.default_rng(1)
        x, noise = generator.normal(size=(2, self.batch, *self.model.shape)).astype(np.float32)
        t = generator.integers(0, self.model.process.timesteps, self.batch)

        def loss(params, x, t, noise):
            output, _ = self.model.predict(params, x, t)
            return jnp.square(output - noise).mean()

        value, ours = jax.jit(jax.value_and_grad(loss))(self.params, x, t, noise)
        unet = copy.deepcopy(self.unet)
        x, noise = (self._tensor(array.transpose(0, 3, 1, 2)) for array in (x, noise))
        theirs = torch.nn.functional.mse_loss(unet(x, self._tensor(t)).sample, noise)
        theirs.backward()
        with torch.no_grad():  # gradients in the place of weights, so that they are read alike
            for parameter in unet.parameters():
                parameter.copy_(parameter.grad)
        ours, expected = named_leaves(ours), named_leaves(converted(unet)[1])
        difference = abs(float(value) - float(theirs.detach())) / float(value)
        for leaf, gradient in expected.items():
            largest = max(np.abs(gradient).max(), 1e-6)
            difference = max(difference, float(np.abs(ours[leaf] - gradient).max() / largest))
        return timing.agreement(difference, self.config.tolerance, "the gradients of both sides")

    def _tensor(self, array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def compare(self) -> list[dict]:
        """Rows of the table."""
        ours, compile_seconds = self._ours()
        sides = {"gen_jax": ours, "PyTorch eager": self._theirs(copy.deepcopy(self.unet))}
        if self.config.compiled:
            torch.compiler.reset()  # a second network would get a program for sizes in general
            compiled = torch.compile(copy.deepcopy(self.unet), dynamic=False)
            sides["PyTorch compiled"] = self._theirs(compiled)
        for run in sides.values():
            run()
        seconds = timing.alternate(sides, self.config.repeats)
        median = {side: statistics.median(values) for side, values in seconds.items()}
        return [
            {
                "network": self.name,
                "parameters": self.parameters,
                "batch": self.batch,
                "side": side,
                "milliseconds_per_step": round(1e3 * median[side] / self.config.steps, 2),
                "images_per_second": round(self.batch * self.config.steps / median[side], 1),
                "spread": round(max(seconds[side]) / min(seconds[side]) - 1, 3),
                "gen_jax_is_faster_by": round(median[side] / median["gen_jax"], 3),
                "compile_seconds": round(compile_seconds, 2) if side == "gen_jax" else None,
            }
            for side in sides
        ]

    def _ours(self):
        """A run of steps, and the seconds that compiling took."""
        mesh = parallel.local_mesh()
        train = dataclasses.replace(TRAIN, batch=self.batch)
        trainable = ModelTrainable(self.model, train)
        state = parallel.replicate(mesh, init_state(train, trainable, self.params))
        arrays = parallel.split(mesh, {"image": self.images})
        flags = parallel.split(mesh, np.zeros(mesh.size, np.int32))
        began = time.perf_counter()
        program = make_step(trainable, train, mesh).lower(state, arrays, flags).compile()
        compile_seconds = time.perf_counter() - began

        def run():
            nonlocal state
            for _ in range(self.config.steps):
                state, _ = program(state, arrays, flags)
            jax.block_until_ready(state)

        return run, compile_seconds

    def _theirs(self, unet):
        """A run of steps, as in the training script of diffusers, without its moving average."""
        optimizer = torch.optim.Adam(unet.parameters(), lr=TRAIN.learning_rate)
        images = self._tensor(self.images.transpose(0, 3, 1, 2)).float() / 127.5 - 1
        timesteps = self.scheduler.config.num_train_timesteps

        def run():
            for _ in range(self.config.steps):
                noise = torch.randn_like(images)
                t = torch.randint(0, timesteps, (self.batch,), device=self.device)
                output = unet(self.scheduler.add_noise(images, noise, t), t).sample
                torch.nn.functional.mse_loss(output, noise).backward()
                torch.nn.utils.clip_grad_norm_(unet.parameters(), TRAIN.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
            if self.device != "cpu":
                torch.cuda.synchronize()

        return run


def benchmark(config: Config) -> dict:
    """Runs everything; the table as JSON values."""
    timing.require("torch", "diffusers")

    rows, differences = [], {}
    print("network  parameters  batch  side                ms/step  images/s  ratio  spread")
    for name, batch in zip(config.networks, config.batches, strict=True):
        sides = Sides(name, batch, config)
        differences[name] = sides.check()
        for row in sides.compare():
            rows.append(row)
            print(
                f"{name:<7}  {row['parameters']:>10}  {batch:>5}  {row['side']:<18}  "
                f"{row['milliseconds_per_step']:>7}  {row['images_per_second']:>8}  "
                f"{row['gen_jax_is_faster_by']:>5}  {row['spread']:>6}",
                flush=True,
            )
    return {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": timing.machine(),
        "largest_difference": differences,
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(timing.main(Config, benchmark, __doc__))
