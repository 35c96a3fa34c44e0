"""The figures of a search's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped, unused-ignore]

from mbqueue.results.report.figures import FOLD_COLOURS, INK, QUIET, log_ticks, styled
from mbqueue.search.file import Search
from mbqueue.search.trials import Trial, TrialState, best_of
from mbqueue.task import Target

_FAINT = "rgba(154, 154, 154, 0.45)"
_BEST, _KEPT, _OPEN = FOLD_COLOURS[1], FOLD_COLOURS[0], FOLD_COLOURS[2]
#: The maximum number of labels on an axis of the parallel-coordinates plot.
_TICKS = 5


def draw(search: Search, trials: Sequence[Trial], shares: Mapping[str, float], target: Target) -> dict[str, go.Figure]:
    """Plot a search's figures; return them by name, in report order. Figures without data are left out.

    Args:
        shares: the result of `mbqueue.search.export.importances`.
    """
    rated = [trial for trial in trials if trial.value is not None]
    if not rated:
        return {}
    found = {"history": history(rated, target), "parallel-coordinates": parallel_coordinates(search, rated, target)}
    if shares:
        found["importance"] = importance(shares)
    return found | {"learning-curves": learning_curves(rated, target)}


def history(trials: Sequence[Trial], target: Target) -> go.Figure:
    """Plot each trial's result against the trial's number, and the best result so far among fully trained trials."""
    values = [trial.value for trial in trials if trial.value is not None]
    figure = go.Figure()
    for name, shown, colour in _groups(trials):
        figure.add_trace(
            go.Scatter(
                x=[trial.number for trial in shown],
                y=[trial.value for trial in shown],
                text=[_label(trial) for trial in shown],
                mode="markers",
                name=name,
                marker={"size": 9, "color": colour},
                hovertemplate=f"%{{text}}<br>{target.with_unit('%{y:.4f}')}<extra></extra>",
            )
        )
    ended = [(trial.number, trial.value) for trial in trials if trial.is_trained and trial.value is not None]
    if ended:
        last = max(trial.number for trial in trials)
        best = list(accumulate((value for _, value in ended), min))
        figure.add_trace(
            go.Scatter(
                x=[*(number for number, _ in ended), last],
                y=[*best, best[-1]],
                mode="lines",
                name="best so far",
                line={"color": INK, "width": 2, "shape": "hv"},
                hovertemplate=f"best so far: {target.with_unit('%{y:.4f}')}<extra></extra>",
            )
        )
    figure.update_xaxes(title="trial", rangemode="tozero")
    if len(trials) <= 10:
        figure.update_xaxes(dtick=1)
    figure.update_yaxes(type="log", title=f"validation MAE{target.in_unit}", **log_ticks(values))
    return styled(figure, height=420)


def parallel_coordinates(search: Search, trials: Sequence[Trial], target: Target) -> go.Figure:
    """Plot each trial as a line through its settings, coloured by the trial's result.

    If a trial does not vary a setting, its line passes through the base experiment's value.
    """
    values = [trial.value for trial in trials if trial.value is not None]
    dimensions = []
    for key, setting in search.space.items():
        column = [trial.settings.get(key, search.base_value(key)) for trial in trials]
        is_number = setting.choices is None and all(isinstance(value, int | float) for value in column)
        dimensions.append({"label": escape(key), **(_scale(column, setting.log) if is_number else _steps(column))})
    dimensions.append({"label": f"validation MAE{escape(target.in_unit)}", "values": values, "tickformat": ".3~g"})
    figure = go.Figure(
        go.Parcoords(
            dimensions=dimensions,
            line={
                "color": values,
                "colorscale": "Viridis",
                "reversescale": True,
                "showscale": True,
                "colorbar": {"thickness": 14, "tickformat": ".3~g"},
            },
            labelangle=-20,
            labelside="top",
        )
    )
    styled(figure, height=480, legend=False)
    return figure.update_layout(margin={"l": 80, "r": 60, "t": 110, "b": 40})


def importance(shares: Mapping[str, float]) -> go.Figure:
    """Plot the importance of each setting, with the most important on top."""
    ranked = sorted(shares.items(), key=lambda item: item[1])
    figure = go.Figure(
        go.Bar(
            x=[share for _, share in ranked],
            y=[escape(key) for key, _ in ranked],
            orientation="h",
            marker={"color": FOLD_COLOURS[0]},
            text=[f"{share:.0%}" for _, share in ranked],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )
    )
    figure.update_xaxes(title="importance, as a share of the total", tickformat=".0%", range=[0, 1])
    figure.update_yaxes(automargin=True)
    return styled(figure, height=130 + 32 * len(ranked), legend=False)


def learning_curves(trials: Sequence[Trial], target: Target) -> go.Figure:
    """Plot each trial's validation MAE against the epoch, averaged over folds; lines of pruned trials are faint."""
    figure = go.Figure()
    for name, shown, colour in _groups(trials):
        x: list[int | None] = []
        y: list[float | None] = []
        text: list[str] = []
        for trial in shown:
            curve = trial.mean_curve
            x += [*range(1, len(curve) + 1), None]  # the None makes plotly leave a gap between two curves
            y += [*curve, None]
            text += [_label(trial)] * (len(curve) + 1)
        is_faint = colour == _FAINT
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                text=text,
                mode="lines+markers",
                name=name,
                line={"color": colour, "width": 1 if is_faint else 2},
                marker={"size": 4 if is_faint else 6},
                hovertemplate=f"%{{text}}<br>epoch %{{x}}: {target.with_unit('%{y:.4f}')}<extra></extra>",
            )
        )
    maes = [value for trial in trials for value in trial.mean_curve]
    figure.update_yaxes(type="log", title=f"validation MAE{target.in_unit}", **log_ticks(maes))
    figure.update_xaxes(title="epoch")
    if max(len(trial.mean_curve) for trial in trials) <= 10:
        figure.update_xaxes(dtick=1)
    return styled(figure, height=480)


