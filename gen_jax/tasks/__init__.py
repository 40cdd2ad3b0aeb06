"""Tasks: what is trained on what, and what sampling and evaluation mean there.

Each task is a package: `config.py` has its configuration and reads its data, without jax; `task.py`
makes the `gen_jax.task.Task` of a configuration. Presets are in the experiments.
"""

from gen_jax.config import RunConfig, resolve

__all__ = ["TASKS", "config_class"]

TASKS = {
    "images": "gen_jax.tasks.images.config:ImagesConfig",
    "pixels": "gen_jax.tasks.pixels.config:PixelsConfig",
    "text": "gen_jax.tasks.text.config:TextRunConfig",
    "translation": "gen_jax.tasks.translation.config:TranslationRunConfig",
    "exact": "gen_jax.tasks.exact.config:ExactConfig",
}


def config_class(task: str) -> type[RunConfig]:
    """The class of the configurations of a task, by the name in a work directory.

    Raises:
      ValueError: there is no such task.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    return resolve(TASKS[task])
