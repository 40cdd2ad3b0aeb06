import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util

import gen_jax
from experiments.gpt_text import EXPERIMENT
from gen_jax import cli, interop
from gen_jax.data import TextConfig, load_text, tokenizers
from gen_jax.models.autoregressive import (
    AutoregressiveSampler,
    SamplingOptions,
    SpeculativeOptions,
    make_prompts,
)
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer import TokenNetwork
from gen_jax.tasks.text.config import EvaluateConfig, TextRunConfig, TextSampleConfig
from gen_jax.tasks.text_files import score
from miniature import TRAIN, summary
from random_networks import random_params
from refusals import refused_in

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.long]

# The least that the experiment can be asked for.
MINUTE = TextRunConfig(
    workdir="",
    data=TextConfig(characters=4000),
    model=TransformerConfig(context=16, layers=1, width=16, heads=2),
    train=dataclasses.replace(TRAIN, steps=4, preview=3),
    sample=TextSampleConfig(prompt="The ", number=3, tokens=24, micro_batch=8),
    evaluate=EvaluateConfig(tokens=100, batch=8),
)
MINIATURE = dataclasses.replace(EXPERIMENT, presets={"minute": MINUTE})


def main(*argv):
    return cli.main(MINIATURE, [str(item) for item in argv])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device):
    """The work directory of the command `all`."""
    path = tmp_path_factory.mktemp("text") / "my run"
    assert main("--workdir", path) == 0
    return path


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "a copy")


def samples(workdir):
    """The samples in samples.txt."""
    parts = text_run_split((workdir / "samples.txt").read_text())
    return [part[1:-1] for part in parts[1:]]


def text_run_split(whole):
    lines = [f"{'-' * 32} sample {number}" for number in range(10)]
    for line in lines:
        whole = whole.replace(line, "\0")
    return whole.split("\0")


