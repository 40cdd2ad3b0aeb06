"""The figures of a comparison, as Vega-Lite charts: one description for page, PNG and SVG.

Vega-Lite (by altair) draws the same chart interactively in a page that needs no network (900 kB of
JavaScript, a quarter of Plotly's), and by vl-convert as PNG and SVG without a browser.
"""

import itertools
import math
from typing import Any

from gen_jax import extras
from gen_jax.comparison import records

__all__ = ["charts", "check_installed", "crossings", "curves", "pareto"]

_USER = "reports need"
_WIDTH, _HEIGHT = 620, 380


def check_installed() -> None:
    """Raises a ValueError that says what to install where a package of the reports is missing."""
    for package in ("altair", "vl_convert"):
        extras.require(package, "report", _USER)


def _altair():
    return extras.require("altair", "report", _USER)


def charts(results: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Figures by name: what each shows, and an altair chart."""
    passed = [entry for entry in results["strategies"] if not entry["failed"]]
    headline = results["headline"]
    found = {
        "quality_nfe": (
            "Quality against sequential evaluations. Filled: trained; hollow: the same sampler "
            "with a perfect network, so that the line between them is what training left.",
            _quality_nfe(passed, headline),
        ),
        "loss_nfe": (
            "What is lost of the truth against sequential evaluations, where the law of the "
            "samples, or a bound of it, is known. Filled: trained; hollow: with a perfect network.",
            _loss_nfe(passed),
        ),
        "quality_rate": (
            "Quality against samples per second. The line joins the strategies that no other beats "
            "in both.",
            _quality_rate(passed, headline),
        ),
        "rate_batch": (
            "Samples per second against batch size. A cross marks where one token at a time with a "
            "cache overtakes a strategy, or is overtaken.",
            _rate_batch(passed),
        ),
        "latency": (
            "Where the time of one sample alone goes: the network, and everything else. Grey "
            "where it was not told apart.",
            _latency(passed),
        ),
    }
    return {name: figure for name, figure in found.items() if figure[1] is not None}


def _points(passed, headline, columns, name):
    """A row for each strategy and network.

    The columns are those of the trained network and, where there is one, of the perfect one; the
    rows have their values under `name`.
    """
    points = []
    for entry in passed:
        cells = records.cells(entry, headline)
        for network, column in zip(("trained", "perfect"), columns, strict=False):
            if cells[column] is not None:
                points.append(
                    {
                        "strategy": entry["title"],
                        "group": entry["group"],
                        "network": network,
                        "NFE": cells["nfe"],
                        name: cells[column],
                        "samples per second": cells["rate"],
                    }
                )
    return points


def _named(headline):
    return headline.replace("_", " ")


def _colour(passed):
    """The colour of a group, in every figure the same, whatever groups that figure has."""
    alt, groups = _altair(), sorted({entry["group"] for entry in passed})
    legend = alt.Legend(symbolOpacity=1)  # some layers are paler than their groups
    scale = alt.Scale(scheme="tableau10", domain=groups)
    return alt.Color("group:N", title=None, scale=scale, legend=legend)


def _quality_nfe(passed, headline):
    alt, name = _altair(), _named(headline)
    y = alt.Y(f"{name}:Q", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))
    points = _points(passed, headline, ("quality", "perfect"), name)
    return _against_nfe(passed, points, y, alt.Tooltip(f"{name}:Q", format=".1%"))


def _loss_nfe(passed):
    """Nats that are lost or, where no strategy has these, bits per unit; None where neither is."""
    alt = _altair()
    lost = _points(passed, "", ("kl", "kl_perfect"), "nats lost")
    if lost:
        # Near 0 linear: one by one loses a hundredth of a nat, at once tens.
        axis = alt.Axis(values=[0, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100], format="~g")
        y = alt.Y("nats lost:Q", axis=axis, scale=alt.Scale(type="symlog", constant=0.1))
        return _against_nfe(passed, lost, y, alt.Tooltip("nats lost:Q", format=".3f"))
    bits = _points(passed, "", ("bits",), "bits per unit")
    if not bits:
        return None
    y = alt.Y("bits per unit:Q", scale=alt.Scale(zero=False))
    return _against_nfe(passed, bits, y, alt.Tooltip("bits per unit:Q", format=".3f"))


def _against_nfe(passed, points, y, tooltip):
    alt = _altair()
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("NFE:Q", scale=alt.Scale(type="log", nice=False, padding=12)),
        y=y,
        color=_colour(passed),
        tooltip=["strategy:N", "network:N", "NFE:Q", tooltip],
    )
    lines = base.mark_line(strokeDash=[2, 3], opacity=0.5).encode(detail="strategy:N")
    trained = base.transform_filter("datum.network == 'trained'").mark_circle(size=80, opacity=1)
    if all(point["network"] == "trained" for point in points):
        return _sized(trained)
    perfect = base.transform_filter("datum.network == 'perfect'").mark_point(size=60)
    return _sized(lines + perfect + trained)


def pareto(points: list[tuple[float | int, float | int]]) -> list[int]:
    """The points that no other beats in both coordinates, by index, in ascending x."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    best, front = float("-inf"), []
    for index in order:
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front[::-1]


def _quality_rate(passed, headline):
    alt, name = _altair(), _named(headline)
    rows = _points(passed, headline, ("quality",), name)
    rows = [row for row in rows if row["samples per second"] is not None]
    front = pareto([(row["samples per second"], row[name]) for row in rows])
    x = alt.X("samples per second:Q", scale=alt.Scale(type="log", nice=False, padding=12))
    y = alt.Y(f"{name}:Q", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))
    points = (
        alt.Chart(alt.Data(values=rows))
        .mark_circle(size=80, opacity=1)
        .encode(
            x=x,
            y=y,
            color=_colour(passed),
            tooltip=[
                "strategy:N",
                alt.Tooltip("samples per second:Q", format=",.0f"),
                alt.Tooltip(f"{name}:Q", format=".1%"),
            ],
        )
    )
    line = alt.Chart(alt.Data(values=[rows[i] for i in front]))
    line = line.mark_line(color="#888", interpolate="step-before").encode(x=x, y=y)
    names = alt.Chart(alt.Data(values=[rows[i] for i in front]))
    names = names.mark_text(align="right", dx=-8, dy=-8, fontSize=10).encode(
        x=x, y=y, text="strategy:N"
    )
    return _sized(line + points + names)


