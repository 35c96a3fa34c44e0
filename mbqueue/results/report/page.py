"""The report as one HTML file: what is said, in which order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mbqueue import files
from mbqueue.clock import format_duration
from mbqueue.results.folder import Recorded
from mbqueue.results.report import analysis, figures, sessions
from mbqueue.results.report.markup import number, page, plot, spread, table

REPORT_FILE = "report.html"

_SCORES = ("mae", "rmse", "median", "max_error", "mape")
_MP_ID = re.compile(r"(mp|mvc)-\d+")
_MP_URL = "https://next-gen.materialsproject.org/materials"


def write_report(recorded: Recorded, path: Path, *, timeline: Sequence[sessions.Span] = ()) -> Path:
    """Write the report of a recorded experiment to ``path`` and return it.

    Args:
        recorded: a results folder; the report reads all of its tables.
        path: the .html file.
        timeline: what each session did when; without it only the sessions' hours are drawn, from the histories.

    Raises:
        ResultsError: when a table is missing or damaged.
    """
    content, histories, everything = recorded.content, recorded.histories, recorded.all_predictions
    board = content["leaderboard"]
    place = figures.leaderboard(
        recorded.name, content["summary"]["mae"]["mean"], board["rows"], comparable=board["comparable"]
    )
    body = [
        *_head(recorded),
        "<h2>Scores per fold</h2>",
        _scores(content),
        "<h2>Beside the matbench leaderboard</h2>",
        _comparability(board),
        plot("leaderboard", place),
        f'<div class="note">{escape(content["notes"]["pretraining_overlap"])}</div>',
        "<h2>Does it overfit?</h2>",
        _verdicts(histories),
        *_curves(histories),
        '<div class="row two"><section>',
        "<h2>Predictions against targets</h2>",
        plot("parity", figures.parity(analysis.parity_density(everything))),
        "</section><section>",
        "<h2>How large the errors are</h2>",
        plot("errors", figures.errors(analysis.error_distribution(everything.abs_error))),
        "</section></div>",
        "<h2>What it fails on</h2>",
        '<div class="row three">',
        plot("by-atoms", figures.trend(analysis.by_atoms(everything), title="atoms in the cell", log_x=True)),
        plot("by-target", figures.trend(analysis.by_target(everything), title="formation energy (eV/atom)")),
        plot("by-elements", figures.trend(analysis.by_element_count(everything), title="elements in the crystal")),
        "</div>",
        "<h2>Error by element</h2>",
        "<p>Mean absolute error in meV/atom over the test crystals that contain the element, and in italics how many "
        "these are. The colours leave out the outer 5 % of the elements on either side.</p>",
        plot("periodic-table", figures.periodic_table(analysis.by_element(everything))),
        "<h2>The 50 worst crystals</h2>",
        _worst(analysis.worst(recorded.predictions)),
        "<h2>Sessions</h2>",
        *_sessions(recorded, timeline),
        "<h2>How it was made</h2>",
        _how(content),
    ]
    files.write_text(path, page(recorded.name, body))
    return path


def _head(recorded: Recorded) -> list[str]:
    content = recorded.content
    dataset, n_folds = content["dataset"], len(content["folds"])
    facts = [
        f"Test part{'s' * (n_folds > 1)} of {n_folds} fold{'s' * (n_folds > 1)}, {len(recorded.all_predictions):,} "
        f"crystals of <code>{escape(dataset['name'])}</code>."
    ]
    if dataset["dropped"]:
        facts.append(f"{len(dataset['dropped']):,} entries could not be used and were left out.")
    if dataset["widened_cutoffs"]:
        facts.append(f"The neighbour cut-off was widened for {dataset['widened_cutoffs']:,}.")
    return [
        f"<h1>{escape(recorded.name)}</h1>",
        f'<p class="quiet">{escape(content["spec"].get("description") or "")}</p>',
        f'<p class="score">MAE {spread(content["summary"]["mae"])} eV/atom</p>',
        f'<p class="quiet">{" ".join(facts)}</p>',
    ]


def _comparability(board: Mapping[str, Any]) -> str:
    if board["comparable"]:
        return "<p>All five official folds, scored by matbench: the mean is a leaderboard score.</p>"
    why = escape("; ".join(board["reasons_against"]))
    return f"<p><b>Not comparable with the leaderboard:</b> {why}. The other models are only there for orientation.</p>"


def _scores(content: Mapping[str, Any]) -> str:
    rows = [
        [
            fold,
            f"{entry['n_test']:,}",
            *(number(entry["scores"][name]) for name in _SCORES),
            str(entry["epochs"]),
            str(entry["best_epoch"] or "–"),
            number(entry["best_val_mae"]),
        ]
        for fold, entry in content["folds"].items()
    ]
    head = ["Fold", "Crystals", "MAE", "RMSE", "Median", "Largest", "MAPE", "Epochs", "Best epoch", "Validation MAE"]
    foot = ["all", "", *(spread(content["summary"][name]) for name in _SCORES), "", "", ""]
    absent = "".join(
        f"<p>Fold {fold}: {escape(', '.join(entry['absent_elements']))} not in its training part, so the reference "
        "energy is 0 and crystals with it are predicted badly.</p>"
        for fold, entry in content["folds"].items()
        if entry["absent_elements"]
    )
    return (
        table(head, rows, foot=foot)
        + absent
        + (
            '<p class="quiet">Errors in eV/atom; MAPE as a share, over targets beyond ±1e-5 eV/atom. Last line: mean '
            "and population standard deviation over folds.</p>"
        )
    )


def _verdicts(histories: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    verdicts = [analysis.verdict(fold, rows) for fold, rows in histories.items()]
    rows = [[f"Fold {v.fold}", f'<b class="{v.kind}">{v.kind}</b>', escape(v.text)] for v in verdicts]
    return table(["", "", ""], rows, left=(0, 1, 2), style="words")


def _curves(histories: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[str]:
    if not any(histories.values()):
        return []
    return [
        "<h2>Learning curves</h2>",
        "<p>Solid: validation. Dotted: training, the running mean over each epoch. Star: the best epoch, whose weights "
        "are kept. Click a name to hide its fold.</p>",
        plot("learning-curves", figures.learning_curves(histories)),
    ]


def _worst(rows: Sequence[analysis.Worst]) -> str:
    cells = [
        [
            str(place),
            _link(row),
            escape(row.composition),
            str(row.fold),
            str(row.n_atoms),
            number(row.y_true),
            number(row.y_pred),
            f"<b>{number(row.abs_error)}</b>",
        ]
        for place, row in enumerate(rows, start=1)
    ]
    head = ["#", "Crystal", "Composition", "Fold", "Atoms", "Target", "Prediction", "Error"]
    return table(head, cells, left=(1, 2)) + (
        '<p class="quiet">Energies in eV/atom. The links lead to the Materials Project: to the entry where the id is '
        "one of its own, else to its entries of the same formula.</p>"
    )


def _link(row: analysis.Worst) -> str:
    own = _MP_ID.fullmatch(row.id) is not None
    url = f"{_MP_URL}/{row.id}" if own else f"{_MP_URL}?formula={quote(row.composition)}"
    return f'<a href="{escape(url)}" rel="noopener noreferrer">{escape(row.id)}</a>'


def _sessions(recorded: Recorded, timeline: Sequence[sessions.Span]) -> list[str]:
    run = recorded.content["run"]
    hours = analysis.session_hours(recorded.content, recorded.histories)
    count = "1 session" if len(hours) == 1 else f"{len(hours)} sessions"
    lines = [f"<p>{count}, {format_duration(run['hours'] * 3600)} in all.</p>"]
    if timeline:
        lines.append(plot("timeline", sessions.timeline(timeline)))
    if hours:
        lines.append(plot("sessions", sessions.session_bars(hours)))
    for change in run["fingerprint_changes"]:
        what = ", ".join(f"{key}: {old} → {new}" for key, (old, new) in change["changes"].items())
        lines.append(
            f"<p>Resumed on other ground at fold {change['fold']}, epoch {change['epoch']}, step {change['step']} "
            f"({escape(what)}): from there on the run is not byte-equal to an uninterrupted one.</p>"
        )
    return lines


def _how(content: Mapping[str, Any]) -> str:
    spec = content["spec"]
    flat = {key: value for key, value in spec.items() if not isinstance(value, dict)}
    for section, values in spec.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
    rows = [[escape(key), escape(str(value))] for key, value in flat.items() if value != ""]
    versions = ", ".join(f"{name} {version}" for name, version in content["run"]["versions"].items())
    return (
        f"<p>{escape(versions)}.<br>Spec hash <code>{content['spec_hash'][:16]}</code>, data hash "
        f"<code>{escape(content['dataset']['hash'][:16])}</code>, recorded {escape(content['run']['recorded_at'])}.</p>"
        f"<details><summary>The whole experiment</summary>{table(['Key', 'Value'], rows, left=(0, 1))}</details>"
    )
