import dataclasses
import json
import shutil

import numpy as np
import pytest

from experiments.masked_text import EXPERIMENT
from gen_jax import cli
from gen_jax.data import TextConfig, tokenizers
from gen_jax.models.masked.config import AbsorbingDiffusionOptions
from gen_jax.nn.config import TransformerConfig
from gen_jax.tasks import text_files
from gen_jax.tasks.masked_text.config import (
    EvaluateConfig,
    MaskedTextConfig,
    MaskedTextSampleConfig,
)
from miniature import TRAIN
from refusals import refused_in

pytestmark = pytest.mark.usefixtures("one_device")

# The least that the experiment can be asked for.
MINUTE = MaskedTextConfig(
    workdir="",
    data=TextConfig(characters=4000),
    model=TransformerConfig(context=16, layers=1, width=16, heads=2, causal=False, extra_inputs=1),
    train=dataclasses.replace(TRAIN, preview=3),
    sample=MaskedTextSampleConfig(number=3, micro_batch=4),
    sampler=AbsorbingDiffusionOptions(rounds=5),
    evaluate=EvaluateConfig(tokens=100, draws=2, batch=8),
)
MINIATURE = dataclasses.replace(EXPERIMENT, presets={"minute": MINUTE})


def main(*argv):
    return cli.main(MINIATURE, [str(item) for item in argv])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device):
    """The work directory of the command `all`."""
    path = tmp_path_factory.mktemp("masked text") / "my run"
    assert main("--workdir", path) == 0
    return path


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "a copy")


def tokens_of(workdir):
    with np.load(workdir / "samples.npz") as file:
        return file["tokens"]


def test_the_command_all_leaves_everything(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.json",
        "model",
        "previews",
        "samples.npz",
        "samples.txt",
        "summary.json",
        "tokenizer.json",
        "trajectory.txt",
    }
    report = json.loads((finished / "summary.json").read_text())
    assert report["nfe"] == 5
    assert report["test_tokens"] == 96  # six whole windows
    wanted = {"nats_per_token", "perplexity", "bits_per_character", "known_words", "distinct_2"}
    assert wanted <= report.keys()
    assert list(EXPERIMENT.commands) == ["all", "train", "sample", "evaluate", "complete"]


def test_the_last_preview_is_what_is_sampled(finished):
    preview = finished / "previews" / "00000002.txt"
    assert preview.read_bytes() == (finished / "samples.txt").read_bytes()


def test_the_samples_are_written_as_text_and_as_tokens(finished):
    tokenizer, tokens = tokenizers.load(finished / "tokenizer.json"), tokens_of(finished)
    assert tokens.shape == (3, 16)
    whole = (finished / "samples.txt").read_text()
    for number, row in enumerate(tokens):
        assert f"{text_files.title(number)}\n{tokenizer.decode(row)}\n" in whole
    rounds = (finished / "trajectory.txt").read_text()
    assert rounds.endswith(f"after round 5 of 5\n{tokenizer.decode(tokens[0])}\n")
    assert text_files.HIDDEN in rounds


@pytest.mark.parametrize("name", ["mask_predict", "maskgit"])
def test_samplers_in_rounds_begin_with_the_prompt(copy, name):
    alone = ("--sample.number", 1) if name == "mask_predict" else ()
    options = ("--sampler", name, "--sampler.rounds", 3, "--sample.prompt", "The ", *alone)
    assert main("sample", "--workdir", copy, *options, "--sample.tokens", 9) == 0
    tokenizer, tokens = tokenizers.load(copy / "tokenizer.json"), tokens_of(copy)
    assert tokens.shape == (1 if alone else 3, 9)
    assert all(tokenizer.decode(row).startswith("The ") for row in tokens)


def test_holes_are_filled(copy, capsys):
    capsys.readouterr()
    template = "A *** in**"
    options = ("--complete.text", template, "--complete.hole", "*", "--complete.fills", 3)
    assert main("complete", "--workdir", copy, *options) == 0
    assert "error" not in capsys.readouterr().err
    given, rest = (copy / "completed.txt").read_text().split("\n", 1)
    assert given == f"given      {template}"
    fills = rest.removeprefix("completed  ").removesuffix("\n").split("\ncompleted  ")
    assert len(fills) == 3
    for fill in fills:
        assert len(fill) == len(template)
        assert all(hole in ("*", letter) for hole, letter in zip(template, fill, strict=True))


REFUSED_TEMPLATES = [
    ("", "give a text with holes as --complete.text"),
    ("A dog", "give a text with holes as --complete.text"),
    ("A \u2603 ___", "complete.text: 1 characters of the text are not in the vocabulary"),
    ("_" * 17, "complete.text has 17 tokens, the model at most 16"),
]


@pytest.mark.parametrize(("template", "message"), REFUSED_TEMPLATES)
def test_templates_that_cannot_be_filled(copy, capsys, template, message):
    capsys.readouterr()
    assert main("complete", "--workdir", copy, "--complete.text", template) == 2
    assert message in refused_in(capsys)


def test_another_text_is_refused(copy, capsys):
    capsys.readouterr()
    options = ("--data.characters", 3000, "--train.steps", 4)
    assert main("train", "--workdir", copy, *options) == 2
    assert "data.characters: 4000 -> 3000" in capsys.readouterr().err


def test_masks_are_shown():
    tokenizer = tokenizers.Chars("abc")
    shown = text_files.decode_with_masks(tokenizer, np.array([0, 3, 3, 1, 3], np.int32), 3)
    assert shown == "a\u2591\u2591b\u2591"
    assert text_files.from_first_word("ing it, all") == " it, all"
    assert text_files.from_first_word(" it") == " it"


REFUSED = [
    ("--sampler mask_predict", "Mask-Predict finds one text, always the same"),
    ("--model.causal", "set model.causal to false and model.extra_inputs to 1"),
    ("--model.extra-inputs 2", "set model.causal to false and model.extra_inputs to 1"),
    ("--sample.tokens 17", "sample.tokens (17) must be at most model.context (16)"),
    ("--sample.tokens 4 --sample.prompt abcd", "sample.prompt has 4 tokens; a sample has 4"),
    ("--evaluate.tokens 9", "the test split has 9 tokens, fewer than model.context, 16"),
    ("--complete.hole __", "complete.hole must be one character, got '__'"),
    ("complete", "train one first, or give its --workdir"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_bad_input_is_refused_in_one_line(tmp_path, capsys, line, message):
    assert main(*line.split(), "--workdir", tmp_path / "run") == 2
    assert message in refused_in(capsys)
    assert not (tmp_path / "run").exists()
