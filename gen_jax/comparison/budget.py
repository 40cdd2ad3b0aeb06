"""What training takes: parameters, and operations counted from the traced step."""

import jax

from gen_jax import operations, parallel, runs
from gen_jax.config import RunConfig
from gen_jax.dry_run import training_step
from gen_jax.workdir import Workdir

__all__ = ["of_run"]


def of_run(config: RunConfig) -> dict[str, int]:
    """Parameters and operations of training of all stages of a trained run.

    Operations are those of matrix products and convolutions (see `operations.count`), over all
    steps and devices.

    Args:
      config: of the run, whose data is read.

    Returns:
      "parameters", "training_operations" and "training_examples", summed over its stages.
    """
    workdir, phases = Workdir(config.workdir), ("train",)
    task = runs.make_task(config, workdir, phases, config.load(workdir.path, phases))
    mesh = parallel.data_mesh()
    total = {"parameters": 0, "training_operations": 0, "training_examples": 0}
    for stage in task.stages:
        train = stage.training(config)
        step, arguments = training_step(config, stage, mesh)
        operations_of_step = mesh.size * operations.count(step, *arguments)
        total["parameters"] += sum(leaf.size for leaf in jax.tree.leaves(stage.abstract_params()))
        total["training_operations"] += train.steps * operations_of_step
        total["training_examples"] += train.steps * train.batch
    return total
