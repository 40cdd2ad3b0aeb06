"""Benchmarks against named peers: `python -m experiments.benchmarks.NAME`."""
