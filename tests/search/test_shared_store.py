"""A search on machines that share only a queue on PostgreSQL and an object store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from postgres_server import PostgresServer
from processes import outcome
from s3_server import S3Server
from small_project import RememberedReport, make_project

from mbqueue import Project
from mbqueue.buckets import STORE_VARIABLE
from mbqueue.project import ProjectFolder
from mbqueue.session.options import WorkOptions
from mbqueue.session.worker import Ending, work
from mbqueue.topology import QUEUE_VARIABLE

BASE = """
[data]
dataset = "sample"
limit = 24
[model]
trainable = "head"
[train]
epochs = 2
batch_size = 8
"""
SEARCH = """
[search]
base = "small"
trials = 3
sampler = "grid"
reduction = 2
[search.space]
"train.lr" = { choices = [1e-8, 1e-3, 1e-5] }
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_machine(root: Path) -> ProjectFolder:
    folder = make_project(root, checkpoint_minutes=5)
    (folder.jobs_dir / "small.toml").write_text(BASE, encoding="utf-8")
    (folder.jobs_dir / "rates.toml").write_text(SEARCH, encoding="utf-8")
    return folder


def found(folder: ProjectFolder) -> dict[str, Any]:
    """Trial → state, settings, learning curve and, if the trial was trained to its end, the bytes of its results."""
    project = Project(folder.root)
    trials = project.status("rates").overview["experiments"]
    return {
        entry["name"]: (
            entry["state"],
            entry["trial"]["settings"],
            entry["folds"][0]["val_mae"],
            outcome(project.results(entry["name"]).folder, 0) if entry["state"] == "done" else None,
        )
        for entry in trials
    }


def test_a_search_that_moves_between_machines_of_one_bucket_and_server_ends_as_on_one_machine(
    tmp_path: Path, postgres_server: PostgresServer, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = make_machine(tmp_path / "alone")
    Project(alone.root).enqueue("rates")
    assert work(alone, WorkOptions(device="cpu"), report=RememberedReport()).ending is Ending.DONE
    monkeypatch.setenv(STORE_VARIABLE, s3.new_store())
    monkeypatch.setenv(QUEUE_VARIABLE, postgres_server.url())
    machines = [make_machine(tmp_path / name) for name in ("first", "second")]
    Project(machines[0].root).enqueue("rates")
    for turn in range(20):
        machine, report = machines[turn % 2], RememberedReport()
        ended = work(machine, WorkOptions(device="cpu", max_jobs=2), report=report)
        assert not [line for line in report.lines if "failed" in line], report.lines
        shutil.rmtree(machine.live_dir / "checkpoints", ignore_errors=True)
        if ended.ending is Ending.DONE:
            break
    else:
        raise AssertionError("it did not end")
    assert turn > 3, "both worked on it"
    ours = found(machines[1])
    assert {state for state, *_ in ours.values()} == {"done", "pruned"}
    assert ours == found(alone)
