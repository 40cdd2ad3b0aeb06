"""The power goes between any two system calls of a run: nothing that was saved is lost."""

import dataclasses
import functools
import warnings
from pathlib import Path

import power
import processes
import pytest
from processes import assert_same_leaves, read_leaves, saved_steps

from gen_jax import checkpoint
from gen_jax.trees import named_leaves
from gen_jax.workdir import MetricsLog, Workdir

# After an error, which it raises, TensorStore calls back to an event loop that is gone.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning"
)

SAVED = (2, 4, 6)  # the steps, of which one is kept
OPTIONS = ("--train.steps", SAVED[-1], "--train.checkpoint-every", SAVED[0])
CONFIG, METRICS, CHECKPOINTS = "run/config.json", "run/metrics.jsonl", "run/checkpoints"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A run with three checkpoints.

    Attributes:
      folder: where it ran, in the directory `run`.
      calls: what it asked of the system.
      values: the leaves that it had at each step.
    """

    folder: Path
    calls: list[power.Call]
    values: dict[int, dict]

    def disk(self, every_call=False, forget=None):
        """The disk of the run; `forget` chooses fsyncs to leave out by the path in the folder."""

        def mark(call):
            return every_call or _reports(call, self.folder)

        def forgotten(path):
            return forget is not None and forget(str(Path(path).relative_to(self.folder)))

        return power.Disk(self.calls, self.folder, mark, forgotten)


def _reports(call, folder):
    """Whether the call shows that a save is over: a record is written, or a step removed."""
    if call.name == "write":
        return call.descriptors()[0][1] == f"{folder}/{METRICS}"
    if not call.name.startswith("rename"):
        return False
    source, target = (Path(string.decode()) for string in call.strings())
    return source.parent.name == "checkpoints" and source.name.isdecimal() and target != source


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("power") / "a folder"
    folder.mkdir()
    toy = processes.Toy(folder)
    calls = power.record(toy, folder, "--workdir", "run", *OPTIONS, "--train.keep", 1)
    whole = toy.run("--workdir", folder.parent / "whole", *OPTIONS)
    assert whole.returncode == 0, whole.stderr
    values = {step: read_leaves(folder.parent / "whole", step) for step in SAVED}
    return Recorded(folder, calls, values)


def steps_in(state):
    """The steps in a state, whole or not, and their files, by number."""
    found = {}
    for path, content in state.items():
        if path.startswith(CHECKPOINTS + "/"):
            name, _, file = path.removeprefix(CHECKPOINTS + "/").partition("/")
            if name.isdecimal() and content is not None:
                found.setdefault(int(name), {})[file] = content
    return found


class Promise:
    """What is promised of a run, by its record: what holds at each moment, and what each save left.

    Args:
      disk: of the record.
    """

    def __init__(self, disk):
        self.final = disk.everything(len(disk.changes))
        self.disk, self.saved, self.demands, newest = disk, {}, [], None
        for number, _, call in disk.moments:
            if call is None or _reports(call, disk.folder):
                steps = steps_in(disk.everything(number))
                newest = max(steps, default=None)
                self.saved |= steps if newest not in self.saved else {}
            self.demands.append(newest)
        assert tuple(sorted(self.saved)) == SAVED
        assert set(self.demands) == {None, *SAVED}

    def losses(self, subsets):
        """Pairs of a step that has been saved, None before the first, and what may be on disk."""
        generator = power.seeded()
        for moment, step in zip(self.disk.moments, self.demands, strict=True):
            for state in self.disk.losses(moment, generator, subsets):
                yield step, state

    def broken(self, step, state):
        """What of the promise a state breaks, after this step was saved."""
        if state.get(CONFIG) not in (self.final[CONFIG], *((None,) if step is None else ())):
            yield CONFIG
        if step is None:
            return
        steps = steps_in(state)
        if not any(n >= step and steps[n] == self.saved.get(n) for n in steps):
            yield "step"
        records = self.final[METRICS].splitlines(keepends=True)[:step]
        if not state.get(METRICS, b"").startswith(b"".join(records)):
            yield METRICS


def distinct(losses):
    """Those that differ in more than half-written steps, each after the latest step it may."""
    found = {}
    for step, state in losses:
        key = frozenset(
            (path, content)
            for path, content in state.items()
            if path != METRICS and ".orbax-checkpoint-tmp/" not in path
        )
        if key not in found or (step or 0) > (found[key][0] or 0):
            found[key] = step, state
    return list(found.values())


def check_records(losses, promise, folder):
    """All of metrics.jsonl that may be found is read, up to where the power went."""
    contents = {state[METRICS] for _, state in losses if METRICS in state}
    whole = power_lines(promise.final[METRICS], folder)
    for content in contents:
        lines = power_lines(content, folder)
        assert lines == whole[: len(lines)]


def power_lines(content, folder):
    """The records in the content of metrics.jsonl."""
    (folder / "metrics.jsonl").write_bytes(content)
    return MetricsLog.read(folder / "metrics.jsonl")


def check_start(step, state, values, folder):
    """The next run finds the values of the step or of a later one; before the first, or refuses."""
    power.build(state, folder / "lost")
    workdir = Workdir(folder / "lost" / "run")
    assert (workdir.stored_config() is not None) or step is None
    abstract = {"ema": {}, "state": {}, "loop": {}}
    for name, value in values[SAVED[0]].items():
        tree, _, leaf = name.partition(".")
        abstract[tree][leaf] = value
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*falling back to the one before")
        if step is None and not _can_start(workdir, abstract):
            return
        restored = checkpoint.restore(workdir.checkpoints, abstract)
    assert restored.step >= (step or 0)
    got = {
        f"{name}.{leaf}": value
        for name, tree in restored.trees.items()
        for leaf, value in named_leaves(tree).items()
    }
    assert_same_leaves(got, values[restored.step])


def _can_start(workdir, abstract):
    """Whether there is something to go on from; if not, that is said in the project's own words."""
    try:
        checkpoint.restore(workdir.checkpoints, abstract)
    except FileNotFoundError as error:
        if not str(error).startswith("no checkpoint in"):
            raise
        return False
    except checkpoint.DamagedCheckpoint as error:
        if not str(error).startswith("every checkpoint in"):
            raise
        return False
    return True


