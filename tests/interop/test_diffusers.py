"""UNets of diffusers: round trips, refusals, and agreement with the peer."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from einops import rearrange

from gen_jax.interop import load_diffusers_unet, save_diffusers_unet
from gen_jax.interop.diffusers_options import read_network
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.losses import DiffusionModel
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.unet import UNetNetwork

WEIGHTS = "diffusion_pytorch_model.safetensors"

# config.json of google/ddpm-cifar10-32.
DDPM_CIFAR10 = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
SMALL = DDPM_CIFAR10 | {
    "block_out_channels": [8, 16, 16, 16],
    "norm_num_groups": 4,
    "sample_size": 16,
}
LEARNED = DiffusionConfig(variance="learned")  # for networks with twice the channels of the image


def two_levels(**options):
    kinds = {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "sample_size": 8,
    }
    return SMALL | kinds | options


def write_config(directory, options):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(options))
    return directory


def random_params(config, size, seed=0):
    """Parameters of order 1 / sqrt(fan in), the zero-initialised ones too."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(
        lambda key: UNetNetwork(config).init(key, size, size), jax.random.key(0)
    )

    def draw(path, leaf):
        noise = generator.normal(size=leaf.shape)
        if path[-1].key == "scale":
            noise = 1 + 0.3 * noise
        elif path[-1].key == "bias":
            noise = 0.1 * noise
        else:
            noise = noise / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_same_tree(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


TINY = UNetConfig(
    widths=(8, 16),
    blocks=1,
    attention=(4,),
    head_width=8,
    groups=4,
    dropout=0.1,
    channels=2,
    out_channels=4,
)
load_tiny = functools.partial(load_diffusers_unet, process=LEARNED)


@pytest.fixture
def saved(tmp_path):
    params = random_params(TINY, 8)
    save_diffusers_unet(tmp_path / "unet", TINY, params, sample_size=8)
    return tmp_path / "unet", params


def edit_tensors(directory, edit):
    tensors = safetensors.numpy.load_file(directory / WEIGHTS)
    safetensors.numpy.save_file(edit(dict(tensors)), directory / WEIGHTS)


@pytest.mark.parametrize(
    ("config", "sample_size"),
    [
        (TINY, 8),
        (UNetConfig(widths=(8,), blocks=2, attention=(), groups=2), 4),
        (UNetConfig(widths=(4, 8, 8), blocks=1, attention=(8, 4), groups=2), (16, 8)),
        (UNetConfig(widths=(8, 8), blocks=1, attention=(8,), groups=8, classes=3), 8),
        (UNetConfig(widths=(8,), attention=(), groups=8, classes=3, null_class=False), 8),
        (
            UNetConfig(
                widths=(8, 8),
                attention=(4,),
                groups=8,
                patch=2,
                time_shift=0.0,
                time_order="cos_sin",
                downsampling="both",
            ),
            16,
        ),
    ],
)
def test_loading_what_was_saved_gives_the_same_bits(tmp_path, config, sample_size):
    params = random_params(config, int(np.max(sample_size)))
    save_diffusers_unet(tmp_path, config, params, sample_size=sample_size)
    process = LEARNED if config is TINY else DiffusionConfig(schedule="cosine")
    model, loaded = load_diffusers_unet(tmp_path, process)
    if not config.null_class:
        process = dataclasses.replace(process, label_dropout=0.0)
    network, sides = model.network, np.broadcast_to(sample_size, 2)
    assert sorted(network.config.attention) == sorted(config.attention)
    assert network.config == dataclasses.replace(config, attention=network.config.attention)
    assert model == DiffusionModel(network, process, (*map(int, sides), config.channels))
    assert_same_tree(loaded, params)


def test_the_process_is_that_of_ddpm_unless_told_otherwise(tmp_path):
    config = dataclasses.replace(TINY, out_channels=2)
    save_diffusers_unet(tmp_path, config, random_params(config, 8), sample_size=8)
    assert load_diffusers_unet(tmp_path)[0].process == DiffusionConfig()
    with pytest.raises(ValueError, match="channels"):
        load_diffusers_unet(tmp_path, LEARNED)


def test_saving_what_was_loaded_gives_the_same_file(saved, tmp_path):
    directory, _ = saved
    model, params = load_tiny(directory)
    save_diffusers_unet(tmp_path / "again", model.network.config, params, sample_size=8)
    for name in ("config.json", WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


def test_saving_leaves_nothing_else_and_replaces_what_was_there(saved):
    directory, params = saved
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    save_diffusers_unet(directory, TINY, other, sample_size=8)
    assert sorted(file.name for file in directory.iterdir()) == ["config.json", WEIGHTS]
    assert_same_tree(load_tiny(directory)[1], other)


def test_a_pipeline_folder_is_opened_at_its_unet(saved):
    directory, params = saved
    (directory.parent / "model_index.json").write_text("{}")
    assert_same_tree(load_tiny(directory.parent)[1], params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_is_loaded_as_float32(saved, dtype):
    directory, params = saved
    edit_tensors(directory, lambda tensors: {k: v.astype(dtype) for k, v in tensors.items()})
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), params)
    assert_same_tree(load_tiny(directory)[1], expected)


def test_bfloat16_parameters_are_saved_as_float32(tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(TINY, 8))
    save_diffusers_unet(tmp_path, TINY, params, sample_size=8)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert_same_tree(load_tiny(tmp_path)[1], expected)


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_attention(rank):
    def edit(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            for new, old in OLD_NAMES.items():
                if f".{new}." in name:
                    name = name.replace(f".{new}.", f".{old}.")
                    if tensor.ndim == 2:
                        tensor = tensor.reshape(tensor.shape + (1,) * (rank - 2))
            renamed[name] = tensor
        assert "mid_block.attentions.0.query.weight" in renamed
        return renamed

    return edit


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_old_names_and_shapes_of_attention_are_the_same_network(saved, rank):
    directory, params = saved
    edit_tensors(directory, old_attention(rank))
    assert_same_tree(load_tiny(directory)[1], params)


def test_an_attention_layer_under_both_names_is_refused(saved):
    directory, _ = saved
    edit_tensors(directory, lambda tensors: tensors | old_attention(2)(tensors))
    with pytest.raises(ValueError, match="under its old and its new name"):
        load_tiny(directory)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("downsample_padding", 2),
        ("flip_sin_to_cos", 1),
        ("freq_shift", 4),
        ("freq_shift", -1),
        ("time_embedding_type", "fourier"),
        ("time_embedding_type", "learned"),
        ("time_embedding_dim", 64),
        ("act_fn", "gelu"),
        ("center_input_sample", True),
        ("mid_block_scale_factor", 1.4),
        ("mid_block_type", None),
        ("class_embed_type", "timestep"),
        ("class_embed_type", "identity"),
        ("num_class_embeds", 0),
        ("resnet_time_scale_shift", "scale_shift"),
        ("attn_norm_num_groups", 2),
        ("add_attention", False),
        ("upsample_type", "resnet"),
        ("downsample_type", "resnet"),
        ("attention_head_dim", 3),
        ("attention_head_dim", 16),
        ("norm_num_groups", 3),
        ("norm_num_groups", None),
        ("norm_eps", "1e-6"),
        ("dropout", 1.0),
        ("layers_per_block", 0),
        ("layers_per_block", [1, 2]),
        ("in_channels", None),
        ("block_out_channels", []),
        ("block_out_channels", 8),
        ("block_out_channels", [2, 16]),
        ("down_block_types", ["DownBlock2D"]),
        ("down_block_types", ["DownBlock2D", ["DownBlock2D"]]),
        ("down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "AttnUpBlock2D"]),
        ("up_block_types", ["AttnUpBlock2D", "SkipUpBlock2D"]),
        ("sample_size", None),
        ("sample_size", 9),
        ("sample_size", [8, 8, 8]),
        ("sample_size", 2**31),
        ("block_out_channels", [8, 10**30]),
        ("layers_per_block", 10**6),
        ("encoder_hid_dim", 4),
    ],
)
def test_an_option_that_the_network_lacks_is_refused_by_name(tmp_path, key, value):
    write_config(tmp_path, two_levels(**{key: value}))
    with pytest.raises(ValueError) as refusal:
        load_diffusers_unet(tmp_path)
    message = str(refusal.value)
    assert f"{key}={json.dumps(value)} (" in message
    assert "\n" not in message


def test_all_refused_options_are_listed_together(tmp_path):
    write_config(tmp_path, two_levels(act_fn="gelu", downsample_type="resnet", add_attention=False))
    with pytest.raises(ValueError, match=r"downsample_type=.* act_fn=.*add_attention="):
        load_diffusers_unet(tmp_path)


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        ("downsample_padding", "downsampling", "both"),
        ("flip_sin_to_cos", "time_order", "cos_sin"),
        ("freq_shift", "time_shift", 0.0),
    ],
)
def test_an_option_left_out_has_the_default_of_diffusers(tmp_path, key, field, value):
    write_config(tmp_path, {name: value for name, value in SMALL.items() if name != key})
    _, config, _ = read_network(tmp_path)
    assert getattr(config, field) == value
    write_config(tmp_path, SMALL)
    _, config, _ = read_network(tmp_path)
    assert getattr(config, field) == getattr(UNetConfig(), field)


