import os
import shlex
import signal
import subprocess
import time

import pytest
from processes import (
    assert_same_leaves,
    next_error_line,
    read_leaves,
    records,
    saved_steps,
    wait_until,
)

pytestmark = pytest.mark.long

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
OPTIONS = ("--train.steps", 150, "--train.checkpoint-every", 50)


def test_a_signal_saves_and_the_command_it_prints_goes_on(experiment, folder):
    """SIGINT is sent to the toy below."""
    signum, workdir = signal.SIGTERM, folder / "my run"
    whole = experiment.run("train", "--workdir", "whole", *OPTIONS)
    assert whole.returncode == 0, whole.stderr
    with experiment.start("train", "--workdir", workdir, *OPTIONS) as process:
        wait_until(lambda: records(workdir), process)
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == CODES[signum], stderr
    (step,) = saved_steps(workdir)[-1:]
    assert 0 < step < 150
    assert f"{signum.name}: finishing the step and saving; once more to stop at once" in stderr
    message, command = stderr.splitlines()[-2:]
    assert message == f"stopped by {signum.name} after step {step}, which is saved. Go on with:"

    python, *arguments = shlex.split(command)
    assert python == "python"
    resumed = subprocess.run(
        [experiment.command()[0], *arguments],
        cwd=folder,
        env=experiment.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert saved_steps(workdir)[-1] == 150
    assert_same_leaves(read_leaves(workdir), read_leaves(folder / "whole"))


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(toy, folder, second):
    options = ("--train.checkpoint-every", 3, "--block-at", 5)
    with toy.start("--workdir", "run", *options) as process:
        wait_until(lambda: saved_steps(folder / "run") == [3], process)
        time.sleep(0.5)  # until it waits for the batch of step 5
        process.send_signal(signal.SIGTERM)
        next_error_line(process, "SIGTERM: finishing the step and saving")
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(second)
        process.communicate(timeout=30)
    assert time.monotonic() - began < 2
    assert process.returncode == CODES[second]
    assert saved_steps(folder / "run") == [3]
    resumed = toy.run("--workdir", "run", "--block-at", -1)
    assert resumed.returncode == 0, resumed.stderr
    assert saved_steps(folder / "run")[-1] == 12


def test_a_hangup_saves_too(toy, folder):
    """As where the connection to the machine is lost."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        pytest.skip("these tests run under nohup, which their processes inherit")
    options = ("--workdir", "run", "--train.steps", 999, "--pause", 0.05)
    with toy.start(*options) as process:
        wait_until(lambda: records(folder / "run"), process)
        process.send_signal(signal.SIGHUP)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGHUP, stderr
    assert "stopped by SIGHUP" in stderr
    assert saved_steps(folder / "run")


@pytest.mark.parametrize("kind", ["closed", "full", "broken pipe"])
def test_messages_that_nobody_reads_stop_nothing(toy, folder, kind):
    options = ("--train.steps", 9999, "--train.checkpoint-every", 9999, "--pause", 0.02)
    command = toy.command("--workdir", "run", *options)
    if kind == "closed":
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
        stream = os.open(os.devnull, os.O_WRONLY)
    elif kind == "full":
        stream = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stream = os.pipe()
        os.close(reader)
    started = subprocess.Popen(command, cwd=folder, env=toy.environment, stderr=stream)
    os.close(stream)
    with started as process:
        wait_until(lambda: len(records(folder / "run")) > 5, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    (step,) = saved_steps(folder / "run")
    assert 5 < step == records(folder / "run")[-1]["step"]


def test_ctrl_c_reaches_the_whole_group_and_leaves_nothing_behind(toy, folder):
    with toy.start("--workdir", "run", "--pause", 0.05, start_new_session=True) as process:
        wait_until(lambda: records(folder / "run"), process)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
