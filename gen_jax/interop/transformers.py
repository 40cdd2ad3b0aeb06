"""Language models in the format of transformers: config.json and safetensors.

The same networks under other names. GPT-2 stores matrices as we do, [in, out]; Llama stores them
[out, in], and splits the query, key and value (one matrix here), and the gate and value of the
feed-forward network (one matrix here). Options that `gen_jax.nn.transformer.TokenNetwork` does not
have are refused by name. Neither PyTorch nor transformers is needed.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gen_jax.interop import files
from gen_jax.interop.transformers_options import read_network, to_gpt2_options
from gen_jax.models.autoregressive.losses import AutoregressiveModel
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork

__all__ = ["load_gpt2", "load_llama", "load_transformers", "save_gpt2"]

_WEIGHTS = "model.safetensors"
_HEAD = "lm_head.weight"
_LEAVES = ("kernel", "bias", "scale")


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a family names and stores its tensors.

    Attributes:
      prefix: of all but the head; files may leave it out.
      block: of the tensors of block {}.
      layers: names of our layers; several where ours is one matrix.
      rows_out: matrices are [out, in].
      ignored: buffers that older versions stored, which follow from the options.
    """

    prefix: str
    block: str
    layers: Mapping[str, tuple[str, ...]]
    rows_out: bool
    ignored: re.Pattern


_GPT2 = _Layout(
    prefix="transformer.",
    block="h.{}.",
    layers={
        "token": ("wte",),
        "position": ("wpe",),
        "norm": ("ln_f",),
        "norm_attention": ("ln_1",),
        "attention/qkv": ("attn.c_attn",),
        "attention/out": ("attn.c_proj",),
        "norm_feed_forward": ("ln_2",),
        "feed_forward/up": ("mlp.c_fc",),
        "feed_forward/down": ("mlp.c_proj",),
    },
    rows_out=False,
    ignored=re.compile(r"\bh\.\d+\.attn\.(bias|masked_bias)$"),  # the causal mask
)
_LLAMA = _Layout(
    prefix="model.",
    block="layers.{}.",
    layers={
        "token": ("embed_tokens",),
        "norm": ("norm",),
        "norm_attention": ("input_layernorm",),
        "attention/qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention/out": ("self_attn.o_proj",),
        "norm_feed_forward": ("post_attention_layernorm",),
        "feed_forward/up": ("mlp.gate_proj", "mlp.up_proj"),
        "feed_forward/down": ("mlp.down_proj",),
    },
    rows_out=True,
    ignored=re.compile(r"\bself_attn\.rotary_emb\.inv_freq$"),
)


def load_transformers(directory: str | os.PathLike) -> tuple[AutoregressiveModel, dict]:
    """The language model in a folder that transformers wrote.

    It loads a `GPT2LMHeadModel`, a `LlamaForCausalLM`, a Mistral, with a sliding window or without,
    and a Qwen2 without one. Where only some matrices have a bias (Qwen2), the others get zeros.

    Args:
      directory: holds config.json and model.safetensors, or shards with their index; the names of
        the tensors may lack "transformer." or "model.". Weights in float16 or bfloat16 become
        float32.

    Returns:
      The model and its float32 parameters; `model.network(params, tokens)` gives logits. Its
      dropout, which only training reads, is 0 whatever the file says. The context of a Llama is
      max_position_embeddings.

    Raises:
      FileNotFoundError: the folder, config.json or weights are missing.
      ValueError: the options cannot be expressed (each is named; scaled rotary positions are among
        them), the weights are pickled or damaged, or tensors are missing, unknown or of another
        shape.
    """
    return _load_family(directory, ("gpt2", "llama"))


def load_gpt2(directory: str | os.PathLike) -> tuple[AutoregressiveModel, dict]:
    """As `load_transformers`, of a folder that must be a GPT-2's."""
    return _load_family(directory, ("gpt2",))


def load_llama(directory: str | os.PathLike) -> tuple[AutoregressiveModel, dict]:
    """As `load_transformers`, of a folder that must be of the family of Llama."""
    return _load_family(directory, ("llama",))


def _load_family(directory, families):
    family, config, biased = read_network(directory, families)
    layout = {"gpt2": _GPT2, "llama": _LLAMA}[family]

    def stored(name):
        bias = family == "llama" and name.endswith(".bias")
        return not bias or name.split(".")[-2] in biased

    model = AutoregressiveModel(TokenNetwork(config))
    return model, _load(pathlib.Path(directory).expanduser(), config, layout, stored)


