"""What the phases of every task share, on a task of three numbers, and on one of two stages."""

import dataclasses
import errno
import io
import json
import shutil
import signal
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen_jax
from gen_jax import cli
from gen_jax.condition import Condition
from gen_jax.config import RunConfig, SampleConfig, TrainConfig, frozen
from gen_jax.task import Run, Stage, Task
from gen_jax.trainables import ModelTrainable
from gen_jax.workdir import Workdir, WorkdirError


@frozen
class PointConfig(RunConfig):
    """A point that moves to where the data is."""

    train: TrainConfig = TrainConfig(
        steps=4, batch=8, learning_rate=0.1, warmup=0, log_every=1, checkpoint_every=2, ema=0.0
    )
    sample: SampleConfig = SampleConfig(number=2, micro_batch=8)
    data: int = 0
    """Below 0 where there is none."""
    stages: int = 1
    """One point, or a second one that moves to the first."""
    pretrained: str = ""
    """Coordinates, with commas."""

    task = "points"
    make_task = "test_runs:make"
    commands = ("train", "sample", "evaluate", "double")

    def load(self, workdir, phases):
        if self.data < 0:
            raise FileNotFoundError(f"no {self.splits(phases)} data")
        return 0.5


@dataclasses.dataclass(frozen=True)
class Point:
    """A model of one point in three dimensions."""

    def init(self, key):
        return {"at": jax.random.normal(key, (3,))}

    def loss(self, params, batch, keys):
        return jnp.square(params["at"][None] - batch["x"]).mean(), {}


@dataclasses.dataclass(frozen=True)
class Here:
    """Draws the point itself."""

    steps: int = 1
    nfe: int = 1
    conditions = ()

    def check(self, params, cond):
        assert cond == Condition()

    def prepare(self, params):
        return params

    def init(self, params, keys, cond):
        return jnp.zeros((len(keys), 3))

    def step(self, params, state, i):
        points = params["at"] if "at" in params else params["second"]["at"]
        return jnp.broadcast_to(points[None], state.shape)

    def finish(self, params, state):
        return state


def make(config, context):
    """The task, which notes what it was made for."""
    assert config.pretrained or "train" in context.phases or context.records["first"]["width"] == 3
    names = ("first", "second")[: config.stages]

    def batch(step, shard, earlier):
        assert shard == (0, 1)
        assert list(earlier) == list(names[: len(earlier)])
        goal = earlier["first"]["at"] if earlier else np.full(3, context.data)
        return {"x": np.tile(np.float32(goal), (8, 1))}

    def initial():
        return {"at": np.array(config.pretrained.split(","), np.float32)}

    stages = tuple(
        Stage(
            name=name,
            trainable=ModelTrainable(Point(), config.train),
            batch=batch,
            record={"width": 3},
            evaluate=lambda params: {"mean": float(params["at"].mean())},
            initial=initial if config.pretrained else None,
            unit="coordinates",
            units_per_example=3,
        )
        for name in names
    )

    def write(run, samples, report):
        assert report["samples"] == len(samples) == 2
        run.keep_samples(points=samples)
        return {"drawn": 1}

    def evaluate(run):
        points = run.kept_samples("points")["points"]
        np.testing.assert_array_equal(points[0], run.params["at"])
        return {"mean": float(points.mean())}

    return Task(
        stages=stages,
        model=Point(),
        sampler=Here(),
        write=write,
        evaluate=evaluate,
        commands={"double": lambda run: {"twice": float(2 * run.params["at"][0])}},
        data=str(context.data) if "train" in context.phases else "",
        results=("samples.npz",),
    )


EXPERIMENT = cli.Experiment("points", "Points.", {"three": PointConfig(workdir="runs/points")})


def main(*argv):
    return cli.main(EXPERIMENT, [str(item) for item in argv])


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_the_commands_are_those_of_the_task_and_all():
    assert EXPERIMENT.commands == ("all", "train", "sample", "evaluate", "double")
    assert cli.phases_of(EXPERIMENT.default, "all") == ("train", "sample", "evaluate")
    assert cli.phases_of(EXPERIMENT.default, "double") == ("double",)


