import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from PIL import Image

from experiments import ddpm_cifar
from gen_jax import cli, memory
from gen_jax.data import DataConfig, cifar10, load, tfds_source
from refusals import refused_in

PER_FILE = 4


def make_archive(path):
    """The layout of the official archive with a few records per file."""
    path.parent.mkdir(parents=True)
    generator = np.random.default_rng(0)
    contents = {}
    for name in cifar10.TEST_FILES + cifar10.TRAIN_FILES:
        table = generator.integers(0, 256, (PER_FILE, 3073), dtype=np.uint8)
        table[:, 0] %= 10
        contents[name] = table.tobytes()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return contents


def manual_file(root):
    return root / "downloads" / "manual" / "cifar-10-binary.tar.gz"


def read(root, split="train", name="cifar10"):
    return load(DataConfig(name="tfds", tfds_name=name, dir=str(root)), split)


def as_set(data):
    return {
        (bytes(image), int(label)) for image, label in zip(data.images, data.labels, strict=True)
    }


def test_the_archive_is_prepared_from_the_manual_folder(tmp_path, monkeypatch):
    contents = make_archive(manual_file(tmp_path))
    info = tfds.download.checksums.compute_url_info(manual_file(tmp_path))
    monkeypatch.setattr(tfds.download.checksums, "get_all_url_infos", lambda: {cifar10.URL: info})
    for split, names in (("train", cifar10.TRAIN_FILES), ("test", cifar10.TEST_FILES)):
        data = read(tmp_path, split)
        decoded = [cifar10.decode(contents[name], name) for name in names]
        expected = {
            (bytes(image), int(label))
            for images, labels in decoded
            for image, label in zip(images, labels, strict=True)
        }
        assert as_set(data) == expected
        assert data.images.shape == (PER_FILE * len(names), 32, 32, 3)
        assert data.label_names == cifar10.LABEL_NAMES

    manual_file(tmp_path).unlink()
    assert as_set(read(tmp_path, "test")) == expected
    stock = tfds.data_source("cifar10", split="test", data_dir=tmp_path, download=False)
    assert {bytes(example["image"]) for example in stock} == {image for image, _ in expected}


def test_an_archive_with_another_checksum_is_refused(tmp_path):
    make_archive(manual_file(tmp_path))
    with pytest.raises(ValueError, match=r"another checksum .*sha256 c4a38c50") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cifar10").glob("*/dataset_info.json"))


def test_an_archive_without_the_files_is_refused(tmp_path):
    path = tmp_path / "other.tar.gz"
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"holds no cifar-10-batches-bin/test_batch\.bin"):
        list(tfds_source._examples(path, "test_", cifar10.TEST_FILES))


def test_no_network_is_one_line_that_names_the_ways_out(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise requests.exceptions.ConnectionError("no route\nto host")

    monkeypatch.setattr(requests, "head", unreachable)
    with pytest.raises(ConnectionError, match=r"--data\.name shapes") as caught:
        read(tmp_path)
    message = str(caught.value)
    assert cifar10.URL in message
    assert str(manual_file(tmp_path).parent) in message
    assert "\n" not in message
    assert caught.value.__suppress_context__


def test_any_other_set_is_read_through_its_data_source(tmp_path):
    with tfds.testing.mock_data(num_examples=6):
        data = read(tmp_path, name="mnist")
    assert data.images.shape == (6, 28, 28, 1)
    assert data.label_names == tuple("0123456789")


def test_sets_without_images_of_one_size_are_refused(tmp_path):
    with tfds.testing.mock_data(num_examples=6):
        with pytest.raises(ValueError, match="differ in size"):
            read(tmp_path, name="cats_vs_dogs")
        with pytest.raises(ValueError, match="no feature `image`"):
            read(tmp_path, name="imdb_reviews")


def test_sets_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tfds build mnist"):
        read(tmp_path, name="mnist")
    with pytest.raises(FileNotFoundError, match="knows no data set 'nothing_of_the_kind'"):
        read(tmp_path, name="nothing_of_the_kind")


@pytest.fixture
def prepared(tmp_path):
    """A set of four small images in a folder of its own, as TFDS leaves it."""

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "small"
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = None

        def _info(self):
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(2, 2, 3))})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                yield i, {"image": Image.fromarray(np.full((2, 2, 3), i, np.uint8))}

    builder = Small(data_dir=tmp_path / "data", file_format="array_record")
    builder.download_and_prepare()
    return tmp_path / "data"


def test_a_set_that_is_only_files_is_read(prepared):
    assert sorted(read(prepared, name="small").images[:, 0, 0, 0]) == [0, 1, 2, 3]


def test_records_of_a_set_that_are_larger_than_any_are_not_read(prepared):
    (path,) = prepared.rglob("dataset_info.json")
    os.truncate(path, 2**40)
    with pytest.raises(
        ValueError, match=r"dataset_info\.json has 1099511627776 bytes, and at most"
    ):
        read(prepared, name="small")


def test_images_that_memory_has_no_room_for_are_not_read(prepared, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 47.0)
    with pytest.raises(
        ValueError, match="of the TFDS data set small take 48 bytes, and 47 bytes of"
    ):
        read(prepared, name="small")


def test_a_feature_of_another_package_is_one_line_of_a_command(prepared, tmp_path, capsys):
    (path,) = prepared.rglob("features.json")
    path.write_text(path.read_text().replace("tensorflow_datasets.", "evil.", 1))
    options = ["--data.name", "tfds", "--data.tfds-name", "small", "--data.dir", str(prepared)]
    workdir = tmp_path / "run"
    argv = ["train", "--workdir", str(workdir), *options]
    assert cli.main(ddpm_cifar.EXPERIMENT, argv) == 2
    line = refused_in(capsys)
    assert f"features.json in {prepared / 'small'} has a feature of the class evil." in line
    assert not workdir.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_feature_of_another_package_is_not_imported(prepared, tmp_path, monkeypatch, legacy):
    """Which TFDS would do, from the current directory too."""
    (tmp_path / "evil.py").write_text("raise SystemExit('it was run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (path,) = prepared.rglob("features.json")
    stored = json.loads(path.read_text())
    inner = stored["featuresDict"]["features"]["image"]
    if legacy:
        stored = {"type": "evil.Feature", "content": {}}
    else:
        inner["pythonClassName"] = "evil.Feature"
    path.write_text(json.dumps(stored))
    before = tfds.features.FeatureConnector.__dict__["cls_from_name"]
    with pytest.raises(
        ValueError, match=r"a feature of the class evil\.Feature, whose mod"
    ) as caught:
        read(prepared, name="small")
    assert "\n" not in str(caught.value)
    assert "evil" not in sys.modules
    assert tfds.features.FeatureConnector.__dict__["cls_from_name"] is before


def test_tensorflow_is_never_imported(tmp_path):
    make_archive(manual_file(tmp_path))
    code = f"""
import json, sys
import tensorflow_datasets as tfds
from gen_jax.data import DataConfig, cifar10, load
info = tfds.download.checksums.compute_url_info({str(manual_file(tmp_path))!r})
tfds.download.checksums.get_all_url_infos = lambda: {{cifar10.URL: info}}
shape = load(DataConfig(name="tfds", dir={str(tmp_path)!r}), "test").images.shape
print(json.dumps([shape, "tensorflow" in sys.modules, "jax" in sys.modules]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [[PER_FILE, 32, 32, 3], False, False]
