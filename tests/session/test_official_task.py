"""Each matbench task runs by name, from `enqueue` to a file that matbench accepts."""

from __future__ import annotations

import gzip
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from long_runs import LONG
from official_folds import made_classes
from pymatgen.core import Lattice, Structure

from mbqueue.api import Project
from mbqueue.data import official
from mbqueue.files import sha256_of_file
from mbqueue.task import TASKS, Task

#: A short run tests only the smallest task.
SAMPLE = ("matbench_jdft2d",)
#: With more crystals than this, training takes too long on a CPU, so the test uses the composition-only model.
LARGEST_TRAINED = 20_000


def made_file(task: Task, path: Path) -> None:
    """Write a dataset in the format and size of a matbench task, with random crystals of one atom."""
    rng = np.random.default_rng(0)
    crystal = Structure(Lattice.cubic(4.0), ["Fe"], [[0, 0, 0]]).as_dict()
    sides, elements = rng.uniform(3.0, 5.0, task.n).tolist(), rng.choice(["Fe", "Cu", "Al", "W"], task.n).tolist()
    rows = []
    for side, element in zip(sides, elements, strict=True):
        lattice = {**crystal["lattice"], "matrix": [[side, 0, 0], [0, side, 0], [0, 0, side]]}
        site = {**crystal["sites"][0], "species": [{"element": element, "occu": 1}], "label": element}
        rows.append([{**crystal, "lattice": lattice, "sites": [site]}, side + (element == "W")])
    if task.target.is_class:
        for row, one in zip(rows, made_classes(task).tolist(), strict=True):
            row[1] = one
    column = task.target.column or "e_form"
    document = {"columns": ["structure", column], "index": list(range(task.n)), "data": rows}
    path.write_bytes(gzip.compress(orjson.dumps(document), compresslevel=1))


@pytest.mark.parametrize("task", [TASKS[name] for name in (TASKS if LONG else SAMPLE)], ids=lambda task: task.dataset)
def test_a_task_goes_from_enqueue_to_a_file_that_matbench_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task
) -> None:
    monkeypatch.setenv("MATMINER_DATA", str(tmp_path))
    file = official.official_file(task.dataset)
    made_file(task, file.path)
    monkeypatch.setattr(official, "official_file", lambda _name: replace(file, sha256=sha256_of_file(file.path)))
    project = Project.create(tmp_path / "project")
    experiment, options = "pretrained_infer", {}
    if task.n < LARGEST_TRAINED:
        experiment, options = "scalar_head", {"epochs": 1}
    project.enqueue(experiment, dataset=task.dataset, **options)
    project.work(device="cpu")
    recorded = project.results(experiment)
    assert recorded.content["leaderboard"]["comparable"]
    assert recorded.target == task.target
    plain = tmp_path / "results.json"
    plain.write_bytes(gzip.decompress((recorded.folder / "matbench_results.json.gz").read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from matbench.bench import MatbenchBenchmark

        benchmark = MatbenchBenchmark.from_file(plain)
    assert benchmark.validate() == {}
    ours = recorded.spread(recorded.board_measure)
    measure = "rocauc" if task.target.is_class else "mae"
    assert benchmark.scores[task.dataset][measure]["mean"] == pytest.approx(ours["mean"])
