"""The comparison of experiments as one HTML file."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped, unused-ignore]

from mbqueue import files
from mbqueue.results.cells import number, spread
from mbqueue.results.choice import MARK, choice_note, chosen_on
from mbqueue.results.compare import Comparison, PairedDifference
from mbqueue.results.folder import Recorded
from mbqueue.results.report.figures import FOLD_COLOURS, INK, styled
from mbqueue.results.report.markup import page, plot, table
from mbqueue.results.scores import Measure
from mbqueue.task import N_FOLDS, Target

#: The width of the names next to the plot, in characters.
_NAME_COLUMNS = 28


def write_comparison(comparison: Comparison, path: Path) -> Path:
    body = ["<h1>Comparison</h1>", *sections(comparison, plot("paired", paired_differences(comparison)))]
    files.write_text(path, page("Comparison", body))
    return path


def sections(comparison: Comparison, paired_plot: str) -> list[str]:
    """Write the text and tables of a comparison as HTML.

    Args:
        paired_plot: the figure of `paired_differences` as HTML.
    """
    labelled = list(zip(comparison.labels, comparison.recorded, strict=True))
    reference = comparison.recorded[0]
    target, measure = reference.target, reference.board_measure
    overlaps = dict.fromkeys(one.overlap for one in comparison.recorded)
    return [
        f"<p>{escape(', '.join(comparison.labels))}</p>",
        f"<h2>{measure.label} on the test set of each fold{escape(target.in_unit)}</h2>",
        table(
            ["Experiment", *(f"Fold {fold}" for fold in range(N_FOLDS)), "Mean ± std"],
            [
                [escape(label), *_folds(one, measure), f"<b>{spread(one.spread(measure), len(one.folds))}</b>"]
                for label, one in labelled
            ],
            style="names",
        ),
        *(
            f"<p>{escape(f'{label}: {note}')}</p>"
            for label, one in labelled
            if (note := choice_note(one.content["spec"]))
        ),
        *(
            f"<p>{escape(label)} is not comparable with the leaderboard: {escape('; '.join(reasons))}.</p>"
            for label, one in labelled
            if one.board and (reasons := one.content["leaderboard"]["reasons_against"])
        ),
        "<h2>Differences paired by crystal</h2>",
        "<p>Mean of |error| − |error of the reference| over the crystals that both predicted, with its 95 % interval. "
        "A negative value means that the errors are smaller than those of the reference. In “A against B”, B is the "
        "reference. The interval accounts for the choice of test crystals, but not for the training seed.</p>",
        paired_plot,
        table(
            ["", "Crystals", "MAE", "MAE of the reference", "Difference", "95 % interval", "Better on", ""],
            [_pair(pair) for pair in comparison.pairs],
            left=(0, 7),
            style="names words",
        ),
        *_board(comparison.board, measure, target),
        *(f'<div class="note">{escape(overlap)}</div>' for overlap in overlaps),
    ]


def paired_differences(comparison: Comparison) -> go.Figure:
    """Plot the mean paired differences with their 95 % intervals, in the unit of `Target.fine`."""
    factor, fine = comparison.recorded[0].target.fine
    shown = [(pair, pair.low, pair.high) for pair in comparison.pairs if pair.low is not None and pair.high is not None]
    figure = go.Figure(
        go.Scatter(
            x=[factor * pair.mean for pair, _, _ in shown],
            y=[f"{_wrapped(pair.b)}<br>against {_wrapped(pair.a)}" for pair, _, _ in shown],
            mode="markers",
            marker={"size": 11, "color": FOLD_COLOURS[0]},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [factor * (high - pair.mean) for pair, _, high in shown],
                "arrayminus": [factor * (pair.mean - low) for pair, low, _ in shown],
                "color": FOLD_COLOURS[0],
            },
            hovertemplate=f"%{{y}}: {fine.with_unit('%{x:+.4g}')}<extra></extra>",
        )
    )
    figure.add_vline(x=0, line={"color": INK, "width": 1})
    figure.update_xaxes(title=f"difference of the absolute error{fine.in_unit}")
    figure.update_yaxes(automargin=True, autorange="reversed")
    lines = sum(2 + len(pair.a) // _NAME_COLUMNS + len(pair.b) // _NAME_COLUMNS for pair, _, _ in shown)
    return styled(figure, height=130 + 20 * lines, legend=False)


def _wrapped(name: str) -> str:
    """Split a long name over several lines, to leave room for the figure."""
    return "<br>".join(escape(part) for part in textwrap.wrap(name, _NAME_COLUMNS))


def _board(rows: Sequence[Mapping[str, Any]], measure: Measure, target: Target) -> list[str]:
    if not rows:
        return []
    cells = [[escape(row["name"]), number(row[measure.key])] for row in rows]
    return ["<h2>The matbench leaderboard</h2>", table(["Model", escape(measure.label + target.in_unit)], cells)]


def _folds(one: Recorded, measure: Measure) -> list[str]:
    entries = one.content["folds"]
    return [
        number(entries[str(fold)]["scores"][measure.key] if str(fold) in entries else None)
        + f" {MARK}" * (str(fold) in entries and fold in chosen_on(one.content["spec"]))
        for fold in range(N_FOLDS)
    ]


def _pair(pair: PairedDifference) -> list[str]:
    interval = "–" if pair.low is None else f"{pair.low:+.5f} to {pair.high:+.5f}"
    return [
        escape(f"{pair.b} against {pair.a}"),
        f"{pair.n:,}",
        number(pair.mae_b),
        number(pair.mae_a),
        f"{pair.mean:+.5f}",
        interval,
        f"{pair.share_better:.1%}",
        escape(pair.verdict),
    ]
