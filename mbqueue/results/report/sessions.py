"""Figures that show when the sessions worked and how they spent their time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped, unused-ignore]

from mbqueue.results.report.figures import FOLD_COLOURS, QUIET, styled

#: The kind of a span during which a session publishes. Only spans of this kind overlap other spans.
PUBLISH = "publish"
CUT_OFF, LOST = "cut off", "repeated"

_KIND_COLOURS = {
    "prepare": "#56B4E9",
    "load": "#F0E442",
    "train": "#009E73",
    "checkpoint": "#999933",
    "predict": "#0072B2",
    "record": "#CC79A7",
    "idle": "#cccccc",
    CUT_OFF: "#E69F00",
    LOST: "#661100",
    "failed": "#D55E00",
    PUBLISH: "#882255",
}
#: Heights of a bar and of the thin line below it, as fractions of the height of a session's row.
_BAR, _BESIDE = 0.7, 0.14


@dataclass(frozen=True, kw_only=True)
class Span:
    """A period in which a session did one kind of work.

    ``start`` and ``end`` are Unix timestamps; ``kind`` is a name in the legend.
    """

    session: str
    device: str
    start: float
    end: float
    kind: str
    label: str = ""


def session_bars(sessions: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Plot the hours of each session: finished epochs by fold, and all other time."""
    labels = [f"{number}. {entry['device']}" for number, entry in enumerate(sessions, start=1)]
    folds = sorted({fold for entry in sessions for fold in entry["folds"]})
    figure = go.Figure(
        [
            go.Bar(
                y=labels,
                x=[entry["folds"].get(fold, 0.0) for entry in sessions],
                name=f"epochs of fold {fold}",
                orientation="h",
                marker={"color": FOLD_COLOURS[fold % len(FOLD_COLOURS)]},
                hovertemplate="%{x:.2f} h<extra>epochs of fold " + str(fold) + "</extra>",
            )
            for fold in folds
        ]
    )
    figure.add_trace(
        go.Bar(
            y=labels,
            x=[entry["rest"] for entry in sessions],
            name="everything else",
            orientation="h",
            marker={"color": "#cccccc"},
            hovertemplate="%{x:.2f} h<extra>start-up, data, predictions, interrupted epochs</extra>",
        )
    )
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title="hours")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return styled(figure, height=150 + 26 * len(sessions))


def timeline(spans: Sequence[Span]) -> go.Figure:
    """Plot the activity of each session over time; publishing is a thin line below the session's bar."""
    sessions = list(dict.fromkeys((span.session, span.device) for span in spans))
    labels = {session: f"{number}. {device}" for number, (session, device) in enumerate(sessions, start=1)}
    figure = go.Figure()
    for kind in kinds_of(spans):
        these = [span for span in spans if span.kind == kind]
        figure.add_trace(
            go.Bar(
                base=[datetime.fromtimestamp(span.start, UTC).replace(tzinfo=None) for span in these],
                x=[1000 * (span.end - span.start) for span in these],
                y=[labels[span.session] for span in these],
                orientation="h",
                name=f"{kind} (in parallel)" if kind == PUBLISH else kind,
                marker={"color": _KIND_COLOURS.get(kind, QUIET)},
                width=_BESIDE if kind == PUBLISH else _BAR,
                offset=_BAR / 2 if kind == PUBLISH else -_BAR / 2,
                customdata=[[span.label, (span.end - span.start) / 60] for span in these],
                hovertemplate=f"{kind} %{{customdata[0]}}: %{{customdata[1]:.1f}} min<extra></extra>",
            )
        )
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(type="date", title="time (UTC)")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return styled(figure, height=150 + 26 * len(labels))


def kinds_of(spans: Sequence[Span]) -> list[str]:
    """The kinds of ``spans``, in the order of the legend."""
    return sorted({span.kind for span in spans}, key=lambda kind: [*_KIND_COLOURS, kind].index(kind))


def seconds_by_kind(spans: Sequence[Span]) -> dict[tuple[str, str], dict[str, float]]:
    """Add up the seconds of each kind of span: (session, device) → kind → seconds.

    Spans of kind `publish` overlap spans of other kinds.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for span in spans:
        kinds = found.setdefault((span.session, span.device), {})
        kinds[span.kind] = kinds.get(span.kind, 0.0) + span.end - span.start
    return found
