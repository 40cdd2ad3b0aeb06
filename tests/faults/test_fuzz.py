"""Whatever the arguments and the files: a result, or one line that says why not; never a traceback.

A case that fails is run again alone by its seed and number, which the message begins with.
"""

import fuzzing
import pytest

pytestmark = pytest.mark.long

SEED = 0


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    fuzzing.work_replaced(monkeypatch)
    fuzzing.nothing_run(monkeypatch)
    return fuzzing.Sandbox(tmp_path, monkeypatch)


@pytest.fixture
def damage(tmp_path, monkeypatch):
    fuzzing.work_replaced(monkeypatch)
    return fuzzing.Damage(tmp_path)


def assert_lawful(run, numbers):
    wrong = {number: said for number in numbers if (said := run(SEED, number))}
    assert not wrong, "\n\n".join(f"seed {SEED}, number {n}: {said}" for n, said in wrong.items())


def test_command_lines(sandbox):
    assert_lawful(sandbox.run, range(260))


def test_damaged_files(damage):
    assert_lawful(damage.run, range(40))


@pytest.mark.slow
def test_many_command_lines(sandbox):
    assert_lawful(sandbox.run, range(260, 2660))


@pytest.mark.slow
def test_many_damaged_files(damage):
    assert_lawful(damage.run, range(40, 640))
