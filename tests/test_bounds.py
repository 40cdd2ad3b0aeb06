"""Files of a run that state more than they have, or are larger than any: refused, and not read."""

import contextlib
import json
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import tensorstore

from gen_jax import array_files, bounded, checkpoint, memory
from gen_jax.comparison import records
from gen_jax.workdir import MetricsLog, Workdir, WorkdirError

MIB = 2**20


@contextlib.contextmanager
def little_memory(most=20 * MIB):
    """What is refused in the block takes little of it."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def npy(kind="<f4", shape="(2,)", values=bytes(8), columns="False"):
    """A file of an array as NumPy writes it, whatever it states."""
    text = f"{{'descr': {kind!r}, 'fortran_order': {columns}, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + values


def packed(path, *members, kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def refused(read, *arguments):
    with little_memory(), pytest.raises(ValueError) as caught:
        read(*arguments)
    line = str(caught.value)
    assert "\n" not in line
    assert str(arguments[0]) in line
    return line


def test_arrays_come_back_as_they_were(tmp_path):
    arrays = {
        "images": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "split": np.array("test"),
        "texts": np.array(["a", "zwölf"]),
        "nothing": np.zeros((0, 3), bool),
        "step": np.int64(7),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "it.npz", **arrays)
        found = array_files.read_npz(tmp_path / "it.npz")
        assert found.keys() == arrays.keys()
        for name, value in arrays.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(shape=f"({2**40},)"), "float32 [1099511627776] does not have 136 bytes"),
        (npy(shape=f"({2**20}, {2**20})"), "does not have 136 bytes"),
        (npy(shape=f"({2**62}, {2**62})"), "does not have 136 bytes"),
        (npy(shape=f"(0, {2**63})", values=b""), "no array has such a shape"),
        (npy(shape="(" + "1, " * 40 + ")"), "is damaged"),
        (npy("<U99999999", "()"), "does not have 136 bytes"),
        (npy("|O", values=b"cos\nsystem\n(S'true'\ntR."), "no header of an array of numbers"),
        (npy([("a", "<f4")]), "no header of an array of numbers"),
        (npy(shape="(-2, -1)"), "no header of an array of numbers"),
        (npy(shape="(" * 200 + "2" + ")" * 200), "no header of an array of numbers"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), "no header of an array of numbers"),
        (b"", "no header of an array of numbers"),
    ],
)
def test_a_member_that_states_what_it_has_not_is_refused(tmp_path, kind, content, message):
    path = packed(tmp_path / "it.npz", ("a.npy", content), kind=kind)
    assert message in refused(array_files.read_npz, path)


def test_an_archive_that_no_savez_wrote_is_refused(tmp_path):
    path, member = tmp_path / "it.npz", ("a.npy", npy(shape="(100,)", values=bytes(400)))
    for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        assert "its compression is of the type" in refused(
            array_files.read_npz, packed(path, member, kind=kind)
        )
    assert "'a' is no array" in refused(array_files.read_npz, packed(path, ("a", npy())))
    whole = packed(path, member, ("b.npy", npy())).read_bytes()
    first = whole.index(b"PK\x01\x02")  # the table of contents
    second = whole.index(b"PK\x01\x02", first + 1)
    for at, value, message in (
        (20, struct.pack("<II", 528, 2**31), "528 bytes do not become 2147483648"),
        (8, b"\x01\x00", "'a.npy' is no array"),  # that it is encrypted
        (42, b"\xff\xff\xff\xff", "is damaged"),  # where it begins
    ):
        damaged = bytearray(whole)
        damaged[first + at : first + at + len(value)] = value
        path.write_bytes(damaged)
        assert message in refused(array_files.read_npz, path)
    again = bytearray(
        whole
    )  # both of the first member: what is there twice is larger than the file
    again[second : second + 46] = whole[first : first + 46]
    path.write_bytes(again)
    assert "its arrays are larger than the file" in refused(array_files.read_npz, path)


def test_what_memory_has_no_room_for_is_not_read(tmp_path, monkeypatch):
    path, size = tmp_path / "it.npz", 2**43
    packed(path, ("a.npy", npy()))
    os.truncate(path, size)  # which takes no room on the disk
    assert "it.npz has 8192 GiB, and " in refused(array_files.read_npz, path)
    packed(path, ("a.npy", bytes(10 * MIB)), kind=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(memory, "available", lambda: 5.0 * MIB)
    line = refused(array_files.read_npz, path)
    assert line.endswith("it.npz has 10 MiB, and 5 MiB of memory are left")


def test_a_table_of_contents_of_a_terabyte_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: np.inf)
    path, size = tmp_path / "it.npz", 2**40
    with open(path, "wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, size, 0))
        file.write(b"PK\x06\x07" + struct.pack("<IQI", 0, size, 1))
        file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 2**32 - 1, 0, 0))
    assert "is damaged" in refused(array_files.read_npz, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(shape=f"({2**40},)"), "is float32 [1099511627776], not float32 [2]"),
        (npy("<i4"), "is int32 [2], not float32 [2]"),
        (npy(columns="True"), "is float32 [2], not float32 [2]"),
        (npy(values=bytes(7)), "is damaged"),
        (npy("|O"), "no header of an array of numbers"),
        (b"", "no header of an array of numbers"),
    ],
)
def test_a_mapped_array_is_the_one_that_is_expected(tmp_path, content, message):
    path, expected = tmp_path / "codes.npy", ((2,), np.dtype(np.float32))
    path.write_bytes(npy(values=b"\0\0\x80\x3f" * 2))
    assert array_files.map_npy(path, *expected).tolist() == [1, 1]
    path.write_bytes(content)
    assert message in refused(array_files.map_npy, path, *expected)


def test_records_that_are_larger_than_any_are_not_read(tmp_path):
    """Each of them takes no room on the disk."""
    workdir = Workdir(tmp_path)
    for name, most, read in (
        ("config.json", bounded.LARGEST_JSON, lambda path: workdir.stored_config()),
        ("summary.json", bounded.LARGEST_JSON, lambda path: workdir.read_json(path.name, "it")),
        ("results.json", bounded.LARGEST_JSON, records.read),
        ("metrics.jsonl", bounded.LARGEST_LOG, MetricsLog.read),
    ):
        (path := tmp_path / name).touch()
        os.truncate(path, 2**40)
        with little_memory(), pytest.raises(WorkdirError, match=str(most)) as caught:
            read(path)
        assert str(path) in str(caught.value)
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(WorkdirError, match="is a pipe or a device"):
            read(path)
        path.unlink()


def test_figures_of_a_run_are_json_of_a_depth(tmp_path):
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(WorkdirError, match=r"has more than 100 levels\); move it away"):
        records.read(tmp_path / "results.json")
    (tmp_path / "metrics.jsonl").write_text('{"step": ' + "9" * 200 + "}\n")
    with pytest.raises(WorkdirError, match="line 1 is no record with a step"):
        MetricsLog.read(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("name", ["_METADATA", "metadata", "_CHECKPOINT_METADATA"])
def test_a_record_of_a_checkpoint_of_a_terabyte_is_not_read(tmp_path, name):
    tree = {"a": np.zeros(2, np.float32)}
    checkpoint.save(tmp_path, 1, {"ema": tree}, {}, keep=2)
    (path,) = (tmp_path / "1").rglob(name)
    os.truncate(path, 2**40)
    with (
        little_memory(),
        pytest.raises(checkpoint.DamagedCheckpoint, match=rf"{name} has 1099511627776 bytes"),
    ):
        checkpoint.restore(tmp_path, {"ema": tree}, step=1)
    (tmp_path / "1").rename(tmp_path / "1.damaged")
    checkpoint.save(tmp_path, 2, {"ema": tree}, {}, keep=2)
    assert checkpoint.restore(tmp_path, {"ema": tree}).step == 2


@pytest.mark.parametrize(
    ("shape", "chunks", "message"),
    [
        ([2**40], [2], r"ema\.a is float32\(1099511627776,\), expected float32\(2,\)"),
        ([2], [2**40], r"damaged: ema\.a is in pieces of \(1099511627776,\)"),
    ],
)
def test_a_leaf_that_states_a_terabyte_is_not_read(tmp_path, shape, chunks, message):
    tree = {"a": np.ones(2, np.float32)}
    checkpoint.save(tmp_path, 1, {"ema": tree}, {}, keep=2)
    base = {"driver": "file", "path": f"{tmp_path}/1/ema/"}
    stored = {"driver": "ocdbt", "base": base}
    key = tensorstore.KvStore.open(stored).result()
    header = json.loads(key["a/.zarray"])
    key["a/.zarray"] = json.dumps(header | {"shape": shape, "chunks": chunks}).encode()
    with little_memory(), pytest.raises(ValueError, match=message):
        checkpoint.restore(tmp_path, {"ema": tree}, step=1)
