"""Checkpoints: Orbax behind three functions, with a digest of every leaf.

Orbax commits a step atomically but does not notice a flipped bit in array data; the digests do.
A checkpoint is a few named trees (say "ema" and "state") and a JSON record.
"""

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import pathlib
import re
import shutil
import stat
import time
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gen_jax import hosts, whole_file
from gen_jax.bounded import LARGEST_RECORD
from gen_jax.sealed import seal, unseal
from gen_jax.trees import named_leaves

__all__ = ["DamagedCheckpoint", "Restored", "digest", "restore", "save", "steps", "tidy"]

_VALUES = "d"  # the folder of the values of arrays, as TensorStore names it
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of folders that are no steps, to Orbax too
FORMAT = 2  # 1 had the trees "params", "ema" and "state", in the work directory itself

# An error of a thread of Orbax or of TensorStore is raised by `save`; the tracebacks that they log
# besides, one for each thread, are noise. So are those of metadata of which nothing is read here.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread" not in record.getMessage())
logging.getLogger("absl").addFilter(lambda record: "Metadata file" not in record.getMessage())
logging.getLogger("asyncio").addFilter(lambda record: "OCDBT" not in record.getMessage())


class DamagedCheckpoint(ValueError):
    """A checkpoint does not hold what was saved; the message names the step and the leaf."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What was read back.

    Attributes:
      step: its step.
      trees: the trees asked for, with NumPy leaves.
      record: the JSON record saved with them.
    """

    step: int
    trees: dict[str, Any]
    record: dict


def steps(directory: str | os.PathLike) -> list[int]:
    """The steps committed in a directory, ascending; empty where it does not exist."""
    path = pathlib.Path(directory)
    if not path.is_dir():
        return []
    return sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdecimal())


def save(
    directory: str | os.PathLike,
    step: int,
    trees: Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    keep: int,
) -> None:
    """Writes a checkpoint whole and returns when it is on disk, where a loss of power leaves it.

    Checkpoints of this step and of later ones, which a run only comes to save over when they are
    damaged, are moved aside, to "<step>.damaged".

    Args:
      directory: where the steps are kept.
      step: of this checkpoint.
      trees: trees of arrays by name; replicated over all devices. Every process calls this.
      record: small JSON values kept beside them.
      keep: newest checkpoints to keep; older ones are removed once the new one is on disk.

    Raises:
      FloatingPointError: a leaf is not finite; nothing is written.
      OSError: the disk is full or the like; older checkpoints are untouched. Where one of those
        cannot be removed the error names it, and the new one is saved.
    """
    items, digests = {}, {}
    for name, tree in trees.items():
        items[name] = {leaf: np.asarray(value) for leaf, value in named_leaves(tree).items()}
        for leaf, value in items[name].items():
            # By jnp, for which bfloat16 is a float too.
            if jnp.issubdtype(value.dtype, jnp.inexact) and not np.isfinite(value).all():
                raise FloatingPointError(
                    f"checkpoint of step {step} not saved: {name}.{leaf} is not finite"
                )
            digests[f"{name}.{leaf}"] = digest(value)
    content = {"format": FORMAT, "step": step, "digests": digests, "record": dict(record)}
    meta = seal(content)
    arguments = {name: ocp.args.PyTreeSave(item) for name, item in items.items()}
    path, main = pathlib.Path(directory).absolute(), jax.process_index() == 0
    if main:
        for later in (other for other in steps(path) if other >= step):
            _move_aside(path / str(later))
    try:
        if main:
            whole_file.make_folder(path)
        with _manager(path, create=True) as manager:
            manager.save(
                step,
                args=ocp.args.Composite(**arguments, meta=ocp.args.JsonSave(meta)),
                force=True,
            )
            manager.wait_until_finished()
        if main:  # Orbax and TensorStore have seen to some of its files and folders, not to all
            whole_file.sync_tree(path / str(step))
            whole_file.sync(path)
    except (ValueError, OSError) as error:  # ValueError where TensorStore could not write
        if main:
            _remove_half_written(path, step)
        raise OSError(f"checkpoint of step {step} not saved in {path}: {_reason(error)}") from error
    if main:
        _prune(path, keep)
    hosts.meet("a checkpoint is saved")


def tidy(directory: str | os.PathLike, *, keep: int) -> None:
    """Removes what a killed process left of steps, as the next `save` does, where none follows.

    Args:
      directory: where the steps are kept; no other process writes there.
      keep: newest checkpoints to keep.

    Raises:
      OSError: something cannot be removed.
    """
    path = pathlib.Path(directory).absolute()
    _prune(path, keep)
    for folder in path.glob(f"*{_TEMPORARY}*"):
        shutil.rmtree(folder)