@pytest.mark.parametrize(
    "options",
    [
        {"act_fn": "swish"},
        {"attn_norm_num_groups": 4},
        {"time_embedding_dim": 32},
        {"num_train_timesteps": 1000},
        {"decay": 0.9999, "optimization_step": 100},
        {"_diffusers_version": "0.0.4", "_name_or_path": "here"},
        {"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]},
        {
            "down_block_types": ["DownBlock2D"] * 2,
            "up_block_types": ["UpBlock2D"] * 2,
            "sample_size": None,
        },
    ],
)
def test_an_option_without_effect_is_accepted(tmp_path, options):
    write_config(tmp_path, two_levels(**options))
    with pytest.raises(FileNotFoundError, match=f"has no {WEIGHTS}"):
        load_diffusers_unet(tmp_path)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", None])
def test_another_kind_of_model_is_refused(tmp_path, name):
    write_config(tmp_path, SMALL | {"_class_name": name})
    with pytest.raises(ValueError, match="is not of a UNet2DModel: _class_name="):
        load_diffusers_unet(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor unet/config\.json"):
        load_diffusers_unet(tmp_path)


@pytest.mark.parametrize("content", ['{"_class_name": "UNet', "[" * 100_000])
def test_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_diffusers_unet(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    write_config(tmp_path, SMALL)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"pickled .*model\.bin.* convert them to .*safetensors"):
        load_diffusers_unet(tmp_path)


def test_sharded_weights_are_refused(saved):
    directory, params = saved
    (directory / f"{WEIGHTS}.index.json").write_text("{}")
    with pytest.raises(ValueError, match="sharded weights"):
        load_tiny(directory)
    with pytest.raises(ValueError, match="sharded weights"):
        save_diffusers_unet(directory, TINY, params, sample_size=8)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(saved, kept):
    path = saved[0] / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged") as refusal:
        load_tiny(saved[0])
    assert "\n" not in str(refusal.value)


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("conv_in.bias"), r"missing conv_in\.bias$"),
        (lambda tensors: tensors | {"extra": np.zeros(1, np.float32)}, "unknown extra$"),
        (
            lambda tensors: tensors | {"conv_in.bias": np.zeros(3, np.float32)},
            r"wrong shape: conv_in\.bias \[3\] instead of \[8\]$",
        ),
        (lambda tensors: {}, r"missing .* and \d+ more$"),
        (
            lambda tensors: tensors | {"conv_in.bias": np.zeros(8, np.int32)},
            r"conv_in\.bias is I32 \(supported: F32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, edit, message):
    edit_tensors(saved[0], edit)
    with pytest.raises(ValueError, match=message):
        load_tiny(saved[0])


def test_what_diffusers_cannot_express_is_not_saved(tmp_path):
    params = random_params(TINY, 8)
    for size in (7, (8, 9), 0):
        with pytest.raises(ValueError, match=r"sample_size=.* multiples of 2"):
            save_diffusers_unet(tmp_path, TINY, params, sample_size=size)
    with pytest.raises(ValueError, match="params does not fit the network: missing conv_in/bias"):
        save_diffusers_unet(tmp_path, TINY, params | {"conv_in": {}}, sample_size=8)
    with pytest.raises(ValueError, match="missing down_0_attention_0"):
        save_diffusers_unet(
            tmp_path, dataclasses.replace(TINY, attention=(8, 4)), params, sample_size=8
        )
    assert not list(tmp_path.iterdir())


# Agreement with diffusers itself.


@pytest.fixture
def peer():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield diffusers.UNet2DModel
    torch.set_num_threads(threads)


def randomise(model, seed=0):
    """Gives every weight a value, the zero-initialised ones and the norms' too."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.3 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.1 * noise)
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)
    return model.eval()


outputs_of = jax.jit(lambda network, *arguments: network(*arguments), static_argnums=0)


def largest_difference(model, network, params, shape, seed=0, labels=None):
    """Between both networks' outputs on the same noise at a time step of its own per sample."""
    import torch

    generator = np.random.default_rng(seed)
    x = generator.normal(size=shape).astype(np.float32)  # [B, height, width, C]
    t = generator.choice(1000, size=shape[:1], replace=False)
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(x).permute(0, 3, 1, 2),
            torch.from_numpy(t),
            class_labels=None if labels is None else torch.from_numpy(labels[0]),
        ).sample
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    assert theirs.std() > 0.1
    label = None if labels is None else labels[1]
    return np.abs(outputs_of(network, params, x, t, label) - theirs).max()


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("options", "batch"),
    [
        (SMALL, 3),
        (two_levels(), 2),
        (two_levels(layers_per_block=1, block_out_channels=[16, 8], norm_num_groups=8), 5),
        (two_levels(layers_per_block=3, in_channels=1, out_channels=2, norm_eps=1e-3), 1),
        (two_levels(attention_head_dim=4, layers_per_block=1), 3),
        (two_levels(attention_head_dim=8, layers_per_block=1, sample_size=[8, 12]), 1),
        (
            two_levels(
                down_block_types=["AttnDownBlock2D"] * 2,
                up_block_types=["AttnUpBlock2D"] * 2,
                attention_head_dim=2,
                layers_per_block=1,
                norm_num_groups=2,
            ),
            2,
        ),
        (
            two_levels(
                block_out_channels=[8],
                down_block_types=["DownBlock2D"],
                up_block_types=["UpBlock2D"],
                sample_size=5,
            ),
            3,
        ),
    ],
)
def test_a_network_of_diffusers_gives_the_same_outputs_here(peer, tmp_path, options, batch):
    options = {key: value for key, value in options.items() if key != "_class_name"}
    model = randomise(peer(**options))
    model.save_pretrained(tmp_path)
    learned = options["out_channels"] == 2 * options["in_channels"]
    ours, params = load_diffusers_unet(tmp_path, LEARNED if learned else DiffusionConfig())
    size = options["sample_size"]
    height, width = size if isinstance(size, list) else (size, size)
    assert ours.shape == (height, width, options["in_channels"])
    assert largest_difference(model, ours.network, params, (batch, *ours.shape)) < 1e-4


