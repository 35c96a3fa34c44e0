"""Render an experiment for `mbqueue status`: a table of its folds, or a single line if there is little space."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.text import Text

from mbqueue.clock import format_duration
from mbqueue.errors import counted
from mbqueue.results.choice import ASCII_MARK, MARK, marked
from mbqueue.task import FORMATION_ENERGY

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_LEVELS = "_.-~=+*#"
_BAR = 10
#: Minimum width of a fold's learning curve, in columns.
_SHORTEST_CURVE = 14
#: Minimum ratio of the highest to the lowest value on a curve's scale, so that noise does not look like progress.
_SMALLEST_SPAN = 1.1
STYLES = {
    "leased": "cyan",
    "running": "cyan",
    "ready": "blue",
    "committed": "green",
    "done": "green",
    "failed": "bold red",
    "paused": "yellow",
    "cancelled": "dim",
    "pruned": "dim",
    "waiting": "dim",
}
_BY_INTEREST = ("running", "failed", "paused", "ready", "waiting", "pruned", "cancelled", "done")


def by_interest(experiments: Sequence[Mapping[str, Any]]) -> list[int]:
    """Sort experiments by interest: active ones first, then those that need attention, then the newest.

    Returns:
        Indices into ``experiments``.
    """
    return sorted(range(len(experiments)), key=lambda i: (_BY_INTEREST.index(experiments[i]["state"]), -i))


def left_out(shown: Sequence[Mapping[str, Any]], drawn: Sequence[Mapping[str, Any]]) -> Text:
    """Summarise in one line the experiments in ``shown`` that are not in ``drawn``."""
    names = {entry["name"] for entry in drawn}
    states = Counter(entry["state"] for entry in shown if entry["name"] not in names)
    counts = ", ".join(f"{states[state]:,} {state}" for state in _BY_INTEREST if states[state])
    return Text(
        f"and {counted(len(shown) - len(drawn), 'more experiment')}: {counts}. To show one: mbqueue status NAME", "dim"
    )


def experiment(entry: Mapping[str, Any], width: int, plain: bool) -> Iterable[Text]:
    """Render an experiment's title, folds and scores."""
    title = Text.assemble((entry["name"], "bold"), "  ", (entry["state"], STYLES.get(entry["state"], "")))
    if entry["paused"] and entry["state"] != "paused":
        title.append(" (paused)", STYLES["paused"])
    if entry["target"]["name"] != FORMATION_ENERGY.target.name:
        title.append(f"  {entry['target']['name']}", "dim")
    title.append(f"  {entry['dataset']}", "dim")  # a long path may be truncated, so the name and state come first
    if entry["priority"]:
        title.append(f"  priority {entry['priority']}", "dim")
    yield cut(title, width, plain)
    if entry["prepare"] not in {"committed", "skipped"}:
        told = f"  preparing the data: {entry['prepare']}{_how_far(entry.get('preparing'))}"
        yield cut(Text(told, STYLES.get(entry["prepare"], "")), width, plain)
    yield from _folds(entry, width, plain)
    if tested := _tested(entry, plain):
        yield Text(f"  {tested}", "bold")
    if chosen := entry.get("chosen"):
        told = f"{_mark(plain)} fold on which the search {chosen['search']} chose these settings"
        yield cut(Text(f"  {told} (best of {counted(chosen['trials'], 'trial')})", "yellow"), width, plain)
    if entry["record"] == "committed":
        yield Text(f"  results: {entry['results_dir']}", "dim")


def _how_far(progress: Mapping[str, Any] | None) -> str:
    """Describe a job's progress and time left, for example ``, graphs 20/100, about 3m00s left``; empty if unknown."""
    if not progress or not progress.get("total"):
        return ""
    left = progress.get("seconds_left")
    about = "" if left is None else f", about {format_duration(left)} left"
    return f", {progress['what']} {progress['done']:,}/{progress['total']:,}{about}"


def one_line(entry: Mapping[str, Any], width: int, plain: bool) -> Text:
    """Render an experiment in one line: name, state, epochs, and then either the running folds or the scores."""
    folds = entry["folds"]
    total = sum(fold["epochs_total"] for fold in folds)
    epochs = f"{sum(fold['epochs_done'] for fold in folds)}/{counted(total, 'epoch')}"
    at_work = ", ".join(f"fold {fold['fold']} {_fold_state(fold)}" for fold in folds if fold["running"])
    told = [epochs, at_work or _tested(entry, plain)]
    rest = Text.assemble("  ", (entry["state"], STYLES.get(entry["state"], "")), f"  {', '.join(filter(None, told))}")
    name = cut(Text(entry["name"], "bold"), max(16, width - len(rest)), plain)
    return cut(Text.assemble(name, rest), width, plain)


def cut(text: Text, width: int, plain: bool) -> Text:
    """Cut a text to at most ``width`` columns, and return it."""
    text.truncate(width, overflow="crop" if plain else "ellipsis")
    return text


