"""The examples of README.md and docs/api.md run as they stand, and docs name what there is."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.ddpm_cifar import EXPERIMENT
from gen_jax import cli, interop
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.nn.unet import UNetNetwork
from latent_pipeline import write_pipeline

ROOT = Path(__file__).parents[1]
SMALL = (
    "--model.widths 8 --model.groups 4 --model.attention --model.patch 8 --train.batch 8 "
    "--train.warmup 0 --train.steps 2 --train.decay constant --sampler.steps 4"
)
_BLOCK = re.compile(r"(?:<!-- (\w+): ([\w.]+) -->\n)?```(\w+)\n(.*?)```\n", re.S)


def blocks(page):
    """The code of a page: (what a comment before it says, its value, language, text)."""
    return _BLOCK.findall((ROOT / page).read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_device):
    """A directory with a run of the main job, as small as can be."""
    path = tmp_path_factory.mktemp("docs") / "a folder"
    path.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert cli.main(EXPERIMENT, ["train", *SMALL.split()]) == 0
    return path


@pytest.mark.long
def test_the_examples_of_the_api_run_as_they_stand(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    scope = {}
    for kind, value, language, text in blocks("docs/api.md"):
        if kind == "file":
            (folder / value).write_text(text)
        elif kind == "command":
            command = shlex.split(text.replace("\\\n", " "))
            assert command[:3] == ["python", "-m", "experiments.ddpm_cifar"]
            assert cli.main(EXPERIMENT, command[3:]) == 0
        else:
            assert language == "python"
            exec(compile(text, "docs/api.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "MaskGIT has no use for the condition 'label'" in printed
    assert "solver                    fading_ddim" in printed


def test_the_examples_of_the_readme_run_as_they_stand(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    unet = EXPERIMENT.presets["tiny"].model
    unet = dataclasses.replace(unet, widths=(8,), groups=4, attention=(), patch=1)
    network = UNetNetwork(unet)
    params = network.init(jax.random.key(0), 4, 4)
    interop.save_diffusers_unet(folder / "ddpm-cifar10-32", unet, params, sample_size=4)
    gpt2 = TransformerConfig(
        vocabulary=50_257, context=128, layers=1, width=8, heads=1, norm_epsilon=1e-5
    )
    params = TokenNetwork(gpt2).init(jax.random.key(0))
    interop.save_gpt2(folder / "gpt2", gpt2, params)
    write_pipeline(folder / "ldm-celebahq-256")
    scope, python = {}, 0
    for kind, _, language, text in blocks("README.md"):
        if language == "python" and kind != "file":
            exec(compile(text, "README.md", "exec"), scope)
            python += 1
    assert python == 5
    assert scope["images"].shape == (16, 16, 16, 3)
    assert scope["faces"].shape == (4, 8, 8, 3)
    assert scope["text"].shape == (2, 100)
    at_once, _, one_by_one = capsys.readouterr().out.splitlines()
    modes = {"0011", "1100"}
    assert at_once.startswith("1 rounds: ")
    assert set(at_once.split()[2:]) - modes
    assert set(one_by_one.split()[2:]) == modes


def test_a_sampler_with_its_choice_is_one_file_of_less_than_thirty_lines():
    (text,) = (text for kind, _, _, text in blocks("docs/api.md") if kind == "file")
    assert len(text.splitlines()) < 30


def test_importing_the_package_is_light():
    """Neither jax nor NumPy is loaded by gen_jax alone, nor jax by a configuration."""
    code = (
        "import sys, gen_jax; assert 'generate' in dir(gen_jax); "
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules); "
        "import experiments.nar_translation, experiments.multimodality; "
        "assert 'jax' not in sys.modules; "
        "from gen_jax import Condition; assert 'jax' in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_what_is_public_is_there():
    import gen_jax

    for name in gen_jax.__all__:
        assert getattr(gen_jax, name) is not None


def test_the_tests_that_prove_what_is_promised_are_there():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs/reliability.md").read_text())
    assert len(named) > 20
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), (file, name)


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/benchmarks.md"])
def test_the_commands_of_the_docs_name_modules_that_exist(page):
    names = re.findall(r"python -m ((?:experiments|kernels)[\w.]*\w)", (ROOT / page).read_text())
    assert names
    for name in set(names):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), name
