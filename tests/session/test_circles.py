"""If each new output of a job is damaged too, the job fails with the reason instead of repeating forever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pymatgen.core import Lattice, Structure
from small_project import RememberedReport, enqueue, make_project, small_spec

from mbqueue.queue.jobs import State
from mbqueue.queue.store import Queue
from mbqueue.results.tables import predictions_file, read_predictions
from mbqueue.session import record
from mbqueue.session.options import WorkOptions
from mbqueue.session.worker import Ending, work


def test_predictions_that_are_damaged_every_time_fail_the_job_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, report = make_project(tmp_path), RememberedReport()
    enqueue(project, small_spec(project, "pretrained_infer"))
    monkeypatch.setattr(record, "broken_folds", lambda *_, **__: {0: "preds_fold_0.csv: not the bytes."})
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.BLOCKED, report.lines
    with Queue(project.queue_db, read_only=True) as queue:
        (failed,) = queue.jobs(state=State.FAILED)
        assert failed.kind == "record"
        assert failed.error is not None
        assert "preds_fold_0.csv: not the bytes." in failed.error
    assert sum("predict: started" in line for line in report.lines) == 2


def test_ids_that_a_spreadsheet_could_misread_are_recorded_unchanged(tmp_path: Path) -> None:
    project, report = make_project(tmp_path), RememberedReport()
    odd = ["=a", "+b", "-c", "@d", "'=e", "f,", 'g"', "h ö", "i|", "`j"]
    ids = [f"{text}{number}" for number, text in enumerate(odd)]
    with (project.root / "odd.jsonl").open("w") as stream:
        for number, one in enumerate(ids):
            caesium_chloride = Structure(Lattice.cubic(4.1 + number / 100), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
            line = {"id": one, "structure": caesium_chloride.as_dict(), "e_form": -2.0 + number / 10}
            stream.write(json.dumps(line) + "\n")
    folder = enqueue(
        project,
        small_spec(project, "pretrained_infer", data__dataset="odd.jsonl", data__limit=0, folds=[0, 1, 2, 3, 4]),
    )
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.DONE, report.lines
    tested = [one for fold in range(5) for one in read_predictions(predictions_file(folder, fold)).ids]
    assert sorted(tested) == sorted(ids)
