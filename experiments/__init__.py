"""Experiments, each its docstring and its presets: `python -m experiments.NAME --help`."""
