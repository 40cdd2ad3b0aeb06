"""What a comparison leaves to be read: results.md, figures, and index.html."""

import html
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gen_jax import whole_file
from gen_jax.comparison import figures, records
from gen_jax.comparison import html as pages

__all__ = ["write"]

_CONTROLS = """
<div class="controls">
<button id="play" type="button">Play</button>
<label><input type="radio" name="clock-of" value="evaluations" checked> equal evaluations</label>
<label><input type="radio" name="clock-of" value="time"> equal time</label>
<label>speed <select id="speed"><option value="0.25">1/4</option>
<option value="1" selected>1</option><option value="4">4</option></select></label>
<label>clock <input id="clock" type="range" min="0" max="1000" value="0"></label>
<output id="shown" for="clock"></output>
</div>"""


def write(
    path: pathlib.Path,
    results: dict[str, Any],
    arrays: Callable[[str], Mapping[str, np.ndarray]],
) -> None:
    """Writes results.md, figures/*.png and .svg, and index.html, each whole.

    Args:
      path: the work directory.
      results: see `records`.
      arrays: the arrays of a strategy by its name; see `measure.examine`.
    """
    whole_file.write(path / "results.md", records.markdown(results))
    drawn = {}
    if any(not entry["failed"] for entry in results["strategies"]):
        drawn = figures.charts(results)
    (path / "figures").mkdir(exist_ok=True)
    for name, (_, chart) in drawn.items():
        png, svg = figures.pictures_of(chart)
        with whole_file.replacing(path / "figures" / f"{name}.png") as file:
            file.write(png)
        whole_file.write(path / "figures" / f"{name}.svg", svg)
    whole_file.write(path / "index.html", _page(results, arrays, drawn))


def _page(results, arrays, drawn):
    machine, cards = results["machine"], []
    passed = [entry for entry in results["strategies"] if not entry["failed"]]
    places = []
    for entry in passed:
        kept = arrays(entry["name"])
        cells = records.cells(entry, results["headline"])
        card = {
            "name": entry["name"],
            "nfe": entry["nfe"],
            "milliseconds": cells["latency"],
            "evaluated": kept["evaluated"].tolist(),
        }
        if "texts" in kept:
            card["texts"] = kept["texts"].tolist()
        else:
            card["frames"] = pages.data_uri(pages.png(kept["frames"]), "image/png")
        cards.append(card)
        places.append(_card(entry, cells, results["headline"], "texts" in card))
    body = [
        f"<p>{html.escape(results['about'])}</p>",
        '<p class="faint">'
        + html.escape(
            f"{results['started']}, commit {results['commit']}, {machine['processor']}, "
            f"{machine['cores']} cores, {machine['devices']} x {machine['device']}, "
            f"jax {machine['packages']['jax']}. {records.budgets(results)}"
        )
        + "</p>",
        "<h2>One sample coming to be</h2>",
        "<p>All strategies on one clock, which runs faster and faster: from one evaluation to the "
        "longest loop, or from the shortest time to the longest.</p>",
        _CONTROLS if cards else "",
        f'<div class="cards">{"".join(places)}</div>',
        "<h2>Every figure</h2>",
        _table(results),
        "<h2>Figures</h2>" if drawn else "",
        pages.chart_places(drawn),
    ]
    charts = {name: chart for name, (_, chart) in drawn.items()}
    return pages.build(
        "One unit at a time, all at once, and between", "\n".join(body), charts, cards
    )


def _card(entry, cells, headline, is_text):
    name, title = entry["name"], html.escape(entry["title"])
    place = (
        f'<pre id="card-{name}" tabindex="0" aria-label="{title}"></pre>'
        if is_text
        else f'<canvas id="card-{name}" width="16" height="16" role="img" aria-label="{title}">'
        "</canvas>"
    )
    numbers = [f"NFE {cells['nfe']:.0f}", f"{cells['latency']:,.1f} ms alone"]
    if cells["quality"] is not None:
        numbers.insert(0, f"{headline.replace('_', ' ')} {cells['quality']:.1%}")
    if cells["perfect"] is not None:
        numbers[0] += f" (a perfect network: {cells['perfect']:.1%})"
    if cells["bits"] is not None:
        numbers.append(f"{cells['bits']:.2f} bits a unit")
    if cells["kl"] is not None:
        numbers.append(f"loses {cells['kl']:.3g} nats (perfect: {cells['kl_perfect']:.3g})")
    return (
        f'<div class="card">{place}<h3>{title}</h3>'
        f"<p>{html.escape(entry['does'])} <b>Loses:</b> {html.escape(_lower(entry['loses']))}</p>"
        f'<p class="faint">{html.escape("; ".join(numbers))}.</p></div>'
    )


def _lower(sentence):
    return sentence[:1].lower() + sentence[1:]


def _table(results):
    headline, rows = results["headline"], []
    heads = ['<th scope="col"><button type="button" title="Its name.">strategy</button></th>']
    shown = records.columns(results)
    for head, _, about in shown.values():
        text = html.escape(head)
        button = f'<button type="button" title="{html.escape(about)}">{text}</button>'
        heads.append(f'<th scope="col">{button}</th>')
    for entry in results["strategies"]:
        title = html.escape(entry["title"])
        if entry["failed"]:
            rows.append(
                f'<tr class="failed"><td data-value="{title}">{title}</td>'
                f'<td colspan="{len(shown)}" data-value="">failed: '
                f"{html.escape(entry['failed'])}</td></tr>"
            )
            continue
        cells = records.cells(entry, headline)
        values = [
            f'<td data-value="{"" if cells[name] is None else cells[name]}">'
            f"{'-' if cells[name] is None else form.format(cells[name])}</td>"
            for name, (_, form, _) in shown.items()
        ]
        about = html.escape(f"{entry['does']} Loses: {_lower(entry['loses'])}")
        rows.append(
            f'<tr><td data-value="{title}" title="{about}">{title}</td>{"".join(values)}</tr>'
        )
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Every figure">'
        f'<table class="sortable"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
