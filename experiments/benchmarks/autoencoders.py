"""Times encoders, decoders and the search of codes against diffusers and PyTorch in one run.

    python -m experiments.benchmarks.autoencoders

Needs the extra `oracles` (PyTorch and diffusers). Random weights of an `AutoencoderKL` are made by
diffusers, saved, and read through `gen_jax.interop`. Both sides must agree before anything is
timed; compiling, preparing weights and warming up are apart; runs of all sides alternate, and the
table gives medians. The search is timed against `torch.cdist(...).argmin` and against the formula
as it is usually written in JAX. The last line is one JSON object.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import kernels
from experiments.benchmarks import timing
from gen_jax import interop

diffusers, torch = timing.Peer("diffusers"), timing.Peer("torch")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time."""

    widths: tuple[int, ...] = (64, 128, 256, 256)
    """Channels of the autoencoder at each resolution."""
    size: int = 64
    """Height and width of the images."""
    batches: tuple[int, ...] = (1, 16)
    """Images at a time."""
    vectors: int = 16_384
    """Vectors N of the search."""
    codes: int = 8192
    """Codes K of the search."""
    width: int = 64
    """Their width D."""
    repeats: int = 7
    """Timed runs of each side."""
    threads: int = os.cpu_count() or 1
    """Threads of PyTorch; XLA takes all cores."""
    tolerance: float = 1e-3
    """Largest difference between latents and images of both sides."""

    def __post_init__(self):
        sizes = (*self.widths, self.size, *self.batches, self.vectors, self.codes, self.width)
        if min((*sizes, self.repeats)) < 1:
            raise ValueError("widths, sizes, batches, vectors, codes and repeats must be positive")


class Autoencoders:
    """One autoencoder with the same weights on both sides."""

    def __init__(self, config: Config):
        levels = len(config.widths)
        torch.manual_seed(0)
        torch.set_num_threads(config.threads)
        self.device, self.config = timing.torch_device(), config
        theirs = diffusers.AutoencoderKL(
            block_out_channels=config.widths,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
            norm_num_groups=min(32, config.widths[0]),
            sample_size=config.size,
        )
        with tempfile.TemporaryDirectory() as directory:
            theirs.save_pretrained(directory)
            self.model, params = interop.load_diffusers_kl(directory)
        self.theirs = theirs.eval().to(self.device)
        self.params = jax.block_until_ready(jax.jit(self.model.prepare)(params))
        self.encode = jax.jit(lambda params, x: self.model.encode(params, x).value)
        self.decode = jax.jit(self.model.decode)

    def check(self) -> float:
        """The largest difference of latents and of images decoded from the same latents.

        Raises:
          FloatingPointError: it is above the tolerance.
        """
        x = self._images(2)
        latents = self.encode(self.params, x)
        images = self.decode(self.params, latents)
        with torch.no_grad():
            their_latents = self.theirs.encode(self._first(x)).latent_dist.mean
            their_images = self.theirs.decode(self._first(latents)).sample
        pairs = ((latents, their_latents), (images, their_images))
        difference = max(
            float(np.abs(np.asarray(ours) - np.moveaxis(theirs.cpu().numpy(), 1, -1)).max())
            for ours, theirs in pairs
        )
        return timing.agreement(difference, self.config.tolerance)

    def compare(self, what: str, batch: int) -> list[dict]:
        """Rows for "encode" or "decode" of a batch."""
        x = self._images(batch)
        if what == "decode":
            x = np.asarray(self.encode(self.params, x))
        run, theirs = getattr(self, what), self._first(x)

        def peer():
            with torch.no_grad():
                if what == "encode":
                    return self.theirs.encode(theirs).latent_dist.mean.cpu().numpy()
                return self.theirs.decode(theirs).sample.cpu().numpy()

        sides = {"gen_jax": lambda: np.asarray(run(self.params, x)), "diffusers eager": peer}
        return _rows(f"{what}, batch {batch}", sides, self.config.repeats)

    def _images(self, batch):
        shape = batch, self.config.size, self.config.size, 3
        return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)

    def _first(self, x):
        return torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy()).to(self.device)


def naive(x, codebook):
    """The formula as it is usually written, with all distances in memory."""
    squares = jnp.square(x).sum(1)[:, None] + jnp.square(codebook).sum(1)[None]
    return jnp.argmin(squares - 2 * x @ codebook.T, axis=1)


def search(config: Config) -> tuple[list[dict], dict]:
    """Rows for the search of codes, and what both programs of JAX need in memory.

    Raises:
      FloatingPointError: the sides find codes at other distances.
    """
    generator = np.random.default_rng(0)
    x = generator.normal(size=(config.vectors, config.width)).astype(np.float32)
    codebook = generator.normal(size=(config.codes, config.width)).astype(np.float32)
    device = timing.torch_device()
    theirs = [torch.from_numpy(array).to(device) for array in (x, codebook)]
    programs = {"gen_jax": lambda x, c: kernels.nearest_code(x, c)[0], "naive JAX": naive}
    programs = {name: jax.jit(run).lower(x, codebook).compile() for name, run in programs.items()}
    sides = {
        name: lambda program=program: np.asarray(program(x, codebook))
        for name, program in programs.items()
    }
    sides["torch.cdist().argmin()"] = lambda: torch.cdist(*theirs).argmin(1).cpu().numpy()
    found = {name: run() for name, run in sides.items()}
    distances = {name: np.square(x - codebook[index]).sum(1) for name, index in found.items()}
    for name, distance in distances.items():
        if not np.allclose(distance, distances["gen_jax"], rtol=1e-4):
            raise FloatingPointError(f"{name} finds other codes than gen_jax: not timed")
    memory = {
        name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()
    }
    what = f"search, {config.vectors} x {config.codes} x {config.width}"
    return _rows(what, sides, config.repeats), memory


def _rows(what, sides, repeats):
    """Warms up, times all sides in turn, and prints a row for each."""
    compile_seconds = {}
    for name, run in sides.items():
        began = time.perf_counter()
        run()
        compile_seconds[name] = time.perf_counter() - began
        run()
    seconds = timing.alternate(sides, repeats)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        {
            "what": what,
            "side": name,
            "milliseconds": round(1e3 * median[name], 3),
            "gen_jax_is_faster_by": round(median[name] / median["gen_jax"], 3),
            "spread": round(max(seconds[name]) / min(seconds[name]) - 1, 3),
            "first_run_seconds": round(compile_seconds[name], 2),
        }
        for name in sides
    ]
    for row in rows:
        print(
            f"{row['what']:<28}  {row['side']:<22}  {row['milliseconds']:>9} ms  "
            f"{row['gen_jax_is_faster_by']:>6}  {row['spread']:>6}",
            flush=True,
        )
    return rows


def benchmark(config: Config) -> dict:
    """Runs everything; the table as JSON values."""
    timing.require("torch", "diffusers")
    sides = Autoencoders(config)
    difference, rows = sides.check(), []
    for batch in config.batches:
        for what in ("encode", "decode"):
            rows += sides.compare(what, batch)
    more, memory = search(config)
    return {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": timing.machine(),
        "largest_difference": difference,
        "bytes_of_temporaries": memory,
        "rows": rows + more,
    }


if __name__ == "__main__":
    sys.exit(timing.main(Config, benchmark, __doc__))