def save_gpt2(
    directory: str | os.PathLike, config: TransformerConfig, params: Mapping[str, Any]
) -> None:
    """Writes a network so that `GPT2LMHeadModel.from_pretrained` of transformers loads it.

    GPT-2 has biases everywhere: for a network without (`bias=False`) zeros are written, and it
    comes back with biases that are zero. A reader sees each file whole, the old one or the new
    one. `config.dtype` is not stored.

    Args:
      directory: created when it does not exist; config.json and the weights in it are replaced.
      config: the sizes of the network.
      params: its parameters, stored as float32.

    Raises:
      ValueError: GPT-2 cannot express the configuration (each field is named), parameters are
        missing, unknown or of another shape, or the folder holds sharded weights.
    """
    directory = pathlib.Path(directory).expanduser()
    options = to_gpt2_options(config)
    index = files.index_name(_WEIGHTS)
    if (directory / index).exists():
        raise ValueError(f"{directory} holds sharded weights ({index}); choose another folder")
    given = traverse_util.flatten_dict(params)
    expected = files.abstract_params(TokenNetwork(config))
    files.check("params", files.shapes(expected), files.shapes(given))
    biased = TokenNetwork(dataclasses.replace(config, bias=True))
    whole = files.abstract_params(biased) | given
    files.write(directory, options, _WEIGHTS, _export(whole, config, _GPT2))


def _load(directory, config, layout, stored):
    """Our tree of parameters; `stored` tells which tensors the file has, the others are zero."""
    path = files.find_weights(directory, _WEIGHTS)
    abstract_params = files.abstract_params(TokenNetwork(config))
    tensors = files.read_tensors(path, files.count(abstract_params), layout.ignored)
    tensors = _with_prefix(path, tensors, layout.prefix)
    expected = {n: t for n, t in _export(abstract_params, config, layout).items() if stored(n)}
    if config.tied and _HEAD in tensors:
        (token,) = _parts(("token",), abstract_params["token",], config, layout)
        if not np.array_equal(tensors.pop(_HEAD), tensors.get(token)):
            raise ValueError(
                f"{path}: {_HEAD} is not the table of tokens, though tie_word_embeddings is true"
            )
    files.check(path, files.shapes(expected), files.shapes(tensors))
    return _import(abstract_params, tensors, config, layout)


def _with_prefix(path, tensors, prefix):
    named = {}
    for name, tensor in tensors.items():
        new = name if name.startswith(prefix) or name == _HEAD else prefix + name
        if new in named:
            raise ValueError(f"{path} has {new} with and without {prefix!r}")
        named[new] = tensor
    return named


def _export(leaves, config, layout):
    """Our parameters by path as tensors by name."""
    return {
        name: part.T if _is_transposed(path, layout) else part
        for path, leaf in leaves.items()
        for name, part in _parts(path, leaf, config, layout).items()
    }


def _import(abstract_params, tensors, config, layout):
    """The inverse of `_export`, as a tree of float32 arrays; zeros for what is not stored."""
    leaves = {}
    for path, leaf in abstract_params.items():
        parts = []
        for name, zeros in _parts(path, leaf, config, layout).items():
            if name not in tensors:
                parts.append(zeros)
            else:
                parts.append(tensors[name].T if _is_transposed(path, layout) else tensors[name])
        leaves[path] = jnp.asarray(np.concatenate(parts, axis=-1))
    return traverse_util.unflatten_dict(leaves)


def _parts(path, leaf, config, layout):
    """One of our parameters as pieces along its last axis, by the names of the tensors."""
    if path == ("head",):
        return {_HEAD: np.asarray(leaf)}
    prefix, layer = layout.prefix, [part for part in path if part not in _LEAVES]
    if match := re.fullmatch(r"block_(\d+)", path[0]):
        prefix += layout.block.format(match[1])
        layer = layer[1:]
    names = layout.layers["/".join(layer)]
    suffix = "bias" if path[-1] == "bias" else "weight"
    shares = {1: [1], 2: [1, 1], 3: [config.heads, config.key_heads, config.key_heads]}[len(names)]
    ends = np.cumsum(shares)[:-1] * np.shape(leaf)[-1] // sum(shares)
    pieces = np.split(np.asarray(leaf), ends, axis=-1)
    return {f"{prefix}{n}.{suffix}": piece for n, piece in zip(names, pieces, strict=True)}


def _is_transposed(path, layout):
    return path == ("head",) or (layout.rows_out and path[-1] == "kernel")
