import dataclasses
import shutil
import signal

import numpy as np
import pytest

from experiments.benchmarks import translation as benchmark
from experiments.nar_translation import EXPERIMENT
from gen_jax import cli
from gen_jax.data import tokenizers
from gen_jax.data.config import TranslationConfig
from gen_jax.data.synonyms import Synonyms
from gen_jax.models.masked.config import MaskPredictOptions
from gen_jax.nn.config import TransformerConfig
from gen_jax.parts import Parts
from gen_jax.tasks.translation.config import (
    EvaluateConfig,
    TranslationRunConfig,
    TranslationSampleConfig,
)
from miniature import TRAIN, summary
from refusals import refused_in

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.long]

# The least that the experiment can be asked for on eight devices.
MINUTE = TranslationRunConfig(
    workdir="",
    data=TranslationConfig(pairs=40, max_length=12, max_words=3),
    model=TransformerConfig(layers=1, width=16, heads=2, mlp_dim=16),
    encoder_layers=1,
    train=TRAIN,
    sample=TranslationSampleConfig(number=5, micro_batch=8, lengths=2),
    sampler=MaskPredictOptions(rounds=2),
    evaluate=EvaluateConfig(batch=1000),
)
USUAL = ("--sampler", "usual")
MINIATURE = dataclasses.replace(EXPERIMENT, presets={"minute": MINUTE})


def main(*argv):
    return cli.main(MINIATURE, [str(item) for item in argv])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_device):
    """A folder with the runs "masked" and "ar"."""
    path = tmp_path_factory.mktemp("translation") / "my runs"
    path.mkdir()
    assert main("--workdir", path / "masked") == 0
    assert main("--workdir", path / "ar", "--strategy", "ar", *USUAL) == 0
    return path


def test_the_command_all_leaves_everything(runs):
    names = {path.name for path in (runs / "masked").iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.json",
        "model",
        "previews",
        "samples.npz",
        "summary.json",
        "tokenizer.json",
        "translations.txt",
    }
    wanted = {
        "exact_accuracy",
        "one_shot_valid_mass",
        "repeated_token_rate",
        "length_exact",
        "nfe",
        "nats_per_pair",
        "conditional_total_correlation_left",
        "nats_per_token",
        "length_loss",
        "pairs_per_second",
        "sampling_latency_seconds",
    }
    assert wanted <= summary(runs / "masked").keys()
    assert summary(runs / "masked")["nfe"] == 2
    commands = ["all", "train", "sample", "evaluate", "distill", "complete"]
    assert list(EXPERIMENT.commands) == commands


def test_the_last_preview_is_what_is_sampled(runs):
    preview = runs / "masked" / "previews" / "00000002.txt"
    assert preview.read_bytes() == (runs / "masked" / "translations.txt").read_bytes()


@pytest.mark.parametrize("name", ["masked", "ar"])
def test_the_translations_are_those_of_the_samples(runs, name):
    tokenizer = tokenizers.load(runs / name / "tokenizer.json")
    with np.load(runs / name / "samples.npz") as file:
        tokens = file["tokens"]
    sources, _ = Synonyms.of(MINUTE.data).pairs("test", 5)
    lines = (runs / name / "translations.txt").read_text().splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("source")] == sources
    found = [line[len("translation ") :] for line in lines if line.startswith("translation")]
    for line, row in zip(found, tokens, strict=True):
        ends = np.flatnonzero(row == tokenizer.eos)
        row = row[: ends[0]] if len(ends) else row
        assert line.split() == tokenizer.decode(row[row != 0]).split()


def test_an_evaluation_that_was_stopped_goes_on(runs, tmp_path, capsys, monkeypatch):
    copy, keep, names = shutil.copytree(runs / "masked", tmp_path / "copy"), Parts.keep, []
    options = ("evaluate", "--workdir", copy, "--evaluate.batch", 500)  # of 1,000 pairs

    def stop(self, name, *others):
        names.append(name)
        if len(names) == 3:
            signal.raise_signal(signal.SIGTERM)
        keep(self, name, *others)

    monkeypatch.setattr(Parts, "keep", stop)
    assert main(*options) == 143
    assert main(*options) == 0
    of = [f"{call}-{row:012d}" for call in ("001", "002") for row in (0, 500)]
    assert names == [*of, "003"], "batches of losses and of bounds, and figures: each once"
    found, whole = summary(copy), summary(runs / "masked")
    for name in ("nats_per_token", "nats_per_pair", "exact_accuracy", "conditional_entropy"):
        assert found[name] == pytest.approx(whole[name], rel=1e-5)
    assert not (copy / "parts").exists()
    capsys.readouterr()


def test_a_masked_model_is_decoded_in_other_ways(runs, tmp_path):
    copy = shutil.copytree(runs / "masked", tmp_path / "copy")
    options = ("--sampler", "absorbing", "--sampler.rounds", 3, "--sampler.schedule", "cosine")
    assert main("sample", "--workdir", copy, *options) == 0
    assert summary(copy)["nfe"] == 3
    assert summary(copy)["samples"] == 5


_LATENT = ["--strategy", "one_shot", "--latent.kind", "gaussian", "--no-copies"]


@pytest.mark.parametrize(
    "options", [["--strategy", "ctc"], pytest.param(_LATENT, marks=pytest.mark.slow)]
)
def test_other_strategies_run(tmp_path, options):
    assert main("--workdir", tmp_path / "run", *options, *USUAL) == 0
    report = summary(tmp_path / "run")
    assert report["nfe"] == (2 if "gaussian" in options else 1)
    assert np.isfinite(report["nats_per_token"])
    assert 0 <= report["exact_accuracy"] <= 1


