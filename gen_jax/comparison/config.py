"""The options of a comparison; importing this loads no jax."""

import typing

from gen_jax.config import frozen

__all__ = ["CompareConfig"]


@frozen
class CompareConfig:
    """Every strategy on the same data, side by side."""

    data: typing.Literal["shapes", "cifar10", "text"] = "shapes"
    """What is generated: embedded shapes, CIFAR-10, or the embedded English."""
    data_dir: str = ""
    """Folder of CIFAR-10, which holds cifar-10-batches-bin."""
    workdir: str = ""
    """Where everything is left, and gone on from; empty for runs/compare_DATA."""
    runs: str = ""
    """Folder of trained runs, named as here; empty to train them in the work directory."""
    strategies: str = ""
    """Names of strategies, with commas; empty for all."""
    plugin: str = ""
    """A Python file with strategies of your own."""
    quick: bool = False
    """Fewer strategies, a quarter of the training, fewer samples."""
    samples: int = 0
    """Samples of each strategy that are scored; 0 for what the data asks for."""
    batches: tuple[int, ...] = (1, 16, 256)
    """Batch sizes to time, ascending from 1; larger ones are left out once they gain little."""
    rounds: int = 5
    """Rounds of timing, in each of which all strategies take turns."""
    seed: int = 0
    """Of the samples."""

    def __post_init__(self):
        if self.samples < 0 or self.rounds < 1:
            raise ValueError("samples must not be negative, and rounds at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
        if self.batches[:1] != (1,) or sorted(set(self.batches)) != list(self.batches):
            raise ValueError(f"batches must ascend from 1, got {self.batches}")
        if self.data == "cifar10" and not (self.data_dir or self.runs):
            raise ValueError("--data cifar10 needs --data-dir, the folder of cifar-10-batches-bin")
        if self.data != "cifar10" and self.data_dir:
            raise ValueError("--data-dir is for --data cifar10")

    @property
    def place(self) -> str:
        """The work directory."""
        return self.workdir or f"runs/compare_{self.data}{'_quick' if self.quick else ''}"
