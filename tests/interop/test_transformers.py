"""Language models of transformers: round trips, refusals, and agreement with the peer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import kernels
from gen_jax import sampling
from gen_jax.interop import load_gpt2, load_llama, save_gpt2
from gen_jax.interop.transformers_options import to_gpt2_config, to_llama_config
from gen_jax.models.autoregressive.config import SamplingOptions
from gen_jax.models.autoregressive.losses import AutoregressiveModel
from gen_jax.models.autoregressive.prompts import make_prompts
from gen_jax.models.autoregressive.samplers import AutoregressiveSampler
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork

logits_of = jax.jit(lambda model, params, tokens: model.network(params, tokens), static_argnums=0)

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

TINY = TransformerConfig(vocabulary=11, context=7, layers=2, width=8, heads=2)

# config.json of openai-community/gpt2, and of an early Llama.
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
LLAMA = {
    "_name_or_path": "here",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 172,
    "max_position_embeddings": 512,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 20000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL = LLAMA | {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "sliding_window": None,
}
del MISTRAL["attention_bias"]
QWEN2 = MISTRAL | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": False,
    "sliding_window": 64,
    "max_window_layers": 1,
}


def write_config(directory, options):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(options))
    return directory


def random_params(config, seed=0):
    """Parameters of order 1 / sqrt(fan in), the constant ones too."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(TokenNetwork(config).init, jax.random.key(0))

    def draw(path, leaf):
        noise = generator.normal(size=leaf.shape)
        if path[-1].key == "scale":
            noise = 1 + 0.3 * noise
        elif path[-1].key == "bias":
            noise = 0.1 * noise
        elif path[-1].key in ("kernel", "head"):
            noise = noise / np.sqrt(leaf.shape[0])
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_same_tree(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def saved(tmp_path):
    params = random_params(TINY)
    save_gpt2(tmp_path / "gpt2", TINY, params)
    return tmp_path / "gpt2", params


def edit_tensors(directory, edit):
    tensors = safetensors.numpy.load_file(directory / WEIGHTS)
    safetensors.numpy.save_file(edit(dict(tensors)), directory / WEIGHTS)


def edit_options(directory, **options):
    stored = json.loads((directory / "config.json").read_text())
    write_config(directory, stored | options)


def shard(directory, number=3):
    """One file as shards with their index; the names of the shards."""
    tensors = safetensors.numpy.load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = [f"model-{i + 1:05}-of-{number:05}.safetensors" for i in range(number)]
    places = {name: names[i % number] for i, name in enumerate(sorted(tensors))}
    for file in names:
        part = {name: tensors[name] for name, place in places.items() if place == file}
        safetensors.numpy.save_file(part, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return names


# What needs no peer.


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, tied=False, mlp_dim=20, norm_epsilon=1e-3),
        dataclasses.replace(TINY, vocabulary=3, heads=1, layers=1, context=1),
    ],
)
def test_loading_what_was_saved_gives_the_same_bits(tmp_path, config):
    params = random_params(config)
    save_gpt2(tmp_path, config, params)
    model, loaded = load_gpt2(tmp_path)
    assert model == AutoregressiveModel(TokenNetwork(config))
    assert_same_tree(loaded, params)


