"""Records of training for TensorBoard, beside metrics.jsonl."""

import os
import pathlib

import numpy as np
from jaxtyping import Integer, UInt8

from gen_jax import extras

__all__ = ["EventLog", "check"]


def check() -> None:
    """Refuses to go on where the package is missing.

    Raises:
      ValueError: it is; the sentence says how to install it.
    """
    extras.require("tensorboardX", "tensorboard", "train.tensorboard needs")


class EventLog:
    """A file of events, which `tensorboard --logdir` reads.

    Args:
      path: the folder of the files; made where it does not exist.
      step: the step that training resumes from; what earlier files have after it is not shown.

    Raises:
      ValueError: the package is missing.
    """

    def __init__(self, path: pathlib.Path, step: int = 0):
        package = extras.require("tensorboardX", "tensorboard", "train.tensorboard needs")
        # The package names files by the second: one that goes on in the same must not replace it.
        suffix = f".{os.getpid()}.{step}"
        self._writer = package.SummaryWriter(str(path), purge_step=step + 1, filename_suffix=suffix)

    def write(self, record: dict) -> None:
        """Adds the numbers of a record, which has a "step"."""
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def count(self, step: int, name: str, counts: Integer[np.ndarray, " K"]) -> None:
        """Adds how often each of K things came as a histogram over their numbers, from 0."""
        numbers = np.arange(len(counts))
        self._writer.add_histogram_raw(
            name,
            min=0,
            max=len(counts) - 1,
            num=int(counts.sum()),
            sum=int(counts @ numbers),
            sum_squares=int(counts @ numbers**2),
            bucket_limits=(numbers + 0.5).tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )
        self._writer.flush()

    def show(self, step: int, shown: str | UInt8[np.ndarray, "height width 3"]) -> None:
        """Adds the samples of a step, as a text or a picture."""
        if isinstance(shown, str):  # TensorBoard reads Markdown: an indented text stays as it is
            lines = "".join(f"    {line}\n" for line in shown.splitlines())
            self._writer.add_text("samples", lines, step)
        else:
            self._writer.add_image("samples", shown, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