@pytest.mark.oracle
def test_the_network_of_ddpm_on_cifar10_agrees(peer, tmp_path):
    options = {key: value for key, value in DDPM_CIFAR10.items() if key != "_class_name"}
    model = randomise(peer(**options))
    model.save_pretrained(tmp_path)
    ours, params = load_diffusers_unet(tmp_path)
    assert ours == DiffusionModel(
        UNetNetwork(UNetConfig(dropout=0.0)), DiffusionConfig(), (32, 32, 3)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 35_746_307
    assert largest_difference(model, ours.network, params, (1, 32, 32, 3)) < 1e-4


@pytest.mark.oracle
@pytest.mark.parametrize("rank", [2, 4])
def test_old_names_of_attention_give_the_same_outputs(peer, tmp_path, rank):
    options = {key: value for key, value in two_levels().items() if key != "_class_name"}
    model = randomise(peer(**options))
    model.save_pretrained(tmp_path)
    edit_tensors(tmp_path, old_attention(rank))
    ours, params = load_diffusers_unet(tmp_path)
    assert largest_difference(model, ours.network, params, (2, 8, 8, 3)) < 1e-4


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("config", "size"),
    [
        (TINY, 8),
        (UNetConfig(widths=(8, 8, 16), blocks=2, attention=(16, 4), groups=4), 16),
    ],
)
def test_a_network_saved_here_gives_the_same_outputs_in_diffusers(peer, tmp_path, config, size):
    params = random_params(config, size)
    save_diffusers_unet(tmp_path, config, params, sample_size=size)
    model, report = peer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    shape = (3, size, size, config.channels)
    assert largest_difference(model.eval(), UNetNetwork(config), params, shape) < 1e-4


