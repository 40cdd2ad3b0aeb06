"""Options of diffusers' `UNet2DModel` as a `UNetConfig`, and back; importing this loads no jax."""

import json
import math
import os
import pathlib
import reprlib

from gen_jax.bounded import read_json
from gen_jax.interop import diffusers_blocks
from gen_jax.interop.config_json import (
    CONFIG,
    DEEPEST,
    LARGEST,
    Refusals,
    is_count,
    naming,
    refusal,
    unknown,
)
from gen_jax.nn.config import UNetConfig

__all__ = ["read_network", "to_config", "to_options"]

# Every option of UNet2DModel with its default.
_DEFAULTS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # read only by learned time embeddings, which are refused
}

# Options that have to be one of these. "swish" is another name of "silu".
_FIXED = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (True,),
    "class_embed_type": (None,),
}

# Whether a block has attention.
_DOWN_BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True}
_UP_BLOCKS = {"UpBlock2D": False, "AttnUpBlock2D": True}

# Set in config.json when the last class means "no class", and when squares of pixels are folded
# into channels before the network; diffusers skips names with an underscore.
_NULL_CLASS, _PATCH = "_last_class_is_none", "_patch"

# What the moving average in training with diffusers writes beside the options.
_MOVING_AVERAGE = {
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
}


def read_network(
    directory: str | os.PathLike,
) -> tuple[pathlib.Path, UNetConfig, tuple[int, int]]:
    """The network in a folder that diffusers' `UNet2DModel` wrote, or a pipeline of one.

    Returns:
      The folder of its config.json, its sizes, and height and width of its images.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: it is damaged, or of another model, or names options that cannot be expressed.
    """
    given = pathlib.Path(directory).expanduser()
    for folder in (given, given / "unet"):
        if (folder / CONFIG).is_file():
            break
    else:
        raise FileNotFoundError(f"{given} has neither {CONFIG} nor unet/{CONFIG}")
    path = folder / CONFIG
    options = read_json(path)
    if not isinstance(options, dict) or options.get("_class_name") != "UNet2DModel":
        name = options.get("_class_name") if isinstance(options, dict) else None
        raise ValueError(f"{path} is not of a UNet2DModel: _class_name={reprlib.repr(name)}")
    with naming(path):
        return folder, *to_config(options)


def to_options(config: UNetConfig, height: int, width: int) -> dict:
    """The options in config.json of a network for images of this size.

    A network with patches is one of the folded images: it has p x p times the channels, and its
    images are p times smaller.
    """
    square = config.patch**2
    height, width = height // config.patch, width // config.patch
    attended = [height >> level in config.attention for level in range(len(config.widths))]
    down, up = ({has: name for name, has in kinds.items()} for kinds in (_DOWN_BLOCKS, _UP_BLOCKS))
    options = _DEFAULTS | {key: allowed[0] for key, allowed in _FIXED.items()}
    options |= {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "in_channels": square * config.channels,
        "out_channels": square * config.out_channels,
        "freq_shift": _whole(config.time_shift),
        "flip_sin_to_cos": config.time_order == "cos_sin",
        "downsample_padding": int(config.downsampling == "both"),
        "down_block_types": [down[has] for has in attended],
        "up_block_types": [up[has] for has in reversed(attended)],
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "dropout": config.dropout,
        "attention_head_dim": config.head_width or None,
        "norm_num_groups": config.groups,
        "norm_eps": config.norm_epsilon,
    }
    if config.classes:
        options |= {"num_class_embeds": config.classes + config.null_class}
        options |= {_NULL_CLASS: True} if config.null_class else {}
    return options | ({_PATCH: config.patch} if config.patch > 1 else {})


def _whole(number):
    """A number of JSON as diffusers writes it."""
    return int(number) if number == int(number) else number