def sparkline(values: Sequence[float], length: int, *, low: float, high: float, ascii_only: bool = False) -> str:
    """Render a curve as at most ``length`` block characters, on a logarithmic scale from ``low`` to ``high``.

    If there are more values than characters, each character shows the mean of several values. Values that are not
    finite or not above 0 appear as ``?``.
    """
    levels = _ASCII_LEVELS if ascii_only else _BLOCKS
    if len(values) > length:
        borders = [round(i * len(values) / length) for i in range(length + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(borders)]
    marks = []
    for value in values:
        if not _is_drawable(value):
            marks.append("?")
            continue
        span = math.log(high / low) if high > low > 0 else 0.0
        share = math.log(value / low) / span if span else 0.0
        marks.append(levels[min(len(levels) - 1, max(0, round(share * (len(levels) - 1))))])
    return "".join(marks)


def bar(done: int, total: int, *, ascii_only: bool = False) -> str:
    """Render a progress bar of `_BAR` characters. The bar is full only if all work is finished, and empty only if no
    work has begun."""
    full, empty = ("#", ".") if ascii_only else ("█", "░")
    if total <= 0:
        return empty * _BAR
    filled = round(_BAR * done / total)
    if done < total:
        filled = min(filled, _BAR - 1)
    if done > 0:
        filled = max(filled, 1)
    return full * filled + empty * (_BAR - filled)


def _tested(entry: Mapping[str, Any], plain: bool) -> str:
    """Describe the mean test score of the folds that have a score; empty for fewer than two folds."""
    key, label = _score(entry)
    tested = [fold[key] for fold in entry["folds"] if fold[key] is not None]
    if len(tested) < 2:
        return ""
    mean = sum(tested) / len(tested)
    spread = math.sqrt(sum((value - mean) ** 2 for value in tested) / len(tested))
    score = f"{mean:.4f} {'+-' if plain else '±'} {spread:.4f} {entry['target']['unit']}".rstrip()
    return f"{label} {score} over {len(tested)} folds"


def _score(entry: Mapping[str, Any]) -> tuple[str, str]:
    """The key of an experiment's test score in the overview, and the score's name."""
    return ("test_rocauc", "test ROC-AUC") if entry["target"]["kind"] == "class" else ("test_mae", "test MAE")


#: Columns of the table of folds, and whether they are right-aligned. This module formats the table itself, because
#: rich's table is too slow for hundreds of folds.
_COLUMNS = (
    ("fold", False), ("epochs", False), ("", True), ("state", False), ("validation MAE", False), ("best", True),
    ("at", True), ("test MAE", True),
)  # fmt: skip
_BARS, _CURVES, _BEST_EPOCHS = 1, 4, 6


def _mark(plain: bool) -> str:
    return ASCII_MARK if plain else MARK


def _folds(entry: Mapping[str, Any], width: int, plain: bool) -> Iterable[Text]:
    """Render the table of folds. For a narrow terminal, leave out the curves, then the bars, then the best epochs."""
    folds = entry["folds"]
    headers = [*(header for header, _ in _COLUMNS[:-1]), _score(entry)[1]]
    rows = [[(header, "dim") for header in headers], *(_cells(entry, fold, plain) for fold in folds)]
    widths = [max(len(row[column][0]) for row in rows) for column in range(len(_COLUMNS))]
    left = [column for column in range(len(_COLUMNS)) if column != _CURVES]
    free = width - sum(widths[column] + 2 for column in left)
    if free >= _SHORTEST_CURVE:
        left = list(range(len(_COLUMNS)))
        for row, fold in zip(rows[1:], folds, strict=True):
            row[_CURVES] = (_curve(fold["val_mae"], free, plain), "cyan")
        widths[_CURVES] = max(len(row[_CURVES][0]) for row in rows)
    for column in (_BARS, _BEST_EPOCHS):
        if sum(widths[c] + 2 for c in left) - 2 > width:
            left.remove(column)
    for row in rows:
        line = Text(no_wrap=True, overflow="crop" if plain else "ellipsis")
        for column in left:
            content, style = row[column]
            columns = widths[column]
            line.append(content.rjust(columns) if _COLUMNS[column][1] else content.ljust(columns), style)
            line.append("  ")
        line.rstrip()
        yield line


def _cells(entry: Mapping[str, Any], fold: Mapping[str, Any], plain: bool) -> list[tuple[str, str]]:
    """The cells of a fold's row as (text, style) pairs. The curve's cell is empty, because `_folds` adds the curve."""
    done, total = fold["epochs_done"], fold["epochs_total"]
    is_over = done + fold["epochs_skipped"] == total
    return [
        (marked(fold["fold"], entry, _mark(plain)), ""),
        (bar(done, total, ascii_only=plain), "green" if is_over else "cyan") if total else ("none", "dim"),
        (f"{done}/{total}" if total else "", ""),
        (_fold_state(fold), STYLES.get(fold["state"], "")),
        ("", ""),
        (_mae(fold["best_val_mae"], plain), ""),
        ("" if fold["best_epoch"] is None else str(fold["best_epoch"]), ""),
        (_mae(fold[_score(entry)[0]], plain), "bold"),
    ]


def _curve(val_mae: Sequence[float | None], length: int, plain: bool) -> str:
    """Render a fold's learning curve on its own scale, so that a bad fold does not flatten the other curves."""
    values = [math.nan if value is None else value for value in val_mae]
    drawn = [value for value in values if _is_drawable(value)]
    low = min(drawn, default=1.0)
    return sparkline(values, length, low=low, high=max([low * _SMALLEST_SPAN, *drawn]), ascii_only=plain)


def _fold_state(fold: Mapping[str, Any]) -> str:
    running = fold["running"]
    if running is None:
        return str(fold["state"])
    return str(running["kind"]) if running["epoch"] is None else f"epoch {running['epoch']}"


def _is_drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _mae(value: float | None, plain: bool) -> str:
    if value is None:
        return "-" if plain else "–"
    return f"{value:.4f}"
