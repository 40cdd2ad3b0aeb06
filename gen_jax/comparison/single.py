"""The page of a single run: its curves, pictures, figures and configuration."""

import html
import json
import pathlib

from gen_jax import bounded, whole_file
from gen_jax.comparison import figures
from gen_jax.comparison import html as pages
from gen_jax.workdir import MetricsLog, Workdir, WorkdirError

__all__ = ["write"]

_LARGEST, _SHOWN = 4 << 20, 4000  # bytes of a picture, characters of a text
_PICTURES = {".png": "image/png", ".gif": "image/gif"}
_PREVIEWS = 6


def write(workdir: Workdir) -> pathlib.Path:
    """Writes index.html whole in the work directory of a run, which may still be training.

    It shows the records of every stage as curves, all pictures and texts that the run has left,
    some of its previews, summary.json and config.json.

    Returns:
      The path of the page.

    Raises:
      WorkdirError: there is no run, or one of its files is damaged.
    """
    config = workdir.stored_config()
    if config is None:
        raise WorkdirError(f"no run in {workdir.path}; train one first, or give its --workdir")
    summary = workdir.read_json("summary.json", "move it away") or {}
    logs = sorted(workdir.path.glob("*/metrics.jsonl"))
    curves = figures.curves({log.parent.name: MetricsLog.read(log) for log in logs})
    body, charts = [f'<p class="faint">{html.escape(str(workdir.path))}</p>'], {}
    if curves is not None:
        charts["curves"] = curves
        body += ["<h2>Training</h2>", pages.chart_places({"curves": ("By step.", curves)})]
    body += _files("Results", sorted(workdir.path.glob("*.*")))
    previews = sorted((workdir.path / "previews").glob("*.*"))
    chosen = previews[:: max(1, -(-len(previews) // _PREVIEWS))] if previews else []
    body += _files("Previews of training", chosen)
    if summary:
        body += ["<h2>Figures</h2>", _table(summary)]
    whole = html.escape(json.dumps(config, indent=2))
    body += ["<h2>Configuration</h2>", f'<pre class="config" tabindex="0">{whole}</pre>']
    path = workdir.path / "index.html"
    title = f"A run of {config.get('task', 'an experiment')}: {workdir.path.name}"
    whole_file.write(path, pages.build(title, "\n".join(body), charts))
    return path


def _files(title, paths):
    shown = []
    for path in paths:
        name = html.escape(path.name)
        if path.suffix in _PICTURES and path.stat().st_size <= _LARGEST:
            uri = pages.data_uri(bounded.read_bytes(path, _LARGEST), _PICTURES[path.suffix])
            shown.append(f'<h3>{name}</h3><img class="plain" alt="{name}" src="{uri}">')
        elif path.suffix == ".txt":
            text = html.escape(bounded.read_text(path, 0, "", _SHOWN, "replace"))
            shown.append(f'<h3>{name}</h3><pre class="config" tabindex="0">{text}</pre>')
    return [f"<h2>{title}</h2>", *shown] if shown else []


def _table(figures_of):
    rows = []
    for name, value in figures_of.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>")
    return f'<div class="wide" tabindex="0"><table><tbody>{"".join(rows)}</tbody></table></div>'
