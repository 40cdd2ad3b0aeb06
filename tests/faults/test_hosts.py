import contextlib
import signal
import sys
import time

import pytest
from processes import (
    Forked,
    assert_one_line,
    free_address,
    next_error_line,
    records,
    saved_steps,
    wait_until,
)

pytestmark = pytest.mark.long

TRAINING = ("--train.steps", 9999, "--train.checkpoint-every", 10, "--pause", 0.01)


@pytest.fixture
def join(toy):
    """Starts a process of a run, of two by default."""
    address = free_address()

    def start(index, *options, processes=2):
        options = ("--workdir", "run", "--distributed.index", index, *options)
        distributed = ("--distributed.coordinator", address, "--distributed.processes", processes)
        process = stack.enter_context(toy.start(*options, *distributed))
        stack.callback(process.kill)
        return process

    with contextlib.ExitStack() as stack:
        yield start


def end(process, seconds=60):
    """What it says on standard error when it ends."""
    return process.communicate(seconds)[1]


@pytest.mark.parametrize("victim", [0, 1])
def test_all_end_when_one_is_killed(join, toy, folder, victim):
    both = [join(index, *TRAINING) for index in range(2)]
    # The first save is over; one that a death cuts short is none.
    wait_until(lambda: len(saved_steps(folder / "run")) > 1, both[0])
    both[victim].kill()
    began = time.monotonic()
    stderr = end(both[1 - victim])
    assert time.monotonic() - began < 10  # it is a tenth of a second
    assert both[1 - victim].returncode == 1
    assert_one_line(stderr, f"process {victim} of 2 was killed", "python toy.py --workdir run")

    (*_, last) = saved_steps(folder / "run")
    alone = toy.run("--workdir", "run", "--train.steps", last + 2, "--train.checkpoint-every", 10)
    assert alone.returncode == 0, alone.stderr
    assert [record["step"] for record in records(folder / "run")] == list(range(1, last + 3))


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_all_end_when_one_is_silent(join, folder, victim):
    patience = ("--distributed.patience", 4)
    both = [join(index, *TRAINING, *patience) for index in range(2)]
    wait_until(lambda: saved_steps(folder / "run"), both[0])
    both[victim].send_signal(signal.SIGSTOP)
    stderr = end(both[1 - victim])
    assert both[1 - victim].returncode == 1
    assert_one_line(stderr, f"process {victim} of 2 has been silent for 4 s")
    both[victim].send_signal(signal.SIGCONT)
    stderr = end(both[victim])
    assert both[victim].returncode == 1
    assert_one_line(stderr, f"process {victim} of 2 (this one) has been silent for 4 s")


def test_all_end_when_one_fails(join, toy, folder):
    """Process 0 cannot have the work directory; process 1 waits for it meanwhile."""
    with toy.start("--workdir", "run", "--block-at", 0) as holder:
        wait_until((folder / "run" / "config.json").exists, holder)
        both = [join(index) for index in range(2)]
        stderrs = [end(process) for process in both]
        holder.kill()
        holder.communicate()
    assert [process.returncode for process in both] == [2, 1]
    assert_one_line(stderrs[0], f"(process {holder.pid})")
    assert_one_line(stderrs[1], "process 0 of 2 ended with exit code 2")


def test_the_wait_at_the_start_has_an_end(join):
    leader, follower = join(0), join(1, processes=3)
    assert_one_line(end(follower), "one of 2, not of 3", "--distributed.processes")
    assert follower.returncode == 2
    leader.send_signal(signal.SIGINT)
    assert end(leader) == "stopped by SIGINT\n"
    assert leader.returncode == 130

    for index, missing in ((0, 1), (1, 0)):
        alone = join(index, "--distributed.wait", 3)
        assert_one_line(end(alone), f"process {missing} of 2 did not come", "within 3 s")
        assert alone.returncode == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_second_signal_ends_the_wait_for_others(join, folder, victim):
    """Process 1 gets a batch for a minute, and process 0 waits for it meanwhile."""
    both = [join(index, "--block-at", 0 if index else -1) for index in range(2)]
    wait_until(lambda: (folder / "run" / "metrics.jsonl").exists(), both[0])
    time.sleep(0.5)  # until both are where they wait
    for process in both:
        process.send_signal(signal.SIGINT)
        next_error_line(process, "SIGINT: finishing the step and saving; once more to stop at once")
    both[victim].send_signal(signal.SIGINT)
    began = time.monotonic()
    stderrs = [end(process) for process in both]
    assert time.monotonic() - began < 10
    assert [process.returncode for process in both] == [130, 130]
    assert stderrs[victim] == ""
    assert stderrs[1 - victim].startswith(f"stopped by SIGINT, and process {victim} of 2 was kill")


def early_and_late(arguments):
    """Process 0 reads a checkpoint, and waits; process 1 comes when process 0 has given up."""
    index, address = arguments
    from gen_jax import checkpoint, cli, host_watch, hosts
    from gen_jax.config import DistributedConfig

    hosts._PATIENCE = host_watch._GRACE = 1

    def run():
        hosts.start(DistributedConfig(address, processes=2, index=int(index)), "begin anew")
        if index == "1":
            time.sleep(60)
        print("step", checkpoint.restore("run/checkpoints", {}).step, file=sys.stderr, flush=True)
        hosts.meet("the place where all meet")

    return cli.guarded(run)


def test_a_process_reads_by_itself_and_does_not_wait_forever(toy, folder):
    assert toy.run("--workdir", "run").returncode == 0
    address = free_address()
    with (
        Forked(early_and_late, ["0", address], folder) as early,
        Forked(early_and_late, ["1", address], folder) as late,
    ):
        both = early, late
        stderrs = [end(process) for process in both]
    line, error = stderrs[0].splitlines()
    assert line == "step 12"
    assert_one_line(error, "not all processes came within 1 s to: the place where all meet")
    assert_one_line(stderrs[1], "process 0 of 2 ended with exit code 1")
    assert [process.returncode for process in both] == [1, 1]
