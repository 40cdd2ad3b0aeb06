import errno
import os
import random
import shutil
import warnings

import numpy as np
import orbax.checkpoint as ocp
import pytest
from processes import assert_same_leaves, read_leaves, saved_steps

from gen_jax import checkpoint, whole_file
from gen_jax.trees import named_leaves

# After an error, which it raises, TensorStore calls back to an event loop that is gone.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning"
)

KEEP = 3


def trees(step):
    """Trees with leaves of several types and sizes, some incompressible, some of zeros."""
    generator = np.random.default_rng(step)
    params = {
        "layer": {
            "kernel": generator.normal(size=(16, 8)).astype(np.float32),
            "bias": np.zeros(8, np.float32),
        },
        "half": generator.normal(size=5).astype(np.float16),
        "scale": np.float32(step),
    }
    return {"params": params, "state": {"step": np.int32(step), "mask": np.arange(3) > 1}}


ABSTRACT = trees(0)


@pytest.fixture
def saved(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path / "saved", step, trees(step), {"note": "α"}, keep=KEEP)
    return tmp_path / "saved"


def files(directory, step):
    found = sorted(path for path in (directory / str(step)).rglob("*") if path.is_file())
    assert len(found) > 10
    return found


def leaves(tree):
    return {
        f"{name}.{key}": np.asarray(value)
        for name, part in tree.items()
        for key, value in named_leaves(part).items()
    }


def is_refused_or_right(directory, step=2):
    """Whether the step is refused by name; if not, every bit must be what was saved."""
    try:
        restored = checkpoint.restore(directory, ABSTRACT, step=step)
    except checkpoint.DamagedCheckpoint as error:
        message = str(error)
        assert message.startswith(f"checkpoint of step {step} is damaged: "), message
        assert any(name in message for name in ("its record", "params", "state")), message
        assert "\n" not in message
        return True
    assert restored.step == step
    assert restored.record == {"note": "α"}
    right, got = leaves(trees(step)), leaves(restored.trees)
    assert got.keys() == right.keys()
    for name, value in got.items():
        assert value.dtype == right[name].dtype, name
        assert value.shape == right[name].shape, name
        assert value.tobytes() == right[name].tobytes(), name
    return False


def test_a_flipped_bit_never_gives_other_values(saved):
    generator, refused, flips = random.Random(0), 0, 0
    assert not is_refused_or_right(saved)
    for path in files(saved, 2):
        content = path.read_bytes()
        for bit in generator.sample(range(8 * len(content)), 6):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            refused += is_refused_or_right(saved)
            flips += 1
        path.write_bytes(content)
    assert not is_refused_or_right(saved)
    assert refused > flips / 4  # many bits are of no consequence: spare metadata, padding


def test_a_value_that_orbax_reads_without_a_word_is_named(saved):
    """Files that are whole, with another value in one leaf: only the digest can tell."""
    params = leaves({"": trees(2)["params"]})
    params = {name.removeprefix("."): value for name, value in params.items()}
    params["half"].view(np.uint16)[3] ^= 1
    ocp.PyTreeCheckpointer().save(saved / "2" / "params", params, force=True)
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"params\.half is not what was saved"):
        checkpoint.restore(saved, ABSTRACT, step=2)
    assert is_refused_or_right(saved)


