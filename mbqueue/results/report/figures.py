"""The report's figures, drawn with plotly from the numbers of `analysis`.

Data that grow with the number of crystals are binned first, so a report opens as quickly for 132,752 crystals as for a
hundred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped, unused-ignore]
from plotly.subplots import make_subplots  # type: ignore[import-untyped, unused-ignore]

from mbqueue.errors import counted
from mbqueue.history import best_epoch
from mbqueue.results.report.analysis import Density, ErrorDistribution, Trend, parity_density
from mbqueue.results.report.elements import N_COLUMNS, N_ROWS, POSITIONS
from mbqueue.results.scores import Measure
from mbqueue.results.tables import Predictions
from mbqueue.task import Target

#: One colour per fold, from Okabe and Ito's palette, which colour-blind readers can distinguish.
FOLD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
INK, _GRID, QUIET = "#222222", "#e3e3e3", "#9a9a9a"
_SCALE = "Viridis"
#: Up to this number of crystals, the parity plot draws each crystal as a point.
_MOST_POINTS = 3000
_ROUND_NUMBERS = [m * 10**power for power in range(4) for m in (1, 2, 5)]
#: On an axis with more decades than this, only powers of ten have labels, because more labels would overlap.
_DECADES_OF_ROUND_TICKS = 1.5


def leaderboard(name: str, mean: float, board: Mapping[str, Any], measure: Measure, target: Target) -> go.Figure:
    """Plot this run among the leaderboard's models, best on top, with errors on a logarithmic axis."""
    entries = [(float(row[measure.key]), str(row["name"]), False) for row in board["rows"]] + [(mean, name, True)]
    entries.sort(reverse=measure.is_error)
    own = FOLD_COLOURS[0] if board["comparable"] else "#7fb8d8"
    figure = go.Figure(
        go.Scatter(
            x=[entry[0] for entry in entries],
            y=[entry[1] for entry in entries],
            mode="markers+text",
            marker={
                "size": [15 if entry[2] else 10 for entry in entries],
                "color": [own if entry[2] else QUIET for entry in entries],
                "symbol": ["diamond" if entry[2] else "circle" for entry in entries],
            },
            text=[f" {entry[0]:.4f}" for entry in entries],
            textposition="middle right",
            cliponaxis=False,
            hovertemplate=f"%{{y}}: {target.with_unit('%{x:.4f}')}<extra></extra>",
        )
    )
    scale = {"type": "log", "dtick": "D2"} if measure.is_error else {}
    title = f"mean {measure.label} over the folds{target.in_unit}"
    figure.update_xaxes(title=title, tickformat=".3~g", **scale)
    figure.update_yaxes(automargin=True)
    return styled(figure, height=120 + 28 * len(entries), legend=False)


