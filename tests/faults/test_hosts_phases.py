"""Processes of one run with a fault after training: while it samples, evaluates, or in between."""

import contextlib
import itertools
import resource
import shutil
import signal
import time

import pytest
from processes import (
    LEAST_TEXT,
    ForkedExperiment,
    assert_one_line,
    assert_same_results,
    free_address,
    wait_until,
)

pytestmark = pytest.mark.long

OPTIONS = (
    f"{LEAST_TEXT} --train.steps 2 --train.checkpoint-every 2 --sample.number 60 "
    "--sample.micro-batch 1 --evaluate.batch 1"
)
SHARE = 30  # of the samples that each process draws, one at a time


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one process that nothing happened to; its folder."""
    folder = tmp_path_factory.mktemp("a run that ended")
    done = ForkedExperiment("gpt_text", folder, OPTIONS).run("all", "--workdir", "run")
    assert done.returncode == 0, done.stderr
    return folder


class Both:
    """Two processes that sample and evaluate what was trained."""

    def __init__(self, folder, processes):
        self.processes = processes
        self.samples, self._parts = folder / "run" / "samples.npz", folder / "run" / "parts"

    def parts(self):
        """The samples, or the measured rows of the test set, that are kept."""
        return list(self._parts.glob("*/*.npz"))

    def wait_for(self, condition):
        wait_until(condition, self.processes[0])

    def ends(self):
        """What both say on standard error when they end."""
        return [process.communicate(60)[1] for process in self.processes]


@pytest.fixture
def start_both(finished, folder):
    """Starts them, with the patience that they have with each other."""
    shutil.copytree(finished / "run", folder / "run")
    for name in ("samples.npz", "samples.txt", "summary.json"):
        (folder / "run" / name).unlink()
    program, address = ForkedExperiment("gpt_text", folder, OPTIONS), free_address()
    distributed = ("--distributed.coordinator", address, "--distributed.processes", 2)

    def start(patience=60):
        started, common = [], ("--workdir", "run", *distributed, "--distributed.patience", patience)
        for index in range(2):
            process = program.start("all", *common, "--distributed.index", index)
            started.append(stack.enter_context(process))
            stack.callback(started[-1].kill)
        return Both(folder, started)

    with contextlib.ExitStack() as stack:
        yield start


def kill(process):
    process.kill()


def fail(process):
    """Lets it write to no file any more, as where a disk is full."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))


def stand_still(process):
    process.send_signal(signal.SIGSTOP)


SAID = {
    kill: "process {} of 2 was killed, or crashed; go on from the last checkpoint",
    fail: "process {} of 2 ended with exit code 1; go on from the last checkpoint",
    stand_still: "process {} of 2 has been silent for 4 s; go on from the last checkpoint",
}
QUICK = (("sampling", kill, 1), ("evaluation", fail, 0))
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(("sampling", "what is between", "evaluation"), SAID, (0, 1))
]


@pytest.mark.parametrize(("phase", "fault", "victim"), CASES)
def test_the_other_ends_and_the_next_start_goes_on(
    start_both, finished, folder, phase, fault, victim
):
    both = start_both(*([4] if fault is stand_still else []))
    if phase == "sampling":
        both.wait_for(lambda: len(both.parts()) > 3)
    else:
        both.wait_for(both.samples.exists)
    if phase == "evaluation":
        both.wait_for(lambda: len(both.parts()) > 2 * SHARE + 3)
    fault(both.processes[victim])
    began, other = time.monotonic(), both.processes[1 - victim]
    _, stderr = other.communicate(60)
    assert time.monotonic() - began < 30  # it is 7 s at the most
    assert other.returncode == 1
    assert_one_line(stderr, SAID[fault].format(victim), "experiments.gpt_text all --workdir run")
    if fault is stand_still:
        both.processes[victim].send_signal(signal.SIGCONT)
    _, stderr = both.processes[victim].communicate(60)
    assert both.processes[victim].returncode == (-signal.SIGKILL if fault is kill else 1)
    if fault is not kill:
        assert_one_line(stderr)

    assert len(both.parts()) > 3
    assert both.samples.exists() == (phase != "sampling")
    alone = ForkedExperiment("gpt_text", folder, OPTIONS).run("all", "--workdir", "run")
    assert alone.returncode == 0, alone.stderr
    assert_same_results(folder / "run", finished / "run")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_for_all_ends_those_that_wait_for_others(start_both, signum, code):
    """Process 1 stands still, and process 0 has drawn its share."""
    both = start_both()
    both.wait_for(lambda: len(both.parts()) > 3)
    both.processes[1].send_signal(signal.SIGSTOP)
    share = f"{SHARE - 1:012d}-{SHARE:012d}.npz"
    both.wait_for(lambda: any(path.name == share for path in both.parts()))
    time.sleep(0.3)
    for process in both.processes:
        process.send_signal(signum)
    began = time.monotonic()
    _, stderr = both.processes[0].communicate(60)
    assert time.monotonic() - began < 30  # before the watch would have ended it
    message, command = stderr.splitlines()
    assert message == f"stopped by {signum.name} in the phase sample. Go on with:"
    assert command.startswith("  python -m experiments.gpt_text all --workdir run ")
    both.processes[1].send_signal(signal.SIGCONT)
    both.ends()
    assert [process.returncode for process in both.processes] == [code, code]
