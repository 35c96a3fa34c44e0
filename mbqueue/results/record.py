"""Record an experiment: write results.json, RESULTS.md and the matbench file from the tables of its folds.

A folder is complete if and only if it has a results.json. So `record_experiment` removes results.json first and writes
a new one last. The file results.json contains the size and SHA-256 of every other file, and its own checksum. The
format of results.json (``"format": 1``):

    format           1
    experiment       name in the queue
    spec, spec_hash  the whole spec (see mbqueue.experiment) and the hash of what changes a fold's result
    dataset          name, source, hash, n (crystals used), official, dropped ([{id, reason}]),
                     widened_cutoffs (crystals whose cut-off was widened so that no atom is isolated)
    folds            fold ("0" to "4") → {n_test, scores (see mbqueue.results.scores),
                     epochs, best_epoch, best_val_mae (both null if nothing was trained),
                     absent_elements (missing from its training set);
                     took_part_in_choice (true; only if the settings were chosen on this fold);
                     blend {weights {member → weight}, n_validation (crystals on which they were fitted; 0 for a
                     mean), made_from {member → SHA-256 of its predictions}} (only for a blend)}
    summary          score → {mean, std} over the recorded folds; null if a fold has no such score
    leaderboard      comparable (bool), reasons_against (list of str), rows ([{name, mae}];
                     balanced_accuracy instead of mae for a class)
    notes            pretraining_overlap, choice (only if the settings were chosen on a fold)
    run              everything that may differ between repeated runs: recorded_at, enqueued_on, versions, devices,
                     sessions ([{id, device, seconds}]), hours, fold_seconds, fingerprint_changes ([{fold, epoch,
                     step, changes}]), files (name → {size, sha256}), checksum (SHA-256 of results.json without
                     this key, as canonical JSON; missing from files of earlier versions)
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mbqueue import files
from mbqueue.clock import utc_text
from mbqueue.errors import ResultsError
from mbqueue.history import best_epoch
from mbqueue.results.choice import choice_note, chosen_on
from mbqueue.results.leaderboard import leaderboard, overlap_note, reasons_against
from mbqueue.results.markdown import results_markdown
from mbqueue.results.matbench_file import write_matbench_file
from mbqueue.results.members import family_names
from mbqueue.results.scores import leaderboard_measure, over_folds, score
from mbqueue.results.tables import (
    RESTORE,
    Predictions,
    fold_files,
    history_file,
    predictions_file,
    read_history,
    read_predictions,
)
from mbqueue.storage.results import ResultFile
from mbqueue.task import TASKS, target_of

FORMAT = 1
RESULTS_FILE = "results.json"
MARKDOWN_FILE = "RESULTS.md"
MATBENCH_FILE = "matbench_results.json.gz"


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """The data used for training and testing."""

    name: str
    source: str
    hash: str
    n: int
    official: bool
    dropped: Sequence[tuple[str, str]] = ()
    widened_cutoffs: int = 0


@dataclass(frozen=True, kw_only=True)
class SessionFacts:
    id: str
    device: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RecordInputs:
    """The inputs for recording an experiment, apart from the folds' tables.

    Attributes:
        experiment: name in the queue.
        spec: the whole spec, as ``Spec.to_json()`` returns it.
        spec_hash: the value of ``Spec.hash``.
        folds: folds to record; the folder must contain the history, predictions and model of each.
        versions: library name → version.
        sessions: the sessions that worked on the experiment, in order.
        fingerprint_changes: one entry per resume with a different device, library or micro-batch: dicts with fold,
            epoch, step and changes ({key: [before, after]}).
        absent_elements: fold → elements missing from its training set.
        blends: fold → ``blend`` in that fold's entry of results.json.
        enqueued_on: day, YYYY-MM-DD; recorded_at: a Unix timestamp.
    """

    experiment: str
    spec: Mapping[str, Any]
    spec_hash: str
    dataset: DatasetFacts
    folds: Sequence[int]
    versions: Mapping[str, str]
    sessions: Sequence[SessionFacts]
    enqueued_on: str
    recorded_at: float
    fingerprint_changes: Sequence[Mapping[str, Any]] = ()
    absent_elements: Mapping[int, Sequence[str]] = field(default_factory=dict)
    blends: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


#: A function with two arguments: the content of results.json, and a function that publishes the files.
Commit = Callable[[dict[str, Any], Callable[[], None]], None]


def _publish_at_once(_content: dict[str, Any], publish: Callable[[], None]) -> None:
    publish()


def record_experiment(folder: Path, inputs: RecordInputs, *, commit: Commit = _publish_at_once) -> dict[str, Any]:
    """Score the folds in ``folder``; write the matbench file (official task only), RESULTS.md and results.json.

    The files are first written under temporary names. ``commit`` receives the content of results.json, and a fast
    function ``publish`` that renames the files, results.json last. ``commit`` calls ``publish`` only if the session
    still has its lease.

    Returns:
        The content of results.json.

    Raises:
        ResultsError: if a fold's file is missing or damaged, folds overlap, or matbench is needed and not
            installed. The folder stays unchanged.
    """
    folds = sorted(inputs.folds)
    predictions = {fold: read_predictions(predictions_file(folder, fold)) for fold in folds}
    histories = {fold: read_history(history_file(folder, fold)) for fold in folds}
    _refuse_overlap(folder, predictions)
    content = _content(inputs, predictions, histories)
    tables = sorted(
        (path for fold in folds for path in fold_files(folder, fold, inputs.spec)),
        key=lambda path: path.suffix == ".pth",
    )
    prefix = f"{files.TEMP_PREFIX}record-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as temporary:
        staging, made = Path(temporary), []
        if content["leaderboard"]["comparable"]:
            task = TASKS[inputs.dataset.name]
            write_matbench_file(
                staging / MATBENCH_FILE,
                predictions,
                task,
                models=family_names(inputs.spec),
                parameters=_parameters(inputs),
            )
            made.append(staging / MATBENCH_FILE)
        names = [path.name for path in [*tables, *made]]
        files.write_text(
            staging / MARKDOWN_FILE, results_markdown(content, [*names, RESULTS_FILE], predictions=predictions)
        )
        made.append(staging / MARKDOWN_FILE)
        content["run"]["files"] = {path.name: _checksum(path) for path in [*tables, *made]}
        content["run"]["checksum"] = checksum_of(content)
        files.write_json(staging / RESULTS_FILE, content)

        def publish() -> None:
            for old in (RESULTS_FILE, MATBENCH_FILE):
                (folder / old).unlink(missing_ok=True)
            for path in [*made, staging / RESULTS_FILE]:
                path.replace(folder / path.name)
            # Also remove this call's temporary folder, so that a crash after the commit leaves nothing behind.
            for left_over in folder.glob(f"{prefix}*"):
                shutil.rmtree(left_over, ignore_errors=True)
            files.fsync_dir(folder)

        commit(content, publish)
    return content


def checksum_of(content: Mapping[str, Any]) -> str:
    """Compute the checksum of results.json over everything but the checksum itself."""
    rest = {**content, "run": {key: value for key, value in content["run"].items() if key != "checksum"}}
    # Convert to JSON and back first, because the stored content has no tuples and only string keys.
    return files.sha256_of_json(json.loads(json.dumps(rest)))


def unfinished_content(folder: Path, inputs: RecordInputs) -> dict[str, Any]:
    """Compute the content of results.json for the finished folds without writing it.

    ``folds`` contains the folds with predictions, ``run.fold_seconds`` contains the folds with a history, and
    ``run.files`` is empty.

    Raises:
        ResultsError: if a table is damaged.
    """
    histories = {
        f: read_history(history_file(folder, f)) for f in sorted(inputs.folds) if history_file(folder, f).exists()
    }
    predictions = {
        f: read_predictions(predictions_file(folder, f)) for f in histories if predictions_file(folder, f).exists()
    }
    content = _content(inputs, predictions, histories)
    content["run"]["files"] = {}
    return content


def fold_checksums(folder: Path, fold: int, spec: Mapping[str, Any]) -> dict[str, dict[str, int | str]]:
    """Return file name → size and SHA-256, for a fold's history, predictions and model. A blend has no model.

    Raises:
        ResultsError: if a file is missing.
    """
    return {path.name: _checksum(path) for path in fold_files(folder, fold, spec)}


def recorded_names(content: Mapping[str, Any]) -> list[str]:
    """The files that `record_experiment` wrote, with results.json last."""
    return [*(name for name in content["run"]["files"] if "_fold_" not in name), RESULTS_FILE]


def broken_folds(
    folder: Path,
    folds: Sequence[int],
    spec: Mapping[str, Any],
    *,
    checksums: Mapping[int, Mapping[str, Any]] | None = None,
) -> dict[int, str]:
    """Find the folds whose history, predictions or model are missing or damaged: fold → the problem.

    To repair a fold, the worker only has to predict the fold again, because the fold's checkpoints contain everything
    else.

    Args:
        spec: the experiment's spec, as plain JSON values.
        checksums: fold → the result of `fold_checksums` when the fold's files were written. The files of other folds
            are read, but not compared with anything.
    """
    found = {}
    for fold in folds:
        try:
            read_history(history_file(folder, fold))
            read_predictions(predictions_file(folder, fold))
            there = fold_checksums(folder, fold, spec)
        except ResultsError as error:
            found[fold] = str(error)
            continue
        written = (checksums or {}).get(fold, there)
        changed = [name for name, checksum in there.items() if written.get(name) != checksum]
        if changed:
            found[fold] = f"{', '.join(changed)} in {folder} changed after mbqueue wrote the fold's results."
    return found


def _content(
    inputs: RecordInputs, predictions: Mapping[int, Predictions], histories: Mapping[int, list[dict[str, Any]]]
) -> dict[str, Any]:
    fold_entries: dict[str, dict[str, Any]] = {}
    target = target_of(inputs.spec)
    train = inputs.spec["train"]
    for fold, table in predictions.items():
        best = best_epoch(histories[fold])
        fold_entries[str(fold)] = {
            "n_test": len(table),
            "scores": score(table.y_true, table.y_pred, target),
            "epochs": len(histories[fold]),
            "stopped_early": bool(train["patience"]) and len(histories[fold]) < train["epochs"],
            "best_epoch": best[0] if best else None,
            "best_val_mae": best[1] if best else None,
            "absent_elements": sorted(inputs.absent_elements.get(fold, ())),
            **({"took_part_in_choice": True} if fold in chosen_on(inputs.spec) else {}),
        }
        if fold in inputs.blends:
            fold_entries[str(fold)]["blend"] = dict(inputs.blends[fold])
    choice = choice_note(inputs.spec)
    dataset = inputs.dataset
    board_measure = leaderboard_measure(target)
    against = reasons_against(
        dataset=dataset.name,
        official=dataset.official,
        n=dataset.n,
        dropped=len(dataset.dropped),
        folds=predictions.keys(),
    )
    return {
        "format": FORMAT,
        "experiment": inputs.experiment,
        "spec": dict(inputs.spec),
        "spec_hash": inputs.spec_hash,
        "dataset": {
            **asdict(dataset),
            "dropped": [{"id": crystal_id, "reason": reason} for crystal_id, reason in dataset.dropped],
        },
        "folds": fold_entries,
        "summary": over_folds((entry["scores"] for entry in fold_entries.values()), target),
        "leaderboard": {
            "comparable": not against,
            "reasons_against": against,
            "rows": [{"name": row.name, board_measure.key: row.score} for row in leaderboard(dataset.name)],
        },
        "notes": {
            "pretraining_overlap": overlap_note(target, inputs.spec, dataset=dataset.name),
            **({"choice": choice} if choice else {}),
        },
        "run": {
            "recorded_at": utc_text(inputs.recorded_at),
            "enqueued_on": inputs.enqueued_on,
            "versions": dict(inputs.versions),
            "devices": sorted(
                {row["device"] for rows in histories.values() for row in rows}
                | {session.device for session in inputs.sessions}
            ),
            "sessions": [asdict(session) for session in inputs.sessions],
            "hours": sum(session.seconds for session in inputs.sessions) / 3600,
            "fold_seconds": {str(fold): sum(row["seconds"] for row in rows) for fold, rows in histories.items()},
            "fingerprint_changes": [dict(change) for change in inputs.fingerprint_changes],
        },
    }


def _refuse_overlap(folder: Path, predictions: Mapping[int, Predictions]) -> None:
    owner: dict[str, int] = {}
    for fold, table in predictions.items():
        for crystal_id in table.ids:
            if crystal_id in owner:
                raise ResultsError(
                    f"Crystal {crystal_id} is in the test set of fold {owner[crystal_id]} and of fold {fold} in "
                    f"{folder}; the files come from different runs. Restore the right files from a copy, or enqueue "
                    "the experiment under another name."
                )
            owner[crystal_id] = fold


def _parameters(inputs: RecordInputs) -> dict[str, Any]:
    flat: dict[str, Any] = {"spec_hash": inputs.spec_hash, "seed": inputs.spec.get("seed")}
    for section in ("model", "train"):
        flat |= {f"{section}.{key}": value for key, value in dict(inputs.spec.get(section, {})).items()}
    return flat


def _checksum(path: Path) -> dict[str, int | str]:
    try:
        return ResultFile.of(path).checksum
    except FileNotFoundError as error:
        raise ResultsError(f"There is no file {path}, although the fold's predict job wrote it. {RESTORE}") from error
