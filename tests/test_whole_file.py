import errno
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


@pytest.fixture
def events(monkeypatch):
    """What is synced, in turn."""
    events = []

    def fsync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", fsync)
    return events


def test_the_content_is_on_disk_before_the_name_and_the_name_before_the_end(
    path, events, monkeypatch
):
    def replace(source, target):
        events.append(("replace", str(source)))
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", replace)
    whole_file.write(path, "new")
    (_, temporary), renamed, folder = events
    assert renamed == ("replace", temporary)
    assert folder == ("sync", str(path.parent))
    events.clear()
    with whole_file.replacing(path, durable=False) as file:
        file.write(b"newer")
    assert [kind for kind, _ in events] == ["replace"]


def test_the_names_of_folders_that_are_made_are_on_disk(tmp_path, events):
    outer, inner = tmp_path / "new", tmp_path / "new" / "inner"
    assert whole_file.make_folder(inner) == [outer, inner]
    assert events == [("sync", str(tmp_path)), ("sync", str(outer))]
    events.clear()
    assert whole_file.make_folder(inner) == []
    assert events == []
    whole_file.write(tmp_path / "other" / "file", "")
    assert events[0] == ("sync", str(tmp_path))


def test_folders_that_cannot_be_made_leave_nothing(tmp_path):
    with pytest.raises(OSError, match="too long"):
        whole_file.make_folder(tmp_path / "new" / ("x" * 300))
    assert os.listdir(tmp_path) == []


def test_a_tree_is_on_disk_with_every_file_and_folder(path, events):
    tree = path.parent
    (tree / "inner" / "empty").mkdir(parents=True)
    (tree / "inner" / "file").touch()
    whole_file.sync_tree(tree)
    assert len(events) == 5
    assert {synced for _, synced in events} == {str(tree), *map(str, tree.rglob("*"))}


def test_a_sync_that_fails_names_what_is_not_on_disk(path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"Input/output error: '{path}'"):
        whole_file.sync_tree(path.parent)


def test_only_what_was_being_written_is_left_over(path):
    def killed():
        with whole_file.replacing(path) as file:
            (name,) = set(os.listdir(path.parent)) - {"file.txt"}
            left.append(name)
            file.write(b"new")

    left = []
    killed()
    (path.parent / left[0]).write_bytes(b"ne")
    others = [".file.txt", f".{16 * 'a'}", f"..{15 * 'a'}", f".x.{16 * 'A'}", f"x.{16 * 'a'}"]
    others += [f".x.{17 * 'a'}", f".x.{16 * 'a'}.y"]
    for name in others:
        (path.parent / name).touch()
    (path.parent / f".folder.{16 * 'a'}").mkdir()
    (path.parent / f".link.{16 * 'a'}").symlink_to(path)
    whole_file.remove_leftovers(path.parent)
    kept = ["file.txt", f".folder.{16 * 'a'}", f".link.{16 * 'a'}", *others]
    assert sorted(os.listdir(path.parent)) == sorted(kept)
