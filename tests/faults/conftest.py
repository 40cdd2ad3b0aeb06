import processes
import pytest


@pytest.fixture
def folder(tmp_path):
    """Where processes run; its name has a space."""
    path = tmp_path / "a folder"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Programs compiled by one process for the next."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def toy(folder, compiled):
    return processes.toy(folder, compiled)


@pytest.fixture
def experiment(folder, compiled):
    return processes.experiment(folder, compiled)


@pytest.fixture
def preset(folder, compiled):
    """The experiment as it is without options, for what is refused before it starts."""
    return processes.experiment(folder, compiled, "")