def learning_curves(histories: Mapping[int, Sequence[Mapping[str, Any]]], target: Target) -> go.Figure:
    """Plot the training and validation MAE of every fold, with the best epoch marked and the learning rate below."""
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.78, 0.22], vertical_spacing=0.06)
    for fold, rows in histories.items():
        if not rows:
            continue
        colour = FOLD_COLOURS[fold % len(FOLD_COLOURS)]
        epochs = [row["epoch"] for row in rows]
        group = {"legendgroup": f"fold {fold}", "x": epochs, "mode": "lines"}
        for key, part, line in (
            ("val_mae", "validation", {"width": 2}),
            ("train_mae", "training", {"width": 1.5, "dash": "dot"}),
        ):
            figure.add_trace(
                go.Scatter(
                    y=[row[key] for row in rows],
                    name=f"fold {fold} {part}",
                    line={"color": colour, **line},
                    hovertemplate=f"epoch %{{x}}: %{{y:.4f}}<extra>{part}, fold {fold}</extra>",
                    **group,
                ),
                row=1,
                col=1,
            )
        if best := best_epoch(rows):
            figure.add_trace(
                go.Scatter(
                    x=[best[0]],
                    y=[best[1]],
                    mode="markers",
                    marker={"symbol": "star", "size": 13, "color": colour, "line": {"color": "white", "width": 1}},
                    name=f"fold {fold} best epoch",
                    legendgroup=f"fold {fold}",
                    showlegend=False,
                    hovertemplate="best epoch %{x}: %{y:.4f}<extra>fold " + str(fold) + "</extra>",
                ),
                row=1,
                col=1,
            )
        figure.add_trace(
            go.Scatter(
                y=[row["lr"] for row in rows],
                name=f"fold {fold} learning rate",
                showlegend=False,
                line={"color": colour, "width": 1.5},
                hovertemplate="epoch %{x}: %{y:.2e}<extra>learning rate, fold " + str(fold) + "</extra>",
                **group,
            ),
            row=2,
            col=1,
        )
    maes = [row[key] for rows in histories.values() for row in rows for key in ("val_mae", "train_mae")]
    figure.update_yaxes(type="log", title=f"MAE{target.in_unit}", **log_ticks(maes), row=1, col=1)
    figure.update_yaxes(title="learning rate", exponentformat="e", rangemode="tozero", nticks=4, row=2, col=1)
    figure.update_xaxes(title="epoch", row=2, col=1)
    if max((len(rows) for rows in histories.values()), default=0) <= 10:
        figure.update_xaxes(dtick=1)  # keep plotly from labelling half epochs
    return styled(figure, height=520)


