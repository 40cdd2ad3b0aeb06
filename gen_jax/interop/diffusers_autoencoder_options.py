"""Options of diffusers' `VQModel` and `AutoencoderKL`, and back; importing this loads no jax."""

import dataclasses
import json
import os
import pathlib
import reprlib
from typing import Any

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
from gen_jax.models.vq.config import CodebookOptions, GaussianOptions, QuantiserOptions
from gen_jax.nn.config import AutoencoderConfig

__all__ = ["Layout", "read_layout", "to_layout", "to_options"]

# Every option of both classes with its default, and those of each.
_COMMON = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "force_upcast": None,  # of half precision, which weights here never have
    "mid_block_add_attention": True,
}
_DEFAULTS = {
    "VQModel": _COMMON
    | {
        "latent_channels": 3,
        "num_vq_embeddings": 256,
        "vq_embed_dim": None,
        "norm_type": "group",
        "lookup_from_codebook": False,
    },
    "AutoencoderKL": _COMMON
    | {
        "latent_channels": 4,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    },
}
# Options that have to be one of these. "swish" is another name of "silu".
_FIXED = {
    "act_fn": ("silu", "swish"),
    "norm_type": ("group",),
    "lookup_from_codebook": (False,),
    "shift_factor": (None, 0, 0.0),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
}
# Whether a block has attention.
_DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
_PATCH = "_patch"  # squares of pixels folded into channels; diffusers skips such names


@dataclasses.dataclass(frozen=True)
class Layout:
    """An autoencoder of diffusers in our terms.

    Attributes:
      network: sizes of encoder and decoder.
      quantiser: what stands between them.
      size: (height, width) of the images that the file names.
      scale: what a diffusion model over the latents multiplies them by.
    """

    network: AutoencoderConfig
    quantiser: QuantiserOptions
    size: tuple[int, int]
    scale: float


def read_layout(directory: str | os.PathLike, kind: str) -> tuple[pathlib.Path, Layout]:
    """The autoencoder in a folder that diffusers wrote.

    Args:
      directory: has config.json.
      kind: "VQModel" or "AutoencoderKL".

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: it is damaged, of another class, or names options that cannot be expressed.
    """
    folder = pathlib.Path(directory).expanduser()
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}")
    options = read_json(path)
    name = options.get("_class_name") if isinstance(options, dict) else None
    if name != kind:
        raise ValueError(f"{path} is not of a {kind}: _class_name={reprlib.repr(name)}")
    with naming(path):
        return folder, to_layout(options, kind)


def to_layout(stored: dict[str, Any], kind: str) -> Layout:
    """Our configuration for the content of config.json.

    Raises:
      ValueError: names every option that cannot be expressed.
    """
    defaults = _DEFAULTS[kind]
    options = defaults | stored
    problems = unknown(stored, defaults)
    problems += [
        refusal(options, key, " or ".join(map(json.dumps, allowed)))
        for key, allowed in _FIXED.items()
        if key in options and options[key] not in allowed
    ]
    problems += _wrong_values(options, kind) or _wrong_structure(options)
    if problems:
        raise ValueError(f"this {kind} cannot be expressed: {'; '.join(problems)}")
    patch, latent = options.get(_PATCH, 1), options["latent_channels"]
    attended = [_DOWN_BLOCKS[name] for name in options["down_block_types"]]
    if kind == "VQModel":
        quantiser = CodebookOptions(
            codes=options["num_vq_embeddings"],
            width=options["vq_embed_dim"] or latent,
            update="gradient",
            restart_every=0,
        )
    else:
        quantiser = GaussianOptions(width=latent)
    network = AutoencoderConfig(
        widths=tuple(options["block_out_channels"]),
        blocks=options["layers_per_block"],
        attention=tuple(level for level, has in enumerate(attended) if has),
        middle_attention=options["mid_block_add_attention"],
        groups=options["norm_num_groups"],
        norm_epsilon=1e-6,
        patch=patch,
        channels=options["in_channels"] // patch**2,
        latent_channels=latent,
    )
    height, width = diffusers_blocks.sizes(options["sample_size"])
    return Layout(
        network, quantiser, (patch * height, patch * width), float(options["scaling_factor"])
    )