def test_a_task_is_its_fields(tmp_path, capsys):
    assert main("--workdir", tmp_path, "--train.evaluate-every", 2) == 0
    printed = capsys.readouterr().out
    left = "config.json, first/metrics.jsonl, samples.npz, summary.json"
    assert f"in {tmp_path}: {left}" in printed
    found = summary(tmp_path)
    assert (found["parameters"], found["step"], found["drawn"]) == (3, 4, 1)
    rate = 3 * 8 * 4 / found["train_seconds"]
    assert found["coordinates_per_second"] == pytest.approx(rate)
    lines = (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records if "eval/mean" in record] == [2, 4]
    assert main("double", "--workdir", tmp_path) == 0
    assert summary(tmp_path)["twice"] != 0
    capsys.readouterr()
    # An earlier checkpoint, whose samples are not those on disk.
    assert main("evaluate", "--workdir", tmp_path, "--sample.checkpoint", 2) == 2
    assert "was drawn at step 4, the checkpoint is of step 2" in capsys.readouterr().err


PLACES = {"load": "", "sample": " in the phase sample", "evaluate": " in the phase evaluate"}


@pytest.mark.parametrize("phase", PLACES)
def test_a_signal_stops_every_phase_with_the_command_that_goes_on(
    phase, finished, monkeypatch, capsys
):
    """Training has tests of its own; of compiling, Python hears when the compiler returns."""

    def stop(*arguments, **arrays):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it was not stopped")

    if phase == "load":
        monkeypatch.setattr(PointConfig, "load", stop)
    else:  # where the samples are written, and where they are read
        name = {"sample": "keep_samples", "evaluate": "kept_samples"}[phase]
        monkeypatch.setattr(Run, name, stop)
    argv = ("evaluate" if phase == "evaluate" else "sample", "--workdir", finished)
    assert main(*argv) == 143
    message, command = capsys.readouterr().err.splitlines()
    assert message == f"stopped by SIGTERM{PLACES[phase]}. Go on with:"
    assert command == f"  python -m experiments.points {argv[0]} --workdir {finished}"


def test_the_command_that_goes_on_is_of_one_process():
    options = ["--distributed.coordinator", "a:1", "--distributed.index=1", "--workdir", "a b"]
    command = cli.command_line("points", ["train", *options])
    assert command == "python -m experiments.points train --workdir 'a b'"


