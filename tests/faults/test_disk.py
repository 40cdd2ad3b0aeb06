import os
import shutil
import subprocess

import pytest
from processes import assert_one_line, assert_same_leaves, read_leaves, saved_steps

pytestmark = pytest.mark.long

NAMESPACE = ["unshare", "--map-root-user", "--mount"]


@pytest.fixture(scope="module")
def mounts(tmp_path_factory):
    """Skips where no small file system can be had."""
    place = tmp_path_factory.mktemp("mount")
    command = [*NAMESPACE, "mount", "-t", "tmpfs", "-o", "size=64k", "none", place]
    if shutil.which("unshare") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")


def test_files_that_cannot_grow_end_the_run_and_spare_what_is_there(toy, folder):
    """The limit on the size of a file stands for a full disk, without needing one.

    The lower one stops the metadata of a checkpoint, the higher one its arrays.
    """
    options = ("--workdir", "run", "--width", 512)
    assert toy.run(*options, "--train.steps", 8).returncode == 0
    before = read_leaves(folder / "run")
    for largest in (3000, 20_000):
        failed = toy.run(*options, "--train.steps", 16, "--largest-file", largest)
        assert failed.returncode == 1, failed.stderr
        assert_one_line(
            failed.stderr, "checkpoint of step 12 not saved in", folder / "run", "File too large"
        )
        assert sorted(os.listdir(folder / "run" / "checkpoints")) == ["4", "8"]
        assert_same_leaves(read_leaves(folder / "run"), before)

    resumed = toy.run(*options, "--train.steps", 16, "--largest-file", 0)
    assert resumed.returncode == 0, resumed.stderr
    assert toy.run("--workdir", "whole", "--width", 512, "--train.steps", 16).returncode == 0
    assert_same_leaves(read_leaves(folder / "run"), read_leaves(folder / "whole"))


def on_small_disk(toy, size, *arguments, full=False):
    """Runs the toy in a directory `disk` of so many bytes; copies what it holds to `after`."""
    fill = "cat /dev/zero > disk/zeros 2> /dev/null;" if full else ""
    script = (
        f'mount -t tmpfs -o size="$1" none disk; shift; {fill} "$@"; code=$?; '
        "cp -r disk after; exit $code"
    )
    (toy.folder / "disk").mkdir()
    return subprocess.run(
        [*NAMESPACE, "sh", "-c", script, "sh", str(size), *toy.command(*arguments)],
        cwd=toy.folder,
        env=toy.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.usefixtures("mounts")
def test_a_full_disk_ends_the_run_and_spares_what_is_there(toy, folder):
    options = ("--width", 512, "--train.steps", 40, "--train.keep", 10)
    failed = on_small_disk(toy, 1_500_000, "--workdir", "disk/run", *options)
    assert failed.returncode == 1, failed.stderr
    assert_one_line(failed.stderr, "not saved in", folder / "disk" / "run", "No space left")
    kept = saved_steps(folder / "after" / "run")
    assert kept
    assert kept == list(range(4, 4 * len(kept) + 1, 4))
    assert f"checkpoint of step {kept[-1] + 4} not saved" in failed.stderr
    left = os.listdir(folder / "after" / "run" / "checkpoints")
    assert sorted(map(int, left)) == kept  # nothing half-written keeps the disk full

    resumed = toy.run("--workdir", "after/run", *options)
    assert resumed.returncode == 0, resumed.stderr
    assert toy.run("--workdir", "whole", *options).returncode == 0
    assert_same_leaves(read_leaves(folder / "after" / "run"), read_leaves(folder / "whole"))


@pytest.mark.usefixtures("mounts")
def test_records_that_do_not_fit_end_the_run(toy, folder):
    """The disk is full before the first checkpoint, of metrics.jsonl alone."""
    options = ("--train.steps", 2000, "--train.checkpoint-every", 2000)
    failed = on_small_disk(toy, 32_768, "--workdir", "disk/run", *options)
    assert failed.returncode == 1, failed.stderr
    assert_one_line(failed.stderr, "No space left", "disk/run")


@pytest.mark.usefixtures("mounts")
def test_a_disk_that_is_full_from_the_start_is_refused(toy, folder):
    failed = on_small_disk(toy, 65_536, "--workdir", "disk/run", full=True)
    assert failed.returncode == 2, failed.stderr
    assert_one_line(
        failed.stderr,
        "cannot write to the work directory",
        folder / "disk" / "run",
        "No space left",
        "--workdir",
    )
