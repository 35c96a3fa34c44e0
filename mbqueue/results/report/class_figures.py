"""The report's figures for class targets, which replace the plot of predictions against targets."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray

from mbqueue.results.report.analysis import Reliability, Roc
from mbqueue.results.report.figures import FOLD_COLOURS, QUIET, styled

_HEIGHT = 420
_DIAGONAL = {"x": [0, 1], "y": [0, 1], "mode": "lines", "hoverinfo": "skip", "showlegend": False}


def roc_curve(curves: Mapping[int, Roc | None]) -> go.Figure:
    """Plot the true positive rate against the false positive rate for every fold."""
    figure = go.Figure(go.Scatter(line={"color": QUIET, "dash": "dash", "width": 1}, **_DIAGONAL))
    for fold, curve in curves.items():
        if curve is None:
            continue
        figure.add_trace(
            go.Scatter(
                x=np.round(curve.false_positive, 4).tolist(),
                y=np.round(curve.true_positive, 4).tolist(),
                mode="lines",
                name=f"fold {fold}: {curve.area:.4f}",
                line={"color": FOLD_COLOURS[fold % len(FOLD_COLOURS)], "width": 2},
                hovertemplate="true positive rate %{y:.3f}, false positive rate %{x:.3f}<extra></extra>",
            )
        )
    figure.update_xaxes(title="false positive rate", range=[0, 1], constrain="domain")
    figure.update_yaxes(title="true positive rate", range=[0, 1], scaleanchor="x", constrain="domain")
    return styled(figure, height=_HEIGHT)


def reliability(found: Reliability) -> go.Figure:
    """Plot the fraction of class 1 against the predicted probability. Points are larger for bins with more crystals."""
    figure = go.Figure(
        [
            go.Scatter(line={"color": QUIET, "dash": "dash", "width": 1}, **_DIAGONAL),
            go.Scatter(
                x=np.round(found.predicted, 4).tolist(),
                y=np.round(found.observed, 4).tolist(),
                mode="lines+markers",
                line={"color": FOLD_COLOURS[0]},
                marker={"size": 6 + 14 * np.sqrt(found.counts / found.counts.max())},
                customdata=found.counts.tolist(),
                hovertemplate="predicted %{x:.3f}, observed %{y:.3f}: %{customdata:,} crystals<extra></extra>",
            ),
        ]
    )
    figure.update_xaxes(title="predicted probability", range=[0, 1], constrain="domain")
    figure.update_yaxes(title="fraction of class 1", range=[0, 1], scaleanchor="x", constrain="domain")
    return styled(figure, height=_HEIGHT, legend=False)


def confusion(counts: NDArray[np.int64]) -> go.Figure:
    """Plot the number of crystals by true and predicted class."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = go.Figure(
        go.Heatmap(
            x=["class 0", "class 1"],
            y=["class 0", "class 1"],
            z=np.round(shares, 4).tolist(),
            text=[[f"{counts[i, j]:,}<br>{shares[i, j]:.1%}" for j in (0, 1)] for i in (0, 1)],
            texttemplate="%{text}",
            colorscale="Blues",
            zmin=0,
            zmax=1,
            showscale=False,
            hovertemplate="%{y}, predicted %{x}: %{text}<extra></extra>",
        )
    )
    figure.update_xaxes(title="predicted")
    figure.update_yaxes(title="true", autorange="reversed")
    return styled(figure, height=_HEIGHT, legend=False)
