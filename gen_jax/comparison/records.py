"""What a comparison leaves: results.json of a versioned schema, and the table in words.

results.json, schema 1:

    schema, data, about, quick, seed, started, seconds
    machine         processor, cores, device, platform, python, packages {name: version}
    commit          of the code, or null outside of a repository
    runs            by name: parameters, training_operations, training_examples, seconds
    entropy         of the data in nats, or null
    strategies      a list, in the order of the table:
      name, title, group, does, loses, runs
      failed        null, or one line; a strategy that failed has no figure below
      parameters, training_operations           summed over its runs
      nfe, steps, samples, sha256               of the samples that were scored
      operations_per_sample                     products and convolutions, from the traced program
      compiled_operations_per_sample, bytes_per_sample   of the compiled step, times its steps
      compile_seconds, peak_memory_bytes        alone; of the largest batch
      network_share     of the time of one sample alone, or null where it was not told apart
      quality, perfect   figures of its samples, and of the same sampler with a perfect network
      law                kl, kl_perfect, entropy in nats, where the law is known
      rates              a list of batch, seconds {median, low, high}, samples_per_second, repeats

Times are medians over rounds in which all strategies took turns; low and high are the extremes.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax
import numpy as np

from gen_jax import bounded, whole_file
from gen_jax.workdir import WorkdirError

__all__ = [
    "COLUMNS",
    "SCHEMA",
    "budgets",
    "cells",
    "columns",
    "commit",
    "machine",
    "markdown",
    "read",
    "summary",
    "write",
]

SCHEMA = 1
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def machine() -> dict[str, Any]:
    """Processor, device and versions."""
    device = jax.devices()[0]
    return {
        "processor": _processor(),
        "cores": _cores(),
        "device": device.device_kind,
        "devices": jax.local_device_count(),
        "platform": device.platform,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _processor():
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def commit() -> str | None:
    """The commit of this code, with "+" where files have changed since; None outside of git."""
    folder = pathlib.Path(__file__).parents[2]
    git = ["git", "-C", str(folder)]
    try:
        if not (folder / ".git").exists():
            return None
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or a damaged repository
        return None
    return name + "+" * bool(changed)


def write(path: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes results whole."""
    whole_file.write(path, json.dumps({"schema": SCHEMA} | results, indent=1) + "\n")


def read(path: pathlib.Path) -> dict[str, Any]:
    """The results in a file.

    Raises:
      WorkdirError: they are damaged, or of another schema.
    """
    try:
        results = bounded.read_json(path)
        schema = results["schema"]
    except (KeyError, TypeError) as error:
        raise WorkdirError(f"{path} is damaged or no results of a comparison") from error
    except ValueError as error:
        raise WorkdirError(f"{error}; move it away") from error
    if schema != SCHEMA:
        raise WorkdirError(
            f"{path} is of schema {schema}, this version reads {SCHEMA}: run the comparison again "
            "in another --workdir"
        )
    return results


def summary(seconds: list[float]) -> dict[str, float]:
    """The median and the extremes."""
    return {
        "median": float(np.median(seconds)),
        "low": float(np.min(seconds)),
        "high": float(np.max(seconds)),
    }


def cells(strategy: dict[str, Any], headline: str) -> dict[str, float | int | None]:
    """The figures of a strategy that the table has, by column; None where there is none."""
    quality, perfect = strategy.get("quality", {}), strategy.get("perfect", {})
    rates = strategy.get("rates", [])
    alone = next((rate["seconds"]["median"] for rate in rates if rate["batch"] == 1), None)
    best = max((rate["samples_per_second"] for rate in rates), default=None)
    return {
        "nfe": strategy.get("nfe"),
        "quality": quality.get(headline),
        "perfect": perfect.get(headline),
        "variation": quality.get("tv_joint"),
        "kl": strategy.get("law", {}).get("kl"),
        "kl_perfect": strategy.get("law", {}).get("kl_perfect"),
        "bits": strategy.get("law", {}).get("bits"),
        "latency": None if alone is None else 1e3 * alone,
        "rate": best,
        "operations": _mega(strategy.get("operations_per_sample")),
        "bytes": _mega(strategy.get("bytes_per_sample")),
        "memory": _mega(strategy.get("peak_memory_bytes")),
        "compile": strategy.get("compile_seconds"),
        "parameters": strategy.get("parameters"),
        "training": _mega(_mega(strategy.get("training_operations"))),
    }


