import subprocess
import sys

import pytest

from annotations import unchecked_annotations
from gen_jax.data import DataConfig, load


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "imagenet"}, "name must be one of 'shapes', 'cifar10', 'folder', 'tfds', got"),
        ({"size": 20}, "16 or 32"),
        ({"name": "folder", "dir": "x", "size": 0}, "at least 1"),
        ({"name": "cifar10", "palette": True}, "shapes only"),
        ({"name": "folder"}, "needs --data.dir"),
        ({"name": "tfds", "tfds_name": ""}, "needs --data.tfds-name"),
    ],
)
@unchecked_annotations()
def test_a_bad_configuration_is_one_clear_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        DataConfig(**fields)
    assert "\n" not in str(caught.value)


def test_the_defaults_need_no_download():
    assert len(load(DataConfig(), "train")) == 648


@unchecked_annotations()
def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train or test"):
        load(DataConfig(), "validation")


def test_importing_the_data_room_is_light():
    heavy = ("jax", "PIL", "tensorflow_datasets", "tensorflow", "requests")
    code = f"import gen_jax.data, sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_importing_the_configuration_needs_no_numpy():
    heavy = ("numpy", "jax")
    code = f"import gen_jax.data.config, sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
