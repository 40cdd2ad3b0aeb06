"""Devices: one axis "data" over all devices of all hosts.

A step is written for one device's share of the batch and mapped with `jit(shard_map)`; one device
is a mesh of one. Parameters are replicated, examples are split.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gen_jax.config import DistributedConfig

AXIS = "data"


def start(config: DistributedConfig) -> None:
    """Joins the processes of a multi-host run; call it before anything touches a device."""
    if config.coordinator == "auto":
        jax.distributed.initialize()
    elif config.coordinator:
        jax.distributed.initialize(config.coordinator, config.processes, config.index)


def data_mesh() -> Mesh:
    """All devices of all hosts."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def local_mesh() -> Mesh:
    """The devices of this host."""
    return Mesh(np.array(jax.local_devices()), (AXIS,))


def split(mesh: Mesh, tree):
    """This host's share of the examples, [B / hosts, ...], as global arrays [B, ...]."""
    sharding = NamedSharding(mesh, P(AXIS))
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
    )


def replicate(mesh: Mesh, tree):
    """The same values on every device; each host passes all of them."""
    sharding = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
    )


def map_devices(
    mesh: Mesh, f: Callable, in_specs, out_specs, *, donate: tuple[int, ...] = ()
) -> Callable:
    """The per-device program `f` over the mesh, compiled; collectives name the axis "data"."""
    mapped = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return jax.jit(mapped, donate_argnums=donate)


def device_banner() -> str:
    """One line that says what the program runs on."""
    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return (
        f"{len(devices)} x {', '.join(kinds)} ({devices[0].platform}){hosts}, jax {jax.__version__}"
    )
