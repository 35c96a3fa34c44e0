"""The report of a search as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped, unused-ignore]

from mbqueue import files
from mbqueue.clock import format_duration
from mbqueue.errors import counted
from mbqueue.results.cells import number
from mbqueue.results.report.markup import page, plot, table
from mbqueue.search.figures import shown
from mbqueue.search.file import Search, Setting
from mbqueue.search.trials import Trial, best_of
from mbqueue.task import Target

_HEADINGS = {
    "history": "Results of the trials",
    "parallel-coordinates": "Settings and results",
    "importance": "Importance of the settings",
    "learning-curves": "Learning curves",
}


def write_report(
    search: Search,
    trials: Sequence[Trial],
    summary: Mapping[str, Any],
    figures: Mapping[str, go.Figure],
    path: Path,
    *,
    target: Target,
) -> Path:
    """Write the report of a search, finished or not, to ``path`` and return it.

    Args:
        summary: from `mbqueue.search.summary.summaries`.
        figures: from `mbqueue.search.figures.draw`.
    """
    body = [*_head(search, trials, summary, target)]
    for name, figure in figures.items():
        body += [f"<h2>{_HEADINGS[name]}</h2>", f"<p>{_said(name, search)}</p>", plot(name, figure)]
    body += [
        f"<h2>Trials, best first{escape(target.in_unit)}</h2>",
        _trials(trials),
        "<h2>Search space</h2>",
        _space(search),
    ]
    files.write_text(path, page(search.name, body))
    return path


def _head(search: Search, trials: Sequence[Trial], summary: Mapping[str, Any], target: Target) -> list[str]:
    counts = ", ".join(f"{count} {state}" for state, count in summary["trials"].items() if count)
    told = f"{len(trials)} of {counted(search.trials, 'trial')}" if search.trials else counted(len(trials), "trial")
    spent = f"{summary['seconds'] / 3600:.2f} GPU-hours used in {counted(summary['epochs_done'], 'epoch')}"
    if summary["epochs_saved"]:
        saved = counted(summary["epochs_saved"], "epoch")
        spent += f"; pruning saved {saved}, about {summary['seconds_saved'] / 3600:.2f} GPU-hours"
    if summary["seconds_left"]:
        spent += f"; about {format_duration(summary['seconds_left'])} of work is left"
    lines = [f"<h1>{escape(search.name)}</h1>"]
    if search.description:
        lines.append(f'<p class="quiet">{escape(search.description)}</p>')
    lines.append(f"<p>Search, {summary['state']}: {told} ({counts}). {spent}.</p>")
    best = best_of(trials)
    if best is None:
        return [*lines, "<p>No trial has been fully trained yet.</p>"]
    folds = ", ".join(map(str, search.folds))
    unit = f" {escape(target.unit)}" if target.unit else ""
    return [
        *lines,
        f'<p class="score">{number(best.value)}{unit}</p>',
        f"<p>Trial {best.number} (<code>{escape(best.experiment)}</code>) has the best validation MAE.</p>",
        table(["Key", "Best value"], [[escape(k), escape(shown(v))] for k, v in best.settings.items()], left=(0, 1)),
        f'<div class="note">The search compares trials by validation MAE on fold{"s" * (len(search.folds) > 1)} '
        f"{folds}. The best of many trials looks better than it is, so estimate its error on test crystals: "
        f"<code>mbqueue promote {escape(search.name)}</code> enqueues these settings on all folds, and marks the folds "
        "that the search used.</div>",
    ]


def _said(name: str, search: Search) -> str:
    """The paragraph that explains a figure."""
    mean = ", the mean over folds" if len(search.folds) > 1 else ""
    conditional = [key for key, setting in search.space.items() if setting.when]
    return {
        "history": f"The best validation MAE of each trial{mean}. Pruned trials are light grey. "
        "The line shows the best fully trained trial so far.",
        "parallel-coordinates": "Each line is a trial. If a trial does not vary a setting, its line shows the value "
        f"from {escape(search.base)}. Drag along an axis to select trials.",
        "importance": "Optuna's PED-ANOVA compares how a setting's values are distributed in the best tenth of the "
        "trials and in all trials. Pruned trials count with their best validation MAE before pruning. With few trials, "
        "the result is only a hint."
        + (
            f" Settings that only some trials vary are left out: {escape(', '.join(conditional))}."
            if conditional
            else ""
        ),
        "learning-curves": f"Validation MAE after each epoch{mean}. Click a name to hide its trials.",
    }[name]


def _trials(trials: Sequence[Trial]) -> str:
    ranked = sorted(trials, key=lambda trial: (trial.value is None, not trial.is_trained, trial.value, trial.number))
    rows = [
        [
            str(trial.number),
            escape(trial.state.value),
            f"{trial.epochs_done}/{trial.epochs * len(trial.curves)}",
            number(trial.value),
            escape(format_duration(trial.seconds)),
            escape(", ".join(f"{key} = {shown(value)}" for key, value in trial.settings.items())),
        ]
        for trial in ranked
    ]
    return table(["Trial", "State", "Epochs", "Validation MAE", "Time", "Settings"], rows, left=(1, 5), style="words")


def _space(search: Search) -> str:
    rows = [[escape(key), escape(_values(setting))] for key, setting in search.space.items()]
    folds = ", ".join(map(str, search.folds))
    bounds = [
        counted(search.trials, "trial") * bool(search.trials),
        f"{search.gpu_hours:g} GPU-hours" * bool(search.gpu_hours),
    ]
    return (
        f"<p>Base <code>{escape(search.base)}</code>, fold{'s' * (len(search.folds) > 1)} {folds}, "
        f"{' or '.join(filter(None, bounds))}, sampler {search.sampler}, pruner {search.pruner}, "
        f"seed {search.seed}.</p>" + table(["Key", "Values"], rows, left=(0, 1), style="words")
    )


def _values(setting: Setting) -> str:
    if setting.choices is not None:
        said = " or ".join(map(str, setting.choices))
    else:
        scale = ", logarithmic" if setting.log else ""
        step = "" if setting.step is None else f" in steps of {setting.step:g}"
        said = f"{setting.low:g} to {setting.high:g}{step}{scale}"
    when = "; ".join(f"{key} is {' or '.join(map(str, values))}" for key, values in setting.when.items())
    return f"{said}, when {when}" if when else said
