import os
import resource

import pytest

from gen_jax import whole_file


@pytest.fixture
def path(tmp_path):
    """A file that is there already."""
    file = tmp_path / "a folder" / "file.txt"
    whole_file.write(file, "old ä\n")
    return file


def test_a_file_is_replaced_and_its_folder_made(path):
    assert path.read_bytes() == "old ä\n".encode()
    with whole_file.replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == "old ä\n".encode()
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file.txt"]


def test_what_is_interrupted_leaves_nothing(path):
    def interrupted():
        with whole_file.replacing(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == "old ä\n".encode()
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_write_that_fails_names_the_file_and_leaves_nothing(path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{path}'"):
            whole_file.write(path, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == "old ä\n".encode()
    assert os.listdir(path.parent) == ["file.txt"]


def test_the_content_is_on_disk_before_the_name_and_the_name_before_the_end(path, monkeypatch):
    events = []

    def fsync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def replace(source, target):
        events.append(("replace", str(source)))
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    whole_file.write(path, "new")
    (_, temporary), renamed, folder = events
    assert renamed == ("replace", temporary)
    assert folder == ("sync", str(path.parent))
    events.clear()
    with whole_file.replacing(path, durable=False) as file:
        file.write(b"newer")
    assert [kind for kind, _ in events] == ["replace"]
