"""What a run would be: its configuration, sizes, memory and operations, before anything is done."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gen_jax import cli, memory, operations, parallel, runs, training
from gen_jax import config as config_lib
from gen_jax.config import RunConfig
from gen_jax.task import Stage
from gen_jax.training_step import abstract_state, make_step
from gen_jax.workdir import Workdir

__all__ = ["dry_run", "training_step"]


def dry_run(
    name: str, config: RunConfig, workdir: Workdir, phases: tuple[str, ...], data: Any
) -> None:
    """Prints the configuration, and for each stage what a step takes; nothing is written.

    A step is compiled, which gives its memory on the devices at hand.

    Args:
      name: of the experiment.
      config: of the run.
      workdir: its directory, which need not exist.
      phases: the commands, of which the first trains.
      data: of `config.load` for these phases.
    """
    print(f"{name}: {parallel.device_banner()}; {workdir.path}")
    task, mesh = runs.make_task(config, workdir, phases, data), parallel.data_mesh()
    values = config_lib.flatten(config_lib.to_dict(config))
    options = {f"--{key}".replace("_", "-"): repr(value) for key, value in values.items()}
    cli.print_summary("configuration", options)
    if task.sizes:
        cli.print_summary("data", task.sizes)
    for stage in task.stages:
        given = stage.initial is not None
        training.check_start(stage.training(config), stage.trainable, mesh, given)
        cli.print_summary(f"training of {stage.name}", _describe(config, stage, mesh))


def training_step(
    config: RunConfig, stage: Stage, mesh: Mesh
) -> tuple[Callable[..., Any], tuple[Any, dict[str, np.ndarray], np.ndarray]]:
    """The step of training of a stage, and its arguments: state (shapes alone), batch and flags.

    Args:
      config: of the run.
      stage: of its task.
      mesh: of `parallel.data_mesh`.
    """
    train = stage.training(config)
    state = abstract_state(train, stage.trainable)
    if not train.ema:
        state = state.replace(ema=None)
    batch = stage.batch_like() if stage.batch_like else stage.batch(0, (0, 1), {})
    step = make_step(stage.trainable, train, mesh)
    return step, (state, batch, np.zeros(mesh.size, np.int32))


def _describe(config: RunConfig, stage: Stage, mesh) -> dict[str, Any]:
    train = stage.training(config)
    held = abstract_state(train, stage.trainable)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))
    step, arguments = training_step(config, stage, mesh)
    batch = arguments[1]
    peak = operations.peak_memory(step.lower(*arguments).compile())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(stage.abstract_params()))
    shapes = {name: f"{leaf.dtype} {list(leaf.shape)}" for name, leaf in batch.items()}
    return {
        "parameters": f"{parameters:,}",
        "state_in_checkpoints": memory.readable(held),
        **{f"batch_{name}": shape for name, shape in shapes.items()},
        "operations_per_step": f"{mesh.size * operations.count(step, *arguments):.4g}",
        "memory_of_a_step_per_device": memory.readable(peak),
    }