def test_a_student_learns_from_the_translations_of_a_teacher(runs, tmp_path, capsys):
    teacher = shutil.copytree(runs / "ar", tmp_path / "teacher")
    assert main("distill", "--workdir", teacher) == 0
    targets = teacher / "distilled.txt"
    assert len(targets.read_text().split("\n")) == MINUTE.data.pairs + 1
    student = tmp_path / "student"
    options = ["--strategy", "one_shot", "--data.targets", targets, *USUAL]
    assert main("train", "--workdir", student, *options) == 0
    targets.write_text("s1\n" * 3)
    assert main("train", "--workdir", student) == 2
    assert "3 lines for 40 training pairs" in capsys.readouterr().err


def test_holes_are_filled_and_prefixes_are_gone_on_from(runs, tmp_path, capsys):
    copy = shutil.copytree(runs / "masked", tmp_path / "copy")
    source = ["--workdir", copy, "--complete.source", "s1 s2 s3"]
    for template in ("i1 _ f3", "t0 u0 i1..."):
        assert main("complete", *source, "--complete.target", template) == 0
        text = (copy / "completed.txt").read_text()
        lines = dict(line.split(maxsplit=1) for line in text.splitlines() if line.strip())
        assert lines["source"] == "s1 s2 s3"
        assert lines["given"] == template
        assert text in capsys.readouterr().out
        words = lines.get("translation", "").split()
        kept = template.removesuffix("...").split()
        # A model that knows nothing may end a sentence anywhere in a hole; what is left is ours.
        assert len(words) == len(kept) or template.endswith("...") or len(words) == 1
        for word, given in zip(words, kept, strict=False):
            assert given in ("_", word)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("masked", [], "give the sentence to translate as --complete.source"),
        ("ar", ["--complete.source", "s1"], "complete is for masked models"),
        ("masked", ["--complete.source", "what"], "not in the vocabulary: 'what'"),
        ("masked", ["--complete.source", "s1", "--complete.target", "t?"], "not in the vocab"),
        (
            "masked",
            ["--complete.source", "s1", "--complete.target", "_" * 12],
            "complete.target has 13 tokens, the model at most 12",
        ),
    ],
)
def test_what_cannot_be_completed_is_one_line(runs, capsys, name, options, message):
    strategy = ["--strategy", "ar", *USUAL] if name == "ar" else []
    assert main("complete", "--workdir", runs / name, *strategy, *options) == 2
    assert message in capsys.readouterr().err


def test_files_are_translated_with_byte_pairs_and_bleu(tmp_path):
    folder = tmp_path / "pairs of files"
    folder.mkdir()
    for split in ("train", "val", "test_2016_flickr"):
        for language, word in (("en", "the cat"), ("de", "die Katze")):
            lines = [f"{word} {number}" for number in range(12)]
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n")
    options = ["--data.name", "files", "--data.dir", folder, "--data.pairs", 0]
    options += ["--data.vocabulary", 280, "--strategy", "one_shot", "--data.max-length", 16, *USUAL]
    assert main("--workdir", tmp_path / "run", *options) == 0
    report = summary(tmp_path / "run")
    assert 0 <= report["bleu"] <= 100
    assert report["bleu_signature"].startswith("nrefs:1")


def test_the_benchmark_times_the_runs_against_the_autoregressive_one(runs, capsys):
    config = benchmark.Config(
        runs=(str(runs / "masked"), str(runs / "ar")),
        rounds=(1, 2),
        lengths=(1,),
        batches=(256,),
        alone=3,
        repeats=1,
        same=0.6,
    )
    rows = benchmark.measure(config)
    names = ["ar", "masked, 1 rounds, 1 lengths", "masked, 2 rounds, 1 lengths"]
    assert [row["run"] for row in rows] == names
    assert rows[0]["latency_ratio"] == rows[0]["throughput_ratio"] == 1
    assert [row["nfe"] for row in rows[1:]] == [1, 2]
    assert all(row["latency_ms"] > 0 and 0 <= row["bleu"] <= 100 for row in rows)
    with pytest.raises(ValueError, match="none of the runs is autoregressive"):
        benchmark.sides(dataclasses.replace(config, runs=config.runs[:1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampler.rounds", 0], "rounds must be at least 1"),
        (["--sampler.rounds", 13], "more than the positions of a target: at most data.max_length"),
        (["--sample.lengths", 13], "more than the table of lengths has"),
        (["--latent.kind", "gaussian"], "latent.kind is for --strategy one_shot"),
        (
            ["--strategy", "ar", "--sampler", "sample", "--sampler.weights", "int8"],
            "weights in int8 are for models without a source",
        ),
        (["--smoothing", 1], "smoothing must be in"),
        (["--model.vocabulary", 5], "leave them as they are"),
        (["--pretrained", "gpt2"], "unknown option --pretrained"),
        (["--data.orders", 3], "orders"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, options, message):
    assert main("--workdir", tmp_path / "run", *options) == 2
    assert message in refused_in(capsys)
    assert not (tmp_path / "run").exists()


def test_another_vocabulary_than_that_of_the_checkpoint_is_refused(runs, tmp_path, capsys):
    copy = shutil.copytree(runs / "masked", tmp_path / "copy")
    path = copy / "tokenizer.json"
    content = path.read_text().replace('"s1"', '"?"').replace('"s2"', '"s1"').replace('"?"', '"s2"')
    path.write_text(content)
    assert main("sample", "--workdir", copy) == 2
    assert "is not the tokenizer that the checkpoint was trained with" in capsys.readouterr().err
