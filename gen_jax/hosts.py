"""Hosts: joining the processes of one run, and waiting for one another.

A collective gives up when another host comes half a minute late to it, and hosts compile, and read
their data, at their own pace. They therefore `meet` before a collective that follows such work.
"""

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from gen_jax.config import DistributedConfig

__all__ = ["check_platform", "gather", "meet", "start"]

_PATIENCE = 600  # seconds that the first host waits for the last


def start(config: DistributedConfig) -> None:
    """Joins the processes of a run on several hosts; call it before anything touches a device.

    Raises:
      ValueError: there is no device of the platforms that JAX_PLATFORMS names.
    """
    if config.coordinator == "auto":
        jax.distributed.initialize()
    elif config.coordinator:
        jax.distributed.initialize(config.coordinator, config.processes, config.index)
    check_platform()


def check_platform() -> None:
    """Refuses to go on where jax has no device.

    Raises:
      ValueError: as `start` does.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # of an unknown one, and of a missing plugin
        reason = str(error).partition(" (")[0].rstrip(". ") or "its plugin is not installed"
        raise ValueError(
            f"jax finds no device of JAX_PLATFORMS={jax.config.jax_platforms} ({reason}): leave it "
            "unset to take what there is, or install the jax of that platform"
        ) from None


def meet(place: str) -> None:
    """Waits until all hosts are here; on one host it returns at once.

    Args:
      place: the name of this place in the program, the same on all hosts.
    """
    ocp.multihost.get_barrier_sync_fn()(key=place, timeout_ms=1000 * _PATIENCE)


def gather(value: int) -> list[int]:
    """The values of all hosts, in the order of their indices; every host calls it."""
    if jax.process_count() == 1:
        return [value]
    meet("gather")
    return multihost_utils.process_allgather(np.int32(value)).tolist()
