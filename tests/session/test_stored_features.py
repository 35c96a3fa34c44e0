"""A frozen backbone's outputs are part of the fingerprint, and a session that finds different bytes reports it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from small_project import RememberedReport, enqueue, make_project, small_spec

from mbqueue.data.datasets import load
from mbqueue.session.options import WorkOptions
from mbqueue.session.outcome import Ending
from mbqueue.session.worker import work
from mbqueue.train.backbone import open_frozen


def test_a_fold_that_resumes_with_different_features_reports_it(tmp_path: Path, report: RememberedReport) -> None:
    project = make_project(tmp_path, checkpoint_minutes=60.0)
    spec = small_spec(project, "head_finetune")
    enqueue(project, spec)
    work(project, WorkOptions(device="cpu", max_jobs=2), report=report)  # the two jobs are `prepare` and epoch 1
    crystals = load("sample", limit=40).crystals
    frozen = open_frozen(spec, crystals, project.cache_dir)
    frozen.write("features", 0, np.nextafter(frozen.features(np.arange(40)), np.float32(9)))
    report.lines.clear()
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.DONE
    assert [line for line in report.lines if "under different conditions (frozen '" in line], report.lines


def test_a_fold_that_resumes_with_the_same_features_says_nothing(tmp_path: Path, report: RememberedReport) -> None:
    project = make_project(tmp_path, checkpoint_minutes=60.0)
    enqueue(project, small_spec(project, "head_finetune"))
    work(project, WorkOptions(device="cpu", max_jobs=2), report=report)
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.DONE
    assert not [line for line in report.lines if "under different conditions" in line], report.lines
