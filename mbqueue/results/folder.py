"""Find and read recorded experiments."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mbqueue.errors import ResultsError
from mbqueue.results.leaderboard import overlap_note
from mbqueue.results.members import unknown_weights
from mbqueue.results.record import FORMAT, RESULTS_FILE, RecordInputs, checksum_of, unfinished_content
from mbqueue.results.scores import Measure, leaderboard_measure, measures_of
from mbqueue.results.tables import RESTORE, Predictions, history_file, predictions_file, read_history, read_predictions
from mbqueue.storage.results import ResultFile
from mbqueue.task import TASKS, Target, target_of

#: The largest accepted results.json, in bytes. 130,000 dropped entries with their reasons take 20 MB.
LARGEST_RESULTS = 256 << 20
#: The keys of `run` in a results.json from a version that did not write checksums.
_RUN_BEFORE_CHECKSUMS = frozenset(
    {"recorded_at", "enqueued_on", "versions", "devices", "sessions", "hours", "fold_seconds", "fingerprint_changes"}
    | {"files"}
)


@dataclass(frozen=True)
class Recorded:
    """A results folder: the content of results.json, and the tables of its folds, read on demand.

    Attributes:
        is_complete: False if ``read_unfinished`` read the results of an unfinished experiment.
    """

    folder: Path
    content: dict[str, Any]
    is_complete: bool = True

    @property
    def name(self) -> str:
        return str(self.content["experiment"])

    @property
    def target(self) -> Target:
        return target_of(self.content["spec"])

    @property
    def overlap(self) -> str:
        """Which crystals and targets the models saw in their pretraining.

        The text is from this version of mbqueue, even if an earlier version recorded the results. If this version does
        not know a model's pretrained weights, the text is the recorded one.
        """
        spec = self.content["spec"]
        if unknown_weights(spec):
            return str(self.content["notes"]["pretraining_overlap"])
        return overlap_note(self.target, spec, dataset=self.content["dataset"]["name"])

    @property
    def measure(self) -> Measure:
        return measures_of(self.target)[0]

    @property
    def board_measure(self) -> Measure:
        """The score that is compared with the leaderboard; without a leaderboard, the main score."""
        return leaderboard_measure(self.target) if self.board else self.measure

    @property
    def board(self) -> list[Mapping[str, Any]]:
        """The published scores on this dataset; empty if the dataset is not a matbench task.

        Ignores the matbench_mp_e_form scores that earlier versions recorded even for other datasets.
        """
        return list(self.content["leaderboard"]["rows"]) if self.content["dataset"]["name"] in TASKS else []

    def spread(self, measure: Measure) -> dict[str, float] | None:
        """Mean and standard deviation of a score over the folds; None if a fold has no such score."""
        found: dict[str, float] | None = self.content["summary"][measure.key]
        return found

    @property
    def folds(self) -> tuple[int, ...]:
        """Folds with predictions, ascending."""
        return tuple(sorted(int(fold) for fold in self.content["folds"]))

    @cached_property
    def histories(self) -> dict[int, list[dict[str, Any]]]:
        """Fold → rows of its history. In an unfinished experiment, a fold can have a history without predictions."""
        folds = sorted(int(fold) for fold in self.content["run"]["fold_seconds"])
        return {fold: read_history(history_file(self.folder, fold)) for fold in folds}

    @cached_property
    def predictions(self) -> dict[int, Predictions]:
        """Fold → predictions of its test set."""
        return {fold: read_predictions(predictions_file(self.folder, fold)) for fold in self.folds}

    @cached_property
    def all_predictions(self) -> Predictions:
        """The predictions of all folds' test sets in one table, in the order of the folds."""
        tables = [self.predictions[fold] for fold in self.folds]
        return Predictions(
            [crystal_id for table in tables for crystal_id in table.ids],
            [composition for table in tables for composition in table.compositions],
            np.concatenate([table.n_atoms for table in tables]),
            np.concatenate([table.y_true for table in tables]),
            np.concatenate([table.y_pred for table in tables]),
        )


