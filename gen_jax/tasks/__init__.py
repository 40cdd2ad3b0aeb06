"""Tasks: what is trained on what, and what sampling and evaluation mean there.

Each task is a package of its name: `config.py` has its configuration and reads its data, without
jax; `task.py` makes the `gen_jax.task.Task` of a configuration. Presets are in the experiments.
"""

import importlib
import pkgutil

from gen_jax.config import RunConfig

__all__ = ["config_class"]


def config_class(task: str) -> type[RunConfig]:
    """The class of the configurations of a task, by the name in a work directory.

    Raises:
      ValueError: there is no such task here, and none of this name was imported from elsewhere.
    """
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]
    if task in names:
        importlib.import_module(f"{__name__}.{task}.config")
    if task not in RunConfig.kinds:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(names)}")
    return RunConfig.kinds[task]
