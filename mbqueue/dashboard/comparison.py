"""Render the output of `mbqueue compare` for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mbqueue.errors import counted
from mbqueue.results.cells import spread
from mbqueue.results.choice import ASCII_MARK, MARK, choice_note, chosen_on
from mbqueue.results.compare import Comparison, PairedDifference
from mbqueue.results.folder import Recorded
from mbqueue.results.scores import Measure
from mbqueue.task import N_FOLDS, Target

#: Width, in characters, of a table with a twelve-character name, five folds and their mean.
_NEEDED_FOR_FOLDS = 70


class ComparisonView:
    """A table of scores, and a comparison of each pair of experiments on the crystals that both predicted."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        sign = "+-" if options.ascii_only else "±"
        dash = "-" if options.ascii_only else "–"
        mark = ASCII_MARK if options.ascii_only else MARK
        parts: list[RenderableType] = [_scores(self.comparison, sign, dash, mark, options.max_width)]
        parts += _notes(self.comparison, mark)
        for pair in self.comparison.pairs:
            parts += [Text(""), *_pair(pair, self.comparison.recorded[0].target)]
        yield Group(*parts)


def _scores(comparison: Comparison, sign: str, dash: str, mark: str, width: int) -> Table:
    """Render the table of scores. Long names wrap, and a narrow terminal shows only the means, so no number is cut."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    first = comparison.recorded[0]
    measure, unit = first.board_measure, first.target.unit
    # Only this column may shrink, because the other columns do not wrap.
    table.add_column(", ".join(filter(None, [measure.label, unit])), overflow="fold")
    shown = range(N_FOLDS) if width >= _NEEDED_FOR_FOLDS else range(0)
    for fold in shown:
        table.add_column(f"fold {fold}", justify="right", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    rows = [
        (
            (one.spread(measure) or {"mean": 0.0})["mean"],
            Text(label, "bold"),
            [_fold(one, fold, measure, dash, mark) for fold in shown],
            spread(one.spread(measure), len(one.folds), sign=sign, none=dash),
        )
        for label, one in zip(comparison.labels, comparison.recorded, strict=True)
    ]
    board = [(row[measure.key], row["name"]) for row in comparison.board]
    rows += [(score, Text(name, "dim"), [""] * len(shown), f"{score:.4f}") for score, name in board]
    for _, label, folds, mean in sorted(rows, key=lambda row: row[0], reverse=not measure.is_error):
        table.add_row(label, *folds, mean)
    return table


def _notes(comparison: Comparison, mark: str) -> Iterable[RenderableType]:
    for label, one in zip(comparison.labels, comparison.recorded, strict=True):
        if note := choice_note(one.content["spec"], mark):
            yield Text(f"{label}: {note}", "yellow")
        if one.board and (reasons := one.content["leaderboard"]["reasons_against"]):
            yield Text(f"{label} cannot be compared with the leaderboard: {'; '.join(reasons)}.", "yellow")
    overlaps = [one.overlap for one in comparison.recorded]
    if len(set(overlaps)) == 1:
        yield Text(overlaps[0], "dim")
    else:
        yield from (Text(f"{label}: {told}", "dim") for label, told in zip(comparison.labels, overlaps, strict=True))


def _pair(pair: PairedDifference, target: Target) -> Iterable[RenderableType]:
    yield Text.assemble(
        (f"{pair.b} against {pair.a}", "bold"), f" on {counted(pair.n, 'crystal')} in common: {pair.verdict}"
    )
    interval = "" if pair.low is None else f", 95% interval {pair.low:+.5f} to {pair.high:+.5f}"
    yield Text(f"  mean difference of |error| {target.with_unit(f'{pair.mean:+.5f}')}{interval}")
    yield Text(
        f"  smaller error on {pair.share_better:.1%} of these crystals; MAE {pair.mae_b:.4f} against {pair.mae_a:.4f}"
    )
    if pair.per_fold:
        folds = ", ".join(f"{fold}: {value:+.5f}" for fold, value in pair.per_fold.items())
        yield Text(f"  by fold: {folds}")


def _fold(one: Recorded, fold: int, measure: Measure, dash: str, mark: str) -> str:
    entry = one.content["folds"].get(str(fold))
    value = None if entry is None else entry["scores"][measure.key]
    is_marked = fold in chosen_on(one.content["spec"])
    return dash if value is None else f"{value:.4f}{f' {mark}' * is_marked}"