def restore(
    directory: str | os.PathLike, abstract: Mapping[str, Any], *, step: int | None = None
) -> Restored:
    """Reads a checkpoint and verifies every leaf.

    Args:
      directory: where the steps are kept.
      abstract: for each tree to read, a tree of the same structure whose leaves have the shape
        and dtype expected (arrays or `jax.ShapeDtypeStruct`). Where it is empty, only the record is
        read.
      step: which one; None for the latest that is whole, with a warning for each that is not.

    Raises:
      FileNotFoundError: there is no checkpoint, or not this step.
      DamagedCheckpoint: the step asked for, or every step, is damaged.
      OSError, MemoryError: a file is there and cannot be read, or there is no memory for it; that
        is no damage, and no reason to take another step.
      ValueError: names, shapes or dtypes are not the expected ones, or the checkpoint is of another
        version of gen_jax.
    """
    available = steps(directory)
    if not available:
        raise FileNotFoundError(f"no checkpoint in {directory}")
    if step is not None:
        if step not in available:
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {directory}; there are {available}"
            )
        return _restore(directory, abstract, step)
    for candidate in reversed(available):
        try:
            return _restore(directory, abstract, candidate)
        except DamagedCheckpoint as error:
            warnings.warn(f"{error}; falling back to the one before", stacklevel=2)
    raise DamagedCheckpoint(f"every checkpoint in {directory} is damaged: steps {available}")


def _restore(directory, abstract, step):
    path = pathlib.Path(directory).absolute()
    _check_files(path, step)
    try:
        manager = _manager(path)
    except ValueError as error:  # Orbax reads what it left in the folders of all steps
        raise DamagedCheckpoint(
            f"checkpoint of step {step} is damaged: a _CHECKPOINT_METADATA in {path} cannot be "
            f"read ({_first_line(error)}); move that file away"
        ) from error
    with manager:
        meta = _read_meta(manager, step)
        trees = {}
        for name, tree in abstract.items():
            expected = named_leaves(tree)
            _check_layout(name, expected, meta["digests"], step)
            leaves = _read_leaves(manager, step, name, expected)
            for leaf, wanted in expected.items():
                value = leaves[leaf]
                if digest(value) != meta["digests"][f"{name}.{leaf}"]:
                    raise DamagedCheckpoint(
                        f"checkpoint of step {step} is damaged: {name}.{leaf} is not what was saved"
                    )
                if value.shape != wanted.shape or value.dtype != wanted.dtype:
                    raise _OtherLeaf(step, f"{name}.{leaf}", value, wanted)
            structure = jax.tree.structure(tree)
            trees[name] = jax.tree.unflatten(structure, [leaves[leaf] for leaf in expected])
    return Restored(step, trees, meta["record"])


class _OtherLeaf(ValueError):
    def __init__(self, step, leaf, found, wanted):
        super().__init__(
            f"checkpoint of step {step}: {leaf} is {found.dtype}{found.shape}, "
            f"expected {wanted.dtype}{wanted.shape}; was it another configuration?"
        )


def _check_files(path, step):
    """Refuses records that are larger than any; Orbax reads those of all steps, without a limit.

    What is half-written or was moved aside is no step: its folder has a dot in its name.
    """
    for folder, folders, names in os.walk(path):
        folders[:] = [n for n in folders if n != _VALUES and not re.match(r"\d+\.", n)]
        for name in names:
            with contextlib.suppress(OSError):  # Orbax meets it, too
                status = os.stat(file := os.path.join(folder, name))
                if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_RECORD:
                    raise DamagedCheckpoint(
                        f"checkpoint of step {step} is damaged: {file} has {status.st_size} bytes "
                        "or is no file; move it away"
                    )


def _read_meta(manager, step):
    problem = f"checkpoint of step {step} is damaged: its record"
    try:
        read = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        meta = unseal(read["meta"])
    except Exception as error:  # Orbax promises no type for what a damaged file raises
        _check_readable(manager, step, error)
        raise DamagedCheckpoint(f"{problem} cannot be read ({_first_line(error)})") from error
    if meta is None:
        raise DamagedCheckpoint(f"{problem} is not what was saved")
    if meta["format"] != FORMAT:
        age = "an older" if meta["format"] < FORMAT else "a newer"
        raise ValueError(
            f"checkpoint of step {step} in {manager.directory} is of {age} version of gen_jax "
            f"(format {meta['format']}, not {FORMAT}); train again in another --workdir"
        )
    if (saved := meta.get("step", step)) != step:
        raise DamagedCheckpoint(
            f"checkpoint of step {step} is damaged: its record is of step {saved}, as where a "
            "folder was copied under another name"
        )
    return meta


