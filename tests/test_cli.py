import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import (
    ddpm_cifar,
    gpt_pixels,
    gpt_text,
    masked_pixels,
    masked_text,
    multimodality,
    nar_translation,
    two_stage,
    vq_cifar,
)
from gen_jax import arguments, cli
from gen_jax import config as config_lib
from gen_jax.config import TrainConfig

ROOT = Path(__file__).parents[1]
EXPERIMENTS = [
    module.EXPERIMENT
    for module in (
        ddpm_cifar,
        gpt_pixels,
        gpt_text,
        masked_pixels,
        masked_text,
        multimodality,
        nar_translation,
        two_stage,
        vq_cifar,
    )
]
PRESETS = [(experiment, name) for experiment in EXPERIMENTS for name in experiment.presets]


def _seconds_of_children():
    """Of the processor, which other work on the machine does not change much."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def without_jax(tmp_path_factory):
    """An environment in which importing jax ends the process with code 99."""
    fake = tmp_path_factory.mktemp("fake")
    (fake / "jax").mkdir()
    (fake / "jax" / "__init__.py").write_text("import os\nos._exit(99)\n")
    path = os.pathsep.join([str(fake), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "80"}


@pytest.fixture(scope="module")
def server(without_jax):
    """What runs command lines in forks of one process."""
    names = [experiment.name for experiment in EXPERIMENTS]
    with subprocess.Popen(
        [sys.executable, "tests/command_server.py", *names],
        cwd=ROOT,
        env=without_jax,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()
    assert process.returncode == 0


@pytest.fixture
def refused(tmp_path, server):
    """Runs a command line that must end with code 2, before jax; what it says, in one line."""

    def run(*arguments, code=2, experiment="ddpm_cifar"):
        request = {"experiment": experiment, "arguments": arguments, "folder": str(tmp_path)}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        done = json.loads(server.stdout.readline())
        return _line_of(done["code"], done["out"], done["err"], code)

    return run


def _line_of(code, out, err, expected):
    """What a refusal says; nothing where the command line was good and jax was reached."""
    assert code == expected, err
    assert out == ""
    if expected == 99:
        return ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert not set(line) & set("│╭╰─")
    return line


UNKNOWN = [
    ("--train.stpes 5", "unknown option --train.stpes; did you mean --train.steps?"),
    ("--train.lr 5", "did you mean --train.learning-rate?"),
    ("--train.learning_rat 5", "did you mean --train.learning-rate?"),
    ("--steps=5", "unknown option --steps=5; did you mean"),
    ("--model.width 64", "did you mean --model.widths?"),
    ("--sample.seeds 1", "did you mean --sample.seed?"),
    ("--work-dir x", "did you mean --workdir?"),
    ("--no-conditionnal", "did you mean --no-conditional?"),
    ("--presets tiny", "unknown option --presets"),
    ("--sampler dddim", "unknown --sampler 'dddim'; did you mean ddim?"),
    ("--sampler nowhere:Mine", "'nowhere:Mine' names no module:attribute that can be imported"),
    ("--sampler .:Mine", "'.:Mine' names no module:attribute that can be imported"),
    ("--sampler.eta 1", "unknown option --sampler.eta"),
    ("--sampler", "--sampler needs a value"),
]
ILL_TYPED = [
    ("--train.steps abc", "error: --train.steps: invalid literal for int"),
    ("--train.steps 1.5", "--train.steps: invalid literal for int"),
    ("--train.steps", "Missing value for argument '--train.steps'"),
    ("--train.beta2 fast", "--train.beta2: could not convert string to float"),
    ("--model.widths 8 x", "--model.widths: Could not find valid parse"),
    ("--data.name mnist", "invalid choice 'mnist' for argument '--data.name'"),
    ("--train.decay linear", "invalid choice 'linear' for argument '--train.decay'"),
    ("--no-data.palette", "unknown option --no-data.palette; did you mean --data.no-palette?"),
    ("--DIFFUSION.TIMESTEPS 5", "did you mean --diffusion.timesteps?"),
    ("--Train.Beta1 0", "did you mean --train.beta1?"),
    ("trian", "unknown command 'trian'; did you mean train?"),
    ("train sample", "Unrecognized options: sample"),
    ("--preset nope", "unknown preset 'nope'; choose one of tiny, cpu, small, paper"),
    ("--preset", "--preset needs a value"),
    ("--workdir", "--workdir needs a value"),
]
OUT_OF_RANGE = [
    ("--train.steps 0", "steps must be at least 1, got 0"),
    ("--train.batch -1", "batch must be at least 1, got -1"),
    ("--train.steps 3000000000", "steps must be below 2**31, got 3000000000"),
    (f"--train.steps 1{'0' * 30}", "steps must be a whole number of at most 64 bits, got 1000"),
    ("--train.batch 1000000000000", "batch must be at most 16777216, got 1000000000000"),
    ("--sample.number 3000000000", "number must be below 2**31, got 3000000000"),
    ("--model.widths 8000000000", "widths must be at most 1048576, got (8000000000,)"),
    ("--model.blocks 2000", "blocks must be at most 256, got 2000"),
    ("--train.keep 0", "keep must be at least 1, got 0"),
    ("--train.ema 1", "ema must be in [0, 1), got 1.0"),
    ("--train.ema nan", "ema must be finite, got nan"),
    ("--train.learning-rate -1", "learning_rate must not be negative, got -1.0"),
    ("--train.learning-rate nan", "learning_rate must be finite, got nan"),
    ("--train.learning-rate inf", "learning_rate must be finite, got inf"),
    ("--train.seed -1", "seed must be in [0, 2**32), got -1"),
    ("--model.dropout 1", "dropout must be in [0, 1), got 1.0"),
    ("--model.blocks 0", "blocks must be at least 1, got 0"),
    ("--model.patch 0", "patch must be at least 1, got 0"),
    ("--model.channels 0", "channels must be at least 1, got 0"),
    ("--model.classes -1", "classes must not be negative, got -1"),
    ("--model.head-width -8", "head_width must not be negative, got -8"),
    ("--model.groups 0", "groups must be at least 1, got 0"),
    ("--model.widths 0", "widths must be positive and not empty, got (0,)"),
    ("--diffusion.beta-start 0.5", "need 0 < beta_start <= beta_end < 1, got 0.5, 0.02"),
    ("--diffusion.beta-end nan", "beta_end must be finite, got nan"),
    ("--diffusion.vlb-weight inf", "vlb_weight must be finite, got inf"),
    ("--diffusion.timesteps 0", "timesteps must be at least 1, got 0"),
    ("--data.size 24", "data.size is 24; the shapes set is drawn at 16 or 32 pixels"),
    ("--sample.number 0", "number must be at least 1, got 0"),
    ("--sampler.steps 0", "at least 1"),
    ("--sampler ddim --sampler.eta -1", "eta must not be negative, got -1.0"),
    ("--sampler ddim --sampler.eta nan", "eta must be finite, got nan"),
    ("--sampler.guidance nan", "guidance must be finite, got nan"),
    ("--evaluate.images 0", "evaluate.images and .batch must be at least 1"),
    ("--distributed.index 1", "index must be in [0, 1), got 1"),
]
CONTRADICTIONS = [
    ("--model.classes 36", "model.classes is 36, which is for --conditional"),
    ("--conditional --model.classes 10", "the data has 36 classes, model.classes is 10"),
    ("--sampler.guidance 2", "sampler.guidance needs a conditional model"),
    ("--sample.label 3", "sample.label must be -1 or a class, got 3"),
    ("--model.groups 5", "groups (5) must divide every width (32, 64)"),
    ("--model.head-width 5", "head_width (5) must divide every width (32, 64)"),
    (
        "--model.widths 8 8 8 8 8",
        "16 x 16 do not fit the model: height and width must be multiples",
    ),
    (
        "--model.channels 1 --model.out-channels 1",
        "the images have 3 channels, model.channels is 1",
    ),
    ("--model.out-channels 6", "model.out_channels must be 3 with diffusion.variance fixed_small"),
    ("--diffusion.variance learned", "time_shift must be 1 where the variance is learned"),
    ("--diffusion.variance learned --diffusion.time-shift 1", "model.out_channels must be 6"),
    ("--sampler.steps 1001", "1001 sampling steps do not fit in 1000 time steps"),
    (
        "--sampler dpm_solver_pp --sampler.steps 1000 --sampler.spacing leading",
        "1000 sampling steps do not fit",
    ),
    ("--train.accumulate 3", "accumulate (3) must divide the batch (64)"),
    ("--data.palette", "leave data.palette off"),
    ("--data.name folder", "data.name=folder needs --data.dir"),
    ("--distributed.processes 2", "several processes need a coordinator"),
]
MISSING = [
    ("--data.name cifar10 --data.dir nowhere", "no CIFAR-10 files in "),
    ("--data.name folder --data.dir nowhere", "nowhere is no folder"),
    ("sample --workdir nowhere", "no run in"),
    ("--workdir ~nobody-here/run", "'~nobody-here/run' begins with a home directory that is not"),
    ("--pretrained ~nobody-here/weights", "a path begins with ~ and a user who is not known here"),
    ("evaluate --workdir nowhere", "train one first, or give its --workdir"),
]
OF_TOKENS = [
    ("gpt_text", "--sampler.top-p 0", "top_p must be in (0, 1], got 0.0"),
    ("gpt_text", "--sample.prompt=", "sample.prompt is empty"),
    ("gpt_text", "--sample.prompt €", "sample.prompt: 1 characters of the text are not in"),
    ("gpt_text", "--sample.stop the", "sample.stop must be one token; 'the' is 3"),
    ("gpt_text", "--preset shakespeare_char", "tinyshakespeare.txt is no file; give --data.path"),
    ("gpt_text", "--preset gpt2_small", "tokenizer.json is no file"),
    ("gpt_text", "--token chars", "did you mean --tokenizer?"),
    ("gpt_text", "sample", "train one first, or give its --workdir"),
    ("gpt_pixels", "--sampler.top-p 2", "top_p must be in (0, 1], got 2.0"),
    ("gpt_pixels", "--data.no-palette", "model.vocabulary must be 256, or 0 for the same, got 7"),
    ("gpt_pixels", "--preset cifar --data.dir nowhere", "no CIFAR-10 files in "),
    ("gpt_pixels", "export", "unknown command 'export'"),
]


@pytest.mark.parametrize(
    ("line", "message"), [*UNKNOWN, *ILL_TYPED, *OUT_OF_RANGE, *CONTRADICTIONS, *MISSING]
)
def test_a_bad_command_line_is_refused_before_jax(refused, line, message):
    assert message in refused(*line.split())


@pytest.mark.parametrize(
    ("line", "message"), [UNKNOWN[0], ILL_TYPED[0], OUT_OF_RANGE[0], CONTRADICTIONS[0], MISSING[0]]
)
def test_it_takes_less_than_a_second_and_a_half(without_jax, tmp_path, line, message):
    """As a command of its own, imports included; of the processor."""
    began = _seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.ddpm_cifar", *line.split()],
        cwd=tmp_path,
        env=without_jax,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert _seconds_of_children() - began < 1.5  # half a second where nothing else runs
    assert message in _line_of(done.returncode, done.stdout, done.stderr, 2)


@pytest.mark.parametrize(("experiment", "line", "message"), OF_TOKENS)
def test_those_of_tokens_too(refused, experiment, line, message):
    assert message in refused(*line.split(), experiment=experiment)


@pytest.mark.parametrize("experiment", [item.name for item in EXPERIMENTS])
def test_a_good_command_line_reaches_jax(refused, experiment):
    """Otherwise the tests above could not tell."""
    refused("--train.steps", "5", code=99, experiment=experiment)


def test_what_the_parser_writes_is_passed_on_where_it_accepts(capsys):
    with arguments.refusals_in_one_line():
        print("a remark", file=sys.stderr)
    assert capsys.readouterr().err == "a remark\n"


def test_what_it_refuses_without_a_box_is_one_line_too():
    @arguments.refusals_in_one_line()
    def refuse():
        print("two\nlines", file=sys.stderr)
        raise SystemExit(2)

    with pytest.raises(ValueError, match=r"^two lines \(see --help\)$"):
        refuse()


def listed(environment, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_experiments_are_listed_without_jax(without_jax):
    done = listed(without_jax)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
    names = [line[0] for line in lines]
    files = sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py"))
    timed = [name for name in names if name not in files]
    others = ["compare_sampling", "report"]  # of many runs, and of any
    assert names[: len(files)] == files == sorted([item.name for item in EXPERIMENTS] + others)
    assert timed == [
        "absent_gpu",
        "absent_tpu",
        "autoencoders",
        "diffusers",
        "diffusers_training",
        "latent_diffusion",
        "nanogpt",
        "transformers",
        "translation",
    ]
    assert all(len(line) > 4 for line in lines)
    refused = listed(without_jax, "ddpm_cifar")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: python -m experiments takes no arguments, got ddpm_c")


@pytest.mark.parametrize(("experiment", "name"), PRESETS)
def test_every_preset_parses_and_survives_json(experiment, name, tmp_path):
    preset = experiment.presets[name]
    for command in experiment.commands:
        assert cli.parse(experiment, [command, "--preset", name]) == (command, preset)
    values = config_lib.to_dict(preset)
    assert config_lib.from_dict(type(preset), values) == preset
    assert config_lib.differences(values, config_lib.to_dict(preset)) == []
    _, changed = cli.parse(
        experiment, [f"--preset={name}", "--workdir", str(tmp_path), "--train.seed", "9"]
    )
    assert config_lib.differences(values, config_lib.to_dict(changed)) == [
        "train.seed: 0 -> 9",
        f"workdir: {preset.workdir!r} -> {str(tmp_path)!r}",
    ]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_option_says_what_it_is(experiment, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse(experiment, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for key in config_lib.flatten(config_lib.to_dict(experiment.default)):
        if key.endswith(".name") and key.count(".") == 1 and key != "data.name":
            key = key.removesuffix(".name")  # a choice is named itself
        assert f"--{key.replace('_', '-')}" in text.replace("--no-", "--"), key


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "many"}, "steps must be a whole number, got 'many'"),
        (config_lib.to_dict(TrainConfig()) | {"momentum": 0.9}, r"no fields \['momentum'\]"),
        (config_lib.to_dict(TrainConfig()) | {"steps": 0}, "steps must be at least 1"),
    ],
)
def test_a_stored_configuration_that_does_not_fit_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        config_lib.from_dict(TrainConfig, values)


def test_differences_lists_every_key_but_the_free_ones():
    stored = {"a": 1, "b": {"c": 2, "d": [3], "e": None}, "gone": True}
    current = {"a": 2, "b": {"c": 3, "d": [4], "e": 5}, "new": 0}
    everything = [
        "a: 1 -> 2",
        "b.c: 2 -> 3",
        "b.d: [3] -> [4]",
        "b.e: None -> 5",
        "gone: True -> None",
        "new: None -> 0",
    ]
    assert config_lib.differences(stored, current) == everything
    assert config_lib.differences(stored, current, ("b.", "new")) == [everything[0], everything[4]]
    assert config_lib.differences(stored, current, ("b",)) == everything
