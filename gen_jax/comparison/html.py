"""Pages of one file, which need no network: HTML with its style, script, charts and pictures."""

import base64
import html
import importlib.resources
import io
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from gen_jax.comparison import figures

__all__ = ["build", "chart_places", "data_uri", "png"]


def build(title: str, body: str, charts: dict[str, Any], cards: Sequence[dict] = ()) -> str:
    """A page.

    Args:
      title: of the page, plain text.
      body: HTML below the title, with a place for each chart (see `chart_places`) and card.
      charts: altair charts by name.
      cards: what is animated: "name", "nfe", "milliseconds", "evaluated", and "frames" (a data URI
        of all frames, one below the other) or "texts".
    """
    data = {"charts": {name: chart.to_dict() for name, chart in charts.items()}, "cards": cards}
    script = _file("page.js")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{_file('page.css')}</style>",
            "</head>",
            "<body>",
            f"<h1>{html.escape(title)}</h1>",
            body,
            f'<script type="application/json" id="data">{_as_script(json.dumps(data))}</script>',
            f"<script>{_as_script(figures.bundle())}</script>" if charts else "",
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def chart_places(figures_of: dict[str, tuple[str, Any]]) -> str:
    """A place for each chart, with what it shows below."""
    return "\n".join(
        f'<div class="figure"><div id="chart-{name}" role="img" aria-label="{html.escape(about)}">'
        f'</div><p class="faint">{html.escape(about)}</p></div>'
        for name, (about, _) in figures_of.items()
    )


def png(frames: np.ndarray) -> bytes:
    """Pictures uint8 [F, height, width, 3], one below the other, as PNG."""
    content = io.BytesIO()
    Image.fromarray(frames.reshape(-1, *frames.shape[2:])).save(content, "PNG", optimize=True)
    return content.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """The content of a file of a MIME type, as an address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _file(name):
    return importlib.resources.files("gen_jax.comparison.page").joinpath(name).read_text("utf-8")


def _as_script(text):
    """Text inside of a script element, which its end tag would end, also within a string."""
    return re.sub(r"</(?=script)", r"<\\/", text, flags=re.IGNORECASE)
