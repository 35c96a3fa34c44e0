"""The matbench submission, with the official ids and made-up numbers."""

from __future__ import annotations

import builtins
import dataclasses
import gzip
import json
import subprocess
import sys
import warnings

import pytest
from official_folds import SMALLEST_TASK

from mbqueue.errors import ResultsError
from mbqueue.results.matbench_file import read_matbench_scores, write_matbench_file
from mbqueue.task import FORMATION_ENERGY


def test_the_official_task_is_recorded_and_valid_by_matbench_itself(
    record_task, official_predictions, tmp_path, capsys
):
    content = record_task(FORMATION_ENERGY, tmp_path)
    path = tmp_path / "matbench_results.json.gz"
    printed = capsys.readouterr().out
    plain = tmp_path / "matbench_results.json"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matbench calls datetime.utcnow, deprecated from Python 3.12 on
        from matbench.bench import MatbenchBenchmark

        benchmark = MatbenchBenchmark.from_file(plain)
    assert printed == ""
    assert benchmark.is_valid
    assert benchmark.is_recorded
    assert content["leaderboard"]["comparable"]
    scores = benchmark.matbench_mp_e_form.scores
    assert scores.mae.mean == pytest.approx(content["summary"]["mae"]["mean"], rel=1e-12)
    assert scores.mape.std == pytest.approx(content["summary"]["mape"]["std"], rel=1e-9)
    data = benchmark.matbench_mp_e_form.results.fold_3.data
    table = official_predictions(FORMATION_ENERGY)[3]
    assert {crystal_id: data[crystal_id] for crystal_id in table.ids} == dict(
        zip(table.ids, table.y_pred.tolist(), strict=True)
    )
    assert read_matbench_scores(path)["matbench_mp_e_form"]["mae"]["mean"] == scores.mae.mean
    assert "a leaderboard score" in (tmp_path / "RESULTS.md").read_text()


def test_two_files_of_the_same_numbers_differ_only_in_date_stamp_and_hash(tmp_path, official_predictions):
    predictions = official_predictions(SMALLEST_TASK)
    contents = []
    for name in ("a.json.gz", "b.json.gz"):
        write_matbench_file(tmp_path / name, predictions, SMALLEST_TASK, models="CHGNet", parameters={"seed": 0})
        contents.append(json.loads(gzip.decompress((tmp_path / name).read_bytes())))
        assert (tmp_path / name).read_bytes()[4:8] == bytes(4)  # the gzip header's time is 0
    for content in contents:
        del content["datestamp"], content["hash"]
    assert json.dumps(contents[0]) == json.dumps(contents[1])


def test_a_changed_prediction_is_noticed_by_matbench_own_hash(tmp_path, recorded_task):
    path = recorded_task(SMALLEST_TASK).folder / "matbench_results.json.gz"
    content = json.loads(gzip.decompress(path.read_bytes()))
    data = content["tasks"][SMALLEST_TASK.dataset]["results"]["fold_0"]["data"]
    data[next(iter(data))] += 0.1
    changed = tmp_path / "changed.json.gz"
    changed.write_bytes(gzip.compress(json.dumps(content).encode()))
    with pytest.raises(ResultsError, match="matbench rejected"):
        read_matbench_scores(changed)


def test_ids_of_other_crystals_are_refused(tmp_path, official_predictions):
    predictions = official_predictions(SMALLEST_TASK)
    first = predictions[0]
    foreign = dataclasses.replace(first, ids=["mine", *first.ids[1:]])
    with pytest.raises(ResultsError, match="fold 0 is not the official one: 2 ids differ"):
        write_matbench_file(
            tmp_path / "m.json.gz",
            {**predictions, 0: foreign},
            SMALLEST_TASK,
            models="CHGNet",
            parameters={},
        )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_fold_is_refused(tmp_path, official_predictions):
    four = {fold: table for fold, table in official_predictions(SMALLEST_TASK).items() if fold != 2}
    with pytest.raises(ResultsError, match="Fold 2 is missing"):
        write_matbench_file(tmp_path / "m.json.gz", four, SMALLEST_TASK, models="CHGNet", parameters={})


def test_without_matbench_the_error_says_how_to_install_it(tmp_path, official_predictions, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matbench"):
            raise ModuleNotFoundError("No module named 'matbench'", name="matbench")
        return real(name, *args, **kwargs)

    predictions = official_predictions(SMALLEST_TASK)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ResultsError, match=r"pip install --no-deps matbench==0\.6"):
        write_matbench_file(tmp_path / "m.json.gz", predictions, SMALLEST_TASK, models="CHGNet", parameters={})


def test_a_damaged_matbench_file_is_refused(tmp_path):
    path = tmp_path / "m.json.gz"
    path.write_bytes(gzip.compress(b"{}" * 100)[:-4])
    with pytest.raises(ResultsError, match="is damaged"):
        read_matbench_scores(path)


def test_the_room_imports_neither_torch_nor_matbench_nor_the_queue():
    code = (
        "import sys, mbqueue.results.record, mbqueue.results.folder\n"
        "print([m for m in ('torch', 'matbench', 'pandas', 'mbqueue.queue', 'mbqueue.train') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
