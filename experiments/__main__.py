"""Lists the experiments: `python -m experiments`."""

import ast
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import experiments
from experiments import benchmarks
from gen_jax import cli


def main(argv: list[str]) -> int:
    """Prints a line for each experiment and each benchmark; 2 where there are arguments."""

    def run():
        if argv:
            raise ValueError(
                f"python -m experiments takes no arguments, got {' '.join(argv)}; "
                "run python -m experiments.NAME instead"
            )
        print("Run one with python -m experiments.NAME; --help shows its options.\n")
        _table(_experiments())
        print("\nSpeed against peers, with python -m experiments.benchmarks.NAME:\n")
        _table(_benchmarks())

    return cli.guarded(run)


def _experiments() -> Iterator[tuple[str, str]]:
    for module in _modules(experiments):
        imported = importlib.import_module(f"experiments.{module}")
        if not hasattr(imported, "EXPERIMENT"):  # of many runs, or of none
            yield module, imported.__doc__.splitlines()[0]
            continue
        experiment = imported.EXPERIMENT
        commands, presets = ", ".join(experiment.commands), ", ".join(experiment.presets)
        yield module, f"{experiment.about} Presets: {presets}. Commands: {commands}."


def _benchmarks() -> Iterator[tuple[str, str]]:
    """They import jax, so that their files are read instead: those that can be run."""
    for module in _modules(benchmarks):
        text = (Path(benchmarks.__path__[0]) / f"{module}.py").read_text(encoding="utf-8")
        about = ast.get_docstring(ast.parse(text)).splitlines()[0]
        if '__name__ == "__main__"' in text:
            yield module, about


def _modules(package):
    names = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
    return [name for name in sorted(names) if not name.startswith("_")]


def _table(rows):
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, about in rows:
        print(f"  {name:<{width}}  {about}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
