"""A task of matbench by its name, from `enqueue` to the file that matbench accepts."""

from __future__ import annotations

import gzip
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from mbqueue.api import Project
from mbqueue.data import official
from mbqueue.files import sha256_of_file
from mbqueue.task import TASKS, Task


def made_file(task: Task, path: Path) -> None:
    """Random crystals in the shape of a task's file, with a target that is not constant."""
    import pandas as pd
    from matminer.utils.io import store_dataframe_as_json

    rng = np.random.default_rng(0)
    sides = rng.uniform(3.0, 5.0, task.n)
    elements = rng.choice(["Fe", "Cu", "Al", "W", "Mg"], task.n)
    structures = [
        Structure(Lattice.cubic(side), [element], [[0, 0, 0]]) for side, element in zip(sides, elements, strict=True)
    ]
    column = task.target.column or "e_form"
    frame = pd.DataFrame({"structure": structures, column: sides})
    store_dataframe_as_json(frame, str(path), compression="gz", pbar=False)


@pytest.mark.parametrize("dataset", ["matbench_jdft2d"])
def test_a_task_goes_from_enqueue_to_a_file_that_matbench_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    task = TASKS[dataset]
    monkeypatch.setenv("MATMINER_DATA", str(tmp_path))
    file = official.official_file(dataset)
    made_file(task, file.path)
    monkeypatch.setattr(official, "official_file", lambda _name: replace(file, sha256=sha256_of_file(file.path)))
    project = Project.create(tmp_path / "project")
    project.enqueue("scalar_head", dataset=dataset, epochs=1)
    project.work(device="cpu")
    recorded = project.results("scalar_head")
    assert recorded.content["leaderboard"]["comparable"]
    assert recorded.target == task.target
    plain = tmp_path / "results.json"
    plain.write_bytes(gzip.decompress((recorded.folder / "matbench_results.json.gz").read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from matbench.bench import MatbenchBenchmark

        benchmark = MatbenchBenchmark.from_file(plain)
    assert benchmark.validate() == {}
    assert benchmark.scores[dataset]["mae"]["mean"] == pytest.approx(recorded.spread(recorded.measure)["mean"])