@pytest.mark.oracle
def test_the_defaults_of_diffusers_agree(peer, tmp_path):
    """All that a user does not name, of the smallest sizes that they allow."""
    model = randomise(peer(sample_size=16, block_out_channels=(32, 32, 32, 32)))
    model.save_pretrained(tmp_path)
    ours, params = load_diffusers_unet(tmp_path)
    assert ours.network.config.attention == (8, 4, 2)
    assert largest_difference(model, ours.network, params, (2, 16, 16, 3)) < 1e-4


@pytest.mark.oracle
@pytest.mark.parametrize("freq_shift", [0, 1, 2])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("padding", [0, 1])
def test_embeddings_of_time_and_strides_agree(peer, tmp_path, freq_shift, flip, padding):
    options = two_levels(
        freq_shift=freq_shift,
        flip_sin_to_cos=flip,
        downsample_padding=padding,
        layers_per_block=1,
        sample_size=12,
    )
    options.pop("_class_name")
    model = randomise(peer(**options))
    model.save_pretrained(tmp_path)
    ours, params = load_diffusers_unet(tmp_path)
    assert largest_difference(model, ours.network, params, (2, 12, 12, 3)) < 1e-4


@pytest.mark.oracle
def test_classes_of_diffusers_agree(peer, tmp_path):
    """As diffusers trains them: all are classes, and a label is always needed."""
    options = two_levels(num_class_embeds=5, layers_per_block=1)
    options.pop("_class_name")
    model = randomise(peer(**options))
    model.save_pretrained(tmp_path)
    ours, params = load_diffusers_unet(tmp_path)
    assert (ours.classes, ours.null_class, ours.process.label_dropout) == (5, False, 0)
    labels = np.array([4, 0, 2])
    shape = (3, 8, 8, 3)
    assert largest_difference(model, ours.network, params, shape, labels=(labels, labels)) < 1e-4