@pytest.mark.parametrize("length", [0, 1, "half", "all but one"])
def test_a_truncated_file_never_gives_other_values(saved, length):
    refused = 0
    for path in files(saved, 2):
        content = path.read_bytes()
        lengths = {"half": len(content) // 2, "all but one": len(content) - 1}
        path.write_bytes(content[: lengths.get(length, length)])
        refused += is_refused_or_right(saved)
        path.write_bytes(content)
    assert refused >= 4


def test_a_deleted_file_never_gives_other_values(saved):
    refused = 0
    for path in files(saved, 2):
        content = path.read_bytes()
        path.unlink()
        refused += is_refused_or_right(saved)
        path.write_bytes(content)
    for folder in sorted(path for path in (saved / "2").rglob("*") if path.is_dir()):
        folder.rename(saved / "aside")
        refused += is_refused_or_right(saved)
        (saved / "aside").rename(folder)
    assert refused >= 8
    assert not is_refused_or_right(saved)


def spoil(directory, step, part="params"):
    """Cuts the largest file of a part of a checkpoint in half."""
    found = [path for path in files(directory, step) if part in path.parts]
    path = max(found, key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("part", ["params", "state", "meta"])
def test_the_latest_falls_back_with_a_warning(saved, part):
    spoil(saved, 2, part)
    with pytest.warns(UserWarning, match="falling back to the one before") as caught:
        restored = checkpoint.restore(saved, ABSTRACT)
    assert len(caught) == 1
    name = "its record" if part == "meta" else f"{part}."
    assert f"checkpoint of step 2 is damaged: {name}" in str(caught[0].message)
    assert restored.step == 1
    for name, value in leaves(restored.trees).items():
        assert value.tobytes() == leaves(trees(1))[name].tobytes()


def test_an_explicit_step_never_falls_back(saved):
    spoil(saved, 2)
    warnings.filterwarnings("error", message=".*falling back")  # until the test ends
    with pytest.raises(checkpoint.DamagedCheckpoint, match="step 2"):
        checkpoint.restore(saved, ABSTRACT, step=2)


def test_when_all_are_damaged_that_is_said(saved):
    for step in (1, 2):
        spoil(saved, step)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(checkpoint.DamagedCheckpoint, match=r"every checkpoint .*: steps \[1, 2\]"),
    ):
        checkpoint.restore(saved, ABSTRACT)


@pytest.mark.parametrize(("number", "age"), [(1, "older"), (3, "newer")])
def test_a_checkpoint_of_another_version_is_refused(saved, monkeypatch, number, age):
    """And not passed over for one before it, as a damaged one is."""
    monkeypatch.setattr(checkpoint, "FORMAT", number)
    checkpoint.save(saved, 3, trees(3), {}, keep=KEEP)
    monkeypatch.undo()
    for abstract in ({}, ABSTRACT):
        with pytest.raises(ValueError, match=f"step 3 .* is of an? {age} version") as caught:
            checkpoint.restore(saved, abstract)
        message = str(caught.value)
        assert "train again in another --workdir" in message
        assert str(saved) in message
        assert "\n" not in message
        assert not isinstance(caught.value, checkpoint.DamagedCheckpoint)


@pytest.mark.parametrize("part", ["meta/metadata", "params/manifest.ocdbt", "state/d/*"])
def test_a_file_that_cannot_be_read_is_no_damage(saved, part):
    """A link to itself stands for what a user without permission, or a broken disk, would get."""
    (path,) = (saved / "2").glob(part)
    content = path.read_bytes()
    path.unlink()
    path.symlink_to(path)
    for step in (None, 2):
        with pytest.raises(OSError, match="checkpoint of step 2 cannot be read") as caught:
            checkpoint.restore(saved, ABSTRACT, step=step)
        assert f"{path}: Too many levels of symbolic links" in str(caught.value)
        assert "\n" not in str(caught.value)
    path.unlink()
    path.write_bytes(content)
    assert checkpoint.restore(saved, ABSTRACT).step == 2


def test_a_step_under_another_number_is_damage(saved):
    shutil.copytree(saved / "2", saved / "7")
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"step 7 .* its record is of step 2"):
        checkpoint.restore(saved, ABSTRACT, step=7)
    with pytest.warns(UserWarning, match="its record is of step 2"):
        assert checkpoint.restore(saved, ABSTRACT).step == 2


def test_too_little_memory_is_no_damage(saved, monkeypatch):
    def restore(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    with pytest.raises(MemoryError, match="checkpoint of step 2 does not fit"):
        checkpoint.restore(saved, ABSTRACT)


def test_metadata_of_orbax_that_it_cannot_read_are_named(saved):
    (saved / "2" / "_CHECKPOINT_METADATA").write_text("7")
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"_CHECKPOINT_METADATA in .* move that"):
        checkpoint.restore(saved, ABSTRACT, step=2)


def test_a_missing_step_is_no_damage(saved):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3 .*\[1, 2\]"):
        checkpoint.restore(saved, ABSTRACT, step=3)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.restore(saved / "none", ABSTRACT)


def test_another_configuration_is_no_damage(saved):
    """What does not fit is refused, not answered with an older checkpoint."""
    wrong_shape, wrong_type, wrong_name = trees(0), trees(0), trees(0)
    wrong_shape["params"]["half"] = np.zeros(6, np.float16)
    wrong_type["params"]["half"] = np.zeros(5, np.float32)
    wrong_name["params"]["other"] = wrong_name["params"].pop("half")
    for abstract in (wrong_shape, wrong_type, wrong_name):
        with pytest.raises(ValueError, match="another configuration") as caught:
            checkpoint.restore(saved, abstract)
        assert not isinstance(caught.value, checkpoint.DamagedCheckpoint)
        assert "half" in str(caught.value)


