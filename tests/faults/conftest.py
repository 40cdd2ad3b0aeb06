import processes
import pytest


@pytest.fixture
def folder(tmp_path):
    """Where processes run; its name has a space."""
    path = tmp_path / "a folder"
    path.mkdir()
    return path


@pytest.fixture
def toy(folder):
    return processes.Toy(folder)


@pytest.fixture
def experiment(folder):
    return processes.experiment(folder)


@pytest.fixture
def preset(folder):
    """The experiment as it is without options, for what is refused before it starts."""
    return processes.experiment(folder, "")
