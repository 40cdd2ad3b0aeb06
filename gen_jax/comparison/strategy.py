"""What is compared: a strategy is how its model is trained, and its sampler. This loads no jax."""

import dataclasses
import difflib
import importlib.util
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from gen_jax.config import RunConfig

__all__ = ["Comparison", "Strategy", "with_plugin"]

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One entry of a comparison.

    Attributes:
      name: of lower-case letters, digits and underscores.
      title: for tables and figures, a few words.
      does: one sentence on what it does.
      loses: one sentence on what it loses.
      runs: names of the trained runs that it reads; the first has its sampler.
      group: what it has in common with others, for colours, such as "rounds".
      changes: fields of the configuration of the first run to replace, as of `gen_jax.load`, such
        as {"sampler": MaskGITOptions(rounds=4)}.
      make: a function, or "module:function", of the loaded runs by name, which returns the sampler
        and its parameters; None for the sampler of the first run.
      quick: whether it is also part of the short comparison.

    Raises:
      ValueError: at construction, where the name is not possible or there is no run.
    """

    name: str
    title: str
    does: str
    loses: str
    runs: tuple[str, ...]
    group: str = "mine"
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    make: str | Callable[[Mapping[str, Any]], tuple[Any, Any]] | None = None
    quick: bool = False

    def __post_init__(self):
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"a strategy is named by lower-case letters, digits and underscores, not "
                f"{self.name!r}"
            )
        if not self.runs or isinstance(self.runs, str):
            raise ValueError(f"the strategy {self.name} names no runs: give runs=(...,)")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared on one set of data.

    Attributes:
      data: its name.
      about: one sentence on the data and the budget.
      runs: configurations of what is trained, by name. A `workdir`, and an `autoencoder` that names
        another of these runs, are replaced by directories of the comparison.
      strategies: in the order of the table.
      judge: "module:class" of what scores samples; see `gen_jax.comparison.judges`.
      shrink: the part of the training steps that the short comparison takes.

    Raises:
      ValueError: at construction, where two strategies have one name, or one reads no run of these.
    """

    data: str
    about: str
    runs: Mapping[str, RunConfig]
    strategies: tuple[Strategy, ...]
    judge: str
    shrink: float = 0.25

    def __post_init__(self):
        names = [strategy.name for strategy in self.strategies]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two strategies are named {twice[0]!r}")
        for strategy in self.strategies:
            for run in strategy.runs:
                if run not in self.runs:
                    raise ValueError(
                        f"the strategy {strategy.name} reads the run {run!r}, but the runs are "
                        f"{', '.join(self.runs)}"
                    )

    def chosen(self, names: str, quick: bool) -> "Comparison":
        """The comparison of some strategies alone, and of the runs that these read.

        Args:
          names: of strategies, with commas; "" for all, or the quick ones.
          quick: take `shrink` of the training steps, and without names the quick strategies.

        Raises:
          ValueError: a name is unknown; the closest one is suggested.
        """
        known = {strategy.name: strategy for strategy in self.strategies}
        wanted = [name.strip() for name in names.split(",")] if names else []
        for name in wanted:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise ValueError(f"unknown strategy {name!r}; did you mean {close[0]}?")
        if not wanted:
            wanted = [name for name, strategy in known.items() if strategy.quick or not quick]
        kept = tuple(s for s in self.strategies if s.name in wanted)
        runs = {name: run for name, run in self.runs.items() if name in self._read(kept)}
        if quick:
            runs = {name: _shorter(run, self.shrink) for name, run in runs.items()}
        return dataclasses.replace(self, runs=runs, strategies=kept)

    def parts(self, strategy: Strategy) -> tuple[str, ...]:
        """All runs that a strategy rests on, those of autoencoders first."""
        return tuple(name for name in self.runs if name in self._read((strategy,)))

    def _read(self, strategies):
        names = {run for strategy in strategies for run in strategy.runs}
        first = {getattr(self.runs[name], "autoencoder", "") for name in names} - {""}
        return names | (first & self.runs.keys())

    def placed(self, folder: pathlib.Path) -> dict[str, RunConfig]:
        """The configurations of the runs, each with its directory in a folder, in an order in which
        they can be trained."""
        placed = {}
        for name, run in self.runs.items():
            changes = {"workdir": str(folder / name)}
            if getattr(run, "autoencoder", "") in self.runs:
                changes["autoencoder"] = str(folder / run.autoencoder)
            placed[name] = dataclasses.replace(run, **changes)
        return placed


def _shorter(run, part):
    changes = {}
    for field in ("train", "coder_train"):
        config = getattr(run, field, None)
        if config is not None:
            steps = max(1, round(config.steps * part))
            changes[field] = dataclasses.replace(config, steps=steps)
    return dataclasses.replace(run, **changes)


def with_plugin(comparison: Comparison, path: str) -> Comparison:
    """A comparison with the strategies of a file of one's own as well.

    The file is imported. It has STRATEGIES, a sequence of `Strategy`, and where those read runs
    that the comparison does not have, RUNS, their configurations by name.

    Raises:
      ValueError: there is no such file, it cannot be imported, has no strategies, or its names
        are taken.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"there is no plugin {path}")
    name = f"gen_jax_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file.absolute())
    if spec is None:
        raise ValueError(f"the plugin {path} is no Python file: it must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"the plugin {path} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    strategies, runs = getattr(module, "STRATEGIES", ()), getattr(module, "RUNS", {})
    if not strategies or not all(isinstance(one, Strategy) for one in strategies):
        raise ValueError(f"the plugin {path} has no STRATEGIES, a sequence of Strategy")
    taken = sorted(runs.keys() & comparison.runs.keys())
    if taken:
        raise ValueError(f"the plugin {path} has a run named {taken[0]!r}, which there is already")
    return dataclasses.replace(
        comparison,
        runs={**comparison.runs, **runs},
        strategies=(*comparison.strategies, *strategies),
    )