def test_saving_what_was_loaded_gives_the_same_file(saved, tmp_path):
    directory, _ = saved
    model, params = load_gpt2(directory)
    save_gpt2(tmp_path / "again", model.network.config, params)
    for name in ("config.json", WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


def test_saving_leaves_nothing_else_and_replaces_what_was_there(saved):
    directory, params = saved
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    save_gpt2(directory, TINY, other)
    assert sorted(file.name for file in directory.iterdir()) == ["config.json", WEIGHTS]
    assert_same_tree(load_gpt2(directory)[1], other)


def test_a_network_without_biases_comes_back_with_zeros(tmp_path):
    config = dataclasses.replace(TINY, bias=False, dropout=0.2)
    params = random_params(config)
    save_gpt2(tmp_path, config, params)
    model, loaded = load_gpt2(tmp_path)
    assert model.network.config == TINY
    tokens = np.arange(12).reshape(2, 6) % 11
    ours = logits_of(AutoregressiveModel(TokenNetwork(config)), params, tokens)
    np.testing.assert_allclose(logits_of(model, loaded, tokens), ours, atol=1e-6)


def without_prefix(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_masks(tensors):
    masks = {
        f"transformer.h.{i}.attn.bias": np.tril(np.ones((1, 1, 7, 7), np.uint8)) for i in range(2)
    }
    masks["transformer.h.0.attn.masked_bias"] = np.full((), -1e4, np.float32)
    return tensors | masks


def with_copied_head(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


@pytest.mark.parametrize(
    "edit",
    [
        without_prefix,
        with_masks,
        lambda tensors: without_prefix(with_masks(tensors)),
        with_copied_head,
    ],
)
def test_other_versions_of_the_file_are_the_same_network(saved, edit):
    directory, params = saved
    edit_tensors(directory, edit)
    assert_same_tree(load_gpt2(directory)[1], params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_is_loaded_as_float32(saved, dtype):
    directory, params = saved
    edit_tensors(directory, lambda tensors: {k: v.astype(dtype) for k, v in tensors.items()})
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), params)
    assert_same_tree(load_gpt2(directory)[1], expected)


def test_shards_are_the_same_network(saved):
    directory, params = saved
    shard(directory)
    assert_same_tree(load_gpt2(directory)[1], params)
    with pytest.raises(ValueError, match="holds sharded weights"):
        save_gpt2(directory, TINY, params)


def test_shards_that_do_not_fit_their_index_are_refused(saved):
    directory, _ = saved
    whole = (directory / WEIGHTS).read_bytes()
    first, second, _ = shard(directory)
    index = json.loads((directory / INDEX).read_text())

    def refused(error, message, places):
        changed = {"weight_map": index["weight_map"] | places}
        (directory / INDEX).write_text(json.dumps(changed))
        with pytest.raises(error, match=message) as refusal:
            load_gpt2(directory)
        assert "\n" not in str(refusal.value)

    name = "transformer.wte.weight"
    refused(ValueError, f"does not fit its shards: {name}$", {name: second})
    refused(ValueError, "does not fit its shards: more$", {"more": first})
    refused(ValueError, r"names \.\./other\.safetensors, not", {name: "../other.safetensors"})
    refused(FileNotFoundError, r"has no other\.safetensors, which", {name: "other.safetensors"})
    (directory / INDEX).write_text(json.dumps(index))
    (directory / WEIGHTS).write_bytes(whole)
    with pytest.raises(ValueError, match=f"holds both {WEIGHTS} and {INDEX}; remove one"):
        load_gpt2(directory)
    (directory / WEIGHTS).unlink()
    for damaged in ("{", "[]", "{}"):
        (directory / INDEX).write_text(damaged)
        with pytest.raises(ValueError, match=rf"{INDEX} is damaged"):
            load_gpt2(directory)


def test_a_tensor_in_two_shards_is_refused(saved):
    directory, _ = saved
    first, second, _ = shard(directory)
    one, two = (safetensors.numpy.load_file(directory / name) for name in (first, second))
    name = next(iter(one))
    safetensors.numpy.save_file(two | {name: one[name]}, directory / second)
    with pytest.raises(ValueError, match=f"has {name} in both {first} and {second}$"):
        load_gpt2(directory)


LOADERS = {"gpt2": load_gpt2, "llama": load_llama, "mistral": load_llama, "qwen2": load_llama}


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (GPT2, "activation_function", "gelu"),
        (GPT2, "activation_function", "relu"),
        (GPT2, "scale_attn_weights", False),
        (GPT2, "scale_attn_by_inverse_layer_idx", True),
        (GPT2, "reorder_and_upcast_attn", True),
        (GPT2, "add_cross_attention", True),
        (GPT2, "is_encoder_decoder", True),
        (GPT2, "pruned_heads", {"0": [1]}),
        (GPT2, "tie_word_embeddings", None),
        (GPT2, "n_head", 7),
        (GPT2, "n_layer", 0),
        (GPT2, "n_embd", "768"),
        (GPT2, "n_embd", 10**30),
        (GPT2, "n_positions", 2**31),
        (GPT2, "n_layer", 10**6),
        (GPT2, "n_inner", 0),
        (GPT2, "n_positions", True),
        (GPT2, "vocab_size", None),
        (GPT2, "layer_norm_epsilon", 0),
        (GPT2, "hidden_size", 768),
        (GPT2, "quantization_config", {"load_in_8bit": True}),
        (LLAMA, "hidden_act", "gelu"),
        (LLAMA, "rope_scaling", {"type": "linear", "factor": 2.0}),
        (LLAMA, "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        (LLAMA, "rope_parameters", {"rope_type": "yarn", "rope_theta": 20000.0}),
        (LLAMA, "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        (LLAMA, "rope_parameters", {"full_attention": {"rope_type": "default"}}),
        (LLAMA, "rope_theta", -1.0),
        (LLAMA, "partial_rotary_factor", 0.5),
        (LLAMA, "num_key_value_heads", 3),
        (LLAMA, "num_attention_heads", 7),
        (LLAMA, "head_dim", 7),
        (LLAMA, "hidden_size", 8),
        (LLAMA, "attention_bias", "no"),
        (LLAMA, "rms_norm_eps", -1e-6),
        (LLAMA, "sliding_window", 64),
        (LLAMA, "qk_layernorm", True),
        (LLAMA, "layer_types", ["full_attention", "sliding_attention"]),
        (MISTRAL, "sliding_window", 0),
        (MISTRAL, "attention_bias", False),
        (QWEN2, "use_sliding_window", True),
        (QWEN2, "layer_types", ["full_attention"]),
    ],
)
def test_an_option_that_the_network_lacks_is_refused_by_name(tmp_path, base, key, value):
    write_config(tmp_path, base | {key: value})
    with pytest.raises(ValueError) as refusal:
        LOADERS[base["model_type"]](tmp_path)
    message = str(refusal.value)
    assert f"{key}={json.dumps(value)} (" in message
    assert "\n" not in message


def test_all_refused_options_are_listed_together(tmp_path):
    write_config(tmp_path, GPT2 | {"scale_attn_weights": False, "rotary": True, "n_layer": 0})
    with pytest.raises(ValueError, match=r"rotary=true .*scale_attn_weights=.* n_layer=0"):
        load_gpt2(tmp_path)


def test_a_base_of_rotary_positions_that_is_given_twice_is_refused(tmp_path):
    write_config(tmp_path, LLAMA | {"rope_parameters": {"rope_theta": 10000.0}})
    with pytest.raises(ValueError, match=r"rope_theta=\[20000\.0, 10000\.0\]"):
        load_llama(tmp_path)


def test_an_option_left_out_has_the_default_of_transformers():
    assert to_gpt2_config({"model_type": "gpt2"}) == TransformerConfig(vocabulary=50257)
    assert to_llama_config({"model_type": "llama"})[0].mlp_dim == 11008
    assert to_llama_config({"model_type": "mistral"})[0].window == 4096
    assert to_llama_config({"model_type": "qwen2"})[0].window == 0


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (GPT2, {}),
        (GPT2, {"activation_function": "gelu_pytorch_tanh", "n_inner": 3072}),
        (GPT2, {"_name_or_path": "gpt2", "transformers_version": "4.0", "dtype": "float32"}),
        (GPT2, {"architectures": None, "do_sample": True, "pruned_heads": {}}),
        (LLAMA, {}),
        (LLAMA, {"rope_scaling": {"type": "default"}, "hidden_act": "swish"}),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
        (LLAMA, {"num_key_value_heads": None, "head_dim": None}),
        (MISTRAL, {}),
        (MISTRAL, {"sliding_window": 512}),
        (QWEN2, {}),
        (QWEN2, {"layer_types": ["full_attention"] * 2}),
    ],
)
def test_an_option_without_effect_is_accepted(tmp_path, base, options):
    write_config(tmp_path, base | options)
    with pytest.raises(FileNotFoundError, match=f"has no {WEIGHTS}"):
        LOADERS[base["model_type"]](tmp_path)


