"""After `predict` is killed, the next `predict` computes only the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_project import make_project

from mbqueue.api import Project
from mbqueue.experiment import DataSpec
from mbqueue.files import write_bytes
from mbqueue.train import chgnet, partial_outputs, predict

#: A program that predicts in batches of 8, stores each batch, and kills itself in the third batch of strained crystals.
KILLED = """
import os, signal, sys
from mbqueue.api import Project
from mbqueue.experiment import DataSpec
from mbqueue.train import chgnet, partial_outputs, predict
partial_outputs.WRITE_SECONDS, predict._BATCH_SIZE = 0.0, 8
compute, done = chgnet.predict, []
def counted(*arguments):
    done.append(1)
    if len(done) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(*arguments)
chgnet.predict = counted
Project(sys.argv[1]).predict(DataSpec(dataset="sample", limit=40), [sys.argv[2]], strains=1, device="cpu")
"""


def test_a_killed_prediction_resumes_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(make_project(tmp_path / "project").root)
    model = tmp_path / "model.pth"
    write_bytes(model, chgnet.model_bytes(chgnet.load_pretrained("0.3.0")))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(project.folder.root), str(model)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    monkeypatch.setattr(predict, "_BATCH_SIZE", 8)
    compute, sizes = chgnet.predict, []

    def counted(model, batch):
        sizes.append(len(batch.targets))
        return compute(model, batch)

    monkeypatch.setattr(chgnet, "predict", counted)
    told: list[tuple[int, int]] = []
    small = DataSpec(dataset="sample", limit=40)
    resumed = project.predict(
        small,
        [model],
        strains=1,
        device="cpu",
        progress=lambda what: lambda done, total: told.append((done, total)) if what == "predicting" else None,
    )
    assert told[0] == (0, 120)
    assert told[1] == (40, 120)  # the 40 predictions without strain had been stored before the kill
    assert 40 < told[2][0] < 80
    assert sum(sizes) == 120 - told[2][0]
    assert told[-1] == (120, 120)

    stored = list(project.folder.predictions_dir("predict").iterdir())
    assert stored
    for file in stored:
        os.utime(file, (0, file.stat().st_mtime - partial_outputs.FORGET_SECONDS - 60))
    sizes.clear()
    anew = project.predict(small, [model], strains=1, device="cpu")
    assert sum(sizes) == 120, "what is older than a week is forgotten"
    assert np.array_equal(anew.predictions.each, resumed.predictions.each)