def _groups(trials: Sequence[Trial]) -> list[tuple[str, list[Trial], str]]:
    """Group trials for a plot as (name, trials, colour), in drawing order."""
    best = best_of(trials)
    rest = [trial for trial in trials if trial is not best]
    named = [
        ("pruned", [trial for trial in rest if trial.state is TrialState.PRUNED], _FAINT),
        ("failed or cancelled", [t for t in rest if t.state in {TrialState.FAILED, TrialState.CANCELLED}], QUIET),
        ("in progress", [trial for trial in rest if trial.state is TrialState.OPEN], _OPEN),
        ("fully trained", [trial for trial in rest if trial.state is TrialState.DONE], _KEPT),
        ("best", [] if best is None else [best], _BEST),
    ]
    return [group for group in named if group[1]]


def _label(trial: Trial) -> str:
    settings = "<br>".join(f"{escape(key)} = {escape(shown(value))}" for key, value in trial.settings.items())
    return f"<b>trial {trial.number}</b>, {trial.state.value}<br>{settings}"


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _scale(column: Sequence[float], is_log: bool) -> dict[str, Any]:
    """Make a numeric axis. plotly has no logarithmic axes for parallel coordinates, so the values are logarithms."""
    if not is_log or min(column) <= 0:  # the base experiment's value may be 0, which has no logarithm
        return {"values": column, "tickformat": ".4~g"}
    placed = [math.log10(value) for value in column]
    low, high = min(placed), max(placed)
    at = [low + (high - low) * step / (_TICKS - 1) for step in range(_TICKS)] if high > low else [low]
    return {"values": placed, "tickvals": at, "ticktext": [f"{10**place:.2g}" for place in at]}


def _steps(column: Sequence[Any]) -> dict[str, Any]:
    """Make an axis with evenly spaced choices, sorted if they are numbers."""
    choices = {shown(value): value for value in column}
    if all(isinstance(value, int | float) for value in choices.values()):
        choices = dict(sorted(choices.items(), key=lambda item: item[1]))
    names = list(choices)
    values = [names.index(shown(value)) for value in column]
    return {"values": values, "tickvals": list(range(len(names))), "ticktext": [escape(name) for name in names]}