@pytest.mark.oracle
def test_a_network_with_patches_is_one_of_folded_images(peer, tmp_path):
    import torch

    config = dataclasses.replace(TINY, patch=2)
    params = random_params(config, 16)
    save_diffusers_unet(tmp_path, config, params, sample_size=16)
    model = peer.from_pretrained(tmp_path).eval()
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 2)).astype(np.float32)
    folded = rearrange(x, "b (h p) (w q) c -> b (p q c) h w", p=2, q=2)
    t = np.array([3, 700])
    with torch.no_grad():
        theirs = model(torch.from_numpy(folded), torch.from_numpy(t)).sample.numpy()
    theirs = rearrange(theirs, "b (p q c) h w -> b (h p) (w q) c", p=2, q=2)
    ours = outputs_of(UNetNetwork(config), params, x, t)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.oracle
def test_the_last_class_of_a_saved_network_is_no_class(peer, tmp_path):
    config = dataclasses.replace(TINY, classes=3)
    params = random_params(config, 8)
    save_diffusers_unet(tmp_path, config, params, sample_size=8)
    model = peer.from_pretrained(tmp_path).eval()
    theirs, ours = np.array([3, 0, 2]), np.array([-1, 0, 2])
    shape = (3, 8, 8, config.channels)
    network = UNetNetwork(config)
    assert largest_difference(model, network, params, shape, labels=(theirs, ours)) < 1e-4


@pytest.mark.oracle
def test_the_table_of_defaults_is_that_of_diffusers(peer):
    import inspect

    from gen_jax.interop.diffusers_options import _DEFAULTS

    signature = inspect.signature(peer.__init__).parameters
    theirs = {name: parameter.default for name, parameter in signature.items() if name != "self"}
    assert json.loads(json.dumps(theirs)) == _DEFAULTS
