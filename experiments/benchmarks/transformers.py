"""Times our generation of text against `generate` of transformers, on the same weights in one run.

    python -m experiments.benchmarks.transformers

Needs the extra `oracles` (PyTorch and transformers). Random weights of GPT-2 are made by
transformers, saved, and read through `gen_jax.interop`; before anything is timed, both sides must
agree on logits and on greedy text. With the extra `peers` CTranslate2 runs the same weights, in
float32, which must give the same greedy text, and in int8, whose products are others. All else is
float32. Compiling, preparing weights and warming up are
apart; runs of the sides alternate, and the table gives medians and the best of a few runs. Tokens
per second count those of the whole batch, with the prompt read within the time. The bandwidth of
memory is the best of sums over a large array, which take turns with the sides. The last line is one
JSON object.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from gen_jax import interop, sampling
from gen_jax.condition import Condition
from gen_jax.models.autoregressive import AutoregressiveSampler, SamplingOptions

torch, transformers = timing.Peer("torch"), timing.Peer("transformers")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time; the network is GPT-2 small by default."""

    batches: tuple[int, ...] = (1, 8)
    """Batch sizes."""
    prompt: int = 16
    """Tokens of each prompt."""
    tokens: int = 128
    """New tokens of each timed run."""
    top_k: int = 50
    """Sample among the k most probable tokens."""
    repeats: int = 5
    """Timed runs of each side."""
    compiled: bool = True
    """Time torch.compile too."""
    peers: bool = True
    """Time CTranslate2 too, where it is installed and jax runs on a CPU."""
    layers: int = 12
    """Blocks of the network."""
    width: int = 768
    """Size of its residual stream."""
    heads: int = 12
    """Heads of its attention."""
    vocabulary: int = 50257
    """Its tokens."""
    context: int = 1024
    """Its longest sequence."""
    threads: int = os.cpu_count() or 1
    """Threads of the peers; XLA takes all cores."""
    checked_tokens: int = 32
    """Greedy tokens that both sides must agree on."""
    tolerance: float = 1e-3
    """Largest difference between the logits of both sides."""
    bandwidth_bytes: int = 2**30
    """Size of the array that is summed to measure the bandwidth of memory."""

    def __post_init__(self):
        least = (*self.batches, self.prompt, self.tokens, self.top_k, self.repeats, self.threads)
        if min((*least, self.checked_tokens)) < 1 or self.bandwidth_bytes < 4:
            raise ValueError("batches, tokens, top_k, repeats, threads and bytes must be positive")
        if self.prompt + max(self.tokens, self.checked_tokens) > self.context:
            raise ValueError("prompt and new tokens must fit into the context")


class Memory:
    """Reads an array of `size` bytes once, as a sum in float32, when called."""

    def __init__(self, size: int):
        self.array = jnp.ones(size // 4, jnp.float32)
        self.sum = jax.jit(jnp.sum).lower(self.array).compile()

    def __call__(self):
        self.sum(self.array).block_until_ready()


class CTranslate2:
    """The weights of a folder of transformers in CTranslate2.

    Args:
      directory: of `save_pretrained`; it gets a vocabulary, which the converter wants.
      vocabulary: the number of tokens.
      compute_type: "float32" or "int8".
      threads: of one run.
    """

    def __init__(self, directory: str, vocabulary: int, compute_type: str, threads: int):
        import ctranslate2

        folder, end = pathlib.Path(directory), "<|endoftext|>"
        tokens = {f"t{i}": i for i in range(vocabulary - 1)} | {end: vocabulary - 1}
        special = dict.fromkeys(("unk_token", "bos_token", "eos_token"), end)
        (folder / "vocab.json").write_text(json.dumps(tokens))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "GPT2Tokenizer", **special})
        )
        converter = ctranslate2.converters.TransformersConverter(directory)
        converter.convert(str(folder / compute_type), quantization=compute_type, force=True)
        self._names = list(tokens)
        self._generator = ctranslate2.Generator(
            str(folder / compute_type),
            device="cpu",
            compute_type=compute_type,
            intra_threads=threads,
            inter_threads=1,
        )

    def __call__(self, prompts, tokens: int, top_k: int):
        """What it adds to the prompts, [B, N]; with a top_k of 1 the greedy text."""
        found = self._generator.generate_batch(
            [[self._names[token] for token in prompt] for prompt in prompts],
            max_length=tokens,
            min_length=tokens,  # no text ends early
            sampling_topk=top_k,
            include_prompt_in_result=False,
        )
        return np.array([result.sequences_ids[0] for result in found])