@pytest.mark.parametrize("name", ["gpt_neo", None, ["gpt2"]])
def test_another_kind_of_model_is_refused(tmp_path, name):
    for load, options in ((load_gpt2, GPT2), (load_llama, LLAMA)):
        write_config(tmp_path, options | {"model_type": name})
        with pytest.raises(ValueError, match=r"model_type=.* cannot be expressed"):
            load(tmp_path)
        write_config(tmp_path, options | {"architectures": ["GPT2ForSequenceClassification"]})
        with pytest.raises(ValueError, match=r"architectures=.* cannot be expressed"):
            load(tmp_path)


def test_missing_and_damaged_files_are_refused(tmp_path):
    for load in (load_gpt2, load_llama):
        with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
            load(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            load(tmp_path)
    for content, message in (('{"model_type": "gp', "is damaged"), ("[]", "holds no options")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_gpt2(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    write_config(tmp_path, GPT2)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"pickled .*model\.bin.* convert them to .*safetensors"):
        load_gpt2(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(saved, kept):
    path = saved[0] / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged") as refusal:
        load_gpt2(saved[0])
    assert "\n" not in str(refusal.value)


def changed(**shapes):
    zeros = {f"transformer.{key.replace('_', '.')}": np.zeros(shapes[key]) for key in shapes}
    return lambda tensors: tensors | {k: v.astype(np.float32) for k, v in zeros.items()}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: {k: v for k, v in tensors.items() if k != "transformer.wpe.weight"},
            r"missing transformer\.wpe\.weight$",
        ),
        (lambda tensors: tensors | {"score": np.zeros(1, np.float32)}, r"unknown transformer\."),
        (changed(wpe_weight=(8, 8)), r"wpe\.weight \[8, 8\] instead of \[7, 8\]$"),
        (changed(wte_weight=(12, 8)), r"wte\.weight \[12, 8\] instead of \[11, 8\]$"),
        (lambda tensors: {}, r"missing .* and \d+ more$"),
        (
            lambda tensors: tensors | {"transformer.ln_f.bias": np.zeros(8, np.int32)},
            r"ln_f\.bias is I32 \(supported: F32",
        ),
        (
            lambda tensors: tensors | {"lm_head.weight": np.zeros((11, 8), np.float32)},
            r"lm_head\.weight is not the table of tokens, though tie_word_embeddings is true",
        ),
        (
            lambda tensors: tensors | {"ln_f.bias": np.zeros(8, np.float32)},
            r"has transformer\.ln_f\.bias with and without 'transformer\.'",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, edit, message):
    edit_tensors(saved[0], edit)
    with pytest.raises(ValueError, match=message) as refusal:
        load_gpt2(saved[0])
    assert "\n" not in str(refusal.value)


def test_an_untied_head_must_be_there(saved):
    edit_options(saved[0], tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"missing lm_head\.weight$"):
        load_gpt2(saved[0])


def test_what_gpt2_cannot_express_is_not_saved(tmp_path):
    params = random_params(TINY)
    for field, value in {
        "vocabulary": 0,
        "kv_heads": 1,
        "head_width": 8,
        "position": "rotary",
        "norm": "rms",
        "activation": "swiglu",
        "causal": False,
        "window": 3,
        "extra_inputs": 1,
        "memory": True,
    }.items():
        config = dataclasses.replace(TINY, **{field: value})
        with pytest.raises(ValueError, match=f"GPT-2 cannot express {field}=") as refusal:
            save_gpt2(tmp_path, config, params)
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"params does not fit the network: missing head$"):
        save_gpt2(tmp_path, dataclasses.replace(TINY, tied=False), params)
    with pytest.raises(ValueError, match="params does not fit the network: unknown block_0"):
        save_gpt2(tmp_path, dataclasses.replace(TINY, bias=False), params)
    assert not list(tmp_path.iterdir())


# Agreement with transformers itself.


@pytest.fixture
def peer():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield transformers
    torch.set_num_threads(threads)


FAMILIES = {
    "GPT2": ("GPT2LMHeadModel", load_gpt2),
    "Llama": ("LlamaForCausalLM", load_llama),
    "Mistral": ("MistralForCausalLM", load_llama),
    "Qwen2": ("Qwen2ForCausalLM", load_llama),
}
SIZES = {
    "vocab_size": 150,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def make(peer, family, seed=0, **options):
    """A network of transformers in which every weight matters; the loader for its files."""
    import torch

    name, load = FAMILIES[family]
    inner = {} if family == "GPT2" else {"intermediate_size": 44}
    torch.manual_seed(seed)
    config = getattr(peer, f"{family}Config")(**(SIZES | inner | options))
    model = getattr(peer, name)(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
            elif "norm" in name or "ln_" in name:
                weight.normal_(1, 0.3)
    return model, load


def logits_of_both(peer_model, model, params, seed=0, length=40):
    import torch

    tokens = np.random.default_rng(seed).integers(0, model.vocabulary, (3, length))
    with torch.no_grad():
        theirs = peer_model(torch.from_numpy(tokens)).logits.numpy()
    assert theirs.std() > 0.5
    return logits_of(model, params, tokens), theirs


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("GPT2", {}),
        ("GPT2", {"tie_word_embeddings": False, "vocab_size": 97}),
        ("GPT2", {"n_inner": 50, "activation_function": "gelu_pytorch_tanh"}),
        ("GPT2", {"layer_norm_epsilon": 1e-2, "num_attention_heads": 1, "vocab_size": 500}),
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-2}),
        ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("Llama", {"head_dim": 12, "num_key_value_heads": 2}),
        ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"attention_bias": True}),
        ("Mistral", {"sliding_window": None, "num_key_value_heads": 2}),
        ("Mistral", {"sliding_window": 256, "num_key_value_heads": 4}),
        ("Mistral", {"sliding_window": 9, "num_key_value_heads": 2}),
        ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ],
)
def test_a_network_of_transformers_gives_the_same_logits_here(peer, tmp_path, family, options):
    model, load = make(peer, family, **options)
    model.save_pretrained(tmp_path)
    ours, theirs = logits_of_both(model, *load(tmp_path))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_shards_and_bodies_of_transformers_are_read(peer, tmp_path, family):
    model, load = make(peer, family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert (tmp_path / "shards" / INDEX).exists()
    model.base_model.save_pretrained(tmp_path / "body")
    for name in ("shards", "body"):
        ours, theirs = logits_of_both(model, *load(tmp_path / name))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.oracle
def test_the_old_name_of_the_rotary_base_is_read(peer, tmp_path):
    base = {"rope_type": "default", "rope_theta": 500.0}
    model, load = make(peer, "Llama", rope_parameters=base)
    model.save_pretrained(tmp_path)
    edit_options(tmp_path, rope_parameters=None, rope_theta=500.0)
    ours, theirs = logits_of_both(model, *load(tmp_path))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, tied=False, mlp_dim=20, norm_epsilon=1e-3),
        dataclasses.replace(TINY, bias=False, dropout=0.1),
    ],
)
def test_a_network_saved_here_gives_the_same_logits_in_transformers(peer, tmp_path, config):
    params, model = random_params(config), AutoregressiveModel(TokenNetwork(config))
    save_gpt2(tmp_path, config, params)
    for loader in (peer.GPT2LMHeadModel, peer.AutoModelForCausalLM):
        loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert type(loaded) is peer.GPT2LMHeadModel
        ours, theirs = logits_of_both(loaded.eval(), model, params, length=7)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def greedy_of_transformers(model, prompts, tokens, eos):
    """Greedy continuations [B, N] of prompts, padded on the left, and after `eos`."""
    import torch

    length = max(map(len, prompts))
    padded = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    seen = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    text = model.generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(seen),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=eos,
        pad_token_id=0 if eos is None else eos,
    )
    return text[:, length:].numpy()


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("GPT2", {"tie_word_embeddings": False}),
        ("Llama", {"num_key_value_heads": 2}),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": 20}),
    ],
)
def test_greedy_text_is_the_same_token_for_token(peer, tmp_path, family, options):
    # Weights so large that texts are not soon a loop, and the best token is clear at every place.
    peer_model, load = make(peer, family, initializer_range=0.8, **options)
    peer_model.save_pretrained(tmp_path)
    model, params = load(tmp_path)
    generator = np.random.default_rng(1)
    prompts = [generator.integers(0, 150, length) for length in (7, 1, 12, 3, 12)]
    endless = greedy_of_transformers(peer_model, prompts, 200, None)
    assert all(len(set(row)) > 20 for row in endless)
    rows = {token: (endless == token).any(axis=1) for token in np.unique(endless)}
    eos = int(next(token for token, has in rows.items() if 0 < has.sum() < len(prompts)))
    theirs = greedy_of_transformers(peer_model, prompts, 200, eos)
    assert theirs.shape == (5, 200)  # some end, others do not

    sampler = AutoregressiveSampler(model, 12, 200, SamplingOptions(temperature=0), eos)
    keys = sampling.sample_keys(0, 0, len(prompts))
    ours = sampling.generate(sampler, params, keys, make_prompts(model, prompts))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.oracle
