"""What is around a run: directories, terminals, locales, networks."""

import contextlib
import os
import pty
import re
import shutil
import socket
import subprocess
import termios
import threading
import time
from pathlib import Path

import numpy as np
import processes
import pytest
from processes import assert_one_line, seconds_of_processes

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the command `all` without a terminal: (its folder, the process)."""
    folder = tmp_path_factory.mktemp("a trained run")
    experiment = processes.experiment(folder)
    done = experiment.run("--workdir", "my run", "--train.steps", 6)
    assert done.returncode == 0, done.stderr
    return folder / "my run", done


@pytest.fixture
def no_jax(folder):
    """The environment of a process in which importing jax ends it with code 99."""
    (folder / "fake" / "jax").mkdir(parents=True)
    (folder / "fake" / "jax" / "__init__.py").write_text("import os\nos._exit(99)\n")
    path = os.pathsep.join([str(folder / "fake"), str(processes.ROOT)])
    return os.environ | {"PYTHONPATH": path}


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("a file/run", "Not a directory"),
        ("a file", "File exists"),
        ("/proc/run", "No such file or directory"),
        ("x" * 300, "File name too long"),
        pytest.param(
            "read only/run",
            "Permission denied",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere"),
        ),
    ],
)
def test_an_impossible_work_directory_is_refused_before_jax(preset, folder, no_jax, place, reason):
    (folder / "a file").write_text("kept")
    (folder / "read only").mkdir(mode=0o500)
    began = seconds_of_processes()
    refused = preset.run("--workdir", place, env=no_jax)
    assert seconds_of_processes() - began < 2.5
    assert refused.returncode == 2
    assert_one_line(refused.stderr, "cannot write to the work directory", place, reason)
    assert refused.stdout == ""
    assert (folder / "a file").read_text() == "kept"
    assert sorted(path.name for path in folder.iterdir()) == ["a file", "fake", "read only"]


def test_the_fake_jax_would_be_noticed(preset, no_jax):
    """Otherwise the tests that use it could not fail."""
    assert preset.run("--workdir", "run", env=no_jax).returncode == 99


def test_a_platform_that_is_not_there_is_named(preset, folder):
    environment = preset.environment | {"JAX_PLATFORMS": "abacus"}
    refused = preset.run("train", "--workdir", "run", env=environment)
    assert refused.returncode == 2
    assert_one_line(refused.stderr, "jax finds no device of JAX_PLATFORMS=abacus", "leave it unset")
    assert not (folder / "run").exists()


@contextlib.contextmanager
def closed_port():
    """A local port that nobody listens on, and nobody else can take."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        yield unheard.getsockname()[1]


def test_without_a_network_the_way_out_is_named(preset, folder):
    with closed_port() as port:
        names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        proxies = dict.fromkeys(names, f"http://127.0.0.1:{port}")
        environment = preset.environment | proxies | {"no_proxy": "", "NO_PROXY": ""}
        options = ("--data.name", "tfds", "--data.dir", "my data", "--workdir", "run")
        began = time.monotonic()
        failed = preset.run(*options, env=environment)
    assert time.monotonic() - began < 30
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    *warnings, error = failed.stderr.splitlines()
    assert len(warnings) <= 1  # TFDS remarks that the set is not prepared
    assert_one_line(
        error,
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        folder / "my data" / "downloads" / "manual",
        "--data.name shapes",
    )


def test_without_a_terminal_there_is_no_bar(trained):
    _, done = trained
    assert done.stderr == ""
    assert "\r" not in done.stdout
    assert "%|" not in done.stdout


def test_on_a_terminal_bars_show_rate_and_time_left(experiment):
    screen, keyboard = pty.openpty()
    termios.tcsetwinsize(keyboard, (24, 120))
    written = bytearray()

    def read():
        with contextlib.suppress(OSError):  # how Linux reports that the other side is gone
            while data := os.read(screen, 4096):
                written.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), keyboard)
        done = experiment.run("--workdir", "run", "--train.steps", 6, **streams)
    finally:
        os.close(keyboard)
        reader.join()
        os.close(screen)
    text = written.decode()
    assert done.returncode == 0, text
    left = r"\[\d\d:\d\d<\d\d:\d\d, *[\d.]+"
    assert re.search(rf"training: *\d+%\|.*\| [1-6]/6 {left} ?(step/s|s/step)", text), text
    assert re.search(rf"sampling: *\d+%\|.*\| [1-3]/3 {left} ?(sample/s|s/sample)", text), text
    assert re.search(r"training:.*loss=\d+\.\d{4}", text), text


UTF8_OFF = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("locale", "name"), [({"LC_ALL": "C"}, "mein Lauf für α"), (UTF8_OFF, "my other run")]
)
def test_samples_are_the_same_in_any_locale_and_place(trained, experiment, folder, locale, name):
    source, _ = trained
    shutil.copytree(source, folder / name)
    done = experiment.run("sample", "--workdir", name, env=experiment.environment | locale)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    with (
        np.load(source / "samples.npz") as here,
        np.load(folder / name / "samples.npz") as there,
    ):
        assert here.files == there.files
        assert all(here[key].tobytes() == there[key].tobytes() for key in here.files)


def test_a_name_that_is_no_text_in_the_locale_is_refused(preset, folder, no_jax):
    refused = preset.run("--workdir", "für α", env=no_jax | UTF8_OFF)
    assert refused.returncode == 2
    assert_one_line(refused.stderr, "a folder/f", "not text in this locale", "PYTHONUTF8=1")
    assert not (folder / "für α").exists()


def test_help_needs_neither_jax_nor_a_locale(preset, no_jax):
    began = seconds_of_processes()
    done = preset.run("--help", env=no_jax | UTF8_OFF)
    assert seconds_of_processes() - began < 2.5
    assert done.returncode == 0, done.stderr
    assert "--train.steps" in done.stdout
    assert "--model.widths" in done.stdout


def test_a_home_directory_is_understood(preset, folder, no_jax):
    """As the shell does not expand it in --workdir=~/runs."""
    environment = no_jax | {"HOME": str(folder)}
    refused = preset.run("sample", "--workdir=~/runs", env=environment)
    assert refused.returncode == 2
    assert_one_line(refused.stderr, "no run in", folder / "runs")
    assert not Path(folder, "~").exists()
    assert not Path(folder, "runs").exists()


def test_a_reader_that_goes_away_does_not_undo_the_run(experiment, folder):
    """As in `python -m experiments.ddpm_cifar train | head -1`."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = experiment.run(
            "train", "--workdir", "run", "--train.steps", 2, stdout=write, stderr=subprocess.PIPE
        )
    finally:
        os.close(write)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "Broken pipe" in done.stderr