class Sides:
    """One GPT-2 with the same weights on both sides."""

    def __init__(self, config: Config):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.manual_seed(0)
        torch.set_num_threads(config.threads)
        self.config, self.device = config, timing.torch_device()
        options = transformers.GPT2Config(
            vocab_size=config.vocabulary,
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            # Greedy text is not one token as it is at 0.02, nor is rounding magnified as at 0.2.
            initializer_range=0.06,
            bos_token_id=None,
            eos_token_id=None,  # no text ends early
        )
        self.model = transformers.GPT2LMHeadModel(options).eval()
        with tempfile.TemporaryDirectory() as directory:
            self.model.save_pretrained(directory)
            self.ours, params = interop.load_gpt2(directory)
            self.others = self._others(directory) if config.peers else {}
        self.model.to(self.device)
        self.params = jax.device_put(params)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        # One new token reads every weight (the head is the table of tokens) but the positions.
        self.weight_bytes = 4 * (self.parameters - config.context * config.width)

    def _others(self, directory):
        if not timing.is_timed("ctranslate2", "CTranslate2"):
            return {}
        config = self.config
        return {
            f"CTranslate2 {kind}": CTranslate2(directory, config.vocabulary, kind, config.threads)
            for kind in ("float32", "int8")
        }

    def prompts(self, batch: int):
        """Random tokens, int32 [B, P]."""
        size = (batch, self.config.prompt)
        return np.random.default_rng(0).integers(0, self.config.vocabulary, size, np.int32)

    def sampler(self, tokens: int, options: SamplingOptions) -> AutoregressiveSampler:
        """Ours."""
        return AutoregressiveSampler(self.ours, self.config.prompt, tokens, options)

    def generate(self, prompts, tokens: int, **options):
        """What `generate` of transformers adds to the prompts, [B, N] in host memory."""
        prompts = torch.from_numpy(prompts).long().to(self.device)
        text = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            pad_token_id=0,
            **options,
        )
        return text[:, prompts.shape[1] :].cpu().numpy()

    def check(self) -> float:
        """The largest difference between the logits of both sides, over prompt and greedy text.

        Raises:
          FloatingPointError: it is above the tolerance, or the texts differ.
        """
        tokens, prompts = self.config.checked_tokens, self.prompts(2)
        keys, cond = sampling.sample_keys(0, 0, 2), Condition(prompt=prompts)
        sampler = self.sampler(tokens, SamplingOptions(temperature=0))
        ours = np.asarray(sampling.generate(sampler, self.params, keys, cond))
        theirs = self.generate(prompts, tokens, do_sample=False)
        whole = np.concatenate([prompts, theirs], axis=1)
        logits = np.asarray(jax.jit(self.ours.network.__call__)(self.params, whole))
        with torch.no_grad():
            expected = self.model(torch.from_numpy(whole).long().to(self.device)).logits
        difference = float(np.abs(expected.cpu().numpy() - logits).max())
        timing.agreement(difference, self.config.tolerance, "the logits of the two sides")
        if (ours != theirs).any():
            place = int((ours != theirs).any(axis=0).argmax())
            raise FloatingPointError(f"greedy texts differ from token {place} on: not timed")
        if self.others and (self.others["CTranslate2 float32"](prompts, tokens, 1) != ours).any():
            raise FloatingPointError("the greedy text of CTranslate2 is another one: not timed")
        return difference

    def compare(self, batch: int, memory: Memory) -> list[dict]:
        """Rows of the table for one size of batch."""
        torch.compiler.reset()  # a second size of batch would get a program for sizes in general
        config, prompts = self.config, self.prompts(batch)
        keys, cond = sampling.sample_keys(1, 0, batch), Condition(prompt=jax.device_put(prompts))
        sampler = self.sampler(config.tokens, SamplingOptions(top_k=config.top_k))
        began = time.perf_counter()
        params = jax.block_until_ready(jax.jit(sampler.prepare)(self.params))
        program = sampling.compile_generate(sampler, params, keys, cond)
        compile_seconds = {"gen_jax": time.perf_counter() - began}
        sides = {"gen_jax": lambda: np.asarray(program(params, keys, cond))}
        failures = {}
        for name, options in self.peers().items():
            sides[name] = lambda options=options: self.generate(
                prompts, config.tokens, do_sample=True, top_k=config.top_k, **options
            )
        for name, run in self.others.items():
            sides[name] = lambda run=run: run(prompts, config.tokens, config.top_k)
        for name, run in list(sides.items()):
            began = time.perf_counter()
            try:
                assert run().shape == (batch, config.tokens)
            except Exception as error:  # torch.compile's many; the row says which
                if name != _COMPILED:
                    raise
                failures[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                del sides[name]
                continue
            if name == _COMPILED:  # what its first run takes above its second
                first, began = time.perf_counter() - began, time.perf_counter()
                run()
                compile_seconds[name] = first - (time.perf_counter() - began)
        # The bandwidth of a shared machine moves from minute to minute: it takes its turn too.
        seconds = timing.alternate(sides | {"memory": memory}, config.repeats)
        bandwidth = memory.array.nbytes / min(seconds.pop("memory"))
        median = {name: statistics.median(values) for name, values in seconds.items()}
        ours, fastest = median["gen_jax"], min(median[n] for n in median if n != "gen_jax")
        rows = []
        for name, values in seconds.items():
            rate = batch * config.tokens / median[name]
            read = self.weight_bytes * config.tokens / median[name]
            row = {
                "batch": batch,
                "side": name,
                "tokens_per_second": round(rate, 2),
                "best_tokens_per_second": round(batch * config.tokens / min(values), 2),
                "gen_jax_is_faster_by": round(median[name] / ours, 3),
                "spread": round(max(values) / min(values) - 1, 3),
                "compile_seconds": compile_seconds.get(name) and round(compile_seconds[name], 2),
            }
            if name == "gen_jax":
                row["faster_than_fastest_peer_by"] = round(fastest / ours, 3)
            if batch == 1:
                row["share_of_bandwidth"] = round(read / bandwidth, 3)
                row["memory_bytes_per_second"] = round(bandwidth)
            rows.append(row)
        return rows + [
            {"batch": batch, "side": name, "failed": reason} for name, reason in failures.items()
        ]

    def peers(self) -> dict[str, dict]:
        """Arguments of `generate` by name."""
        static = {"cache_implementation": "static"}
        peers = {
            "dynamic cache": {},
            "static cache": static | {"disable_compile": True},
        }
        if self.config.compiled:
            # Compiles the step of one token, as `generate` does by itself on a GPU.
            settings = transformers.CompileConfig()
            settings._compile_all_devices = True
            peers[_COMPILED] = static | {"compile_config": settings}
        return peers


_COMPILED = "static cache, compiled"


def benchmark(config: Config) -> dict:
    """Runs everything; the table as JSON values."""
    timing.require("torch", "transformers")

    # Float32 on both sides: on GPUs jax would take TensorFloat-32 by default, PyTorch would not.
    with jax.default_matmul_precision("highest"):
        memory = Memory(config.bandwidth_bytes)
        sides = Sides(config)
        difference = sides.check()
        rows = []
        for batch in config.batches:
            more = sides.compare(batch, memory)
            _print(more, heading=not rows)
            rows += more
    return {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": timing.machine(),
        "parameters": sides.parameters,
        "weight_bytes_per_token": sides.weight_bytes,
        "prompt": config.prompt,
        "tokens": config.tokens,
        "largest_difference": difference,
        "rows": rows,
    }


def _print(rows, heading):
    if heading:
        print("batch  side                     tok/s     best  ratio  spread  compile s  bandwidth")
    for row in rows:
        if "failed" in row:
            print(f"{row['batch']:>5}  {row['side']:<22}  not timed: {row['failed']}", flush=True)
            continue
        compiling = row["compile_seconds"]
        share = row.get("share_of_bandwidth")
        print(
            f"{row['batch']:>5}  {row['side']:<22}  {row['tokens_per_second']:>6}  "
            f"{row['best_tokens_per_second']:>7}  {row['gen_jax_is_faster_by']:>5}  "
            f"{row['spread']:>6}  {'' if compiling is None else compiling:>9}  "
            f"{'' if share is None else f'{100 * share:.0f} %':>9}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(timing.main(Config, benchmark, __doc__))
