"""What the exact comparison prints and draws."""

import itertools
from pathlib import Path

import numpy as np
from matplotlib import pyplot

__all__ = ["LIMIT", "figure", "findings", "show", "show_facts"]

_COLUMNS = (("KL", "kl", "drawn_kl", "network_kl"), ("TV", "tv", "drawn_tv", "network_tv"))
LIMIT = 4096  # rounds of repair that stand for infinitely many
_NETWORKS = ("one_shot", "ar", "latent")
_VALID = ("valid", "drawn_valid", "network_valid")


def show(name: str, table: dict) -> None:
    """Prints the gaps of all strategies on one set."""
    print(
        f"\n{name}: entropy {table['entropy']:.4f} nats, total correlation "
        f"{table['total_correlation']:.4f} nats"
    )
    kinds = [*_COLUMNS, *([("valid", *_VALID)] if table["valid"] else [])]
    heads = [f"{kind} {what}" for kind, *_ in kinds for what in ("exact", "sampler", "network")]
    print(f"  {'strategy':<33}{'NFE':>4}" + "".join(f"{head:>16}" for head in heads))
    for row in table["rows"]:
        cells = [_cell(row, key) for _, *keys in kinds for key in keys]
        print(f"  {row['strategy']:<33}{row['nfe']:>4}" + "".join(f"{c:>16}" for c in cells))


def _cell(row, key):
    if key not in row:
        return "-"
    value = f"{row[key] + 0.0:.4f}"
    error = row.get(f"{key}_error")
    return value if error is None else f"{value} ± {error:.4f}"


def show_facts(facts: list[dict]) -> None:
    """Prints what is known exactly, and what was run beside it."""
    print(f"\n  {'also known exactly':<72}{'exact':>12}{'run':>20}")
    for fact in facts:
        run = f"{fact['run']:.6f} ± {fact['error']:.6f}" if "run" in fact else "-"
        print(f"  {fact['claim']:<72}{fact['exact']:>12.6f}{run:>20}")


def findings(tables: dict) -> list[str]:
    """What the numbers say, one line each."""
    lines = []
    for name, table in tables.items():
        rows = {network: _first(table["rows"], network) for network in _NETWORKS}
        whole, gap = rows["one_shot"], table["total_correlation"]
        lines.append(
            f"{name}: {whole['strategy']} loses {gap:.4f} nats, its total correlation; the trained "
            f"decoder {whole['network_kl']:.4f}."
        )
        for row in (rows["ar"], rows["latent"]):
            left = row["network_kl"]
            lines.append(
                f"{name}: {row['strategy']} leaves {left:.4f} nats when trained, "
                f"{left / gap:.1%} of it, with {row['nfe']} evaluations."
            )
        lines += _schedules(name, table["rows"])
    lines += _repairs(tables)
    return lines


def _first(rows, network):
    return next(row for row in rows if row["network"] == network)


def _schedules(name, rows):
    found, rows = [], [row for row in rows if row["schedule"]]
    for rounds in sorted({row["nfe"] for row in rows}):
        gaps = {row["schedule"]: row["kl"] for row in rows if row["nfe"] == rounds}
        ranks = sorted(gaps, key=lambda schedule, gaps=gaps: round(gaps[schedule], 9))
        steps = [ranks[0]]
        for before, after in itertools.pairwise(ranks):
            equal = abs(gaps[before] - gaps[after]) < 1e-9
            steps.append(f"{'=' if equal else '<'} {after}")
        found.append(f"{name}, {rounds} rounds in a random order: {' '.join(steps)}.")
    return found


def _repairs(tables):
    lines = []
    for name, table in tables.items():
        limits = table["repair_limits"]
        kinds = {"reaches the data": 1e-3, "stops at a floor of its own": 1.0}
        for rule, tv in limits.items():
            what = next(words for words, bound in kinds.items() if tv < bound)
            lines.append(
                f"{name}: {rule}, one position a round, {what}: total variation {tv:.4f} after "
                f"{LIMIT} rounds."
            )
    return lines


def figure(tables: dict, path: Path) -> None:
    """Draws gap against NFE, a column per set: KL above, total variation below.

    Lines are exact, crosses are samplers with exact conditionals, circles trained networks.
    """
    pyplot.switch_backend("Agg")  # a figure is a file, with a display or without
    families = list(dict.fromkeys(row["family"] for t in tables.values() for row in t["rows"]))
    colours = dict(zip(families, pyplot.get_cmap("tab20")(np.linspace(0, 1, 20)), strict=False))
    fig, axes = pyplot.subplots(2, len(tables), figsize=(4.6 * len(tables), 9), sharex=True)
    for column, (name, table) in enumerate(tables.items()):
        for axis, (kind, exact, drawn, network) in zip(axes[:, column], _COLUMNS, strict=True):
            for family in families:
                rows = [row for row in table["rows"] if row["family"] == family]
                _curve(axis, rows, exact, "-", 1.0, colours[family], family)
                _points(axis, rows, drawn, "x", colours[family])
                _points(axis, rows, network, "o", colours[family])
            axis.set_xscale("log", base=2)
            axis.set_yscale("symlog", linthresh=1e-2)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.set_ylabel(f"{kind} to the data" + (", nats" if kind == "KL" else ""))
        axes[0, column].set_title(name)
        axes[1, column].set_xlabel("sequential evaluations (NFE)")
    handles = [pyplot.Line2D([], [], color=colours[f], marker="s", label=f) for f in families]
    handles += [pyplot.Line2D([], [], color="black", linestyle="-", label="exact")]
    handles += [pyplot.Line2D([], [], color="black", linestyle="", marker="x", label="sampler")]
    handles += [
        pyplot.Line2D(
            [],
            [],
            color="black",
            linestyle="",
            marker="o",
            markerfacecolor="none",
            label="trained network",
        )
    ]
    fig.legend(handles=handles, loc="lower center", ncols=6, frameon=False)
    fig.tight_layout(rect=(0, 0.12, 1, 1))
    fig.savefig(path, dpi=100)
    pyplot.close(fig)


def _curve(axis, rows, key, style, width, colour, label):
    known = sorted((row["nfe"], row[key]) for row in rows if key in row)
    if known:
        axis.plot(*zip(*known, strict=True), style, lw=width, color=colour, marker=".", label=label)


def _points(axis, rows, key, marker, colour):
    known = [(r["nfe"], max(r[key], 0), r.get(f"{key}_error", 0)) for r in rows if key in r]
    if known:
        nfe, value, error = zip(*known, strict=True)
        axis.errorbar(
            nfe,
            value,
            error,
            linestyle="",
            marker=marker,
            color=colour,
            markerfacecolor="none",
            capsize=2,
            lw=0.8,
        )
