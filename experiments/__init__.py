"""Experiments, each its docstring and its presets: `python -m experiments.NAME --help`."""

import sys

from gen_jax import signals

if sys.argv[:1] == ["-m"]:  # while `python -m experiments.NAME` looks for the module
    signals.end_at_once()
