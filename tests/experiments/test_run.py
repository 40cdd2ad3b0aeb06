"""What every family shares, on a family of three numbers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import common, run
from experiments.ddpm_cifar import TINY
from gen_jax import config as config_lib
from gen_jax.config import DistributedConfig, TrainConfig, to_dict
from gen_jax.workdir import Workdir, WorkdirError


@dataclasses.dataclass(frozen=True)
class Config:
    """A point that moves to where the data is."""

    workdir: str
    """Directory of the run."""
    train: TrainConfig = TrainConfig(
        steps=4, batch=8, learning_rate=0.1, warmup=0, log_every=1, checkpoint_every=2, ema=0.0
    )
    sample: run.SampleConfig = run.SampleConfig()
    evaluate: int = 0
    """Nothing."""
    distributed: DistributedConfig = DistributedConfig()
    pretrained: str = ""
    """Coordinates, with commas."""


class Points(run.Run):
    """The hooks, and what they were called with."""

    unit, units_per_example = "coordinates", 3
    results = ("samples.npz",)

    def check(self):
        if self.config.evaluate < 0:
            raise FileNotFoundError(f"no {self.splits} data")

    def init_params(self, key):
        return {"at": jax.random.normal(key, (3,))}

    def loss(self, params, batch, keys):
        value = jnp.square(params["at"] - batch["x"]).mean()
        return value, {"loss": value}

    def train_batch(self, step, shard):
        assert shard == (0, 1)
        return {"x": np.full((8, 3), 0.5, np.float32)}

    def record(self):
        return {"width": 3}

    def template(self, record):
        return {"at": jax.ShapeDtypeStruct((record["width"],), np.float32)}

    def published(self):
        at = np.array(self.config.pretrained.split(","), np.float32)
        return {"at": at}, {"width": len(at)}

    def validate(self, params):
        return {"mean": float(params["at"].mean())}

    def sample(self, params):
        self.keep_samples(points=np.asarray(params["at"])[None])
        return {"drawn": 1}

    def evaluate(self, params):
        np.testing.assert_array_equal(self.kept_samples()["points"][0], params["at"])
        return self.validate(params)


EXPERIMENT = common.Experiment(
    name="points",
    about="Points.",
    presets={"three": Config(workdir="runs/points")},
    commands=run.commands("points", Points, ("train", "sample", "evaluate")),
)


def main(*argv):
    return common.main(EXPERIMENT, [str(item) for item in argv])


def test_the_commands_are_the_phases_and_all():
    assert list(EXPERIMENT.commands) == ["all", "train", "sample", "evaluate"]
    assert list(run.commands("points", Points)) == ["all", *run.PHASES]


def test_a_family_is_its_hooks(tmp_path, capsys):
    assert main("--workdir", tmp_path, "--train.evaluate-every", 2) == 0
    printed = capsys.readouterr().out
    assert f"in {tmp_path}: config.json, metrics.jsonl, samples.npz, summary.json" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["parameters"], summary["step"], summary["drawn"]) == (3, 4, 1)
    rate = 3 * 8 * 4 / summary["train_seconds"]
    assert summary["coordinates_per_second"] == pytest.approx(rate)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/mean" in line] == [2, 4]
    # An earlier checkpoint, whose samples are not those on disk.
    assert main("evaluate", "--workdir", tmp_path, "--sample.checkpoint", 2) == 2
    assert "was drawn at step 4, the checkpoint is of step 2" in capsys.readouterr().err
    assert main("sample", "--workdir", tmp_path, "--sample.checkpoint", 2) == 0
    assert main("evaluate", "--workdir", tmp_path, "--sample.checkpoint", 2) == 0
    capsys.readouterr()


def test_published_parameters_are_drawn_from_where_nothing_is_trained(tmp_path, capsys):
    assert main("sample", "--workdir", tmp_path, "--pretrained", "1,2,3") == 0
    with np.load(tmp_path / "samples.npz") as file:
        np.testing.assert_array_equal(file["points"], [[1, 2, 3]])
        assert file["step"] == 0
    options = ("--pretrained", "1,2,3", "--train.learning-rate", 0)
    assert main("all", "--workdir", tmp_path, *options) == 0
    with np.load(tmp_path / "samples.npz") as file:
        np.testing.assert_array_equal(file["points"], [[1, 2, 3]])
        assert file["step"] == 4
    capsys.readouterr()


def test_data_that_does_not_fit_is_refused(tmp_path, capsys):
    for command, splits in (("train", "('train',)"), ("all", "('train', 'test')")):
        assert main(command, "--workdir", tmp_path, "--evaluate", -1) == 2
        assert f"no {splits} data" in capsys.readouterr().err


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


def test_a_run_from_before_a_field_came_is_resumed_at_its_default(tmp_path):
    stored = to_dict(TINY)
    stored["train"] = without(stored["train"], "beta1", "weight_decay", "final_rate")
    stored = without(stored, "pretrained", "diffusion")
    assert config_lib.from_dict(type(TINY), stored).train == TINY.train
    added = config_lib.added(type(TINY), stored)
    assert added["train.beta1"] == 0.9
    assert added["pretrained"] == ""
    assert added["diffusion.schedule"] == "linear"
    assert "workdir" not in added
    assert "model.widths" not in added

    workdir = Workdir(tmp_path)
    workdir.write_config(stored, ())
    (workdir.checkpoints / "10").mkdir(parents=True)
    config = dataclasses.replace(TINY, diffusion=type(TINY)(workdir="").diffusion)
    workdir.check_config(to_dict(config), run.free_keys(run.Run, config, stored))
    train = dataclasses.replace(TINY.train, beta1=0.8)
    config = dataclasses.replace(config, train=train)
    with pytest.raises(WorkdirError, match=r"\(train\.beta1: None -> 0\.8\)"):
        workdir.check_config(to_dict(config), run.free_keys(run.Run, config, stored))