def model_of(workdir):
    """The model and the averaged parameters of the last checkpoint."""
    loaded = gen_jax.load(workdir)
    return loaded.model, loaded.params


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
    }
    assert [path.name for path in finished.rglob(".*") if path.name != ".lock"] == []
    wanted = {
        "nats_per_token",
        "bits_per_character",
        "perplexity",
        "test_tokens",
        "known_words",
        "distinct_2",
        "nfe",
        "tokens_per_second",
        "sampled_tokens_per_second",
        "sampling_latency_seconds",
        "wall_seconds",
    }
    assert wanted <= summary(finished).keys()
    lines = [
        json.loads(line) for line in (finished / "model" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "eval/nats_per_token" in line] == [2, 4]


def test_the_last_preview_is_what_is_sampled(finished):
    assert [path.name for path in sorted((finished / "previews").iterdir())] == [
        "00000002.txt",
        "00000004.txt",
    ]
    preview = finished / "previews" / "00000004.txt"
    assert preview.read_bytes() == (finished / "samples.txt").read_bytes()


def test_the_samples_are_written_as_text_and_as_tokens(finished):
    tokenizer = tokenizers.load(finished / "tokenizer.json")
    with np.load(finished / "samples.npz") as file:
        tokens, prompt = file["tokens"], file["prompt"]
        assert (int(file["step"]), int(file["nfe"])) == (4, summary(finished)["nfe"])
    assert tokens.shape == (3, 24)  # more than the context
    assert tokenizer.decode(prompt) == "The "
    expected = ["The " + tokenizer.decode(row) for row in tokens]
    assert samples(finished) == expected


def test_the_likelihood_is_that_of_the_model_summed_by_hand(finished):
    """Windows of 16 targets that overlap in one token; 99 targets, the last window cut."""
    model, params = model_of(finished)
    tokenizer = tokenizers.load(finished / "tokenizer.json")
    tokens = tokenizer.encode(load_text(MINUTE.data, "test"))[:100]
    nats = 0.0
    for first in range(0, 99, 16):
        window = tokens[first : first + 17]
        nats -= float(model.log_prob(params, {"tokens": window[None]})[0])
    report = summary(finished)
    assert report["test_tokens"] == 99
    assert report["nats_per_token"] == pytest.approx(nats / 99, rel=1e-5)
    assert report["bits_per_character"] == pytest.approx(nats / 99 / np.log(2), rel=1e-5)
    assert report["perplexity"] == pytest.approx(np.exp(nats / 99), rel=1e-5)


def test_a_resumed_run_is_the_one_that_was_not_cut(finished, tmp_path, capsys):
    run = tmp_path / "run"
    assert main("train", "--workdir", run, "--train.steps", 2) == 0
    assert main("train", "--workdir", run, "--train.steps", 4) == 0
    (_, expected), (_, resumed) = model_of(finished), model_of(run)
    for left, right in zip(jax.tree.leaves(expected), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(left, right)
    capsys.readouterr()


def test_one_sample_is_shown_while_it_is_drawn_and_is_the_first_of_many(finished, copy, capsys):
    capsys.readouterr()
    assert main("sample", "--workdir", copy, "--sample.number", 1) == 0
    printed = capsys.readouterr().out
    expected = samples(finished)[0]
    assert f"\n{expected}\n" in printed
    assert samples(copy) == [expected]
    report = summary(copy)
    assert 0 < report["first_token_seconds"] <= report["sampling_latency_seconds"]
    assert report["sampled_tokens_per_second"] > 0


def test_a_sample_ends_before_its_stop_token(finished, copy, capsys):
    for whole in samples(finished):
        rest = whole.removeprefix("The ")
        if stop := next((c for c in rest[3:] if c not in rest[:3] and c.isalpha()), None):
            break
    options = ("--sample.stop", stop, "--workdir", copy)
    assert main("sample", *options) == 0
    many = samples(copy)
    assert many[samples(finished).index(whole)] == "The " + rest.partition(stop)[0]
    assert main("sample", *options, "--sample.number", 1) == 0
    assert samples(copy) == many[:1]
    with np.load(copy / "samples.npz") as file:
        assert file["tokens"].shape == (1, 24)
    capsys.readouterr()


def test_weights_in_int8_are_the_choice_of_a_sample(copy, capsys):
    options = ("--sampler.weights", "int8", "--sampler.temperature", 0)
    assert main("sample", "--workdir", copy, *options) == 0
    model, params = model_of(copy)
    with np.load(copy / "samples.npz") as file:
        given, drawn = file["prompt"], file["tokens"]
    sampler = AutoregressiveSampler(
        model, len(given), 24, SamplingOptions(temperature=0, weights="int8")
    )
    keys, cond = gen_jax.sample_keys(0, 0, 3), make_prompts(model, [given] * 3)
    np.testing.assert_array_equal(drawn, gen_jax.generate(sampler, params, keys, cond))
    capsys.readouterr()


def test_a_search_finds_what_is_at_least_as_probable(copy, capsys):
    model, params = model_of(copy)
    found = []
    for option in (
        ("--sampler", "beam_search", "--sampler.beams", 4),
        ("--sampler", "sample", "--sampler.temperature", 0),
    ):
        options = ("--workdir", copy, "--sample.number", 1, "--sample.tokens", 3, *option)
        assert main("sample", *options) == 0
        with np.load(copy / "samples.npz") as file:
            both = np.concatenate([file["prompt"], file["tokens"][0]])
        values = model.token_log_prob(params, {"tokens": both[None]})
        found.append(float(values[0, -3:].sum()))
    assert found[0] >= found[1] - 1e-5
    capsys.readouterr()


def test_weights_travel_through_transformers_format(finished, copy, tmp_path, capsys):
    assert main("export", "--workdir", copy) == 0
    model, params = interop.load_gpt2(copy / "gpt2")
    _, expected = model_of(finished)
    tokens = np.arange(16)[None] % model.network.config.vocabulary
    ours = model_of(copy)[0].network(expected, tokens)
    np.testing.assert_allclose(model.network(params, tokens), ours, atol=1e-5)

    options = ("--pretrained", copy / "gpt2", "--tokenizer", copy / "tokenizer.json")
    drawn = tmp_path / "published"
    assert main("sample", "--workdir", drawn, *options) == 0
    assert samples(drawn) == samples(finished)
    assert json.loads((drawn / "config.json").read_text())["model"]["width"] == 16
    assert main("train", "--workdir", drawn, *options, "--train.learning-rate", 0) == 0
    for left, right in zip(
        jax.tree.leaves(expected), jax.tree.leaves(model_of(drawn)[1]), strict=True
    ):
        np.testing.assert_allclose(left, right, atol=1e-7)
    assert main("sample", "--workdir", tmp_path, *options, "--model.width", 32) == 2
    assert "is another network than model (" in capsys.readouterr().err


@pytest.fixture(scope="module")
def draft(tmp_path_factory, one_device):
    """The run of a smaller model."""
    path = tmp_path_factory.mktemp("text") / "a draft"
    assert main("train", "--workdir", path, "--model.width", 8, "--train.preview-every", 0) == 0
    return path


SHORT = ("--sample.tokens", 6, "--sampler", "speculative")


def test_a_smaller_run_drafts(copy, draft, capsys):
    assert main("sample", "--workdir", copy, *SHORT, "--sampler.draft", draft) == 0
    report = summary(copy)
    assert 0 <= report["accepted_share_of_drafted"] <= 1
    assert 6 / 5 <= report["evaluations_of_the_large_model"] <= 6  # four are drafted, one is drawn
    rates = report["tokens_per_second_alone"], report["tokens_per_second_alone_plain"]
    assert report["times_plain_decoding"] == pytest.approx(rates[0] / rates[1])
    assert all(len(sample) == 10 for sample in samples(copy))
    assert main("evaluate", "--workdir", copy) == 0
    short = dataclasses.replace(MINUTE.sample, tokens=6)
    loaded = gen_jax.load(copy, sampler=SpeculativeOptions(draft=str(draft)), sample=short)
    assert set(loaded.params) == {"target", "draft"}
    keys = gen_jax.sample_keys(0, 0, 3)
    drawn = gen_jax.generate(loaded.sampler, loaded.params, keys, loaded.condition(3))
    expected = [sample[4:] for sample in samples(copy)]
    assert [loaded.tokenizer.decode(row) for row in np.asarray(drawn)] == expected
    capsys.readouterr()


def test_a_run_that_drafts_for_itself_is_always_right(copy, finished, capsys):
    greedy = (*SHORT, "--sampler.temperature", 0)
    assert main("sample", "--workdir", copy, *greedy, "--sampler.draft", finished) == 0
    assert summary(copy)["evaluations_of_the_large_model"] == 2
    assert summary(copy)["accepted_share_of_drafted"] == 1
    capsys.readouterr()


def test_drafts_that_do_not_fit(copy, draft, tmp_path, capsys):
    tokens = tmp_path / "other tokens"
    assert main("train", "--workdir", tokens, "--tokenizer", "bytes", "--train.steps", 1) == 0
    capsys.readouterr()
    for options, message in (
        (SHORT, "give the run of a smaller model as --sampler.draft"),
        ((*SHORT, "--sampler.draft", tmp_path), f"no run in {tmp_path}"),
        ((*SHORT, "--sampler.draft", tokens), "has another tokenizer"),
        (("--sampler", "speculative", "--sampler.draft", draft), "draw at most 8"),
    ):
        assert main("sample", "--workdir", copy, *options) == 2
        assert message in refused_in(capsys)


def test_a_folder_gives_its_sizes_and_its_tokenizer(tmp_path, capsys):
    """Of a Llama: neither the preset's sizes nor its tokenizer count."""
    llama = TransformerConfig(
        vocabulary=64,
        context=32,
        layers=1,
        width=8,
        heads=2,
        kv_heads=1,
        mlp_dim=12,
        position="rotary",
        norm="rms",
        norm_epsilon=1e-6,
        activation="swiglu",
        bias=False,
        tied=False,
    )
    folder = tmp_path / "a llama"
    params = write_llama(folder, llama)
    run = tmp_path / "run"
    assert main("sample", "--pretrained", folder, "--workdir", run) == 2
    assert "has no tokenizer.json: give --tokenizer the path" in capsys.readouterr().err
    tokenizers.Chars("".join(map(chr, range(32, 96)))).save(folder / "tokenizer.json")
    options = ("--sample.prompt", "HELLO", "--sample.tokens", 9)
    assert main("sample", "--pretrained", folder, "--workdir", run, *options) == 0
    loaded = gen_jax.load(run)
    assert loaded.model == interop.load_llama(folder)[0]
    assert loaded.model.network.config == dataclasses.replace(llama, head_width=4)
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(loaded.params), strict=True):
        np.testing.assert_array_equal(left, right)
    assert all(sample.startswith("HELLO") for sample in samples(run))
    capsys.readouterr()


def write_llama(folder, config):
    """Random weights in the layout of transformers."""
    from gen_jax.interop import files
    from gen_jax.interop.transformers import _LLAMA, _export

    params = random_params(TokenNetwork(config))
    options = {
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.context,
    }
    tensors = _export(traverse_util.flatten_dict(params), config, _LLAMA)
    files.write(folder, options, "model.safetensors", tensors)
    return params


@pytest.mark.parametrize(
    ("options", "unit"), [("--tokenizer bytes", "byte"), ("--model.vocabulary 90", "character")]
)
def test_other_tokens(tmp_path, capsys, options, unit):
    """A vocabulary may be larger than the tokenizer's; what it does not have is shown as U+FFFD."""
    short = ("--train.steps", 1, "--sample.tokens", 40, "--evaluate.tokens", 50)
    assert main("--workdir", tmp_path, *options.split(), *short) == 0
    assert f"bits_per_{unit}" in summary(tmp_path)
    assert all(sample.startswith("The ") for sample in samples(tmp_path))
    capsys.readouterr()
    assert main("sample", "--workdir", tmp_path, "--sample.number", 1) == 0
    assert capsys.readouterr().out.count("\ufffd") >= samples(tmp_path)[0].count("\ufffd") > 0


REFUSED = [
    ("--sample.prompt ß€", "sample.prompt: 2 characters of the text are not in the vocabulary"),
    ("--sample.prompt=", "sample.prompt is empty"),
    (
        f"--sample.prompt {'a' * 17}",
        "sample.prompt has 17 tokens; it needs at least 1, and at "
        "most the context of the model, 16",
    ),
    ("--sampler.top-p 0", "top_p must be in (0, 1], got 0.0"),
    ("--sampler.top-p 2", "top_p must be in (0, 1], got 2.0"),
    ("--sampler.top-k -1", "top_k must not be negative"),
    ("--sampler.weights int4", "invalid choice 'int4'"),
    ("--sampler.temperature nan", "temperature must be finite, got nan"),
    ("--sample.stop the", "sample.stop must be one token; 'the' is 3"),
    ("--sample.stop €", "sample.stop: 1 characters of the text are not in the vocabulary"),
    ("--sample.stop eos", "sample.stop: this tokenizer has no EOS"),
    ("--sample.tokens 0", "sample.tokens must be at least 1, got 0"),
    ("--sampler beam_search", "set sample.number to 1"),
    ("--sampler beam_search --sample.number 1", "beam search stays within the context"),
    ("--evaluate.tokens 1", "evaluate.tokens must be 0 or at least 2"),
    ("--tokenizer nowhere.json", "nowhere.json is no file; choose bytes, chars or the path"),
    ("--tokenizer=", "tokenizer is empty"),
    ("--pretrained there", "there is not a folder (nothing is downloaded here)"),
    ("--model.vocabulary 5", "model.vocabulary is 5, the tokenizer has"),
    ("--model.no-causal", "a model of text is causal"),
    ("--model.context 5000", "tokens are too few for a window of 5001"),
    ("--data.name file", "data.name=file needs --data.path"),
    ("--data.name file --data.path nowhere", "nowhere is no file; give --data.path"),
    ("sample", "train one first, or give its --workdir"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    assert main(*line.split(), "--workdir", tmp_path / "run") == 2
    assert message in refused_in(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "option", "value", "message"),
    [
        ("sample", "--sample.prompt", "ß", "sample.prompt: 1 characters of the text are not in"),
        ("sample", "--tokenizer", "bytes", "tokenizer: 'chars' -> 'bytes'"),
        ("train", "--tokenizer", "bytes", "tokenizer: 'chars' -> 'bytes'"),
        ("train", "--data.characters", "3000", "data.characters: 4000 -> 3000"),
    ],
)
def test_a_run_keeps_its_tokenizer_and_its_text(
    finished, copy, capsys, command, option, value, message
):
    assert main(command, "--workdir", copy, option, value) == 2
    assert message in capsys.readouterr().err
    assert main("evaluate", "--workdir", copy) == 0
    capsys.readouterr()


def test_files_that_were_exchanged_are_noticed(tmp_path, copy, capsys):
    tokenizers.Chars("abc").save(copy / "tokenizer.json")
    assert main("sample", "--workdir", copy, "--sample.prompt", "a") == 2
    assert "is not the tokenizer that the checkpoint was trained with" in capsys.readouterr().err
    tokenizers.Bytes().save(copy / "tokenizer.json")
    assert main("sample", "--workdir", copy) == 2
    assert "--tokenizer chars is not the tokenizer of the run" in capsys.readouterr().err

    file, run = tmp_path / "text", tmp_path / "run"
    file.write_text("The end. " * 40)
    options = ("--workdir", run, "--data.name", "file", "--data.path", file)
    assert main("train", *options, "--train.steps", 1) == 0
    file.write_text("The eed. " * 40)
    capsys.readouterr()
    assert main("train", "--workdir", run, "--train.steps", 2) == 2
    assert "error: the data is not what the run in" in capsys.readouterr().err


def test_the_score_of_texts():
    known = "It is a cat, and a dog."
    perfect = score(["a cat is a dog, a cat is cu"], known)
    assert perfect == {"known_words": 1.0, "distinct_2": 5 / 7}
    assert score(["xx cat."], known) == {"known_words": 0.6, "distinct_2": 1.0}
    assert score([""], known) == {"known_words": 0.0, "distinct_2": 0.0}