def crossings(
    ours: list[tuple[float | int, float | int]], others: list[tuple[float | int, float | int]]
) -> list[tuple[float | int, float | int]]:
    """Where two curves of (batch, rate) cross, straight between measured batches on log scales."""

    def logs(curve):
        return {math.log(x): math.log(y) for x, y in curve}

    a, b = logs(ours), logs(others)
    shared, found = sorted(a.keys() & b.keys()), []
    for left, right in itertools.pairwise(shared):
        before, after = a[left] - b[left], a[right] - b[right]
        if before * after < 0:
            part = before / (before - after)
            x = left + part * (right - left)
            found.append((math.exp(x), math.exp(a[left] + part * (a[right] - a[left]))))
    return found


def _rate_batch(passed):
    alt = _altair()
    rows = [
        {
            "strategy": entry["title"],
            "group": entry["group"],
            "batch": rate["batch"],
            "samples per second": rate["samples_per_second"],
        }
        for entry in passed
        for rate in entry["rates"]
    ]
    x = alt.X("batch:Q", scale=alt.Scale(type="log", base=2, nice=False, padding=12))
    y = alt.Y("samples per second:Q", scale=alt.Scale(type="log", nice=False, padding=12))
    lines = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True)
        .encode(
            x=x,
            y=y,
            color=_colour(passed),
            detail="strategy:N",
            tooltip=["strategy:N", "batch:Q", alt.Tooltip("samples per second:Q", format=",.0f")],
        )
    )
    crossed = _marks(passed)
    if not crossed:
        return _sized(lines)
    marks = alt.Chart(alt.Data(values=crossed)).mark_point(
        shape="cross", size=90, color="#888", filled=True
    )
    tooltip = ["crossing:N", alt.Tooltip("batch:Q", format=".1f")]
    return _sized(lines + marks.encode(x=x, y=y, tooltip=tooltip))


def _marks(passed):
    curves_of = {
        entry["name"]: [(rate["batch"], rate["samples_per_second"]) for rate in entry["rates"]]
        for entry in passed
    }
    titles = {entry["name"]: entry["title"] for entry in passed}
    return [
        {"crossing": f"{titles['ar']} and {titles[name]}", "batch": x, "samples per second": y}
        for name, curve in curves_of.items()
        if "ar" in curves_of and name != "ar"
        for x, y in crossings(curves_of["ar"], curve)
    ]


def _latency(passed):
    alt, rows = _altair(), []
    for entry in passed:
        alone = records.cells(entry, "")["latency"]
        share = entry.get("network_share")
        parts = {"not told apart": 1.0} if share is None else {"network": share, "rest": 1 - share}
        rows += [
            {"strategy": entry["title"], "part": part, "milliseconds": alone * value}
            for part, value in parts.items()
        ]
    colours = alt.Scale(
        domain=["network", "rest", "not told apart"], range=["#4c78a8", "#f58518", "#bab0ac"]
    )
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            x=alt.X("milliseconds:Q", title="milliseconds for one sample alone"),
            y=alt.Y("strategy:N", sort=[entry["title"] for entry in passed], title=None),
            color=alt.Color("part:N", title=None, scale=colours),
            tooltip=["strategy:N", "part:N", alt.Tooltip("milliseconds:Q", format=".2f")],
        )
    )
    return chart.properties(width="container", height=16 * len(passed))


def curves(records_of: dict[str, list[dict[str, Any]]]) -> Any | None:
    """Every scalar of the records of training against the step, a small chart each.

    Args:
      records_of: lines of metrics.jsonl by stage.

    Returns:
      A chart; None where nothing was recorded.
    """
    alt = _altair()
    rows = [
        {"stage": stage, "step": record["step"], "figure": name, "value": value}
        for stage, lines in records_of.items()
        for record in lines
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float)
    ]
    if not rows:
        return None
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("step:Q"),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            color=alt.Color("stage:N", title=None),
            tooltip=["stage:N", "step:Q", alt.Tooltip("value:Q", format=".5g")],
        )
    )
    chart = chart.properties(width=260, height=150)
    names = sorted({row["figure"] for row in rows})
    return chart.facet(
        alt.Facet("figure:N", title=None, sort=names), columns=2, data=alt.Data(values=rows)
    ).resolve_scale(y="independent")


def _sized(chart):
    return chart.properties(width="container", height=_HEIGHT)


def pictures_of(chart: Any) -> tuple[bytes, str]:
    """A chart as PNG, twice its size, and as SVG."""
    convert = extras.require("vl_convert", "report", _USER)
    spec = chart.to_dict()
    if spec.get("width") == "container":
        spec["width"] = _WIDTH
    spec["background"] = "white"
    return convert.vegalite_to_png(spec, scale=2), convert.vegalite_to_svg(spec)


def bundle() -> str:
    """The JavaScript that draws charts in a page: vegaEmbed, and all that it needs."""
    convert = extras.require("vl_convert", "report", _USER)
    return convert.javascript_bundle()
