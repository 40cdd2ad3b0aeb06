"""Devices: one axis "data" over all devices of all hosts.

A step is written for one device's share of the batch and mapped with `jit(shard_map)`; one device
is a mesh of one. Parameters are replicated, examples are split.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

__all__ = [
    "AXIS",
    "data_mesh",
    "device_banner",
    "gather",
    "is_varying",
    "local_mesh",
    "map_devices",
    "mean",
    "replicate",
    "split",
    "sum",
    "varying",
]

AXIS = "data"


def data_mesh() -> Mesh:
    """All devices of all hosts."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def local_mesh() -> Mesh:
    """The devices of this host."""
    return Mesh(np.array(jax.local_devices()), (AXIS,))


def split(mesh: Mesh, tree: Any) -> Any:
    """This host's share of the examples, [B / hosts, ...], as global arrays [B, ...]."""
    sharding = NamedSharding(mesh, P(AXIS))
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
    )


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The same values on every device; each host passes all of them."""
    sharding = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
    )


def map_devices(
    mesh: Mesh, f: Callable, in_specs: Any, out_specs: Any, *, donate: tuple[int, ...] = ()
) -> Callable:
    """The per-device program `f` over the mesh, compiled; collectives name the axis "data".

    Arguments whose places are in `donate` give their memory to the results, except on CPUs: there
    the compiler first copies each donated array that several kernels read, which made up a fifth
    of a training step of a small network.
    """
    mapped = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return jax.jit(mapped, donate_argnums=donate if _donation_pays(mesh) else ())


def _donation_pays(mesh):
    return mesh.devices.flat[0].platform != "cpu"


def mean(tree: Any) -> Any:
    """The mean of each leaf over all devices; only inside a program of `map_devices`."""
    return jax.lax.pmean(tree, AXIS)


def sum(tree: Any) -> Any:
    """The sum of each leaf over all devices; only inside a program of `map_devices`.

    A leaf that is equal on every device is counted once for each of them.
    """
    return jax.lax.psum(tree, AXIS)


def gather(tree: Any) -> Any:
    """The shares [n, ...] of all devices one after the other, [devices x n, ...], on every device.

    Only inside a program of `map_devices`.
    """
    index, devices = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)

    def one(leaf):
        whole = jnp.zeros((devices, *leaf.shape), leaf.dtype)
        whole = sum(varying(whole).at[index].set(leaf))
        return whole.reshape(-1, *leaf.shape[1:])

    return jax.tree.map(one, tree)


def varying(tree: Any) -> Any:
    """The same values, marked as each device's own; only inside a program of `map_devices`.

    The gradient with respect to a value that is equal on every device is summed over devices by
    jax. With respect to a value that is marked in this way, each device has the gradient of its own
    share of the batch, which `mean` then averages.
    """
    return jax.tree.map(
        lambda leaf: leaf if is_varying(leaf) else jax.lax.pcast(leaf, AXIS, to="varying"), tree
    )


def is_varying(leaf: Any) -> bool:
    """Whether an array inside a program of `map_devices` may differ from device to device."""
    kind = jax.typeof(leaf)
    # Which axes a value varies over is `vma` in older releases of jax 0.10.
    return AXIS in (kind.vma if hasattr(kind, "vma") else kind.mat.varying)


def device_banner() -> str:
    """One line that says what the program runs on."""
    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return (
        f"{len(devices)} x {', '.join(kinds)} ({devices[0].platform}){hosts}, jax {jax.__version__}"
    )
