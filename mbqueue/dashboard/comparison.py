"""What `mbqueue compare` shows in the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mbqueue.results.compare import Comparison, PairedDifference
from mbqueue.results.folder import Recorded
from mbqueue.task import N_FOLDS, Target

#: Columns that five folds with their mean take beside a name of twelve.
_NEEDED_FOR_FOLDS = 70


def render_comparison(comparison: Comparison) -> RenderableType:
    """Scores side by side with the leaderboard, then every pair on the crystals that both predicted."""
    return _View(comparison)


class _View:
    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        sign = "+-" if options.ascii_only else "±"
        dash = "-" if options.ascii_only else "–"
        parts: list[RenderableType] = [_scores(self.comparison, sign, dash, options.max_width)]
        parts += _notes(self.comparison)
        for pair in self.comparison.pairs:
            parts += [Text(""), *_pair(pair, self.comparison.recorded[0].target)]
        yield Group(*parts)


def _scores(comparison: Comparison, sign: str, dash: str, width: int) -> Table:
    """Numbers are always whole: names take the lines that they need, and a narrow terminal gets the means only."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    target = comparison.recorded[0].target
    table.add_column(
        ", ".join(filter(None, ["MAE", target.unit])), overflow="fold"
    )  # the only one that may shrink, since the others do not wrap
    shown = range(N_FOLDS) if width >= _NEEDED_FOR_FOLDS else range(0)
    for fold in shown:
        table.add_column(f"fold {fold}", justify="right", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    rows = [
        (_mean(one), Text(label, "bold"), [_fold(one, fold, dash) for fold in shown], _spread(one, sign))
        for label, one in zip(comparison.labels, comparison.recorded, strict=True)
    ]
    board = comparison.recorded[0].content["leaderboard"]["rows"]
    rows += [(row["mae"], Text(row["name"], "dim"), [""] * len(shown), f"{row['mae']:.4f}") for row in board]
    for _, label, folds, mean in sorted(rows, key=lambda row: row[0]):
        table.add_row(label, *folds, mean)
    return table


def _notes(comparison: Comparison) -> Iterable[RenderableType]:
    for label, one in zip(comparison.labels, comparison.recorded, strict=True):
        if reasons := one.content["leaderboard"]["reasons_against"]:
            yield Text(f"{label} does not compare with the leaderboard: {'; '.join(reasons)}.", "yellow")
    yield Text("CHGNet's pretraining has seen most of these crystals; the other models have not.", "dim")


def _pair(pair: PairedDifference, target: Target) -> Iterable[RenderableType]:
    yield Text.assemble((f"{pair.b} against {pair.a}", "bold"), f" on {pair.n:,} common crystals: {pair.verdict}")
    interval = "" if pair.low is None else f", 95% interval {pair.low:+.5f} to {pair.high:+.5f}"
    yield Text(f"  mean difference of |error| {target.with_unit(f'{pair.mean:+.5f}')}{interval}")
    yield Text(
        f"  smaller error on {pair.share_better:.1%} of the crystals; MAE there {pair.mae_b:.4f} and {pair.mae_a:.4f}"
    )
    if pair.per_fold:
        folds = ", ".join(f"{fold}: {value:+.5f}" for fold, value in pair.per_fold.items())
        yield Text(f"  by fold: {folds}")


def _mean(one: Recorded) -> float:
    return float(one.content["summary"]["mae"]["mean"])


def _spread(one: Recorded, sign: str) -> str:
    mae = one.content["summary"]["mae"]
    return f"{mae['mean']:.4f} {sign} {mae['std']:.4f}"


def _fold(one: Recorded, fold: int, dash: str) -> str:
    entry = one.content["folds"].get(str(fold))
    return dash if entry is None else f"{entry['scores']['mae']:.4f}"