def test_a_run_does_not_go_on_with_other_data(finished, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    kept = [path for path in run.rglob("*") if path.is_file()]
    monkeypatch.setattr(PointConfig, "load", lambda *arguments: 0.25)
    assert main("train", "--workdir", run, "--train.steps", 9) == 2
    error = f"error: the data is not what the run in {run} was trained with: restore it, or"
    assert capsys.readouterr().err.startswith(error)
    assert [path for path in run.rglob("*") if path.is_file()] == kept
    assert main("sample", "--workdir", run) == 0, "which reads no data"
    monkeypatch.undo()
    assert main("train", "--workdir", run, "--train.steps", 9) == 0


def test_a_configuration_that_is_lost_is_in_the_last_checkpoint(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "config.json").read_text()
    (run / "config.json").unlink()
    assert main("train", "--workdir", run, "--train.batch", 16) == 2
    assert "train.batch: 8 -> 16" in capsys.readouterr().err
    assert not (run / "config.json").exists()
    assert main("train", "--workdir", run) == 0
    assert json.loads((run / "config.json").read_text()) == json.loads(before) | {
        "workdir": str(run)
    }


def test_another_machine_draws_a_part(finished, tmp_path, capsys):
    """It has a copy of the run, and leaves what it drew for the run that puts all together."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("samples.npz"))
    part = ("--sample.of", 2, "--sample.start", 1, "--sample.number", 1)
    assert main("sample", "--workdir", copy, *part) == 0
    assert not (copy / "samples.npz").exists()
    assert len(list(copy.glob("parts/*/*.npz"))) == 1
    assert main("sample", "--workdir", finished, "--sample.parts", copy) == 0
    assert not (finished / "parts").exists()
    capsys.readouterr()
    others = ("--sample.seed", 1, "--sample.parts", copy)
    assert main("sample", "--workdir", finished, *others) == 2
    assert f"error: {copy} has no part of these samples" in capsys.readouterr().err


def test_figures_of_a_finished_phase_are_kept(finished, monkeypatch, capsys):
    def stop(run, *names):
        raise FloatingPointError("no figures")

    (finished / "summary.json").unlink()
    monkeypatch.setattr(Run, "kept_samples", stop)
    assert main("--workdir", finished) == 1
    assert summary(finished)["samples_per_second"] > 0


PARTS = [
    ({"start": 1}, "give the number of all samples too, as of"),
    ({"start": 3, "number": 2, "of": 4}, "samples 3 to 4 are no part of 4"),
    ({"of": -1}, "must not be negative"),
]


@pytest.mark.parametrize(("wrong", "message"), PARTS)
def test_parts_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SampleConfig(**wrong)


def test_a_second_stage_is_a_second_entry(tmp_path, capsys):
    """It sees what the first one learned, has a directory of its own, and is resumed by itself."""
    options = ("--workdir", tmp_path, "--stages", 2, "--train.checkpoint-every", 200)
    assert main("train", *options, "--train.steps", 2) == 0
    assert (tmp_path / "second" / "metrics.jsonl").exists()
    assert {"first_train_seconds", "second_train_seconds"} <= summary(tmp_path).keys()
    assert main("train", *options, "--train.steps", 400) == 0
    assert main("sample", "--workdir", tmp_path) == 0
    with np.load(tmp_path / "samples.npz") as file:
        np.testing.assert_allclose(file["points"], 0.5, atol=1e-2)
    capsys.readouterr()


def test_an_earlier_checkpoint_is_sampled_and_evaluated(tmp_path, capsys):
    assert main("train", "--workdir", tmp_path) == 0
    for command in ("sample", "evaluate"):
        assert main(command, "--workdir", tmp_path, "--sample.checkpoint", 2) == 0
    assert main("sample", "--workdir", tmp_path, "--sample.checkpoint", 3) == 2
    assert "no checkpoint of step 3" in capsys.readouterr().err


def test_pretrained_parameters_are_drawn_from_where_nothing_is_trained(tmp_path, capsys):
    assert main("sample", "--workdir", tmp_path, "--pretrained", "1,2,3") == 0
    with np.load(tmp_path / "samples.npz") as file:
        np.testing.assert_array_equal(file["points"], [[1, 2, 3]] * 2)
        assert file["step"] == 0
    options = ("--pretrained", "1,2,3", "--train.learning-rate", 0)
    assert main("all", "--workdir", tmp_path, *options) == 0
    with np.load(tmp_path / "samples.npz") as file:
        np.testing.assert_array_equal(file["points"], [[1, 2, 3]] * 2)
        assert file["step"] == 4
    capsys.readouterr()


def test_data_that_does_not_fit_is_refused_without_a_trace(tmp_path, capsys):
    run = tmp_path / "run"
    for command, splits in (("train", "('train',)"), ("all", "('train', 'test')")):
        assert main(command, "--workdir", run, "--data", -1) == 2
        assert f"no {splits} data" in capsys.readouterr().err
    assert not run.exists()


def test_a_start_that_fails_leaves_no_configuration_behind(tmp_path, capsys):
    """The next run without a preset would take it."""
    run = tmp_path / "run"
    assert main("all", "--workdir", run, "--train.batch", 12) == 2
    assert "a batch of 12 does not divide over 8 devices" in capsys.readouterr().err
    assert not run.exists()
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert main("all", "--workdir", run, "--train.batch", 12) == 2
    assert [path.name for path in run.iterdir() if path.name != ".lock"] == ["notes.txt"]
    assert main("train", "--workdir", run) == 0
    assert json.loads((run / "config.json").read_text())["train"]["batch"] == 8


def test_a_dry_run_says_what_it_would_take_and_leaves_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    assert main("--dry-run", "--workdir", run, "--stages", 2, "--train.learning-rate", 0.5) == 0
    printed = capsys.readouterr().out
    assert "--train.learning-rate" in printed
    assert printed.count("parameters                   3\n") == 2
    assert "training of second" in printed
    assert "batch x                      float32 [8, 3]" in printed
    # params, ema, two moments of 3 floats; the optimiser's count, the step and the skipped ones.
    assert printed.count(f"state in checkpoints         {4 * (4 * 3 + 3)} bytes") == 2
    assert not run.exists()
    assert main("all", "--dry-run", "--workdir", run, "--train.batch", 12) == 2
    assert "a batch of 12 does not divide" in capsys.readouterr().err
    assert not run.exists()


def test_only_training_is_tried_dry(finished, capsys):
    assert main("sample", "--dry-run", "--workdir", finished) == 2
    assert "--dry-run is of training, not of sample" in capsys.readouterr().err


def test_a_run_starts_from_the_parameters_of_another_one(finished, tmp_path, capsys):
    run = tmp_path / "run"
    start = gen_jax.load(finished).params["at"]
    options = ("--workdir", run, "--init-from", finished)
    assert main("train", *options, "--train.steps", 1, "--train.learning-rate", 0) == 0
    np.testing.assert_array_equal(gen_jax.load(run).params["at"], start)
    stored = json.loads((run / "config.json").read_text())
    assert stored["train"]["log_every"] == 1
    assert stored["init_from"] == str(finished)
    # It is read once: the run goes on from its own checkpoint.
    options = ("--workdir", run, "--train.steps", 3, "--train.learning-rate", 0)
    shutil.move(finished, tmp_path / "away")
    try:
        assert main("train", *options) == 0, capsys.readouterr().err
    finally:
        shutil.move(tmp_path / "away", finished)
    np.testing.assert_array_equal(gen_jax.load(run).params["at"], start)


def test_a_finished_run_is_the_base_of_one_that_starts_from_it(finished, tmp_path):
    _, config = cli.parse(EXPERIMENT, ["train", "--init-from", str(finished)])
    assert config.train.steps == 2
    assert config.workdir == EXPERIMENT.default.workdir
    preset = ["train", "--preset", "three", "--init-from", str(finished)]
    assert cli.parse(EXPERIMENT, preset)[1].train.steps == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--init-from", "nowhere"), "no run in "),
        (("--init-from", "run"), "init_from is the work directory"),
        (("--init-from", "{finished}", "--pretrained", "1,2,3"), "both say where training starts"),
        (("--init-from", "{empty}", "--preset", "three"), "no checkpoint in "),
        (("--init-from", "{finished}", "--stages", 2), "no checkpoint in "),
        (("--init-from", "{other}", "--preset", "three"), "holds a run of the task 'lines'"),
    ],
)
def test_a_start_that_is_none_is_refused_without_a_trace(
    finished, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    places = {"finished": finished, "empty": tmp_path / "empty", "other": tmp_path / "other"}
    for name, changes in (("empty", {}), ("other", {"task": "lines"})):
        places[name].mkdir()
        stored = json.loads((finished / "config.json").read_text())
        (places[name] / "config.json").write_text(json.dumps(stored | changes))
    options = [str(option).format(**places) for option in options]
    assert main("train", "--workdir", "run", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def archive(**arrays):
    """The content of a file of these arrays."""
    np.savez(file := io.BytesIO(), **arrays)
    return file.getvalue()


def stated():
    """The content of a file whose one array states a shape of 2^40."""
    np.save(file := io.BytesIO(), np.zeros(3))
    content = file.getvalue().replace(b"(3,), }" + 12 * b" ", b"(1099511627776,), }")
    with zipfile.ZipFile(whole := io.BytesIO(), "w") as members:
        members.writestr("images.npy", content)
    return whole.getvalue()


PICKLED = archive(step=np.array([{}, print], object), images=np.zeros(3))
STATED = stated()
DAMAGE = [
    ("config.json", b"\xff\x00", "sample", "config.json is damaged ('utf-8' codec"),
    ("config.json", b"[1, 2]", "sample", "config.json is damaged (it holds no object of fields)"),
    ("config.json", b"[" * 100_000, "sample", "config.json is damaged (it has more than 100 level"),
    ("config.json", {"stages": [[1]]}, "sample", "config.json: stages must be a whole number"),
    ("config.json", {"train": [1]}, "sample", "config.json: TrainConfig cannot be read from [1]"),
    ("config.json", {"data": 2**62}, "sample", None),
    ("config.json", {"data": 10**30}, "sample", "data must be a whole number of at most 64 bits"),
    ("config.json", {"pretrained": "\0"}, "sample", "must be text without null characters"),
    ("config.json", {"task": {}}, "sample", "config.json: task must be a name, got {}"),
    ("config.json", None, "sample", "config.json cannot be read (Is a directory)"),
    ("summary.json", b"", "sample", "summary.json is damaged (Expecting value"),
    ("summary.json", b"[]", "evaluate", "summary.json is damaged (it holds no object of fields)"),
    ("summary.json", None, "evaluate", "summary.json cannot be read (Is a directory)"),
    ("samples.npz", b"", "evaluate", "zip file); run the command `sample` again"),
    ("samples.npz", b"PK\x03\x04 cut", "evaluate", "samples.npz is damaged"),
    ("samples.npz", b"words", "evaluate", "samples.npz is damaged"),
    ("samples.npz", PICKLED, "evaluate", "samples.npz is damaged (no header of an array of num"),
    ("samples.npz", STATED, "evaluate", "(float64 [1099511627776] does not have 152 bytes)"),
    ("samples.npz", archive(step=4), "evaluate", "samples.npz has no points; run the command"),
    (
        "samples.npz",
        archive(step=[1, 2], points=1),
        "evaluate",
        "samples.npz is damaged; run the command",
    ),
    ("summary.json", b" " * (2**24 + 1), "evaluate", "and at most 16777216 are read; move it away"),
    ("config.json", b" " * (2**24 + 1), "sample", "and at most 16777216 are read; restore it"),
    ("first/metrics.jsonl", b'{"loss": 1}\n', "train", "line 1 is no record with a step"),
    ("first/metrics.jsonl", None, "train", "metrics.jsonl cannot be read (Is a directory)"),
    ("first/metrics.jsonl", b"[" * 100_000 + b"\n", "train", "line 1 is no record with a step"),
    ("first/metrics.jsonl", b"1" * 5000 + b"\n", "train", "line 1 is no record with a step"),
    ("samples.npz", None, "sample", "samples.npz is a directory; move it away"),
    ("first/checkpoints", b"words", "train", "checkpoints is no directory; move it away"),
    ("first", b"words", "train", "first is no directory; move it away"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("points") / "run"
    assert main("all", "--workdir", path, "--train.steps", 2) == 0
    return path


def contents(run):
    """Every file of a run, and when it was written."""
    paths = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


@pytest.mark.parametrize(("name", "content", "command", "message"), DAMAGE)
def test_damaged_files_are_named_before_any_work(
    finished, tmp_path, capsys, name, content, command, message
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    changed = json.loads((run / "config.json").read_text())
    if isinstance(content, dict):
        content = json.dumps(changed | content).encode()
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    (run / name).mkdir() if content is None else (run / name).write_bytes(content)
    steps = ("--train.steps", 4) if command == "train" else ()
    before = contents(run)
    code = main(command, "--workdir", run, *steps)
    output = capsys.readouterr()
    if message is None:  # a number of any size is one
        assert code == 0
        return
    assert code == 2, output.err
    assert "\n" not in output.err.rstrip("\n")
    assert message in output.err
    assert contents(run) == before


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 1, "error: out of memory; try a larger --train.accumulate"),
        (FileNotFoundError("no a\nb\r\x1b"), 2, r"error: no a\nb\r\x1b"),
        (MemoryError("8 EiB"), 1, "error: out of memory (8 EiB); try"),
        (FileExistsError(17, "File exists", "samples"), 2, "File exists: 'samples'"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), 2, "File name too long: 'a'"),
        (OSError(errno.EIO, "Input/output error", "a"), 1, "Input/output error: 'a'"),
    ],
)
def test_errors_of_the_system_are_one_line(capsys, error, code, message):
    def fail():
        raise error

    assert cli.guarded(fail) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_directory_without_a_name_is_refused(capsys):
    assert main("train", "--workdir=") == 2
    assert "the work directory has no name" in capsys.readouterr().err


def test_another_kind_of_run_is_named(tmp_path, capsys):
    assert main("train", "--workdir", tmp_path, "--train.steps", 1) == 0
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"task": "lines"}))
    assert main("sample", "--workdir", tmp_path) == 2
    assert "holds a run of the task 'lines'" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"workdir": "x"}))
    assert main("sample", "--workdir", tmp_path) == 2
    assert "is of an older version" in capsys.readouterr().err


def test_a_run_from_before_a_field_came_is_resumed_at_its_default(tmp_path):
    """A field that came later may not change either."""

    def without(values, *names):
        return {name: value for name, value in values.items() if name not in names}

    config = PointConfig(workdir=str(tmp_path))
    stored = without(cli.stored_form(config), "pretrained")
    stored["train"] = without(stored["train"], "beta1", "weight_decay")
    workdir = Workdir(tmp_path)
    workdir.create()
    workdir.write_config(stored, ())
    (workdir.stage("first").checkpoints / "10").mkdir(parents=True)
    with cli.claim(workdir, config):
        pass
    changed = dataclasses.replace(config, train=dataclasses.replace(config.train, beta1=0.8))
    with (
        pytest.raises(WorkdirError, match=r"\(train\.beta1: None -> 0\.8\)"),
        cli.claim(workdir, changed),
    ):
        pass
