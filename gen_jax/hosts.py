"""Hosts: joining the processes of one run, and waiting for one another.

A collective gives up when another host comes half a minute late to it, and hosts compile, and read
their data, at their own pace. They therefore `meet` before a collective that follows such work.
No signal is heard in code of jax that waits for other hosts, so a thread calls it.
"""

import concurrent.futures
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from gen_jax import host_watch
from gen_jax.config import DistributedConfig

__all__ = ["check_platform", "gather", "meet", "start"]

_PATIENCE = 600  # seconds that the first host waits for the last


def start(config: DistributedConfig, resume: str = "") -> None:
    """Joins the processes of a run on several hosts; call it before anything touches a device.

    From then on this process ends with one line when another is gone; see `host_watch`.

    Args:
      config: how they find each other.
      resume: the command that goes on with the run.

    Raises:
      ValueError: there is no device of the platforms that JAX_PLATFORMS names, no cluster that
        tells who is there, or a process that does not fit the others.
      OSError: not all processes came.
    """
    if config.coordinator:
        _join(config, f"go on from the last checkpoint, on any number of hosts: {resume}")
    check_platform()


def _join(config, advice):
    address, processes, index = config.coordinator, config.processes, config.index
    devices = None
    if address == "auto":
        address, processes, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, int(config.wait)
        )
        if None in (address, processes, index):
            raise ValueError(
                "no cluster that jax knows tells who is there; give --distributed.coordinator "
                "host:port, --distributed.processes and --distributed.index"
            )
    _, port = host_watch.join(
        address,
        processes,
        index,
        patience=config.patience,
        wait=config.wait,
        advice=advice,
        port=_free_port,
    )
    if index != 0:
        port = host_watch.relay(address.rpartition(":")[0].strip("[]"), port)
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM from `signals`
    anywhere = "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"
    _waiting(
        lambda: jax.distributed.initialize(
            f"127.0.0.1:{port}",
            processes,
            index,
            devices,
            coordinator_bind_address=f"{anywhere}:{port}",
            initialization_timeout=int(config.wait),
            # The watch comes first.
            heartbeat_timeout_seconds=int(10 * config.patience) + 100,
        )
    )


def _free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


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

    Raises:
      TimeoutError: not all hosts came.
    """
    if jax.process_count() == 1:
        return
    barrier = ocp.multihost.get_barrier_sync_fn()
    try:
        _waiting(lambda: barrier(key=place, timeout_ms=1000 * _PATIENCE))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise TimeoutError(f"not all processes came within {_PATIENCE} s to: {place}") from error


def gather(place: str, tree: Any) -> Any:
    """The trees of all hosts as one of NumPy arrays [hosts, ...], in the order of their indices.

    Args:
      place: as of `meet`; every host comes here.
      tree: of arrays, of the same shapes on all hosts.

    Raises:
      TimeoutError: not all hosts came.
    """
    meet(place)
    if jax.process_count() == 1:
        return jax.tree.map(lambda leaf: np.asarray(leaf)[None], tree)
    return _waiting(lambda: multihost_utils.process_allgather(tree))


def _waiting(call: Callable[[], Any]) -> Any:
    """What a thread gets from a call; a signal ends the wait for it, and leaves the thread alone.

    It is none of a pool, for whose threads the interpreter waits at its end.
    """
    future: concurrent.futures.Future = concurrent.futures.Future()

    def work():
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result()
