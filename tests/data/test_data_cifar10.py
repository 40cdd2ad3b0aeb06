import os
import pickle

import numpy as np
import pytest

from gen_jax.data import DataConfig, load
from gen_jax.data.cifar10 import BINARY_FOLDER, PYTHON_FOLDER, TEST_FILES, TRAIN_FILES


def records(seed, count=3):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, count)
    return labels, generator.integers(0, 256, (count, 3072), dtype=np.uint8)


def write_binary(folder):
    folder.mkdir()
    for seed, name in enumerate(TRAIN_FILES + TEST_FILES):
        labels, planes = records(seed)
        table = np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1)
        (folder / f"{name}.bin").write_bytes(table.tobytes())


def python2_pickle(labels, planes):
    """What cPickle of Python 2 writes for one batch (protocol 2)."""

    def text(content):
        return b"T" + len(content).to_bytes(4, "little") + content

    def number(value):
        return b"J" + value.to_bytes(4, "little", signed=True)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
    array += b"\x87R(K\x01" + number(planes.shape[0]) + number(planes.shape[1]) + b"\x86"
    array += dtype + b"\x89" + text(planes.tobytes()) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    items = text(b"batch_label") + text(b"training batch 1 of 5")
    items += text(b"labels") + listed + text(b"data") + array
    items += text(b"filenames") + b"](" + text(b"frog_s_000001.png") + b"e"
    return b"\x80\x02}(" + items + b"u."


def python3_pickle(labels, planes):
    return pickle.dumps({b"data": planes, b"labels": labels.tolist()}, protocol=2)


def write_python(folder, dump):
    folder.mkdir()
    for seed, name in enumerate(TRAIN_FILES + TEST_FILES):
        (folder / name).write_bytes(dump(*records(seed)))


def read(directory, split="train"):
    return load(DataConfig(name="cifar10", dir=str(directory)), split)


@pytest.fixture
def binary(tmp_path):
    write_binary(tmp_path / BINARY_FOLDER)
    return tmp_path


def test_binary_files_hold_planes_of_red_green_and_blue(binary):
    train, test = read(binary), read(binary, "test")
    assert train.images.shape == (15, 32, 32, 3)
    assert test.images.shape == (3, 32, 32, 3)
    labels, planes = records(0)
    assert np.array_equal(train.labels[:3], labels)
    assert train.images[2, 5, 7, 1] == planes[2, 1024 + 5 * 32 + 7]
    assert train.label_names[0] == "airplane"


@pytest.mark.parametrize("dump", [python2_pickle, python3_pickle])
def test_both_versions_give_the_same_data(binary, tmp_path, dump):
    (tmp_path / "python").mkdir()
    write_python(tmp_path / "python" / PYTHON_FOLDER, dump)
    for split in ("train", "test"):
        ours, theirs = read(tmp_path / "python", split), read(binary, split)
        assert np.array_equal(ours.images, theirs.images)
        assert np.array_equal(ours.labels, theirs.labels)


def test_the_folder_of_the_files_itself_is_accepted(binary):
    assert np.array_equal(read(binary / BINARY_FOLDER).images, read(binary).images)


def test_nothing_there_names_the_address_and_the_embedded_set(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data\.name shapes") as caught:
        read(tmp_path)
    message = str(caught.value)
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz" in message
    assert str(tmp_path / BINARY_FOLDER) in message
    assert "\n" not in message


def test_a_truncated_file_is_named_with_both_sizes(binary):
    path = binary / BINARY_FOLDER / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin has 9119 bytes; expected 30730000"):
        read(binary)


def test_a_missing_file_is_named(binary):
    (binary / BINARY_FOLDER / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_4\.bin is missing"):
        read(binary)


def test_a_label_out_of_range_is_refused(binary):
    path = binary / BINARY_FOLDER / "test_batch.bin"
    path.write_bytes(b"\x0b" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"those of CIFAR-10 lie in 0\.\.9"):
        read(binary, "test")


class Evil:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("style", ["python 2", "python 3", "nested"])
def test_a_pickle_that_names_a_function_is_refused_and_not_run(tmp_path, style):
    write_python(tmp_path / PYTHON_FOLDER, python2_pickle)
    target = tmp_path / "owned"
    content = {
        "python 2": b"cos\nmkdir\n(S'" + str(target).encode() + b"'\ntR.",
        "python 3": pickle.dumps(Evil(target)),
        "nested": pickle.dumps({b"data": [Evil(target)], b"labels": []}, protocol=2),
    }[style]
    (tmp_path / PYTHON_FOLDER / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=r"test_batch is refused: .*mkdir") as caught:
        read(tmp_path, "test")
    assert "\n" not in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(python2_pickle(*records(0))[:-50], id="truncated"),
        pytest.param(b"", id="empty"),
        pytest.param(b"not a pickle", id="text"),
        pytest.param(pickle.dumps({b"data": [1], b"labels": [1]}, 2), id="no array"),
        pytest.param(pickle.dumps([1, 2], 2), id="no dictionary"),
        pytest.param(pickle.dumps({b"data": np.zeros(3), b"labels": [1]}, 2), id="floats"),
        pytest.param(pickle.dumps({b"data": np.array([{}]), b"labels": [1]}, 2), id="objects"),
    ],
)
def test_a_damaged_pickle_is_one_clear_line(tmp_path, content):
    write_python(tmp_path / PYTHON_FOLDER, python2_pickle)
    (tmp_path / PYTHON_FOLDER / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match="test_batch") as caught:
        read(tmp_path, "test")
    assert "\n" not in str(caught.value)