def to_config(stored: dict) -> tuple[UNetConfig, tuple[int, int]]:
    """Our configuration, and a size of images at which attention sits where it should.

    Args:
      stored: the content of config.json.

    Raises:
      ValueError: names every option that cannot be expressed.
    """
    options = _DEFAULTS | stored
    problems = unknown(stored, _DEFAULTS.keys() | _MOVING_AVERAGE)
    for key, allowed in _FIXED.items():
        if options[key] not in allowed:
            problems.append(refusal(options, key, " or ".join(map(json.dumps, allowed))))
    problems += _wrong_values(options) or _wrong_structure(options)
    if problems:
        raise ValueError(f"this UNet2DModel cannot be expressed: {'; '.join(problems)}")

    widths = tuple(options["block_out_channels"])
    attended = [_DOWN_BLOCKS[_plain(name)] for name in options["down_block_types"]]
    stride = 2 ** (len(widths) - 1)
    height, width = diffusers_blocks.sizes(options["sample_size"]) or (stride, stride)
    patch, known = options.get(_PATCH, 1), options["num_class_embeds"] or 0
    null_class = options.get(_NULL_CLASS) is True
    config = UNetConfig(
        widths=widths,
        blocks=options["layers_per_block"],
        attention=tuple(height >> level for level, has in enumerate(attended) if has),
        head_width=options["attention_head_dim"] or 0,
        groups=options["norm_num_groups"],
        norm_epsilon=float(options["norm_eps"]),
        dropout=float(options["dropout"]),
        patch=patch,
        channels=options["in_channels"] // patch**2,
        out_channels=options["out_channels"] // patch**2,
        classes=known - null_class if known else 0,
        null_class=null_class or not known,
        time_shift=float(options["freq_shift"]),
        time_order="cos_sin" if options["flip_sin_to_cos"] else "sin_cos",
        downsampling="both" if options["downsample_padding"] else "end",
    )
    return config, (patch * height, patch * width)


def _wrong_values(options):
    """Refusals of options that do not have the type or the range of their kind."""
    refusals = Refusals(options)

    def number(value):
        return type(value) in (int, float) and 0 <= value < math.inf

    for key in ("in_channels", "out_channels", "norm_num_groups"):
        refusals.unless(key, is_count, f"a positive integer up to {LARGEST}")
    for key in ("attention_head_dim", "attn_norm_num_groups", "num_class_embeds"):
        refusals.unless(
            key,
            lambda value: value is None or is_count(value),
            f"null or a positive integer up to {LARGEST}",
        )
    diffusers_blocks.check_values(refusals, _DOWN_BLOCKS, _UP_BLOCKS, _plain)
    refusals.unless("flip_sin_to_cos", lambda value: type(value) is bool, "true or false")
    refusals.unless("downsample_padding", lambda value: value in (0, 1), "0 or 1")
    refusals.unless("freq_shift", number, "a number that is not negative")
    refusals.unless("dropout", lambda value: number(value) and value < 1, "a number in [0, 1)")
    refusals.unless("norm_eps", number, "a number that is not negative")
    refusals.unless(
        "sample_size",
        lambda value: value is None or all(map(is_count, diffusers_blocks.sizes(value) or [None])),
        f"null, a positive integer or two, up to {LARGEST}",
    )
    return refusals.problems


def _wrong_structure(options):
    """Refusals of options that do not fit each other, or our network."""
    refusals = Refusals(options)
    widths, groups = options["block_out_channels"], options["norm_num_groups"]
    head, size = options["attention_head_dim"], diffusers_blocks.sizes(options["sample_size"])
    down = [_DOWN_BLOCKS[_plain(name)] for name in options["down_block_types"]]
    up = [_UP_BLOCKS[_plain(name)] for name in options["up_block_types"]]
    stride = 2 ** (len(widths) - 1)
    refusals.unless(
        "block_out_channels",
        widths[0] % 2 == 0 and widths[0] >= 4,
        "the first even and at least 4",
    )
    diffusers_blocks.check_structure(refusals, down, up)
    refusals.unless(
        "attention_head_dim",
        head is None or all(width % head == 0 for width in widths),
        f"null or a divisor of every width {widths}",
    )
    refusals.unless(
        "attn_norm_num_groups",
        options["attn_norm_num_groups"] in (None, groups),
        f"null or norm_num_groups, {groups}",
    )
    refusals.unless(
        "time_embedding_dim",
        options["time_embedding_dim"] in (None, 4 * widths[0]),
        f"null or 4 x the first width, {4 * widths[0]}",
    )
    refusals.unless(
        "sample_size",
        size is not None or not any(down),
        "an integer, where attention is given by block",
    )
    refusals.unless(
        "sample_size",
        size is None or not any(side % stride for side in size),
        f"a multiple of {stride}",
    )
    classes, patch = options["num_class_embeds"], options.get(_PATCH, 1)
    refusals.unless(
        "num_class_embeds",
        classes is None or classes > (options.get(_NULL_CLASS) is True),
        f'null, or more than 1 where "{_NULL_CLASS}" is true',
    )
    refusals.unless(
        "freq_shift",
        options["freq_shift"] < widths[0] // 2,
        f"below half of the first width, {widths[0] // 2}",
    )
    for key in ("in_channels", "out_channels"):
        refusals.unless(
            key,
            is_count(patch, DEEPEST) and options[key] % patch**2 == 0,
            f'a multiple of the square of "{_PATCH}", {patch}',
        )
    return refusals.problems


def _plain(name):
    # diffusers takes the names of its first versions, "UNetResDownBlock2D", for the same blocks.
    return name.removeprefix("UNetRes") if isinstance(name, str) else None
