"""Times our sampling loop against the pipelines of diffusers, on the same weights in one run.

    python -m experiments.benchmarks.diffusers

Needs the extra `oracles` (PyTorch and diffusers). Random weights are made by diffusers, saved, and
read through `gen_jax.interop`; before anything is timed, both sides must agree on every step. With
the extra `peers` the network of the pipeline is computed by OpenVINO and by ONNX Runtime as well.
Compiling, preparing weights and warming up are apart; runs of the sides alternate, and the
table gives medians. The last line is one JSON object.
"""

import copy
import dataclasses
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

import jax
import numpy as np

from experiments.benchmarks import timing
from gen_jax import interop, sampling
from gen_jax.condition import Condition
from gen_jax.models.diffusion import (
    DDIM,
    Ancestral,
    DiffusionConfig,
    DiffusionModel,
    DiffusionSampler,
)

diffusers, torch = timing.Peer("diffusers"), timing.Peer("torch")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time."""

    batches: tuple[int, ...] = (1, 16)
    """Batch sizes for the CIFAR-10 network of DDPM (35.7M parameters)."""
    steps: int = 10
    """Steps of each timed run of that network."""
    head_width: int = 0
    """Channels of a head of its attention; 0 for one head, as DDPM has it. The default of
    diffusers' UNet2DModel is 8."""
    small_steps: int = 50
    """DDIM steps of each timed run of the small network, at batch 1."""
    repeats: int = 5
    """Timed runs of each side."""
    compiled: bool = True
    """Time torch.compile too (it compiles for minutes)."""
    peers: bool = True
    """Time OpenVINO and ONNX Runtime too, where they are installed and jax runs on a CPU."""
    threads: int = os.cpu_count() or 1
    """Threads of the peers; XLA takes all cores."""
    tolerance: float = 1e-3
    """Largest difference between the images of both sides after one step."""

    def __post_init__(self):
        if min((*self.batches, self.steps - 1, self.small_steps - 1, self.repeats)) < 1:
            raise ValueError("batches and repeats must be at least 1, steps at least 2")
        if self.head_width and (self.head_width < 1 or 256 % self.head_width):
            raise ValueError(f"head_width must be 0 or divide 256, got {self.head_width}")


