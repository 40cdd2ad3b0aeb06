import contextlib
import gc
import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

import experiments
from gen_jax import cli, signals

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def forever():
    """Something that goes on in Python."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        time.sleep(0.01)
    raise AssertionError("nothing stopped it")


@pytest.mark.parametrize("signum", CODES)
def test_a_signal_stops_a_program_where_it_is(signum, capsys):
    before = signal.signal(signum, signal.default_int_handler)  # a shell may ignore SIGHUP

    def run():
        signal.raise_signal(signum)
        forever()

    try:
        assert cli.guarded(run, "python -m one 'a b'") == CODES[signum]
        assert signal.getsignal(signum) is signal.default_int_handler
    finally:
        signal.signal(signum, before)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"stopped by {signal.Signals(signum).name}. Go on with:",
        "  python -m one 'a b'",
    ]


def test_a_block_is_finished_first(capfd):
    done = []

    def run():
        with signals.finishing("the outer block"):
            with signals.finishing("what must be whole"):
                signal.raise_signal(signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("after")

    assert cli.guarded(run) == 143
    assert done == ["inner", "outer"]
    said = "SIGTERM: finishing what must be whole; once more to stop at once"
    assert capfd.readouterr().err.splitlines() == ["", said, "stopped by SIGTERM"]


def test_an_error_inside_of_a_block_passes():
    def divide():
        with signals.finishing("the division"):
            signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        divide()
    with signals.finishing("the next one") as block:
        pass
    assert block.signum is None, "the signal before is forgotten"


def test_a_signal_that_a_callback_swallows_comes_again(capsys):
    def callback(phase, _info):
        if phase == "start":
            gc.callbacks.remove(callback)
            signal.raise_signal(signal.SIGINT)

    def run():
        gc.callbacks.append(callback)
        gc.collect()
        forever()

    hook = sys.unraisablehook
    try:
        assert cli.guarded(run) == 130
    finally:
        sys.unraisablehook = hook
    assert capsys.readouterr().err.splitlines() == ["stopped by SIGINT"]


def test_a_signal_that_somebody_catches_comes_again_before_work(capsys):
    def run():
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        with signals.finishing("what is not begun"):
            raise AssertionError("it began")

    assert cli.guarded(run) == 130


@pytest.fixture
def heard():
    """Processes hear SIGINT, also those of tests which a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["module", "callback"])
def test_a_signal_while_modules_are_imported_ends_the_process(tmp_path, heard, where):
    """In the place of a package that takes time comes one that signals."""
    kill = "os.kill(os.getpid(), signal.SIGINT)"
    lines = {
        "module": ["try:", f"    {kill}; time.sleep(9)", "except: pass"],
        "callback": [f"gc.callbacks.append(lambda *_: ({kill}, time.sleep(9)))", "gc.collect()"],
    }
    source = "\n".join(["import gc, os, signal, time", *lines[where], "print('imported')"])
    (tmp_path / "tyro.py").write_text(source)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "experiments.ddpm_cifar", "--help"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by SIGINT\n")


def test_importing_experiments_leaves_signals_alone():
    before = [signal.getsignal(signum) for signum in CODES]
    importlib.reload(experiments)
    assert [signal.getsignal(signum) for signum in CODES] == before