def to_options(
    network: AutoencoderConfig, quantiser: QuantiserOptions, size: tuple[int, int], scale: float
) -> dict[str, Any]:
    """The options in config.json of an autoencoder for images of this size.

    Raises:
      ValueError: diffusers cannot express it.
    """
    square = network.patch**2
    height, width = (side // network.patch for side in size)
    levels = range(len(network.widths))
    down, up = ({has: name for name, has in kinds.items()} for kinds in (_DOWN_BLOCKS, _UP_BLOCKS))
    attended = [level in network.attention for level in levels]
    if isinstance(quantiser, CodebookOptions):
        kind, own = "VQModel", {"num_vq_embeddings": quantiser.codes}
        own |= {"vq_embed_dim": quantiser.width}
        if quantiser.tables > 1:
            raise ValueError(f"a VQModel has one table of codes, not {quantiser.tables}")
    elif isinstance(quantiser, GaussianOptions):
        kind, own = "AutoencoderKL", {}
        if network.latent_channels not in (0, quantiser.width):
            raise ValueError(
                f"an AutoencoderKL has as many latent_channels as its latent, {quantiser.width}, "
                f"not {network.latent_channels}"
            )
    else:
        raise ValueError(f"diffusers has no quantiser {quantiser.name!r}")
    if network.norm_epsilon != 1e-6 or network.head_width or network.dropout:
        raise ValueError("diffusers has norm_epsilon 1e-6, one head and no dropout: change these")
    options = _DEFAULTS[kind] | {
        "_class_name": kind,
        "in_channels": square * network.channels,
        "out_channels": square * network.channels,
        "down_block_types": [down[has] for has in attended],
        "up_block_types": [up[has] for has in reversed(attended)],
        "block_out_channels": list(network.widths),
        "layers_per_block": network.blocks,
        "latent_channels": network.latent_channels or quantiser.width,
        "norm_num_groups": network.groups,
        "sample_size": height if height == width else [height, width],
        "scaling_factor": scale,
        "mid_block_add_attention": network.middle_attention,
    }
    options = {key: value for key, value in options.items() if key != "force_upcast"} | own
    return options | ({_PATCH: network.patch} if network.patch > 1 else {})


def _wrong_values(options, kind):
    """Refusals of options that do not have the type or the range of their kind."""
    refusals = Refusals(options)
    for key in ("in_channels", "out_channels", "norm_num_groups", "latent_channels"):
        refusals.unless(key, is_count, f"a positive integer up to {LARGEST}")
    if kind == "VQModel":
        key = "num_vq_embeddings"
        refusals.unless(key, is_count, f"a positive integer up to {LARGEST}")
        refusals.unless(key, options[key] != 1, "at least 2")
        refusals.unless(
            "vq_embed_dim",
            lambda value: value is None or is_count(value),
            f"null or a positive integer up to {LARGEST}",
        )
    diffusers_blocks.check_values(refusals, _DOWN_BLOCKS, _UP_BLOCKS)
    refusals.unless("mid_block_add_attention", lambda value: type(value) is bool, "true or false")
    refusals.unless(
        "scaling_factor",
        lambda value: type(value) in (int, float) and 0 < value < float("inf"),
        "a positive number",
    )
    refusals.unless(
        "sample_size",
        lambda value: all(map(is_count, diffusers_blocks.sizes(value) or [None])),
        f"a positive integer or two, up to {LARGEST}",
    )
    return refusals.problems


def _wrong_structure(options):
    """Refusals of options that do not fit each other, or our network."""
    refusals, widths = Refusals(options), options["block_out_channels"]
    down = [_DOWN_BLOCKS[name] for name in options["down_block_types"]]
    up = [_UP_BLOCKS[name] for name in options["up_block_types"]]
    stride, patch = 2 ** (len(widths) - 1), options.get(_PATCH, 1)
    diffusers_blocks.check_structure(refusals, down, up)
    refusals.unless(
        "out_channels",
        options["out_channels"] == options["in_channels"],
        f"in_channels, {options['in_channels']}",
    )
    refusals.unless(
        "in_channels",
        is_count(patch, DEEPEST) and options["in_channels"] % patch**2 == 0,
        f'a multiple of the square of "{_PATCH}", {patch}',
    )
    refusals.unless(
        "sample_size",
        not any(side % stride for side in diffusers_blocks.sizes(options["sample_size"])),
        f"a multiple of {stride}",
    )
    return refusals.problems