def read_recorded(folder: Path, *, verify: bool = True) -> Recorded:
    """Read the results in ``folder``.

    Args:
        folder: results/daily/DATE/NAME.
        verify: compare every file with the size and SHA-256 in results.json.

    Raises:
        ResultsError: if the folder is incomplete, has a different format, or a file differs from its record.
    """
    path = folder / RESULTS_FILE
    content = _content_of(path)
    if verify:
        for name, checksum in content["run"]["files"].items():
            _verify(folder / name, checksum)
    return Recorded(folder, content)


def _content_of(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_RESULTS:
            raise ResultsError(f"{path} is larger than any file that mbqueue writes. {RESTORE}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        state = "is not complete yet" if path.parent.is_dir() else "does not exist"
        raise ResultsError(
            f"{path.parent} {state} (no {RESULTS_FILE}). `mbqueue status` shows its progress."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ResultsError(f"{path} cannot be read: {error}. {RESTORE}") from error
    run = content.get("run") if isinstance(content, dict) else None
    if not isinstance(run, dict) or not isinstance(run.get("files"), dict):
        raise ResultsError(f"{path} does not have mbqueue's format. {RESTORE}")
    # Check the checksum before anything else, because a flipped bit may have changed any value, even the format.
    has_checksum = "checksum" in run or not run.keys() <= _RUN_BEFORE_CHECKSUMS
    if has_checksum and run.get("checksum") != checksum_of(content):
        raise ResultsError(f"{path} has changed since it was written: its checksum is wrong. {RESTORE}")
    if content.get("format") != FORMAT:
        raise ResultsError(
            f"{path} has format {content.get('format')!r}, but this version of mbqueue reads format {FORMAT}. Update "
            "mbqueue."
        )
    if any(Path(name).name != name for name in run["files"]):
        raise ResultsError(f"{path} lists files outside its folder, so mbqueue did not write it. {RESTORE}")
    return dict(content)


def read_unfinished(folder: Path, inputs: RecordInputs) -> Recorded:
    """Read the existing results of an experiment that has not been recorded yet.

    Raises:
        ResultsError: if a table is damaged.
    """
    return Recorded(folder, unfinished_content(folder, inputs), is_complete=False)


def newest_folder(results_dirs: Iterable[Path], name: str) -> Path:
    """Find the newest complete results folder whose name, or whose experiment's name, is ``name``.

    The newest results are those enqueued on the latest day and, among these, those recorded last.

    Args:
        results_dirs: folders to search. If several folders contain equally new results, the first folder wins.

    Raises:
        ResultsError: if there is no such results folder. The error lists all complete results folders.
    """
    folders = list(results_dirs)
    found = [path.parent for results_dir in folders for path in results_dir.glob(f"daily/*/*/{RESULTS_FILE}")]
    named = [folder for folder in found if folder.name == name]
    named = named or [folder for folder in found if _name_and_time(folder)[0] == name]
    if named:
        return max(named, key=lambda folder: (folder.parent.name, recorded_at(folder)))
    known = ", ".join(sorted({folder.name for folder in found})) or "none"
    raise ResultsError(
        f"There are no complete results for {name!r} in {' or '.join(map(str, folders))}. Complete results exist for: "
        f"{known}. To see the progress of all experiments: mbqueue status"
    )


def recorded_at(folder: Path) -> str:
    """The time at which a folder's results were recorded, as text; empty if results.json cannot be read."""
    return _name_and_time(folder)[1]


def _name_and_time(folder: Path) -> tuple[str, str]:
    """The name of an experiment and the time of recording; two empty strings if results.json cannot be read."""
    try:
        recorded = read_recorded(folder, verify=False)
    except ResultsError:
        return "", ""
    return recorded.name, str(recorded.content["run"].get("recorded_at", ""))


def _verify(path: Path, checksum: dict[str, Any]) -> None:
    if not path.exists():
        raise ResultsError(f"{path} is missing, but {RESULTS_FILE} lists it. {RESTORE}")
    if not ResultFile(path.name, checksum["size"], checksum["sha256"]).is_whole(path):
        raise ResultsError(f"{path} differs from the recorded file. {RESTORE}")
