import contextlib
import signal
import socket
import time

import pytest
from processes import assert_one_line, records, saved_steps, wait_until

TRAINING = ("--train.steps", 9999, "--train.checkpoint-every", 10, "--pause", 0.01)


@pytest.fixture
def join(toy):
    """Starts a process of a run, of two by default."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

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
