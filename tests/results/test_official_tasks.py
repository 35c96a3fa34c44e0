"""Every matbench task, from recorded folds to files that matbench accepts."""

from __future__ import annotations

import dataclasses
import gzip
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbqueue.errors import UsageError
from mbqueue.experiment import load_spec, parse_spec
from mbqueue.results.export import export_submission
from mbqueue.results.folder import Recorded, read_recorded
from mbqueue.results.matbench_file import read_matbench_scores
from mbqueue.results.record import RecordInputs, record_experiment
from mbqueue.results.tables import (
    Predictions,
    history_file,
    model_file,
    predictions_file,
    write_history,
    write_predictions,
)
from mbqueue.task import TASKS, Task

#: Leave out formation energy, which test_matbench_file.py covers, and the band gap, which differs only in size.
TRIED = [task for task in TASKS.values() if task.n < 20_000 or task.target.is_class]


@pytest.fixture(scope="module")
def recorded_task(tmp_path_factory: pytest.TempPathFactory, make_inputs: Callable[[], RecordInputs]) -> Any:
    """A task's five folds with its official ids and made-up numbers, recorded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matbench's imports warn
        from matbench.metadata import mbv01_validation
    made: dict[str, Recorded] = {}

    def make(task: Task) -> Recorded:
        if task.dataset in made:
            return made[task.dataset]
        folder = tmp_path_factory.mktemp(task.dataset)
        rng = np.random.default_rng(0)
        for fold, split in enumerate(mbv01_validation.splits[task.dataset].values()):
            n = len(split.test)
            y_true = rng.normal(0, 1, n)
            y_pred = y_true + rng.normal(0, 0.5, n)
            if task.target.is_class:
                y_true, y_pred = (y_true > 0).astype(float), 1 / (1 + np.exp(-y_pred))
            table = Predictions(split.test, ["NaCl"] * n, np.full(n, 2), y_true, y_pred)
            write_predictions(predictions_file(folder, fold), table)
            write_history(history_file(folder, fold), [])
            model_file(folder, fold).write_bytes(b"weights")
        inputs = make_inputs()
        spec = parse_spec({"name": f"mine-{task.dataset}", "data": {"dataset": task.dataset}}, source="test")
        dataset = dataclasses.replace(
            inputs.dataset, name=task.dataset, source=task.dataset, n=task.n, official=True, dropped=[]
        )
        whole = dataclasses.replace(
            inputs,
            experiment=spec.name,
            spec=spec.to_json(),
            spec_hash=spec.hash,
            dataset=dataset,
            folds=tuple(range(5)),
        )
        record_experiment(folder, whole)
        made[task.dataset] = read_recorded(folder)
        return made[task.dataset]

    return make


def accepted(path: Path, tmp_path: Path) -> Any:
    """Read a result file with matbench, check it with matbench's ``validate``, and return the benchmark."""
    plain = tmp_path / "results.json"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from matbench.bench import MatbenchBenchmark

        benchmark = MatbenchBenchmark.from_file(plain)
    assert benchmark.validate() == {}
    assert benchmark.is_recorded
    return benchmark


@pytest.mark.parametrize("task", TRIED, ids=lambda task: task.dataset)
def test_the_recorded_task_is_accepted_by_matbench_with_the_same_score(
    recorded_task: Any, tmp_path: Path, task: Task
) -> None:
    recorded = recorded_task(task)
    benchmark = accepted(recorded.folder / "matbench_results.json.gz", tmp_path)
    theirs = benchmark.scores[task.dataset]["rocauc" if task.target.is_class else "mae"]
    assert recorded.content["leaderboard"]["comparable"]
    assert recorded.spread(recorded.board_measure)["mean"] == pytest.approx(theirs["mean"], rel=1e-12)
    assert "a leaderboard score" in (recorded.folder / "RESULTS.md").read_text()


def test_several_tasks_become_one_submission(recorded_task: Any, tmp_path: Path) -> None:
    tried = [task for task in TRIED if task.n < 5_000 or task.target.is_class]
    recorded = [recorded_task(task) for task in tried]
    folder = export_submission(recorded, tmp_path / "out", authors="A", algorithm="CHGNet for all")
    benchmark = accepted(folder / "results.json.gz", tmp_path)
    assert {task.dataset_name for task in benchmark.tasks} == {task.dataset for task in tried}
    for task, one in zip(tried, recorded, strict=True):
        assert load_spec(folder / f"experiment_{task.dataset}.toml").hash == one.content["spec_hash"]
        alone = read_matbench_scores(one.folder / "matbench_results.json.gz")[task.dataset]
        assert read_matbench_scores(folder / "results.json.gz")[task.dataset] == alone
    assert json.loads((folder / "info.json").read_text())["algorithm"] == "CHGNet for all"
    assert "experiment*.toml" in (folder / "run_experiment.py").read_text()


def test_several_tasks_need_the_name_of_their_algorithm(recorded_task: Any, tmp_path: Path) -> None:
    small = [recorded_task(task) for task in TRIED if task.n < 2_000]
    with pytest.raises(UsageError, match="--algorithm"):
        export_submission(small, tmp_path, authors="A")