def _mega(value):
    return None if value is None else value / 1e6


COLUMNS = {  # of the tables: heading, format, what it is
    "nfe": ("NFE", "{:.0f}", "Sequential evaluations of the network for one sample."),
    "quality": ("{headline}", "{:.1%}", "Of the samples of the trained strategy."),
    "perfect": ("perfect", "{:.1%}", "The same of the same sampler with a perfect network."),
    "variation": (
        "variation",
        "{:.3f}",
        "Total variation between samples and truth; as many exact draws do not give 0.",
    ),
    "kl": ("KL", "{:.3f}", "What the trained strategy loses of the truth, in nats per sample."),
    "kl_perfect": ("KL, perfect", "{:.3f}", "What a perfect network loses, in nats."),
    "bits": (
        "bits/unit",
        "{:.3f}",
        "Code length of test data for each unit: exact one by one and at once, else a bound.",
    ),
    "latency": ("alone, ms", "{:.2f}", "Median time of one sample alone, in milliseconds."),
    "rate": ("samples/s", "{:,.0f}", "Median rate at the best batch size."),
    "operations": ("Mop", "{:,.1f}", "Products and convolutions for one sample, in millions."),
    "bytes": ("MB moved", "{:,.1f}", "Bytes that the compiled step reads and writes, all steps."),
    "memory": ("peak MB", "{:,.0f}", "Memory of the program of the largest batch."),
    "compile": ("compile, s", "{:.1f}", "Time to compile the loop for one sample."),
    "parameters": ("parameters", "{:,.0f}", "Of all networks that the strategy reads."),
    "training": ("training, Top", "{:.2f}", "Operations of training, in 10^12."),
}


def budgets(results: dict[str, Any]) -> str:
    """In words, how far the budgets of the strategies that passed are equal."""
    passed = [entry for entry in results["strategies"] if not entry["failed"]]
    if not passed:
        return "No strategy passed."
    parts, equal = [], True
    for name, unit, scale in (
        ("parameters", "million parameters", 1e6),
        ("training_operations", "x 10^12 operations of training", 1e12),
    ):
        values = [entry[name] for entry in passed]
        low, high = min(values), max(values)
        parts.append(f"{low / scale:.3g} to {high / scale:.3g} {unit}")
        equal &= high <= low * 1.1 / 0.9
    verdict = "equal within a tenth of their middle" if equal else "NOT equal within a tenth"
    return f"Budgets: {', '.join(parts)}; {verdict}."


def columns(results: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """The columns in which some strategy has a figure, with their headings filled in."""
    headline = results["headline"]
    rows = [cells(entry, headline) for entry in results["strategies"] if not entry["failed"]]
    return {
        name: (head.format(headline=headline.replace("_", " ")), form, about)
        for name, (head, form, about) in COLUMNS.items()
        if any(row[name] is not None for row in rows)
    }


def markdown(results: dict[str, Any]) -> str:
    """The table as Markdown, with what failed below it."""
    headline = results["headline"]
    shown = columns(results)
    heads = [head for head, _, _ in shown.values()]
    lines = [
        f"# {results['about']}",
        "",
        f"Commit {results['commit']}, {results['started']}, {results['machine']['processor']}, "
        f"{results['machine']['cores']} cores, {results['machine']['devices']} x "
        f"{results['machine']['device']}, jax {results['machine']['packages']['jax']}, "
        f"{results['seconds']:.0f} s.",
        "",
        budgets(results),
        "",
        "| strategy | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    failed = []
    for strategy in results["strategies"]:
        if strategy["failed"]:
            failed.append(f"- **{strategy['title']}** failed: {strategy['failed']}")
            continue
        values = cells(strategy, headline)
        texts = [
            "-" if values[name] is None else form.format(values[name])
            for name, (_, form, _) in shown.items()
        ]
        lines.append(f"| {strategy['title']} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", *failed]) + "\n"