def log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Choose the tick labels of a logarithmic axis for ``values``."""
    drawn = [value for value in values if np.isfinite(value) and value > 0]
    if not drawn:
        return {}
    low, high = np.log10(min(drawn)), np.log10(max(drawn))
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    if high - low > _DECADES_OF_ROUND_TICKS:
        every = 1 + len(powers) // 10
        return {"tickvals": [float(f"1e{power}") for power in powers[::every]], "tickformat": "~g"}
    steps = (1, 1.5, 2, 3, 5, 7)
    return {"tickvals": [float(f"{step}e{power}") for power in powers for step in steps], "tickformat": ".2~g"}


def parity(predictions: Predictions, target: Target) -> go.Figure:
    """Plot predictions against targets: a point with an id per crystal, or the density if there are many crystals."""
    density = parity_density(predictions)
    few = len(predictions) <= _MOST_POINTS
    low, high = float(density.edges[0]), float(density.edges[-1])
    figure = go.Figure(
        [
            _points(predictions) if few else _density(density),
            go.Scatter(
                x=[low, high],
                y=[low, high],
                mode="lines",
                line={"color": "#D55E00", "width": 1, "dash": "dash"},
                hoverinfo="skip",
            ),
        ]
    )
    figure.update_xaxes(title=f"target{target.in_unit}", range=[low, high], constrain="domain")
    figure.update_yaxes(title=f"prediction{target.in_unit}", range=[low, high], scaleanchor="x", constrain="domain")
    return styled(figure, height=560, legend=False)


def _points(predictions: Predictions) -> go.Scatter:
    return go.Scatter(
        x=_rounded(predictions.y_true),
        y=_rounded(predictions.y_pred),
        mode="markers",
        marker={"size": 6, "color": FOLD_COLOURS[0], "opacity": 0.5},
        text=[
            f"{escape(crystal_id)} {escape(composition)}"
            for crystal_id, composition in zip(predictions.ids, predictions.compositions, strict=True)
        ],
        hovertemplate="%{text}<br>target %{x:.3f}<br>prediction %{y:.3f}<extra></extra>",
    )


def _density(density: Density) -> go.Heatmap:
    counts = density.counts.astype(float)
    with np.errstate(divide="ignore"):
        shade = np.where(counts > 0, np.log10(counts), np.nan)
    centres = (density.edges[:-1] + density.edges[1:]) / 2
    named = _round_counts(int(density.counts.max()))
    return go.Heatmap(
        x=_rounded(centres),
        y=_rounded(centres),
        z=_nested(shade, 3),
        customdata=density.counts.tolist(),
        colorscale=_SCALE,
        zmin=0,
        colorbar={
            "title": {"text": "crystals", "side": "right"},
            "tickvals": [float(np.log10(count)) for count in named],
            "ticktext": [f"{count:,}" for count in named],
            "thickness": 14,
        },
        hovertemplate="target %{x:.2f}<br>prediction %{y:.2f}<br>%{customdata} crystals<extra></extra>",
        hoverongaps=False,
    )


def _round_counts(largest: int) -> list[int]:
    """Choose the labels of a logarithmic colour bar: round counts, and the largest count."""
    steps = (1, 2, 5) if largest < 100 else (1,)
    round_counts = [step * 10**power for power in range(len(str(largest))) for step in steps]
    return [count for count in round_counts if count <= largest / 1.3] + [largest]


def errors(distribution: ErrorDistribution, target: Target) -> go.Figure:
    """Plot a histogram of absolute errors in logarithmic bins, with quantiles."""
    edges = distribution.edges
    bin_text = target.with_unit("%{customdata[0]:.2g} to %{customdata[1]:.2g}")
    figure = go.Figure(
        go.Bar(
            x=np.sqrt(edges[:-1] * edges[1:]).tolist(),
            y=distribution.counts.tolist(),
            width=np.diff(edges).tolist(),
            marker={"color": FOLD_COLOURS[0], "line": {"width": 0}},
            customdata=np.column_stack([edges[:-1], edges[1:]]).tolist(),
            hovertemplate=f"{bin_text}: %{{y:,}} crystals<extra></extra>",
        )
    )
    # On a logarithmic axis, plotly places lines by their values, but annotations by the logarithms of their values.
    for step, (share, value) in enumerate(distribution.quantiles.items()):
        if value <= 0:
            continue
        label = "median" if share == 0.5 else f"{share:.0%}"
        figure.add_vline(x=value, line={"color": FOLD_COLOURS[1], "width": 1.5, "dash": "dash"})
        figure.add_annotation(
            x=float(np.log10(value)),
            y=1.0 - 0.09 * step,
            yref="paper",
            text=f"{label}: {value:.4f}",
            showarrow=False,
            xanchor="left",
            xshift=4,
            font={"color": FOLD_COLOURS[1]},
            bgcolor="rgba(255,255,255,0.8)",
        )
    figure.update_xaxes(type="log", title=f"absolute error{target.in_unit}", dtick=1, tickformat="~g")
    figure.update_yaxes(title="crystals")
    figure.update_layout(bargap=0)
    return styled(figure, height=560, legend=False)


def trend(data: Trend, target: Target, *, title: str, log_x: bool = False) -> go.Figure:
    """Plot the mean, median and quartiles of the error against a property of crystals."""
    x = data.centres.tolist()
    colour = FOLD_COLOURS[0]
    figure = go.Figure(
        [
            go.Scatter(x=x, y=data.upper.tolist(), mode="lines", line={"width": 0}, showlegend=False, hoverinfo="skip"),
            go.Scatter(
                x=x,
                y=data.lower.tolist(),
                mode="lines",
                line={"width": 0},
                fill="tonexty",
                fillcolor="rgba(0,114,178,0.18)",
                name="middle 50 %",
                hoverinfo="skip",
            ),
            go.Scatter(x=x, y=data.median.tolist(), mode="lines+markers", name="median", line={"color": colour}),
            go.Scatter(
                x=x,
                y=data.mean.tolist(),
                mode="lines+markers",
                name="mean",
                line={"color": FOLD_COLOURS[1], "dash": "dot"},
                customdata=data.counts.tolist(),
                hovertemplate="%{x:.3g}: mean %{y:.4f}, %{customdata:,} crystals<extra></extra>",
            ),
        ]
    )
    figure.update_xaxes(title=title)
    if np.array_equal(data.centres, np.round(data.centres)):
        figure.update_xaxes(tickformat="d", dtick=1)
    if log_x:
        figure.update_xaxes(type="log", tickvals=_ROUND_NUMBERS, ticktext=[str(number) for number in _ROUND_NUMBERS])
    figure.update_yaxes(title=f"absolute error{target.in_unit}", rangemode="tozero")
    return styled(figure, height=340)


def periodic_table(by_element: Mapping[str, tuple[float, int]], target: Target) -> go.Figure:
    """For each element, plot the number of crystals that contain it, and their MAE in the unit of `Target.fine`."""
    factor, fine = target.fine
    shade = np.full((N_ROWS, N_COLUMNS), np.nan)
    absent = np.full((N_ROWS, N_COLUMNS), np.nan)
    text = np.full((N_ROWS, N_COLUMNS), "", dtype=object)
    hover = np.full((N_ROWS, N_COLUMNS), "", dtype=object)
    for symbol, (row, column) in POSITIONS.items():
        if symbol in by_element:
            mae, count = by_element[symbol]
            shade[row, column] = factor * mae
            text[row, column] = f"<b>{symbol}</b><br>{_short(factor * mae)}<br><i>{_compact(count)}</i>"
            hover[row, column] = f"{symbol}: MAE {target.with_unit(f'{mae:.4f}')} over {counted(count, 'crystal')}"
        else:
            absent[row, column] = 0.0
            text[row, column] = symbol
    # Limit the colour scale to the middle 90 %, so that a few rare elements do not wash out the others.
    low, high = np.nanquantile(shade, (0.05, 0.95)).tolist() if by_element else (0.0, 1.0)
    shared = {"x": list(range(N_COLUMNS)), "y": list(range(N_ROWS)), "xgap": 2, "ygap": 2}
    figure = go.Figure(
        [
            go.Heatmap(
                z=_nested(absent, 0),
                text=np.where(np.isnan(absent), "", text).tolist(),
                texttemplate="%{text}",
                textfont={"color": "#b5b5b5", "size": 11},
                colorscale=[[0, "#f4f4f4"], [1, "#f4f4f4"]],
                showscale=False,
                hoverinfo="skip",
                **shared,
            ),
            go.Heatmap(
                z=_nested(shade, 2),
                text=np.where(np.isnan(shade), "", text).tolist(),
                texttemplate="%{text}",
                textfont={"size": 10},
                customdata=hover.tolist(),
                hovertemplate="%{customdata}<extra></extra>",
                hoverongaps=False,
                colorscale=_SCALE,
                zmin=low,
                zmax=high if high > low else low + 1.0,
                colorbar={"title": {"text": f"MAE{fine.in_unit}", "side": "right"}, "thickness": 14},
                **shared,
            ),
        ]
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, autorange="reversed")
    return styled(figure, height=640, legend=False)


def styled(figure: go.Figure, *, height: int, legend: bool = True) -> go.Figure:
    """Give a figure the report's fonts, colours and margins."""
    figure.update_layout(
        template="none",
        height=height,
        showlegend=legend,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "traceorder": "normal"},
        margin={"l": 70, "r": 40, "t": 40, "b": 55},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        hoverlabel={"font": {"family": "system-ui, sans-serif"}},
    )
    axis = {"gridcolor": _GRID, "linecolor": QUIET, "zeroline": False, "title_standoff": 8}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def _nested(values: Any, digits: int) -> list[list[float | None]]:
    """Convert an array to lists of rounded numbers, with None for NaN, so that the JSON is short and valid."""
    return [[None if np.isnan(value) else round(float(value), digits) for value in row] for row in values]


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]


def _short(mae: float) -> str:
    return f"{mae:.0f}" if mae >= 10 else f"{mae:.1f}"


def _compact(count: int) -> str:
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"
