"""Times latent diffusion against diffusers' `LDMPipeline`, on the same weights in one run.

    python -m experiments.benchmarks.latent_diffusion

Needs the extra `oracles` (PyTorch and diffusers). Random weights of a pipeline are made by
diffusers, saved, and read through `gen_jax.interop`. Images of the same noise must agree before
anything is timed; compiling, preparing weights and warming up are apart; runs of both sides
alternate, and the table gives medians. The last line is one JSON object.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np

from experiments.benchmarks import timing
from gen_jax import interop, sampling
from gen_jax.condition import Condition

diffusers, torch = timing.Peer("diffusers"), timing.Peer("torch")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time."""

    unet_widths: tuple[int, ...] = (64, 128, 192)
    """Channels of the UNet at each resolution; all but the finest have attention."""
    widths: tuple[int, ...] = (32, 64, 64)
    """Channels of the autoencoder at each resolution."""
    size: int = 16
    """Height and width of the latents."""
    codes: int = 64
    """Codes of the autoencoder."""
    batches: tuple[int, ...] = (1,)
    """Images at a time."""
    steps: int = 10
    """Steps of DDIM."""
    repeats: int = 7
    """Timed runs of each side."""
    threads: int = os.cpu_count() or 1
    """Threads of PyTorch; XLA takes all cores."""
    tolerance: float = 1e-3
    """Largest difference between the images of both sides, which are in [0, 1]."""

    def __post_init__(self):
        sizes = (*self.unet_widths, *self.widths, self.size, *self.batches, self.repeats)
        if min(sizes) < 1 or min(self.steps, self.codes) < 2:
            raise ValueError(
                "widths, size, batches and repeats must be positive, steps and codes at least 2"
            )


class Sides:
    """One pipeline with the same weights on both sides."""

    def __init__(self, config: Config):
        torch.manual_seed(0)
        torch.set_num_threads(config.threads)
        self.config, self.pipe = config, _pipeline(config).to(timing.torch_device())
        with tempfile.TemporaryDirectory() as directory:
            self.pipe.save_pretrained(directory)
            loaded = interop.load_diffusers_ldm(directory, steps=config.steps)
        self.sampler, self.params = loaded

    def theirs(self, batch: int) -> np.ndarray:
        """Images of the peer, [batch, height, width, 3] in [0, 1]."""
        steps = self.config.steps
        return self.pipe(batch_size=batch, num_inference_steps=steps, output_type="np").images

    def check(self) -> float:
        """The largest difference of images from the same noise.

        Raises:
          FloatingPointError: it is above the tolerance.
        """
        keys = sampling.sample_keys(0, 0, 2)
        noise = np.array(self.sampler.init(self.params, keys, Condition()).x)
        noise = torch.from_numpy(np.moveaxis(noise, -1, 1).copy())
        ours = np.asarray(sampling.generate(self.sampler, self.params, keys)) / 2 + 0.5
        with mock.patch(f"{type(self.pipe).__module__}.randn_tensor", return_value=noise):
            theirs = self.theirs(len(noise))
        difference = float(np.abs(ours.clip(0, 1) - theirs).max())
        return timing.agreement(difference, self.config.tolerance)

    def compare(self, batch: int) -> list[dict]:
        """Rows of the table: what one run of each side takes, and what the ratio is."""
        keys, steps = sampling.sample_keys(1, 0, batch), self.config.steps
        began = time.perf_counter()
        params = jax.block_until_ready(jax.jit(self.sampler.prepare)(self.params))
        program = sampling.compile_generate(self.sampler, params, keys)
        compile_seconds = time.perf_counter() - began
        sides = {
            "gen_jax": lambda: np.asarray(program(params, keys, Condition())),
            "diffusers eager": lambda: self.theirs(batch),
        }
        for run in sides.values():
            run()
        seconds = timing.alternate(sides, self.config.repeats)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        return [
            {
                "batch": batch,
                "steps": steps,
                "side": name,
                "milliseconds": round(1e3 * median[name], 3),
                "gen_jax_is_faster_by": round(median[name] / median["gen_jax"], 3),
                "spread": round(max(seconds[name]) / min(seconds[name]) - 1, 3),
                "compile_seconds": round(compile_seconds, 2) if name == "gen_jax" else None,
            }
            for name in sides
        ]


def _pipeline(config):
    """Random weights, and codes as far apart as the latents that the UNet draws."""
    levels, unet_levels = len(config.widths), len(config.unet_widths)
    vqvae = diffusers.VQModel(
        block_out_channels=config.widths,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        norm_num_groups=min(32, config.widths[0]),
        num_vq_embeddings=config.codes,
        sample_size=config.size * 2 ** (levels - 1),
    )
    with torch.no_grad():
        vqvae.quantize.embedding.weight.normal_(std=1 / vqvae.config.scaling_factor)
    unet = diffusers.UNet2DModel(
        sample_size=config.size,
        block_out_channels=config.unet_widths,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * (unet_levels - 1)),
        up_block_types=(*["AttnUpBlock2D"] * (unet_levels - 1), "UpBlock2D"),
        attention_head_dim=32,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False
    )
    pipe = diffusers.LDMPipeline(vqvae.eval(), unet.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def benchmark(config: Config) -> dict:
    """Runs everything; the table as JSON values."""
    timing.require("torch", "diffusers")
    sides, rows = Sides(config), []
    difference = sides.check()
    print("batch  steps  side             milliseconds  ratio  spread")
    for batch in config.batches:
        rows += (more := sides.compare(batch))
        for row in more:
            print(
                f"{row['batch']:>5}  {row['steps']:>5}  {row['side']:<15}  "
                f"{row['milliseconds']:>12}  {row['gen_jax_is_faster_by']:>5}  {row['spread']:>6}",
                flush=True,
            )
    return {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": timing.machine(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(sides.params)),
        "largest_difference": difference,
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(timing.main(Config, benchmark, __doc__))
