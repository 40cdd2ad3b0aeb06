"""Options of GPT-2 and of the family of Llama in transformers as a `TransformerConfig`, and back.

Importing this loads no jax. An option that config.json leaves out has the default of transformers.
Every option is either read, or has one supported value, or is known to have no effect on the
logits; all others are refused.
"""

import dataclasses
import json
import math
import os
import pathlib

from gen_jax.bounded import read_json
from gen_jax.interop.config_json import (
    CONFIG,
    DEEPEST,
    LARGEST,
    Refusals,
    is_count,
    naming,
    refusal,
    shown,
    unknown,
)
from gen_jax.nn.config import TransformerConfig

__all__ = ["read_network", "to_gpt2_config", "to_gpt2_options", "to_llama_config"]

# Every option of GPT2Config that is read here or has to have one value, with its default.
GPT2_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}

# The same of the family of Llama, by `model_type`.
LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "attention_bias": False,
    "mlp_bias": False,
}
_NO_BIAS_OPTIONS = {k: v for k, v in LLAMA_DEFAULTS.items() if not k.endswith("_bias")}
MISTRAL_DEFAULTS = _NO_BIAS_OPTIONS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
QWEN2_DEFAULTS = _NO_BIAS_OPTIONS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,  # without effect where use_sliding_window is false
    "layer_types": None,
}
_LLAMA_FAMILY = {
    "llama": ("Llama", LLAMA_DEFAULTS),
    "mistral": ("Mistral", MISTRAL_DEFAULTS),
    "qwen2": ("Qwen2", QWEN2_DEFAULTS),
}

# The classes whose files are read, by family and `model_type`.
_KINDS = {
    "gpt2": {"gpt2": ("GPT2LMHeadModel", "GPT2Model")},
    "llama": {
        kind: (f"{name}ForCausalLM", f"{name}Model") for kind, (name, _) in _LLAMA_FAMILY.items()
    },
}

# Options that have to be one of these, where they are given.
_FIXED = {
    "is_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, None),
}
_GPT2_FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
_LLAMA_FIXED = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, None),
    "use_sliding_window": (False,),
}

# Options of older files, or of other members of the family, that are read as well.
_LLAMA_READ = {"layer_types", "rope_scaling", "rope_theta"}

# Options without effect on the logits: dropout (read in training only), the initialisation, heads
# for other tasks, the loop of generation, and records.
_WITHOUT_EFFECT_NAMES = """
    architectures attention_dropout attn_pdrop bad_words_ids begin_suppress_tokens bos_token_id
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_range
    is_decoder label2id length_penalty max_length max_window_layers min_length model_type n_ctx
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_past output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache
"""
_WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT_NAMES.split())


def read_network(
    directory: str | os.PathLike, families: tuple[str, ...] = ("gpt2", "llama")
) -> tuple[str, TransformerConfig, frozenset[str]]:
    """The network in a folder that transformers wrote.

    Args:
      directory: of config.json.
      families: those that are accepted; "llama" has Mistral and Qwen2 too.

    Returns:
      Its family, its sizes, and for a Llama names of the matrices that have a bias; see
      `to_llama_config`.

    Raises:
      FileNotFoundError: the folder or its config.json is missing.
      ValueError: config.json is damaged, or of another model, or names options that cannot be
        expressed.
    """
    folder = pathlib.Path(directory).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder (nothing is downloaded here)")
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}")
    options = read_json(path)
    if not isinstance(options, dict):
        raise ValueError(f"{path} is damaged: it holds no options")
    with naming(path):
        _check_kind(options, {kind: _KINDS[f][kind] for f in families for kind in _KINDS[f]})
        if options["model_type"] in _KINDS["llama"]:
            return "llama", *to_llama_config(options)
        return "gpt2", to_gpt2_config(options), frozenset()


def to_gpt2_options(config: TransformerConfig) -> dict:
    """The options in config.json of a network.

    Raises:
      ValueError: names every field that GPT-2 cannot express.
    """
    problems = []
    if config.vocabulary < 1:
        problems.append("vocabulary=0 (supported: the number of tokens)")
    if config.width % config.heads:
        problems.append(f"heads={config.heads} (supported: a divisor of width, {config.width})")
    if not problems:
        problems = _fields_that_are_lost(config, to_gpt2_config(_gpt2_options(config)))
    if problems:
        raise ValueError(f"GPT-2 cannot express {'; '.join(problems)}")
    return _gpt2_options(config)