@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize(
    "choice",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 400},
        {"top_p": 0.9},
        {"top_p": 0.05},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 50, "top_p": 0.8},
        {"temperature": 0.3, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
    ],
)
def test_the_filters_keep_what_those_of_transformers_keep(peer, choice, scale):
    import torch

    warpers = {
        "temperature": peer.TemperatureLogitsWarper,
        "top_k": peer.TopKLogitsWarper,
        "top_p": peer.TopPLogitsWarper,
        "min_p": peer.MinPLogitsWarper,
    }
    logits = scale * np.random.default_rng(0).normal(size=(64, 300)).astype(np.float32)
    theirs = torch.from_numpy(logits)
    for name, warper in warpers.items():
        if name in choice:
            theirs = warper(choice[name])(None, theirs)
    ours = np.asarray(kernels.filter_logits(logits, **choice))
    np.testing.assert_array_equal(ours > -np.inf, theirs.numpy() > -np.inf)
    np.testing.assert_allclose(jax.nn.softmax(ours), theirs.softmax(-1).numpy(), rtol=1e-5)


@pytest.mark.oracle
def test_the_tables_of_defaults_are_those_of_transformers(peer):
    from gen_jax.interop import transformers_options as options

    for config, table in (
        (peer.GPT2Config, options.GPT2_DEFAULTS),
        (peer.LlamaConfig, options.LLAMA_DEFAULTS),
        (peer.MistralConfig, options.MISTRAL_DEFAULTS),
        (peer.Qwen2Config, options.QWEN2_DEFAULTS),
    ):
        fields = {field.name: field.default for field in dataclasses.fields(config)}
        theirs = {name: fields.get(name) for name in table}
        assert theirs == table
        unread = fields.keys() - table.keys() - options._WITHOUT_EFFECT - options._FIXED.keys()
        common = {field.name for field in dataclasses.fields(peer.PreTrainedConfig)}
        assert not unread - common
