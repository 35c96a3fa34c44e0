"""What model files were trained on, according to the queue and to the results recorded next to the files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mbqueue.data.crystals import Crystals
from mbqueue.data.elements import symbol_of
from mbqueue.errors import MbqueueError
from mbqueue.files import sha256_of_file
from mbqueue.project import ProjectFolder
from mbqueue.queue.jobs import Kind, State
from mbqueue.queue.opening import is_queue_there, open_queue
from mbqueue.results.record import RESULTS_FILE
from mbqueue.results.tables import model_file

_IDS_SHOWN = 5


def is_known_data(project: ProjectFolder, dataset_hash: str, models: Sequence[Path]) -> bool:
    """Whether this dataset was used by an experiment in the queue or by an experiment recorded next to a model."""
    for folder in {path.parent for path in models}:
        with suppress(KeyError, TypeError):
            if _recorded(folder)["dataset"]["hash"] == dataset_hash:
                return True
    try:
        if not is_queue_there(project):
            return False
        with open_queue(project, read_only=True) as queue:
            return any(experiment.dataset_hash == dataset_hash for experiment in queue.experiments())
    except MbqueueError:
        return False  # predict even if the queue cannot be read


def unseen_elements(project: ProjectFolder, crystals: Crystals, models: Sequence[Path]) -> list[str]:
    """Warn about crystals with elements that a model's training set lacks: one sentence for each set of elements.

    Models that neither the queue nor the results next to them know are ignored.
    """
    known = dict(_absent_in_queue(project))
    absent: dict[frozenset[int], list[Path]] = {}
    for path in models:
        digest = sha256_of_file(path)
        symbols = known.get(digest, frozenset()) | dict(_absent_in_results(path.parent)).get(digest, frozenset())
        numbers = [z for z in np.unique(crystals.atomic_numbers).tolist() if symbol_of(z) in symbols]
        absent.setdefault(frozenset(numbers), []).append(path)
    return [_sentence(crystals, sorted(numbers), paths) for numbers, paths in absent.items() if numbers]


def _sentence(crystals: Crystals, numbers: list[int], models: Sequence[Path]) -> str:
    owners = np.repeat(np.arange(len(crystals)), crystals.n_atoms)
    rows = np.unique(owners[np.isin(crystals.atomic_numbers, numbers)]).tolist()
    ids = ", ".join(crystals.ids[row] for row in rows[:_IDS_SHOWN]) + (", …" if len(rows) > _IDS_SHOWN else "")
    elements = ", ".join(map(symbol_of, numbers))
    return (
        f"{', '.join(map(str, models))}: no training crystals with {elements}, so predictions are poor for "
        f"{len(rows):,} of {len(crystals):,} crystals ({ids})."
    )


def _absent_in_queue(project: ProjectFolder) -> Iterator[tuple[str, frozenset[str]]]:
    """For each model file that a job of this project wrote, yield its SHA-256 and the elements absent from training."""
    with suppress(MbqueueError):  # predict even if the queue cannot be read
        if is_queue_there(project):
            with open_queue(project, read_only=True) as queue:
                jobs = queue.jobs(state=State.COMMITTED)
            for job in jobs:
                if job.kind is Kind.PREDICT and job.result and job.fold is not None:
                    with suppress(AttributeError, LookupError, TypeError):  # an odd result must not end the prediction
                        absent = frozenset(map(symbol_of, job.result["absent_elements"]))
                        yield _digest(job.result.get("files"), job.fold), absent


def _absent_in_results(folder: Path) -> Iterator[tuple[str, frozenset[str]]]:
    """For each model in a folder of recorded results, yield its SHA-256 and the elements absent from training."""
    with suppress(KeyError, TypeError, ValueError, AttributeError):
        recorded = _recorded(folder)
        for fold, entry in recorded["folds"].items():
            yield _digest(recorded["run"]["files"], int(fold)), frozenset(entry["absent_elements"])


def _digest(files: Any, fold: int) -> str:
    """The SHA-256 of a fold's model in a table of files; empty if there is none."""
    entry = files.get(model_file(Path(), fold).name) if isinstance(files, Mapping) else None
    return str(entry["sha256"]) if entry else ""


def _recorded(folder: Path) -> Any:
    """The content of a folder's results.json; None if the file is missing or unreadable."""
    try:
        return json.loads((folder / RESULTS_FILE).read_bytes())
    except (OSError, ValueError):
        return None