def test_what_is_saved_over_damage_is_kept_aside(saved):
    """However often: nothing is lost that might still be of use."""
    for _ in range(3):
        spoil(saved, 2)
        with pytest.warns(UserWarning, match="falling back"):
            assert checkpoint.restore(saved, ABSTRACT).step == 1
        checkpoint.save(saved, 2, trees(2), {"note": "α"}, keep=KEEP)
        assert not is_refused_or_right(saved)
    names = {path.name for path in saved.iterdir()}
    assert names == {"1", "2", "2.damaged", "2.damaged.2", "2.damaged.3"}


def test_damage_of_a_later_step_does_not_push_out_good_ones(saved):
    """Retention counts by step: a damaged step 2 must not count as newer than a good 1."""
    spoil(saved, 2)
    for step in (3, 9):
        checkpoint.save(saved, step, trees(step), {"note": "α"}, keep=KEEP)
    spoil(saved, 9)
    with pytest.warns(UserWarning, match="falling back"):
        assert checkpoint.restore(saved, ABSTRACT).step == 3
    checkpoint.save(saved, 5, trees(5), {"note": "α"}, keep=1)
    assert checkpoint.steps(saved) == [5]
    assert not is_refused_or_right(saved, 5)
    assert (saved / "9.damaged").is_dir()


def test_half_written_steps_are_no_steps(saved):
    """What Orbax leaves behind when it is killed is neither read nor kept."""
    left = saved / "3.orbax-checkpoint-tmp"
    shutil.copytree(saved / "2", left)
    assert checkpoint.steps(saved) == [1, 2]
    assert checkpoint.restore(saved, ABSTRACT).step == 2
    checkpoint.save(saved, 3, trees(3), {"note": "α"}, keep=KEEP)
    assert checkpoint.steps(saved) == [1, 2, 3]
    assert not left.exists()


def test_a_step_that_does_not_get_to_disk_is_not_saved(saved, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(whole_file, "sync_tree", fail)
    with pytest.raises(OSError, match=r"step 3 not saved in .*: .*Input/output error"):
        checkpoint.save(saved, 3, trees(3), {"note": "α"}, keep=1)
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2"]
    assert not is_refused_or_right(saved)


def test_what_is_left_of_a_step_that_was_being_removed_goes_with_the_next(saved, monkeypatch):
    """As where the process is killed within."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder: None)
        checkpoint.save(saved, 3, trees(3), {"note": "α"}, keep=2)
    assert checkpoint.steps(saved) == [2, 3]
    assert len(list(saved.iterdir())) == 3
    checkpoint.save(saved, 4, trees(4), {"note": "α"}, keep=2)
    assert sorted(path.name for path in saved.iterdir()) == ["3", "4"]
    assert not is_refused_or_right(saved, 4)


def test_what_is_left_of_the_last_save_goes_with_the_next_start(toy, folder):
    """As where the process is killed after training, while old steps are removed."""
    assert toy.run("--workdir", "run", "--train.keep", 2).returncode == 0
    steps = folder / "run" / "checkpoints"
    shutil.copytree(steps / "8", steps / "4")
    shutil.copytree(steps / "8" / "ema", steps / "2.orbax-checkpoint-tmp" / "ema")
    before = read_leaves(folder / "run")
    again = toy.run("--workdir", "run", "--train.keep", 2)
    assert again.returncode == 0, again.stderr
    assert sorted(path.name for path in steps.iterdir()) == ["12", "8"]
    assert_same_leaves(read_leaves(folder / "run"), before)


def test_training_goes_on_from_the_one_before(toy, folder):
    assert toy.run("--workdir", "whole").returncode == 0
    shutil.copytree(folder / "whole", folder / "damaged")
    spoil(folder / "damaged" / "checkpoints", 12, "state")
    resumed = toy.run("--workdir", "damaged")
    assert resumed.returncode == 0, resumed.stderr
    assert "checkpoint of step 12 is damaged: state." in resumed.stderr
    assert "falling back to the one before" in resumed.stderr
    assert "Traceback" not in resumed.stderr
    assert saved_steps(folder / "damaged") == [4, 8, 12]
    assert_same_leaves(read_leaves(folder / "damaged"), read_leaves(folder / "whole"))
    assert (folder / "damaged" / "checkpoints" / "12.damaged").is_dir()

    for step in (4, 8, 12):
        spoil(folder / "damaged" / "checkpoints", step, "state")
    refused = toy.run("--workdir", "damaged")
    assert refused.returncode == 2
    error = refused.stderr.splitlines()[-1]
    assert error.startswith("error: every checkpoint in ")
    assert str(folder / "damaged") in error
    assert "Traceback" not in refused.stderr
    assert saved_steps(folder / "damaged") == [4, 8, 12]
