"""scheduler_config.json of diffusers: a process and how it is sampled; importing this loads no jax.

An option that the file leaves out has the default of diffusers 0.42.
"""

import json
import os
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

from gen_jax.bounded import read_json
from gen_jax.interop.config_json import LARGEST, Refusals, is_count, unknown
from gen_jax.models.diffusion.config import DiffusionConfig
from gen_jax.models.diffusion.solvers import DDIM, Solver
from gen_jax.models.diffusion.time_grid import TimeGrid

__all__ = ["SCHEDULER", "read_ddim", "read_process", "to_ddim_options"]

SCHEDULER = "scheduler_config.json"

# The options that say which process a network was trained for, with the defaults of DDPMScheduler.
# Those of DDIMScheduler and others say nothing of the variance.
_PROCESS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "rescale_betas_zero_snr": False,
}
_PROCESS_VALUES = {
    "beta_schedule": {
        "linear": "linear",
        "scaled_linear": "scaled_linear",
        "squaredcos_cap_v2": "cosine",
    },
    "trained_betas": {None: None},
    "prediction_type": {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"},
    "variance_type": {
        "fixed_small": "fixed_small",
        "fixed_large": "fixed_large",
        "learned_range": "learned",
    },
    "rescale_betas_zero_snr": {False: False},
}

_PROCESS_OF_DDIM = {key: value for key, value in _PROCESS.items() if key != "variance_type"}

# What DDIMScheduler knows beside the process, with its defaults, and what the first versions of
# diffusers wrote, which it reads no longer.
_DDIM = {
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_OLD_DDIM = {"timestep_values": None, "timesteps": None, "tensor_format": None}


def read_process(directory: str | os.PathLike) -> DiffusionConfig | None:
    """The process that the scheduler beside a network describes; None where there is no scheduler.

    Args:
      directory: has scheduler_config.json, or the folder "scheduler" with it (a pipeline).

    Raises:
      ValueError: the file is damaged, or it describes a process that cannot be expressed.
    """
    given = pathlib.Path(directory).expanduser()
    paths = (given / SCHEDULER, given / "scheduler" / SCHEDULER)
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    refusals = Refusals(_PROCESS | _read(path))
    _check_process(refusals)
    if refusals.problems:
        problems = "; ".join(refusals.problems)
        raise ValueError(f"the process of {path} cannot be expressed: {problems}")
    return _to_process(refusals.options)


def read_ddim(directory: str | os.PathLike, steps: int) -> tuple[DiffusionConfig, DDIM]:
    """The process and the solver in a folder that diffusers' `DDIMScheduler` wrote.

    Args:
      directory: has scheduler_config.json.
      steps: of the solver, which the file does not say.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or of another scheduler, or names options that cannot be expressed
        or are unknown, or so many steps do not fit.
    """
    TimeGrid(steps)  # refuses what is no number of steps
    path = pathlib.Path(directory).expanduser() / SCHEDULER
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {SCHEDULER}")
    stored = _read(path)
    if (name := stored.get("_class_name")) != "DDIMScheduler":
        raise ValueError(f"{path} is not of a DDIMScheduler: _class_name={reprlib.repr(name)}")
    known = _PROCESS_OF_DDIM.keys() | _DDIM.keys() | _OLD_DDIM.keys()
    refusals = Refusals(_PROCESS | _DDIM | _OLD_DDIM | stored)
    refusals.problems += unknown(stored, known)
    _check_process(refusals)
    _check_ddim(refusals, steps)
    if refusals.problems:
        problems = "; ".join(refusals.problems)
        raise ValueError(f"the scheduler of {path} cannot be expressed: {problems}")
    process, options = _to_process(refusals.options), refusals.options
    leading = options["timestep_spacing"] == "leading"
    solver = DDIM(
        steps,
        options["timestep_spacing"],
        clip=options["clip_sample"],
        offset=options["steps_offset"] if leading else 0,
        end="clean" if options["set_alpha_to_one"] else "first",
    )
    solver.check(process)
    return process, solver


def to_ddim_options(process: DiffusionConfig, solver: Solver) -> dict[str, Any]:
    """The content of scheduler_config.json of a `DDIMScheduler` for the process and the solver.

    The number of steps is not in it, nor what only training reads.

    Raises:
      ValueError: `DDIMScheduler` cannot express the solver.
    """
    if not isinstance(solver, DDIM):
        raise ValueError(f"an LDMPipeline draws with ddim, not {solver.name}")
    if solver.eta or solver.guidance != 1 or solver.clipped_direction:
        raise ValueError(
            "the scheduler has neither eta nor guidance nor clipped_direction: leave these"
        )
    of_process = {
        "num_train_timesteps": process.timesteps,
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "beta_schedule": process.schedule,
        "prediction_type": process.prediction,
    }
    for key, table in _PROCESS_VALUES.items():
        if key in of_process:
            names = {ours: theirs for theirs, ours in table.items()}
            of_process[key] = names[of_process[key]]
    of_solver = {
        "clip_sample": solver.clip,
        "set_alpha_to_one": solver.end == "clean",
        "steps_offset": solver.offset,
        "timestep_spacing": solver.spacing,
    }
    options = _PROCESS_OF_DDIM | _DDIM | of_process | of_solver
    refusals = Refusals(options | _OLD_DDIM)
    _check_ddim(refusals, solver.steps)
    if refusals.problems:
        raise ValueError(f"diffusers cannot express the solver: {'; '.join(refusals.problems)}")
    return {"_class_name": "DDIMScheduler"} | options


def _read(path):
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged: it holds no options")
    return stored


def _check_process(refusals: Refusals) -> None:
    """Refuses the options of a process that cannot be expressed."""
    for key, values in _PROCESS_VALUES.items():
        refusals.unless(
            key,
            lambda value, values=values: (
                isinstance(value, (str, bool, type(None))) and value in values
            ),
            " or ".join(map(json.dumps, values)),
        )
    refusals.unless("num_train_timesteps", is_count, f"1 to {LARGEST}")
    for key in ("beta_start", "beta_end"):
        refusals.unless(
            key,
            lambda value: type(value) in (int, float) and 0 < value < 1,
            "a number between 0 and 1",
        )


def _check_ddim(refusals: Refusals, steps: int) -> None:
    """Refuses what `DDIM` does not do, of a process that can be expressed."""
    options = refusals.options
    for key in ("clip_sample", "set_alpha_to_one"):
        refusals.unless(key, lambda value: type(value) is bool, "true or false")
    refusals.unless(
        "clip_sample_range",
        options["clip_sample"] is False or options["clip_sample_range"] == 1,
        "1",
    )
    refusals.unless("thresholding", options["thresholding"] is False, "false")
    refusals.unless(
        "steps_offset",
        lambda value: type(value) is int and value >= 0,
        "an integer that is not negative",
    )
    # DDIMScheduler steps from t to t - T // steps whatever its grid. That is the next point of
    # "leading", and of "trailing" where the steps divide T, but never of "linspace".
    total = options["num_train_timesteps"]
    even = is_count(total) and total % steps == 0
    trailing = '"trailing"' + ("" if even else f", where {steps} steps divide {total}")
    refusals.unless(
        "timestep_spacing",
        lambda value: value == "leading" or (value == "trailing" and even),
        f'"leading", or {trailing}',
    )
    refusals.unless("timestep_values", options["timestep_values"] is None, "null")
    refusals.unless("timesteps", options["timesteps"] in (None, total), f"null or {total}")


def _to_process(options: Mapping[str, Any]) -> DiffusionConfig:
    """The process of options that `_check_process` does not refuse."""
    values = {key: table[options[key]] for key, table in _PROCESS_VALUES.items()}
    return DiffusionConfig(
        timesteps=options["num_train_timesteps"],
        schedule=values["beta_schedule"],
        beta_start=float(options["beta_start"]),
        beta_end=float(options["beta_end"]),
        prediction=values["prediction_type"],
        variance=values["variance_type"],
    )
