"""Render a search for `mbqueue status`: a summary and, for `mbqueue status NAME`, a table of its trials."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mbqueue.clock import format_duration
from mbqueue.dashboard.experiments import STYLES, cut
from mbqueue.errors import counted


def search_lines(search: Mapping[str, Any], width: int, plain: bool, *, opened: bool) -> Iterable[RenderableType]:
    """Render a summary of a search: trial counts by state, the best trial so far, and the time used and left.

    Args:
        opened: show all settings of the best trial, even if they take several lines.
    """
    trials = search["trials"]
    counts = ", ".join(f"{count} {state}" for state, count in trials.items() if count)
    begun, wanted = sum(trials.values()), search["trials_wanted"]
    told = f"{begun} of {counted(wanted, 'trial')}" if wanted else counted(begun, "trial")
    title = Text.assemble((search["name"], "bold"), "  ", (search["state"], STYLES.get(search["state"], "")))
    title.append(f"  search: {told} ({counts})", "dim")
    yield cut(title, width, plain)
    best = search["best"]
    if best is not None:
        settings = settings_text(best["settings"])
        told = f"best validation MAE {best['val_mae']:.4f} in trial {best['trial']}: {settings}"
        if opened:
            yield Padding(Text(told, "bold"), (0, 0, 0, 2))
        else:
            yield cut(Text(f"  {told}", "bold"), width, plain)
    spent = [f"{format_duration(search['seconds'])} used"]
    if search["epochs_saved"]:
        saved = counted(search["epochs_saved"], "epoch")
        spent.append(f"{saved} (about {format_duration(search['seconds_saved'])}) saved by pruning")
    if search["seconds_left"]:
        spent.append(f"about {format_duration(search['seconds_left'])} left")
    yield cut(Text(f"  {'; '.join(spent)}", "dim"), width, plain)


def trial_table(entries: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("right", "left", "right", "left", "left"):
        table.add_column(justify=justify)
    for entry in entries:
        number, state, epochs, best, settings = _cells(entry)
        shown = Text(state, STYLES.get(state, ""))
        table.add_row(number, shown, epochs, Text(best, "bold"), Text(settings, "dim"))
    return Padding(table, (0, 0, 0, 2))


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    folds = entry["folds"]
    done, total = sum(fold["epochs_done"] for fold in folds), sum(fold["epochs_total"] for fold in folds)
    best = [fold["best_val_mae"] for fold in folds if fold["best_val_mae"] is not None]
    mean = f"{sum(best) / len(best):.4f}" if best else "-"
    trial = entry["trial"]
    return str(trial["number"]), entry["state"], f"{done}/{total}", mean, settings_text(trial["settings"])


def settings_text(settings: Mapping[str, Any]) -> str:
    """Format a trial's settings in one line, for example ``train.lr=0.0003, train.batch_size=32``."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )
