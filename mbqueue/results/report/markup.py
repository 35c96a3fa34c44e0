"""Build an HTML file from strings: the page, its tables and its plots.

A Content-Security-Policy in the head forbids every request, so the file always works without a network.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from html import escape

import plotly.graph_objects as go  # type: ignore[import-untyped, unused-ignore]
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped, unused-ignore]

#: Every page that mbqueue writes has these bytes near its beginning, so that mbqueue can recognise its own pages.
MARK = b'http-equiv="Content-Security-Policy" content="default-src'
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 0 1.25rem 4rem;
       max-width: 70rem }
h1 { font-size: 1.7rem; margin: 1.5rem 0 0 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
p { max-width: 46rem } h1, p { overflow-wrap: anywhere } .quiet { color: #666 } code { font-size: .9em }
.score { font-size: 2rem; font-weight: 600; margin: .5rem 0 0 }
.note { border-left: 4px solid #e69f00; background: #fff8e8; padding: .6rem 1rem; margin: 1rem 0; max-width: 46rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; margin: .5rem 0 }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #e3e3e3; white-space: nowrap }
th { font-weight: 600; border-bottom-color: #9a9a9a } tfoot td { font-weight: 600 }
.left { text-align: left } .words td:last-child { white-space: normal }
.names td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9rem }
.row { display: grid; gap: 1rem } .row > * { min-width: 0 }
.plot { min-width: 42rem } .row .plot { min-width: 0 } /* in narrower figures, labels would overlap */
.two { grid-template-columns: 1fr 1fr } .three { grid-template-columns: 1fr 1fr 1fr }
.doubtful { color: #b34700 } .improving { color: #0072b2 } .settled { color: #007a5a } .untrained { color: #666 }
@media (max-width: 60rem) { .two, .three { grid-template-columns: 1fr } }
@media print { h2 { break-after: avoid } .plot { break-inside: avoid; min-width: 0 } .wide { overflow: visible } }
"""
# plotly draws before the final width of the page is known, so resize all plots once the page has loaded.
_FIT = """
addEventListener("load", () => document.querySelectorAll(".js-plotly-plot").forEach((p) => Plotly.Plots.resize(p)));
"""


def page(title: str, body: Iterable[str]) -> str:
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)} · mbqueue</title>",
            f"<style>{_STYLE}</style>",
            f"<script>{get_plotlyjs()}</script>",
            "</head>\n<body>",
            *body,
            "<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>",
            f"<script>{_FIT}</script>",
            "</body>\n</html>\n",
        ]
    )


def plot(name: str, figure: go.Figure) -> str:
    """Convert a figure to ``<div id="plot-NAME">``, with a button that saves it as PNG.

    On a narrow page, the figure scrolls.
    """
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{name}",
        config={
            "responsive": True,
            "displaylogo": False,
            "modeBarButtons": [["toImage"]],
            "toImageButtonOptions": {"filename": name, "scale": 2},
        },
    )
    return f'<div class="wide"><div class="plot">{html}</div></div>'


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[int] = (0,),
    foot: Sequence[str] = (),
    style: str = "",
) -> str:
    """Build a table from HTML cells, with the columns in ``left`` aligned left. Callers must escape text in cells."""

    def line(cells: Sequence[str], tag: str) -> str:
        opened = [f'<{tag} class="left">' if column in left else f"<{tag}>" for column in range(len(cells))]
        return f"<tr>{''.join(f'{o}{cell}</{tag}>' for o, cell in zip(opened, cells, strict=True))}</tr>"

    body = "".join(line(cells, "td") for cells in rows)
    footer = f"<tfoot>{line(foot, 'td')}</tfoot>" if foot else ""
    whole = f"<thead>{line(head, 'th')}</thead><tbody>{body}</tbody>{footer}"
    return f'<div class="wide"><table class="{style}">{whole}</table></div>'