def _read_leaves(manager, step, name, expected):
    leaves = list(expected)

    def read(chosen):
        arguments = ocp.args.PyTreeRestore(
            item=dict.fromkeys(chosen, 0),
            restore_args={leaf: ocp.RestoreArgs(restore_type=np.ndarray) for leaf in chosen},
            partial_restore=True,
        )
        item = manager.restore(step, args=ocp.args.Composite(**{name: arguments}))[name]
        return {leaf: np.asarray(item[leaf]) for leaf in chosen}

    try:
        _check_shapes(manager, step, name, expected)
        return read(leaves)
    except (_OtherLeaf, DamagedCheckpoint):
        raise
    except Exception as error:  # as above; look for the leaf that is to blame
        _check_readable(manager, step, error)
        for leaf in leaves:
            try:
                read([leaf])
            except Exception as cause:
                raise DamagedCheckpoint(
                    f"checkpoint of step {step} is damaged: {name}.{leaf} cannot be read "
                    f"({_first_line(cause)})"
                ) from cause
        raise DamagedCheckpoint(
            f"checkpoint of step {step} is damaged: {name} cannot be read ({_first_line(error)})"
        ) from error


def _check_shapes(manager, step, name, expected):
    """Refuses leaves, and pieces of them, that are larger than what is expected, unread."""
    path = manager.directory / str(step) / name
    stored = ocp.PyTreeCheckpointHandler().metadata(path).tree
    for leaf, wanted in expected.items():
        found, most = stored[leaf], math.prod(wanted.shape)
        if math.prod(found.shape) > most:
            raise _OtherLeaf(step, f"{name}.{leaf}", found, wanted)
        piece = found.storage.chunk_shape if found.storage else ()
        if math.prod(piece) > max(most, 1):
            raise DamagedCheckpoint(
                f"checkpoint of step {step} is damaged: {name}.{leaf} is in pieces of {piece}"
            )


def _check_readable(manager, step, error):
    """Raises what keeps the files of a step from being read, where that is why there was an error.

    Orbax and TensorStore say of a file without permission that it is not there, and of others
    little: the files are read once more.
    """
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        raise MemoryError(f"checkpoint of step {step} does not fit") from error

    def refuse(reason):
        absent = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        if not isinstance(reason, absent):
            raise OSError(
                f"checkpoint of step {step} cannot be read: {reason.filename}: {reason.strerror}"
            ) from reason

    for folder, _, names in os.walk(manager.directory / str(step), onerror=refuse):
        for name in names:
            path = os.path.join(folder, name)
            try:
                with open(path, "rb") as file:
                    while file.read(2**20):
                        pass
            except OSError as reason:
                reason.filename = path
                refuse(reason)


def _check_layout(name, expected, digests, step):
    stored = {key.removeprefix(f"{name}.") for key in digests if key.startswith(f"{name}.")}
    missing, extra = sorted(set(expected) - stored), sorted(stored - set(expected))
    if missing or extra:
        raise ValueError(
            f"checkpoint of step {step} holds another {name}: it lacks {missing[:5]}, and has "
            f"{extra[:5]} besides; was it another configuration?"
        )


def _remove_half_written(path, step):
    """Removes what a failed save leaves, which would keep a full disk full.

    Writes that are under way may add to it for a moment.
    """
    with contextlib.suppress(FileNotFoundError):  # it is there where it only did not get to disk
        _unname(path / str(step))
    for _ in range(20):
        left = list(path.glob(f"{step}{_TEMPORARY}*"))
        if not left:
            return
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


def _prune(path, keep):
    """Removes all steps but the newest; none is half there, whatever happens meanwhile."""
    old = [_unname(path / str(step)) for step in steps(path)[:-keep]]
    if old:
        whole_file.sync(path)
    for folder in old:
        shutil.rmtree(folder)


def _unname(path):
    """Makes a step a folder that is none, which the next save removes where nobody else does."""
    return path.rename(path.with_name(path.name + _TEMPORARY))


def _move_aside(path):
    number, aside = 1, path.with_name(f"{path.name}.damaged")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged.{number}")
    os.replace(path, aside)


def _manager(path, *, create=False):
    """Of all processes together where it creates; else of this one, which waits for no other."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process {index}"
    )
    together = ocp.options.MultiprocessingOptions()
    options = ocp.CheckpointManagerOptions(
        multiprocessing_options=together if create else alone,
        enable_async_checkpointing=False,
        create=create,
        cleanup_tmp_directories=create,  # what a killed run left half-written, or half-removed
    )
    return ocp.CheckpointManager(path, options=options)


def digest(value: np.ndarray) -> str:
    """A hash of an array: its dtype, shape and bits."""
    head = f"{value.dtype.str}{value.shape}".encode()
    total = hashlib.blake2b(head, digest_size=16)
    total.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))  # copies no mapped file
    return total.hexdigest()


def _first_line(error):
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _reason(error):
    """What the system said; TensorStore quotes its number in a message of many paths."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else _first_line(error)
