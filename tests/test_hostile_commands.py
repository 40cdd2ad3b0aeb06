"""Files that an enemy wrote, on command lines: one line that names the file, and no trace."""

import gzip
import json
import struct
import zlib

import pytest

from experiments import ddpm_cifar, gpt_text
from gen_jax import cli
from gen_jax.data import tokenizers
from refusals import refused_in

GPT2 = {"model_type": "gpt2", "vocab_size": 256, "n_positions": 1024, "n_embd": 4}
GPT2 |= {"n_layer": 1, "n_head": 1}


def bomb(folder):
    """A text of 64 KiB that becomes 64 MiB."""
    path = folder / "text.gz"
    path.write_bytes(gzip.compress(b"x" * 2**26))
    return path, ["train", "--data.name", "file", "--data.path", path, "--data.max-bytes", 2**20]


def tokenizer(folder):
    """A file of `tokenizers` that ends the process which reads it."""
    path, normalizer = folder / "tokenizer.json", {"type": "Precompiled"}
    normalizer |= {"precompiled_charsmap": "/////w=="}
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    fields = {"version": "1.0", "added_tokens": [], "normalizer": normalizer, "model": model}
    path.write_text(json.dumps(fields))
    return path, ["train", "--tokenizer", path]


def picture(folder):
    """A PNG of ten billion pixels, in a hundred bytes."""

    def chunk(kind, content):
        content = kind + content
        return (
            struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
        )

    path = folder / "train" / "a.png"
    for split in ("train", "test"):
        (folder / split).mkdir()
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
        pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
        (folder / split / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels)
    return path, ["train", "--data.name", "folder", "--data.dir", folder]


def options(**changes):
    def folder_of(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(GPT2 | changes))
        tokenizers.Chars("".join(map(chr, range(256)))).save(folder / "tokenizer.json")
        return path, ["sample", "--pretrained", folder]

    return folder_of


def weights(folder):
    """A tensor without numbers whose other axis has 2^62."""
    _, argv = options()(folder)
    path = folder / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    return path, argv


@pytest.mark.parametrize(
    ("experiment", "make", "message"),
    [
        (gpt_text, bomb, "has more than 1048576 bytes when unpacked; raise --data.max-bytes"),
        (gpt_text, tokenizer, "it ends the process that reads it (SIGABRT)"),
        (ddpm_cifar, picture, "has 10000000000 pixels, and at most 67108864 are read"),
        (gpt_text, options(vocab_size=10**12), "vocab_size=1000000000000 "),
        (gpt_text, options(n_embd=2**70), "n_embd=1180591620717411303424 "),
        (gpt_text, weights, "a is of the shape [0, 4611686018427387904]"),
    ],
)
def test_a_hostile_file_is_one_line_that_names_it(
    tmp_path, monkeypatch, capsys, experiment, make, message
):
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / "theirs").mkdir()
    path, argv = make(folder)
    before = sorted(tmp_path.rglob("*"))
    argv = [*map(str, argv), "--workdir", str(tmp_path / "run")]
    assert cli.main(experiment.EXPERIMENT, argv) == 2
    line = refused_in(capsys)
    assert message in line
    assert str(path) in line
    assert sorted(tmp_path.rglob("*")) == before
