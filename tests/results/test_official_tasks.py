"""Every matbench task, from recorded folds to files that matbench accepts."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from mbqueue.errors import UsageError
from mbqueue.experiment import load_spec
from mbqueue.results.export import export_submission
from mbqueue.results.matbench_file import read_matbench_scores
from mbqueue.task import TASKS, Task

#: Leave out formation energy, which test_matbench_file.py covers, and the band gap, which differs only in size.
TRIED = [task for task in TASKS.values() if task.n < 20_000 or task.target.is_class]


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
    together = read_matbench_scores(folder / "results.json.gz")
    for task, one in zip(tried, recorded, strict=True):
        assert load_spec(folder / f"experiment_{task.dataset}.toml").hash == one.content["spec_hash"]
        alone = read_matbench_scores(one.folder / "matbench_results.json.gz")
        assert alone == {task.dataset: together[task.dataset]}
    assert json.loads((folder / "info.json").read_text())["algorithm"] == "CHGNet for all"
    assert "experiment*.toml" in (folder / "run_experiment.py").read_text()


def test_several_tasks_need_the_name_of_their_algorithm(recorded_task: Any, tmp_path: Path) -> None:
    small = [recorded_task(task) for task in TRIED if task.n < 2_000]
    with pytest.raises(UsageError, match="--algorithm"):
        export_submission(small, tmp_path, authors="A")