def _fields_that_are_lost(config, loaded):
    """Refusals of fields that would come back with another meaning."""
    same = dataclasses.replace(
        config,
        # Zeros stand for no biases; the others do not belong to the function or are spelt out.
        bias=loaded.bias,
        dropout=loaded.dropout,
        dtype=loaded.dtype,
        rotary_base=loaded.rotary_base if config.position == "learned" else config.rotary_base,
        kv_heads=0 if config.key_heads == config.heads else config.kv_heads,
        head_width=0 if config.heads * config.head_size == config.width else config.head_width,
    )
    given, back = dataclasses.asdict(same), dataclasses.asdict(loaded)
    return [
        refusal(given, name, json.dumps(back[name])) for name in given if given[name] != back[name]
    ]


def _gpt2_options(config):
    return GPT2_DEFAULTS | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": "float32",
        "vocab_size": config.vocabulary,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.mlp_dim or None,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        # Those of GPT-2 by default, which need not be in this vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
    }


def to_gpt2_config(stored: dict) -> TransformerConfig:
    """Our configuration of a GPT-2.

    Args:
      stored: the content of config.json.

    Raises:
      ValueError: names every option that cannot be expressed.
    """
    _check_kind(stored, _KINDS["gpt2"])
    options = GPT2_DEFAULTS | stored
    problems = _unknown_and_fixed(stored, options, GPT2_DEFAULTS.keys(), _GPT2_FIXED)
    problems += _wrong_values(
        options,
        counts=("vocab_size", "n_positions", "n_embd", "n_head"),
        layers=("n_layer",),
        optional_counts=("n_inner",),
        positive=("layer_norm_epsilon",),
        flags=("tie_word_embeddings",),
    )
    if not problems and options["n_embd"] % options["n_head"]:
        problems.append(refusal(options, "n_head", f"a divisor of n_embd, {options['n_embd']}"))
    _refuse("GPT-2", problems)
    return TransformerConfig(
        vocabulary=options["vocab_size"],
        context=options["n_positions"],
        layers=options["n_layer"],
        width=options["n_embd"],
        heads=options["n_head"],
        mlp_dim=options["n_inner"] or 0,
        norm_epsilon=float(options["layer_norm_epsilon"]),
        tied=options["tie_word_embeddings"],
    )


def to_llama_config(stored: dict) -> tuple[TransformerConfig, frozenset[str]]:
    """Our configuration of a Llama, Mistral or Qwen2, and where biases are.

    Args:
      stored: the content of config.json.

    Returns:
      The configuration, and names of the matrices of a block that have a bias ("q_proj", ...).
      Where there is any, our network has biases everywhere, and the others are zero.

    Raises:
      ValueError: names every option that cannot be expressed.
    """
    _check_kind(stored, _KINDS["llama"])
    kind = stored["model_type"]
    defaults = _LLAMA_FAMILY[kind][1]
    options = defaults | stored
    problems = _unknown_and_fixed(stored, options, defaults.keys() | _LLAMA_READ, _LLAMA_FIXED)
    problems += _wrong_values(
        options,
        counts=(
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "max_position_embeddings",
        ),
        layers=("num_hidden_layers",),
        optional_counts=("num_key_value_heads", "head_dim", "sliding_window"),
        positive=("rms_norm_eps",),
        flags=("tie_word_embeddings", "attention_bias", "mlp_bias"),
    )
    base, more = _rotary_base(options)
    problems += more
    if not problems:
        problems = _wrong_structure(options)
    _refuse(f"this {kind}", problems)
    biased = {"q_proj", "k_proj", "v_proj"} if kind == "qwen2" else set()
    if options.get("attention_bias"):
        biased |= {"q_proj", "k_proj", "v_proj", "o_proj"}
    if options.get("mlp_bias"):
        biased |= {"gate_proj", "up_proj", "down_proj"}
    heads, context = options["num_attention_heads"], options["max_position_embeddings"]
    window = options["sliding_window"] if kind == "mistral" else None
    config = TransformerConfig(
        vocabulary=options["vocab_size"],
        context=context,
        layers=options["num_hidden_layers"],
        width=options["hidden_size"],
        heads=heads,
        kv_heads=options["num_key_value_heads"] or heads,
        head_width=options["head_dim"] or options["hidden_size"] // heads,
        mlp_dim=options["intermediate_size"],
        position="rotary",
        rotary_base=float(base),
        norm="rms",
        norm_epsilon=float(options["rms_norm_eps"]),
        activation="swiglu",
        bias=bool(biased),
        tied=options["tie_word_embeddings"],
        window=window if window and window < context else 0,
    )
    return config, frozenset(biased)