COMMON = {
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
CIFAR = COMMON | {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
SMALL = COMMON | {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def converted(unet) -> tuple[DiffusionModel, dict]:
    """Our model and parameters from a UNet2DModel of diffusers."""
    with tempfile.TemporaryDirectory() as directory:
        unet.save_pretrained(directory)
        return interop.load_diffusers_unet(directory, DiffusionConfig(variance="fixed_small"))


def openvino_network(unet, x, t, threads: int) -> Callable:
    """A UNet2DModel compiled by OpenVINO in float32, as a function of arrays of these shapes."""
    import openvino

    shapes = [openvino.PartialShape(list(a.shape)) for a in (x, t)]
    model = openvino.convert_model(unet, example_input=(x, t), input=shapes)
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.compile_model(model, "CPU", options)
    return lambda x, t: compiled((x, t))[0]


def onnx_network(unet, x, t, threads: int) -> Callable:
    """A UNet2DModel in ONNX Runtime, as a function of arrays of these shapes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "unet.onnx")
        torch.onnx.export(unet, (x, t), path, dynamo=False, input_names=["x", "t"])
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x, t: session.run(None, {"x": x, "t": t})[0]


def output_alone(unet):
    """A module that returns the prediction of a UNet2DModel as a tensor."""

    class Prediction(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, x, t):
            return self.unet(x, t).sample

    return Prediction().eval()


PEERS = {"OpenVINO": ("openvino", openvino_network), "ONNX Runtime": ("onnxruntime", onnx_network)}


class Sides:
    """One network with the same weights on both sides."""

    def __init__(self, options: dict, config: Config):
        torch.manual_seed(0)
        torch.set_num_threads(config.threads)
        self.device = timing.torch_device()
        self.torch_unet = diffusers.UNet2DModel(**options).eval().to(self.device)
        self.model, params = converted(self.torch_unet)
        self.params, self.tolerance = jax.device_put(params), config.tolerance
        self.repeats, self.threads = config.repeats, config.threads
        self.peers = [
            name
            for name, (package, _) in PEERS.items()
            if config.peers and timing.is_timed(package, name)
        ]
        self._computed = {}
        self.parameters = sum(p.numel() for p in self.torch_unet.parameters())

    def sampler(self, solver: str, steps: int) -> DiffusionSampler:
        """Our sampler with the settings that the pipeline has by default."""
        kinds = {"ddpm": Ancestral, "ddim": DDIM}
        return DiffusionSampler(self.model, kinds[solver](steps))

    def pipeline(self, solver: str, unet):
        """The pipeline of diffusers, without its progress bar."""
        if solver == "ddim":
            pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
        else:
            pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def computed_by(self, name: str, batch: int):
        """The network of diffusers, computed by a peer for one batch size.

        Raises:
          FloatingPointError: its output differs from that of PyTorch by more than the tolerance.
        """
        if (name, batch) in self._computed:
            return self._computed[name, batch]
        make = PEERS[name][1]
        size = self.torch_unet.config.sample_size
        x, t = torch.randn(batch, 3, size, size), torch.full((batch,), 500)
        plain = output_alone(self.torch_unet)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = make(plain, x, t, self.threads)
            expected = plain(x, t).numpy()
        difference = np.abs(run(x.numpy(), t.numpy()) - expected).max()
        timing.agreement(float(difference), self.tolerance, f"{name} and PyTorch")
        unet = copy.copy(self.torch_unet)

        def forward(x, t, **options):
            t = np.full(batch, int(t))
            sample = torch.from_numpy(run(x.numpy(), t))
            return diffusers.models.unets.unet_2d.UNet2DOutput(sample=sample)

        unet.forward = forward
        self._computed[name, batch] = unet
        return unet

    def check(self, steps: int) -> float:
        """The largest difference between both sides after one DDIM step, over all steps.

        Each step of diffusers starts from our image: with random weights a whole trajectory
        is chaotic, and would magnify rounding until nothing could be compared.

        Raises:
          FloatingPointError: it is above the tolerance.
        """
        sampler, keys = self.sampler("ddim", steps), sampling.sample_keys(0, 0, 2)
        noise = sampler.init(self.params, keys, Condition()).x
        _, (noisy, _) = sampling.generate(sampler, self.params, keys, trajectory=sampler.trajectory)
        ours = np.concatenate([np.asarray(noise)[None], noisy]).transpose(0, 1, 4, 2, 3)
        scheduler = diffusers.DDIMScheduler()
        scheduler.set_timesteps(steps)
        difference = 0.0
        for x, following, t in zip(ours[:-1], ours[1:], scheduler.timesteps, strict=True):
            x = torch.from_numpy(x.copy()).to(self.device)
            with torch.no_grad():
                theirs = scheduler.step(self.torch_unet(x, t).sample, t, x).prev_sample
            difference = max(difference, float(np.abs(theirs.cpu().numpy() - following).max()))
        return timing.agreement(difference, self.tolerance)

    def compare(self, solver: str, batch: int, steps: int, compiled: bool) -> list[dict]:
        """Rows of the table: seconds of one run of each side, and what the ratio is."""
        sampler, keys = self.sampler(solver, steps), sampling.sample_keys(1, 0, batch)
        began = time.perf_counter()
        params = jax.block_until_ready(jax.jit(sampler.prepare)(self.params))
        program = sampling.compile_generate(sampler, params, keys)
        compile_seconds = time.perf_counter() - began
        sides = {"gen_jax": lambda: np.asarray(program(params, keys, Condition()))}
        units = {"diffusers eager": self.torch_unet}
        if compiled:
            units["diffusers compiled"] = torch.compile(self.torch_unet)
        units |= {name: self.computed_by(name, batch) for name in self.peers}
        for name, unet in units.items():
            pipe = self.pipeline(solver, unet)
            sides[name] = lambda pipe=pipe: pipe(
                batch_size=batch, num_inference_steps=steps, output_type="np"
            )
        for run in sides.values():
            run()
        seconds = timing.alternate(sides, self.repeats)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        return [
            {
                "parameters": self.parameters,
                "solver": solver,
                "batch": batch,
                "steps": steps,
                "side": name,
                "seconds": round(median[name], 5),
                "milliseconds_per_step": round(1e3 * median[name] / steps, 3),
                "spread": round(max(seconds[name]) / min(seconds[name]) - 1, 3),
                "gen_jax_is_faster_by": round(median[name] / median["gen_jax"], 3),
                "compile_seconds": round(compile_seconds, 2) if name == "gen_jax" else None,
            }
            for name in sides
        ]


def benchmark(config: Config) -> dict:
    """Runs everything; the table as JSON values."""
    timing.require("torch", "diffusers")

    rows, differences = [], {}
    small = Sides(SMALL, config)
    differences["small"] = small.check(config.small_steps)
    rows += small.compare("ddim", 1, config.small_steps, config.compiled)
    _print(rows, len(rows))
    cifar = Sides(CIFAR | {"attention_head_dim": config.head_width or None}, config)
    differences["cifar"] = cifar.check(config.steps)
    for batch in config.batches:
        for solver in ("ddpm", "ddim"):
            more = cifar.compare(solver, batch, config.steps, config.compiled)
            rows += more
            _print(rows, len(more))
    return {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": timing.machine(),
        "largest_difference": differences,
        "rows": rows,
    }


def _print(rows, last):
    if len(rows) == last:
        print("parameters  solver  batch  steps  side                ms/step  ratio  spread")
    for row in rows[-last:]:
        print(
            f"{row['parameters']:>10}  {row['solver']:<6}  {row['batch']:>5}  {row['steps']:>5}  "
            f"{row['side']:<18}  {row['milliseconds_per_step']:>7}  "
            f"{row['gen_jax_is_faster_by']:>5}  {row['spread']:>6}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(timing.main(Config, benchmark, __doc__))