def test_a_record_played_back_gives_the_files_of_the_run(recorded):
    disk = recorded.disk()
    assert disk.everything(len(disk.changes)) == power.found(recorded.folder)


def test_what_was_saved_outlives_a_loss_of_power(recorded, tmp_path):
    """At any moment, whatever of the calls had come to the disk."""
    promise = Promise(recorded.disk())
    losses = list(promise.losses(subsets=3))
    for step, state in losses:
        assert not list(promise.broken(step, state)), (step, sorted(state))
    check_records(losses, promise, tmp_path)
    states = distinct(losses)
    assert len(states) > 100
    for step, state in power.seeded().sample(states, 30):
        check_start(step, state, recorded.values, tmp_path)


@pytest.mark.slow
def test_what_was_saved_outlives_a_loss_of_power_between_any_two_calls(recorded, tmp_path):
    """With many more subsets, all restored; some runs go on from them."""
    promise = Promise(recorded.disk(every_call=True))
    losses = list(promise.losses(subsets=6))
    for step, state in losses:
        assert not list(promise.broken(step, state)), (step, sorted(state))
    check_records(losses, promise, tmp_path)
    states = distinct(losses)
    for step, state in states:
        check_start(step, state, recorded.values, tmp_path)
    toy = processes.Toy(tmp_path / "lost")
    for step, state in power.seeded().sample(states, 40):
        power.build(state, tmp_path / "lost")
        done = toy.run("--workdir", "run", *OPTIONS, "--train.keep", 1)
        if done.returncode:
            assert step is None
            *_, last = done.stderr.splitlines()  # after a warning for each step that is damaged
            assert last.startswith("error: every checkpoint in"), done.stderr
        else:
            assert saved_steps(tmp_path / "lost" / "run") == [SAVED[-1]]
            leaves = read_leaves(tmp_path / "lost" / "run")
            assert_same_leaves(leaves, recorded.values[SAVED[-1]])


LEFT_OUT = {
    "of the files of a step": (
        "step",
        lambda path: path.startswith(CHECKPOINTS) and Path(path).parts[2:3] != (),
    ),
    "of the names of steps": ("step", lambda path: path == CHECKPOINTS),
    "of the folder of steps": ("step", lambda path: path == "run"),
    "of the work directory": ("step", lambda path: path == "."),
    "of records": (METRICS, lambda path: path == METRICS),
    "of the configuration": (CONFIG, lambda path: path.startswith("run/.config.json")),
}


@pytest.mark.parametrize("syncs", LEFT_OUT)
def test_a_sync_that_is_left_out_is_found(recorded, tmp_path, syncs):
    what, forget = LEFT_OUT[syncs]
    promise = Promise(recorded.disk(forget=functools.partial(_of_a_step, forget)))
    losses = promise.losses(subsets=3)
    step, state = next(loss for loss in losses if what in promise.broken(*loss))
    if what == "step":
        with pytest.raises((AssertionError, checkpoint.DamagedCheckpoint, FileNotFoundError)):
            check_start(step, state, recorded.values, tmp_path)


def _of_a_step(forget, path):
    """Leaves what Orbax and TensorStore sync to them."""
    return forget(path) and ".orbax-checkpoint-tmp" not in path
