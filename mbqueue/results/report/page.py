"""Write the report of an experiment as one HTML file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import plotly.graph_objects as go  # type: ignore[import-untyped, unused-ignore]

from mbqueue import files
from mbqueue.clock import format_duration
from mbqueue.errors import counted
from mbqueue.results.absences import absences
from mbqueue.results.cells import number, spread
from mbqueue.results.choice import choice_note, marked
from mbqueue.results.folder import Recorded
from mbqueue.results.members import enumerated, members_of
from mbqueue.results.report import analysis, class_figures, figures, sessions
from mbqueue.results.report.markup import page, plot, table
from mbqueue.results.scores import measures_of
from mbqueue.task import Target

REPORT_FILE = "report.html"

#: Figures shown side by side.
_FAILS_ON = ("by-atoms", "by-target", "by-elements")
_MP_ID = re.compile(r"(mp|mvc)-\d+")
_MP_URL = "https://next-gen.materialsproject.org/materials"


def write_report(recorded: Recorded, path: Path, *, timeline: Sequence[sessions.Span] = ()) -> Path:
    """Write the report of an experiment, complete or not, and return the path of the HTML file.

    Args:
        recorded: a results folder; the report reads all of its tables.
        path: the .html file.
        timeline: the sessions' activities; without a timeline, the report shows only the sessions' hours, from the
            histories.

    Raises:
        ResultsError: if a table is missing or damaged.
    """
    plots = {name: plot(name, figure) for name, figure in draw(recorded, timeline=timeline).items()}
    content, target = recorded.content, recorded.target
    body = [*_head(recorded)]
    if recorded.folds:
        body += [
            "<h2>Scores per fold</h2>",
            _scores(recorded),
        ]
    if "leaderboard" in plots:
        body += [
            "<h2>Comparison with the matbench leaderboard</h2>",
            _comparability(content["leaderboard"]),
            plots["leaderboard"],
        ]
    body += [
        f'<div class="note">{escape(content["notes"]["pretraining_overlap"])}</div>',
        "<h2>Overfitting</h2>",
        _verdicts(recorded.histories),
    ]
    if "learning-curves" in plots:
        body += [
            "<h2>Learning curves</h2>",
            "<p>Solid lines show the validation MAE, and dotted lines the training MAE as a running mean over each "
            "epoch. A star marks the best epoch, whose weights are kept. Click a name to hide its fold.</p>",
            plots["learning-curves"],
        ]
    if recorded.folds:
        body += [
            *(_classes(plots) if target.is_class else _numbers(plots)),
            "<h2>Error by crystal property</h2>",
            f'<div class="row three">{"".join(plots[name] for name in _FAILS_ON if name in plots)}</div>',
            "<h2>Error by element</h2>",
            f"<p>Mean absolute error{target.fine[1].in_unit} over the test crystals that contain the element. The "
            "number of crystals is in italics. The colour scale ignores the highest and lowest 5 % of the "
            "elements.</p>",
            plots["periodic-table"],
            *_worst(analysis.worst(recorded.predictions), target),
        ]
    body += [
        "<h2>Sessions</h2>",
        *_sessions(recorded, [plots[name] for name in ("timeline", "sessions") if name in plots], timeline),
        "<h2>Experiment</h2>",
        _how(content),
    ]
    files.write_text(path, page(recorded.name, body))
    return path


def _numbers(plots: Mapping[str, str]) -> list[str]:
    return [
        '<div class="row two"><section>',
        "<h2>Predictions against targets</h2>",
        plots["parity"],
        "</section><section>",
        "<h2>Distribution of errors</h2>",
        plots["errors"],
        "</section></div>",
    ]


def _classes(plots: Mapping[str, str]) -> list[str]:
    return [
        '<div class="row three"><section>',
        "<h2>ROC curve</h2>",
        plots["roc"],
        "</section><section>",
        "<h2>Reliability of the probabilities</h2>",
        plots["reliability"],
        "</section><section>",
        "<h2>Confusion matrix</h2>",
        plots["confusion"],
        "</section></div>",
        "<p>The reliability diagram shows the fraction of class 1 among crystals with similar predicted probabilities. "
        "Well-calibrated probabilities are on the diagonal. The confusion matrix uses a threshold of 0.5.</p>",
    ]


def draw(recorded: Recorded, *, timeline: Sequence[sessions.Span] = ()) -> dict[str, go.Figure]:
    """Create the report's figures: name → figure, in the report's order. Figures without data are left out."""
    content, histories, target = recorded.content, recorded.histories, recorded.target
    found = {}
    if recorded.folds:
        measure = recorded.board_measure
        if recorded.board and (mean := recorded.spread(measure)) is not None:
            found["leaderboard"] = figures.leaderboard(
                recorded.name, mean["mean"], content["leaderboard"], measure, target
            )
    if any(histories.values()):
        found["learning-curves"] = figures.learning_curves(histories, target)
    if recorded.folds:
        tested = recorded.all_predictions
        if target.is_class:
            found |= {
                "roc": class_figures.roc_curve({fold: analysis.roc(t) for fold, t in recorded.predictions.items()}),
                "reliability": class_figures.reliability(analysis.reliability(tested)),
                "confusion": class_figures.confusion(analysis.confusion(tested)),
            }
        else:
            found |= {
                "parity": figures.parity(tested, target),
                "errors": figures.errors(analysis.error_distribution(tested.abs_error), target),
                "by-target": figures.trend(analysis.by_target(tested), target, title=target.axis),
            }
        found |= {
            "by-atoms": figures.trend(analysis.by_atoms(tested), target, title="atoms in the cell", log_x=True),
            "by-elements": figures.trend(analysis.by_element_count(tested), target, title="elements in the crystal"),
            "periodic-table": figures.periodic_table(analysis.by_element(tested), target),
        }
    if timeline:
        found["timeline"] = sessions.timeline(timeline)
    if hours := analysis.session_hours(content, histories):
        found["sessions"] = sessions.session_bars(hours)
    return found


def _head(recorded: Recorded) -> list[str]:
    content = recorded.content
    dataset, n_folds = content["dataset"], len(recorded.folds)
    sentences = []
    if recorded.folds:
        sentences.append(
            f"Test set{'s' * (n_folds > 1)} of {counted(n_folds, 'fold')}, "
            f"{counted(len(recorded.all_predictions), 'crystal')} of <code>{escape(dataset['name'])}</code>."
        )
    if dataset["dropped"]:
        n = len(dataset["dropped"])
        sentences.append(
            f"{counted(n, 'entry', 'entries')} could not be used and {'was' if n == 1 else 'were'} left out."
        )
    if dataset["widened_cutoffs"]:
        sentences.append(f"The neighbour cut-off was widened for {counted(dataset['widened_cutoffs'], 'crystal')}.")
    lines = [
        f"<h1>{escape(recorded.name)}</h1>",
        f'<p class="quiet">{escape(content["spec"].get("description") or "")}</p>',
    ]
    if not recorded.is_complete:
        done = ", ".join(map(str, recorded.folds)) or "none"
        lines.append(
            f'<div class="note"><b>Not finished.</b> Folds with predictions: {done}. Folds with finished epochs: '
            f"{', '.join(str(fold) for fold, rows in recorded.histories.items() if rows) or 'none'}.</div>"
        )
    if recorded.folds:
        score = recorded.target.with_unit(spread(recorded.spread(recorded.measure), n_folds))
        lines.append(f'<p class="score">{recorded.measure.label} {escape(score)}</p>')
    return [*lines, f'<p class="quiet">{" ".join(sentences)}</p>']


def _comparability(board: Mapping[str, Any]) -> str:
    if board["comparable"]:
        return "<p>matbench scored all five official folds, so the mean is a leaderboard score.</p>"
    why = escape("; ".join(board["reasons_against"]))
    return f"<p><b>Not comparable with the leaderboard:</b> {why}. The other models are shown only for reference.</p>"


def _scores(recorded: Recorded) -> str:
    content, measures = recorded.content, measures_of(recorded.target)
    rows = [
        [
            marked(fold, content["spec"]),
            f"{entry['n_test']:,}",
            *(number(entry["scores"][measure.key]) for measure in measures),
            str(entry["epochs"]),
            str(entry["best_epoch"] or "–"),
            number(entry["best_val_mae"]),
        ]
        for fold, entry in content["folds"].items()
    ]
    labels = [measure.label for measure in measures]
    head = ["Fold", "Crystals", *labels, "Epochs", "Best epoch", "Validation MAE"]
    # Write the mean and the deviation on two lines, so that the table fits on a page of 1250 pixels.
    n_folds = len(recorded.folds)
    over_folds = (spread(recorded.spread(measure), n_folds).replace(" ± ", "<br>± ") for measure in measures)
    foot = ["all", "", *over_folds, "", "", ""] if n_folds > 1 else []
    footnote = " The last row shows the mean and the population standard deviation over folds." * (n_folds > 1)
    target = recorded.target
    told = (
        "Predictions are probabilities of class 1. A crystal counts as class 1 if its probability is above 0.5."
        if target.is_class
        else f"All errors refer to the predicted {escape(target.axis)}. MAPE is a fraction, and excludes targets "
        "within ±1e-5 of 0."
    )
    absent = "".join(
        f"<p>{escape(said)}</p>" for said in absences(content["folds"], recorded.predictions, recorded.target)
    )
    choice = choice_note(content["spec"])
    return (
        table(head, rows, foot=foot)
        + (f'<div class="note">{escape(choice)}</div>' if choice else "")
        + absent
        + f'<p class="quiet">{told}{footnote}</p>'
    )


def _verdicts(histories: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    verdicts = [analysis.verdict(fold, rows) for fold, rows in histories.items()]
    rows = [
        [f"Fold {v.fold}", f'<b class="{"doubtful" if v.is_doubtful else v.kind}">{v.kind}</b>', escape(v.text)]
        for v in verdicts
    ]
    return table(["", "", ""], rows, left=(0, 1, 2), style="words")


def _worst(rows: Sequence[analysis.Worst], target: Target) -> list[str]:
    cells = [
        [
            str(position),
            _link(row),
            escape(row.composition),
            str(row.fold),
            str(row.n_atoms),
            number(row.y_true),
            number(row.y_pred),
            f"<b>{number(row.abs_error)}</b>",
        ]
        for position, row in enumerate(rows, start=1)
    ]
    head = ["#", "Crystal", "Composition", "Fold", "Atoms", "Target", "Prediction", "Error"]
    return [
        f"<h2>The {counted(len(rows), 'worst crystal')}</h2>",
        table(head, cells, left=(1, 2)),
        f'<p class="quiet">Target and prediction: {escape(target.axis)}. Each link opens the crystal in the Materials '
        "Project or, if its id is not from there, a search for its formula.</p>",
    ]


def _link(row: analysis.Worst) -> str:
    own = _MP_ID.fullmatch(row.id) is not None
    url = f"{_MP_URL}/{row.id}" if own else f"{_MP_URL}?formula={quote(row.composition)}"
    return f'<a href="{escape(url)}" rel="noopener noreferrer">{escape(row.id)}</a>'


def _sessions(recorded: Recorded, plots: Sequence[str], timeline: Sequence[sessions.Span]) -> list[str]:
    run = recorded.content["run"]
    count = counted(len(run["sessions"]), "session")
    lines = [f"<p>{count}, {format_duration(run['hours'] * 3600)} in all.</p>", *plots]
    if timeline:
        lines.append(_where_time_went(timeline))
    for change in run["fingerprint_changes"]:
        what = ", ".join(f"{key}: {old} → {new}" for key, (old, new) in change["changes"].items())
        lines.append(
            f"<p>Resumed under different conditions at fold {change['fold']}, epoch {change['epoch']}, "
            f"step {change['step']} ({escape(what)}): the last digits may differ from those of an "
            "uninterrupted run.</p>"
        )
    return lines


def _where_time_went(timeline: Sequence[sessions.Span]) -> str:
    kinds = sessions.kinds_of(timeline)
    of_sessions = sessions.seconds_by_kind(timeline)

    def cells(spent: Mapping[str, float]) -> list[str]:
        return [format_duration(spent[kind]) if spent.get(kind) else "–" for kind in kinds]

    rows = [
        [f"{position}. {escape(device)}", *cells(spent)]
        for position, ((_, device), spent) in enumerate(of_sessions.items(), start=1)
    ]
    total = {kind: sum(spent.get(kind, 0.0) for spent in of_sessions.values()) for kind in kinds}
    words = [text for kind, text in _MEANING.items() if kind in kinds]
    return table(["Session", *kinds], rows, foot=["all", *cells(total)]) + f'<p class="quiet">{" ".join(words)}</p>'


_MEANING = {
    "checkpoint": "<b>checkpoint</b>: the time for saving checkpoints, drawn at the end of each finished epoch.",
    "idle": "<b>idle</b>: start-up, waiting, and jobs of other experiments.",
    sessions.CUT_OFF: "<b>cut off</b>: attempts whose session died or lost its lease. The next attempt shows how "
    "much of the work was saved.",
    sessions.LOST: "<b>repeated</b>: work and warm-up that had to be repeated because a session died or lost its "
    "lease, drawn at the end of the attempt. The part of the attempt that was saved counts as work.",
    sessions.PUBLISH: "<b>publish</b>: the time for copying commits to the drive. A separate thread copies the "
    "commits, so this time overlaps with the other columns. Before a session ends, it waits until its commits are "
    "copied.",
}


def _how(content: Mapping[str, Any]) -> str:
    spec = content["spec"]
    flat = {key: value for key, value in spec.items() if not isinstance(value, dict)}
    for section, values in spec.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
    if members := members_of(spec):
        flat["made_from.members"] = enumerated(members)
    rows = [[escape(key), escape(str(value))] for key, value in flat.items() if value != ""]
    versions = ", ".join(f"{name} {version}" for name, version in content["run"]["versions"].items())
    return (
        f"<p>{escape(versions)}.<br>Spec hash <code>{content['spec_hash'][:16]}</code>, data hash "
        f"<code>{escape(content['dataset']['hash'][:16])}</code>, recorded {escape(content['run']['recorded_at'])}.</p>"
        f"<details><summary>The whole experiment</summary>{table(['Key', 'Value'], rows, left=(0, 1))}</details>"
    )