def _check_kind(stored, kinds):
    """Refuses what is not of one of these model types, with its classes."""
    kind = stored.get("model_type")
    supported = " or ".join(kinds)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"model_type={shown(kind)} cannot be expressed (supported: {supported})")
    names = stored.get("architectures") or [kinds[kind][0]]
    if not isinstance(names, list) or any(name not in kinds[kind] for name in names):
        raise ValueError(
            f"architectures={shown(names)} cannot be expressed "
            f"(supported: {' or '.join(kinds[kind])})"
        )


def _unknown_and_fixed(stored, options, read, fixed):
    fixed = _FIXED | fixed
    known = read | fixed.keys() | _WITHOUT_EFFECT
    problems = unknown(stored, known)
    for key, allowed in fixed.items():
        if key in options and not _is_one_of(options[key], allowed):
            problems.append(refusal(options, key, " or ".join(map(json.dumps, allowed))))
    return problems


def _wrong_values(options, counts, layers, optional_counts, positive, flags):
    """Refusals of options that do not have the type or the range of their kind."""
    problems = []

    def require(keys, holds, supported):
        for key in keys:
            if key in options and not holds(options[key]):
                problems.append(refusal(options, key, supported))

    require(counts, is_count, f"a positive integer up to {LARGEST}")
    require(layers, lambda value: is_count(value, DEEPEST), f"a positive integer up to {DEEPEST}")
    require(
        optional_counts,
        lambda value: value is None or is_count(value),
        f"null or a positive integer up to {LARGEST}",
    )
    require(positive, _is_positive, "a positive number")
    require(flags, lambda value: type(value) is bool, "true or false")
    return problems


def _wrong_structure(options):
    """Refusals of options of a Llama that do not fit each other, or our network."""
    refusals = Refusals(options)
    width, heads = options["hidden_size"], options["num_attention_heads"]
    key_heads, head_width = options["num_key_value_heads"] or heads, options["head_dim"]
    refusals.unless(
        "num_attention_heads",
        head_width is not None or width % heads == 0,
        f"a divisor of hidden_size, {width}",
    )
    refusals.unless(
        "num_key_value_heads",
        heads % key_heads == 0,
        f"null or a divisor of num_attention_heads, {heads}",
    )
    refusals.unless(
        "head_dim" if head_width else "hidden_size",
        (head_width or width // heads) % 2 == 0,
        "an even size of each head",
    )
    layers = options.get("layer_types")
    refusals.unless(
        "layer_types",
        layers is None or layers == ["full_attention"] * options["num_hidden_layers"],
        "null or full_attention for each layer",
    )
    return refusals.problems


def _rotary_base(options):
    """The base of rotary positions, under its old or its new name, and refusals."""
    problems, bases = [], []
    if options.get("rope_theta") is not None:
        bases.append(options["rope_theta"])
    for key in ("rope_parameters", "rope_scaling"):
        value = options.get(key)
        if value is None:
            continue
        rest = value if isinstance(value, dict) else {"rope_type": value}
        kinds = [rest[name] for name in ("rope_type", "type") if name in rest]
        unknown = rest.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if any(kind != "default" for kind in kinds) or unknown:
            problems.append(refusal(options, key, "the type default, with rope_theta"))
        elif not _is_one_of(rest.get("partial_rotary_factor"), (1, None)):
            problems.append(refusal(options, key, "partial_rotary_factor 1"))
        if rest.get("rope_theta") is not None:
            bases.append(rest["rope_theta"])
    if not problems and not all(_is_positive(base) for base in bases):
        problems.append(f"rope_theta={shown(bases[0])} (supported: a positive number)")
    elif not problems and len(set(bases)) > 1:
        problems.append(f"rope_theta={shown(bases)} (supported: the same at each place)")
    return bases[0] if bases else 10_000.0, problems


def _is_positive(value):
    return type(value) in (int, float) and 0 < value < math.inf


def _is_one_of(value, allowed):
    # True and 1 are different values here, and 1 and 1.0 are not.
    return any(
        value == other and (type(value) is bool) == (type(other) is bool) for other in allowed
    )


def _refuse(what, problems):
    if problems:
        raise ValueError(f"{what} cannot be expressed: {'; '.join(problems)}")
