"""Figures of the TPUs for which programs are estimated."""

import dataclasses

__all__ = ["CHIPS", "Chip"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TensorCore of a chip, and how libtpu calls the chip.

    Attributes:
      name: as in the names of topologies.
      accelerator: what the environment variable TPU_ACCELERATOR_TYPE says of a host with it.
      gigahertz: its clock: the published bf16 peak over 2 width^2 MXUs rows operations a cycle.
      gigabytes: 10^9 bytes a second from its HBM.
      mxus: the number of its matrix units.
      width: rows and columns of weights in a matrix unit.
      rows: rows of the left operand that a matrix unit takes in a cycle.
    """

    name: str
    accelerator: str
    gigahertz: float
    gigabytes: float
    mxus: int
    width: int
    rows: int

    def __str__(self):
        return self.name

    @property
    def bytes_per_cycle(self) -> float:
        """Bytes from HBM in one cycle."""
        return self.gigabytes / self.gigahertz

    def microseconds(self, cycles: float | int) -> float:
        """The time of so many cycles."""
        return cycles / self.gigahertz / 1e3


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "v5litepod-4", 1.5, 819.0, mxus=4, width=128, rows=1),
        Chip("v6e", "v6e-4", 1.75, 1640.0, mxus=2, width=256, rows=2),
    )
}
