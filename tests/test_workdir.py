"""The directory of a run: what is made when, and files that are not what they should be."""

import json
import os

import pytest

from gen_jax.workdir import MetricsLog, Workdir, WorkdirError


def everything(path):
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def test_nothing_is_made_to_read_a_configuration(tmp_path):
    workdir = Workdir(tmp_path / "a" / "run")
    assert workdir.stored_config() is None
    workdir.check_config({"x": 1}, ())
    assert not workdir.has_checkpoints()
    assert workdir.stage("model").path == tmp_path / "a" / "run" / "model"
    assert everything(tmp_path) == []


def start(path, **config):
    """What a run does that fails once it holds the directory, and perhaps stored something."""
    with Workdir(path).lock():
        assert path.is_dir()
        if config:
            Workdir(path).write_config(config, ())
        raise ValueError("no data")


def test_a_start_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    for path in (tmp_path / "a" / "run", tmp_path / "there" / "run"):
        with pytest.raises(ValueError, match="no data"):
            start(path)
    assert everything(tmp_path) == ["there"]


def test_what_was_there_or_was_written_stays(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    for path, config in ((old, {}), (new, {"x": 1})):
        with pytest.raises(ValueError, match="no data"):
            start(path, **config)
    assert everything(tmp_path) == ["new", "new/.lock", "new/config.json", "old", "old/.lock"]
    assert Workdir(new).stored_config() == {"x": 1}


def test_a_directory_that_cannot_be_made_leaves_nothing(tmp_path):
    for name in ("x" * 300, "new/" + "x" * 300):
        workdir = Workdir(tmp_path / name)
        for make in (workdir.create, workdir.lock().__enter__):
            with pytest.raises(WorkdirError, match="cannot write to the work directory"):
                make()
    assert everything(tmp_path) == []


def test_a_lock_is_held_by_one(tmp_path):
    workdir = Workdir(tmp_path / "run")
    with workdir.lock():
        with (
            pytest.raises(WorkdirError, match=rf"another run \(process {os.getpid()}\) is using"),
            Workdir(workdir.path).lock(),
        ):
            pass
        assert workdir.path.is_dir()
    with workdir.lock():
        pass


def test_checkpoints_of_stages_bind_the_configuration(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.write_config({"x": 1}, ())
    workdir.write_config({"x": 2}, ())
    (workdir.stage("model").checkpoints / "10").mkdir(parents=True)
    assert workdir.has_checkpoints()
    with pytest.raises(WorkdirError, match=r"another configuration \(x: 2 -> 3\)"):
        workdir.write_config({"x": 3}, ())


def test_checkpoints_where_older_versions_left_them_are_refused(tmp_path):
    workdir = Workdir(tmp_path)
    (workdir.checkpoints / "10").mkdir(parents=True)
    with pytest.raises(WorkdirError, match="are of an older version of gen_jax") as caught:
        workdir.stage("model")
    assert str(workdir.checkpoints) in str(caught.value)
    assert "train again in another --workdir" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is damaged"),
        (b'{"x": ', "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[1]", "holds no object"),
        (b"null", "holds no object"),
    ],
)
def test_a_configuration_that_is_none_is_named(tmp_path, content, reason):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(WorkdirError, match=reason) as caught:
        Workdir(tmp_path).stored_config()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_directory_in_the_place_of_a_file_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    read = {
        "config.json": Workdir(tmp_path).stored_config,
        "metrics.jsonl": lambda: MetricsLog.read(tmp_path / name),
    }
    with pytest.raises(WorkdirError, match=rf"{name} cannot be read \(Is a directory\)"):
        read[name]()


@pytest.mark.parametrize(
    "line", [b"[1]", b"3", b'{"loss": 1}', b'{"step": "2"}', b'{"step": 2', b"", b"\xff"]
)
def test_a_line_that_is_no_record_is_named_and_the_file_is_left(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    path.write_bytes(content)
    for read in (MetricsLog.read, lambda path: MetricsLog(path, 1)):
        with pytest.raises(WorkdirError, match="line 2 is no record with a step") as caught:
            read(path)
        assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_a_record_cut_anywhere_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first, last = '{"step": 1, "x": 0.5}\n', '{"step": 2, "x": 0.5}'
    for length in range(len(last)):
        path.write_text(first + last[:length])
        log = MetricsLog(path, step=2)
        log.write({"step": 3})
        log.close()
        assert path.read_text() == first + '{"step": 3}\n'


def test_records_after_the_step_of_a_resume_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    MetricsLog(path, step=2).close()
    assert MetricsLog.read(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("rest", [64 * "\0", '{"step": 3, "lo' + 64 * "\0", 9 * "\0" + "\n"])
def test_what_a_loss_of_power_left_of_records_ends_them(tmp_path, rest):
    """Pages are written in any order: of those that were not, zeros are left."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + rest + ': 4.0}\n{"step": 5}\n')
    assert MetricsLog.read(path) == [{"step": 1}, {"step": 2}]


def test_a_lock_removes_what_killed_runs_were_writing(tmp_path):
    left, folders = ".config.json.0123456789abcdef", ("", "model", "previews", "other")
    for folder in folders:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / left).touch()
        (tmp_path / folder / "config.json").touch()
    (tmp_path / "other" / ".lock").touch()  # a directory of another run, which may be writing
    with Workdir(tmp_path).lock():
        assert [name for name in folders if (tmp_path / name / left).exists()] == ["other"]
        assert all((tmp_path / name / "config.json").exists() for name in folders)


def test_records_are_on_disk_after_a_sync(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        synced.append(os.pread(descriptor, 100, 0))

    log = MetricsLog(tmp_path / "metrics.jsonl")
    log._file.close()
    log._file = open(tmp_path / "metrics.jsonl", "a+")  # noqa: SIM115, to be read here too
    monkeypatch.setattr(os, "fsync", fsync)
    log.write({"step": 1})
    log.sync()
    assert synced == [b'{"step": 1}\n']
    log.close()
