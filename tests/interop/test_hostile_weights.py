"""Folders of weights that an enemy wrote: refused in one line, and nothing large is made."""

import json
import re
import resource
import struct

import pytest

from gen_jax import bounded
from gen_jax.interop import load_diffusers_unet, load_diffusers_vq, load_gpt2

GPT2 = {"model_type": "gpt2", "vocab_size": 5, "n_positions": 4, "n_embd": 4, "n_layer": 1}
GPT2 |= {"n_head": 1}
UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "block_out_channels": [8],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
}
VQ = {"_class_name": "VQModel"}
LOADERS = {"gpt2": load_gpt2, "unet": load_diffusers_unet, "vq": load_diffusers_vq}


@pytest.fixture(autouse=True)
def little_memory():
    """Whatever is refused takes no gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def refused(load, folder):
    """The line with which a loader refuses a folder; another error passes."""
    with pytest.raises(ValueError) as caught:
        load(folder)
    trace = caught.traceback[-1]
    assert trace.frame.f_globals["__name__"].startswith("gen_jax."), "no refusal of ours"
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 5000
    return line


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gpt2", GPT2 | {"vocab_size": 10**12}, "vocab_size=1000000000000 "),
        ("gpt2", GPT2 | {"n_embd": 2**70}, "n_embd=1180591620717411303424 "),
        ("gpt2", GPT2 | {"n_layer": 1000}, "n_layer=1000 "),
        ("gpt2", GPT2 | {"n_embd": [[0] * 10_000]}, r"n_embd=\[\[0, .*\.\.\. \(supported"),
        ("gpt2", GPT2 | {"other\n" * 1000: 1}, r"other\\nother.* \(unknown\)"),
        ("gpt2", GPT2 | {str(i): i for i in range(10_000)}, r"\(unknown\)"),
        ("gpt2", GPT2 | {"model_type": "x" * 10_000}, "model_type="),
        ("unet", UNET | {"sample_size": 2147483648}, "sample_size=2147483648 "),
        ("unet", UNET | {"sample_size": [2**20, 2**20]}, "at most 16777216 pixels"),
        ("unet", UNET | {"norm_eps": float("inf")}, "norm_eps=Infinity"),
        ("unet", UNET | {"_class_name": "x" * 10_000}, "_class_name='x"),
        (
            "unet",
            UNET
            | {"block_out_channels": [8] * 19, "layers_per_block": 256}
            | {"down_block_types": UNET["down_block_types"] * 19}
            | {"up_block_types": UNET["up_block_types"] * 19, "sample_size": 2**18},
            "layers_per_block=256",
        ),
        ("vq", VQ | {"sample_size": [2**20, 2**20]}, "at most 16777216 pixels"),
        ("vq", VQ | {"num_vq_embeddings": 2**40}, "num_vq_embeddings="),
    ],
)
def test_a_hostile_option_is_one_line(tmp_path, kind, options, message):
    (tmp_path / "config.json").write_text(json.dumps(options))
    assert re.search(message, refused(LOADERS[kind], tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "has more than 100 levels"),
        (b'{"model_type": ' + b"[" * 500 + b"]" * 500 + b"}", "has more than 100 levels"),
        (b'{"n_embd": ' + b"9" * 5000 + b"}", "has an integer of 5000 digits"),
        (b"[" + b"[]," * 5_000_000 + b"0]", "has more than 4194304 values"),
        (b" " * (bounded.LARGEST_JSON + 1), "at most 16777216 are read"),
        (b"\xff", "is damaged"),
        (b"", "is damaged"),
    ],
)
def test_a_hostile_config_json_is_one_line(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    assert message in refused(load_gpt2, tmp_path)


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({}, 2**63, "header too large"),
        ({}, 99_000_000, "invalid header length"),
        (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", None, "is damaged"),
        ({"a": TENSOR, "b": TENSOR}, None, "invalid offset"),
        ({"a": TENSOR | {"data_offsets": [8, 16]}}, None, "invalid offset"),
        ({"a": TENSOR | {"data_offsets": [8, 0]}}, None, "invalid offset"),
        ({"a": TENSOR | {"shape": [-2]}}, None, "is damaged"),
        ({"a": TENSOR | {"shape": [2**33, 2**33]}}, None, "overflow"),
        ({"a": TENSOR | {"shape": [0, 2**62], "data_offsets": [0, 0]}}, None, "of the shape [0, 4"),
        ({"a": TENSOR | {"shape": [0, 2**63], "data_offsets": [0, 0]}}, None, "of the shape [0, 9"),
        ({"a": TENSOR | {"shape": [1] * 99 + [2]}}, None, "of the shape [1, 1, "),
        ({"a": TENSOR | {"dtype": "X99"}}, None, "is damaged"),
        ({"a": TENSOR | {"dtype": "F8_E4M3", "shape": [8]}}, None, "a is F8_E4M3 (supported: F32"),
        ({"a": TENSOR | {"dtype": "F4", "shape": [16]}}, None, "a is F4 (supported: F32"),
        ({"a": TENSOR | {"dtype": "C64", "shape": [1]}}, None, "a is C64 (supported: F32"),
    ],
)
def test_a_hostile_header_of_weights_is_one_line(tmp_path, header, size, message):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    length = struct.pack("<Q", len(header) if size is None else size)
    (tmp_path / "model.safetensors").write_bytes(length + header + bytes(8))
    if '"data_offsets": [0, 0]' in header.decode(errors="replace"):
        (tmp_path / "model.safetensors").write_bytes(length + header)
    assert message in refused(load_gpt2, tmp_path)


def test_weights_far_larger_than_the_network_are_not_read(tmp_path):
    """A file of 40 GB that takes no room on the disk."""
    size = 10 * 2**30
    shapes = [2**24] * (size // 2**24)
    offsets = [4 * 2**24 * i for i in range(len(shapes) + 1)]
    header = {
        f"t{i}": {"dtype": "F32", "shape": [n], "data_offsets": offsets[i : i + 2]}
        for i, n in enumerate(shapes)
    }
    content = json.dumps(header).encode()
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + offsets[-1])
    assert f"has {size} numbers, but the network has " in refused(load_gpt2, tmp_path)


@pytest.mark.parametrize("places", [{"a": ["x"]}, {"a": None}, {"a": {"b": 1}}, {"a": "x" * 10**5}])
def test_an_index_of_shards_that_names_no_files_is_one_line(tmp_path, places):
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert "not files beside it" in refused(load_gpt2, tmp_path)
