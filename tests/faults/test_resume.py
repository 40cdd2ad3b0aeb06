import json
import os

import pytest
from processes import (
    OPTIMISED,
    assert_one_line,
    assert_same_leaves,
    read_leaves,
    records,
    saved_steps,
    wait_until,
)

from experiments.ddpm_cifar import TINY
from gen_jax import cli
from gen_jax.workdir import Workdir, WorkdirError

pytestmark = pytest.mark.long


@pytest.fixture
def stored(folder):
    """A work directory of the preset `tiny`, with a step that nobody gets to read."""
    workdir = Workdir(folder / "stored run")
    workdir.create()
    workdir.write_config(cli.stored_form(TINY), ())
    (workdir.stage("model").checkpoints / "1000").mkdir(parents=True)
    return workdir


def test_half_a_run_resumed_equals_a_whole_one(experiment, folder):
    experiment.environment |= OPTIMISED
    every = ("--train.checkpoint-every", 5)
    whole = experiment.run("train", "--workdir", "whole", "--train.steps", 10, *every)
    assert whole.returncode == 0, whole.stderr
    for steps in (5, 10):
        run = experiment.run("train", "--workdir", "in two parts", "--train.steps", steps, *every)
        assert run.returncode == 0, run.stderr
        assert saved_steps(folder / "in two parts")[-1] == steps
    assert saved_steps(folder / "in two parts") == [5, 10]
    for step in (5, 10):
        assert_same_leaves(
            read_leaves(folder / "in two parts", step), read_leaves(folder / "whole", step)
        )
    assert [record["step"] for record in records(folder / "in two parts")] == list(range(1, 11))


def test_a_finished_run_is_left_as_it_is(toy, folder):
    assert toy.run("--workdir", "run").returncode == 0
    before = {
        path: path.stat().st_mtime_ns
        for path in (folder / "run").rglob("*")
        if path.is_file() and path.name not in (".lock", "config.json")
    }
    assert toy.run("--workdir", "run").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_order_of_signs_of_life_does_not_change_what_is_learned(toy, folder):
    """How often a run writes records and checkpoints, and what it keeps, changes no number."""
    assert toy.run("--workdir", "one").returncode == 0
    other = ("--train.log-every", 5, "--train.checkpoint-every", 1, "--train.keep", 1)
    assert toy.run("--workdir", "other", *other).returncode == 0
    assert_same_leaves(read_leaves(folder / "one"), read_leaves(folder / "other"))
    assert saved_steps(folder / "other") == [12]


def test_a_changed_configuration_is_refused_with_every_key(preset, stored):
    options = (
        "--model.widths 16 32 --train.batch 16 --train.seed 1 --diffusion.schedule linear "
        "--data.size 32 --sample.seed 5"
    )
    changed = preset.run("--workdir", stored.path, *options.split())
    assert changed.returncode == 2
    assert_one_line(
        changed.stderr,
        stored.path,
        "model.widths: [32, 64] -> [16, 32]",
        "train.batch: 64 -> 16",
        "train.seed: 0 -> 1",
        "diffusion.schedule: 'cosine' -> 'linear'",
        "data.size: 16 -> 32",
        "--workdir",
    )
    assert "sample.seed" not in changed.stderr
    assert stored.stored_config() == cli.stored_form(TINY)


@pytest.mark.parametrize("key", ["--train.steps", "--train.learning-rate", "--train.warmup"])
def test_a_schedule_of_rates_cannot_be_changed(preset, stored, key):
    """With the cosine of the preset even the number of steps is part of the schedule."""
    refused = preset.run("--workdir", stored.path, key, 1)
    assert refused.returncode == 2
    assert_one_line(refused.stderr, key.removeprefix("--").replace("-", "_"))


def test_before_the_first_checkpoint_everything_may_change(tmp_path):
    """A first try that does not fit in memory, say, does not bind the second."""
    workdir = Workdir(tmp_path)
    for batch in (64, 32):
        workdir.write_config({"train": {"batch": batch}}, ())
        assert workdir.stored_config() == {"train": {"batch": batch}}
    (workdir.stage("model").checkpoints / "10").mkdir(parents=True)
    with pytest.raises(WorkdirError, match=r"train\.batch: 32 -> 16"):
        workdir.write_config({"train": {"batch": 16}}, ())
    assert workdir.stored_config() == {"train": {"batch": 32}}


def test_a_damaged_configuration_is_named(preset, stored):
    path = stored.path / "config.json"
    path.write_text(path.read_text()[:100])
    refused = preset.run("--workdir", stored.path)
    assert refused.returncode == 2
    assert_one_line(refused.stderr, path, "damaged")


def test_a_second_run_in_one_directory_is_refused(toy, folder):
    with toy.start("--workdir", "run", "--block-at", 5) as first:
        wait_until(lambda: saved_steps(folder / "run") == [4], first)
        before = (folder / "run" / "config.json").read_bytes()
        second = toy.run("--workdir", folder / "run", "--train.steps", 20)
        assert (folder / "run" / "config.json").read_bytes() == before
        first.kill()
        first.communicate()
    assert second.returncode == 2
    assert_one_line(second.stderr, f"(process {first.pid})", folder / "run", "--workdir")
    third = toy.run("--workdir", "run", "--block-at", -1)
    assert third.returncode == 0  # the lock died with its process


def test_every_command_of_an_experiment_takes_the_lock(preset, stored):
    with stored.lock():
        for command in ("all", "train", "sample", "evaluate"):
            refused = preset.run(command, "--workdir", stored.path)
            assert refused.returncode == 2
            assert_one_line(refused.stderr, f"(process {os.getpid()})", stored.path)


def test_records_are_mended_on_resume(toy, folder):
    options = ("--workdir", "run", "--train.checkpoint-every", 4)
    assert toy.run(*options, "--train.steps", 8).returncode == 0
    path = folder / "run" / "metrics.jsonl"
    whole = path.read_text()
    # As after a crash in step 11, whose record was cut short.
    later = [json.dumps({"step": step, "loss": 0.0}) for step in (9, 10, 11)]
    path.write_text(whole + "\n".join(later)[:-7])
    assert toy.run(*options, "--train.steps", 12).returncode == 0
    assert path.read_text().startswith(whole)
    assert [record["step"] for record in records(folder / "run")] == list(range(1, 13))
    assert all(record["loss"] > 0 for record in records(folder / "run"))
