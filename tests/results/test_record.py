"""The results folder of an experiment."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest

from mbqueue import families
from mbqueue.errors import ResultsError
from mbqueue.files import TEMP_PREFIX
from mbqueue.history import best_epoch
from mbqueue.results.folder import newest_folder, read_recorded
from mbqueue.results.record import SessionFacts, broken_folds, checksum_of, record_experiment
from mbqueue.results.report.page import write_report
from mbqueue.results.scores import score
from mbqueue.results.tables import predictions_file, read_predictions
from mbqueue.task import FORMATION_ENERGY


def test_scores_are_those_of_the_tables_in_the_folder(recorded_folder):
    content = json.loads((recorded_folder / "results.json").read_text())
    for fold in (0, 1):
        table = read_predictions(predictions_file(recorded_folder, fold))
        assert content["folds"][str(fold)]["scores"] == score(table.y_true, table.y_pred, FORMATION_ENERGY.target)
    maes = [content["folds"][fold]["scores"]["mae"] for fold in ("0", "1")]
    assert content["summary"]["mae"] == {"mean": float(np.mean(maes)), "std": float(np.std(maes))}


def test_results_json_names_spec_data_sessions_and_overlap(recorded_folder, inputs):
    content = json.loads((recorded_folder / "results.json").read_text())
    assert content["format"] == 1
    assert content["spec"] == json.loads(json.dumps(inputs.spec))
    assert content["spec_hash"] == inputs.spec_hash
    assert content["dataset"]["hash"] == inputs.dataset.hash
    assert content["dataset"]["dropped"] == [{"id": "x-9", "reason": "two atoms on one place"}]
    assert content["dataset"]["widened_cutoffs"] == 2
    assert content["run"]["hours"] == 1.5
    assert "MPtrj" in content["notes"]["pretraining_overlap"]


def test_two_equal_runs_differ_only_in_the_run_section(tmp_path, fill, inputs, history):
    first = record_experiment(fill(tmp_path / "a"), inputs)
    later = dataclasses.replace(
        inputs,
        recorded_at=inputs.recorded_at + 5,
        enqueued_on="2026-12-01",
        sessions=[SessionFacts(id="t1", device="cuda", seconds=1.0), SessionFacts(id="t2", device="cpu", seconds=2.0)],
    )
    second = record_experiment(fill(tmp_path / "b"), later)
    assert first["run"] != second["run"]
    assert {**first, "run": None} == {**second, "run": None}


def test_another_run_differs_outside_the_run_section(tmp_path, fill, inputs):
    first = record_experiment(fill(tmp_path / "a"), inputs)
    second = record_experiment(fill(tmp_path / "b", seed=1), inputs)
    assert {**first, "run": None} != {**second, "run": None}


def test_best_epoch_is_the_earliest_of_equals():
    rows = [{"epoch": 1, "val_mae": 0.3}, {"epoch": 2, "val_mae": 0.1}, {"epoch": 3, "val_mae": 0.1}]
    assert best_epoch(rows) == (2, 0.1)
    assert best_epoch([]) is None


def test_folds_that_stopped_early_are_reported(tmp_path, fill, inputs):
    spec = {**inputs.spec, "train": {**inputs.spec["train"], "epochs": 5, "patience": 2}}
    fill(tmp_path, folds=(0,), epochs=5)
    fill(tmp_path, folds=(1,), epochs=3)
    record_experiment(tmp_path, dataclasses.replace(inputs, spec=spec))
    content = json.loads((tmp_path / "results.json").read_text())
    assert [content["folds"][fold]["stopped_early"] for fold in ("0", "1")] == [False, True]
    assert "Stopped early: fold 1. The validation MAE did not improve" in (tmp_path / "RESULTS.md").read_text()


def test_one_fold_has_a_score_without_a_spread_and_one_of_a_kind_is_singular(tmp_path, fill, inputs):
    train = {**inputs.spec["train"], "epochs": 2, "patience": 1}
    dataset = dataclasses.replace(inputs.dataset, widened_cutoffs=1)
    one = dataclasses.replace(inputs, folds=(0,), dataset=dataset, spec={**inputs.spec, "train": train})
    content = record_experiment(fill(tmp_path, folds=(0,), epochs=1), one)
    page = (tmp_path / "RESULTS.md").read_text()
    score = f"{content['summary']['mae']['mean']:.4f}"
    assert f"**Test MAE {score} eV/atom** for the formation energy, over one fold." in page
    assert "±" not in page.replace("±1e-5", "")
    assert "population standard deviation" not in page
    assert "did not improve for 1 epoch, so" in page
    assert "In 1 crystal, an atom" in page
    assert "1 entry could not be used and was left out" in page
    report = write_report(read_recorded(tmp_path), tmp_path / "report.html").read_text()
    assert f'<p class="score">MAE {score} eV/atom</p>' in report
    assert "The last row shows" not in report
    assert "widened for 1 crystal." in report


def test_an_experiment_without_training_has_no_best_epoch(tmp_path, fill, inputs):
    content = record_experiment(fill(tmp_path, epochs=0), inputs)
    assert content["folds"]["0"]["best_epoch"] is None
    assert "| 0 | – | – |" in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.parametrize("missing", ["history_fold_1.csv", "preds_fold_1.csv", "model_fold_1.pth"])
def test_a_folder_that_lacks_a_file_gets_no_results_json(tmp_path, fill, inputs, missing):
    folder = fill(tmp_path)
    (folder / missing).unlink()
    before = sorted(folder.iterdir())
    with pytest.raises(ResultsError, match=missing):
        record_experiment(folder, inputs)
    assert sorted(folder.iterdir()) == before
    with pytest.raises(ResultsError, match="not complete yet"):
        read_recorded(folder)


def test_nothing_in_the_folder_changes_before_the_commit_publishes(tmp_path, fill, inputs):
    folder = fill(tmp_path)
    before = sorted(path.name for path in folder.iterdir())

    def refused(_content, _publish):
        assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(TEMP_PREFIX)) == before
        raise RuntimeError("the lease is lost")

    with pytest.raises(RuntimeError, match="the lease is lost"):
        record_experiment(folder, inputs, commit=refused)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_broken_folds_are_named_with_the_reason(recorded_folder):
    assert broken_folds(recorded_folder, (0, 1), {}) == {}
    (recorded_folder / "model_fold_0.pth").unlink()
    path = predictions_file(recorded_folder, 1)
    path.write_bytes(path.read_bytes()[:-3])
    broken = broken_folds(recorded_folder, (0, 1), {})
    assert "model_fold_0.pth" in broken[0]
    assert "ends in the middle of a line" in broken[1]


def test_folds_that_share_a_crystal_are_refused(recorded_folder, inputs):
    one = predictions_file(recorded_folder, 0)
    predictions_file(recorded_folder, 1).write_bytes(one.read_bytes())
    with pytest.raises(ResultsError, match="x-0-0000 is in the test set of fold 0 and of fold 1"):
        record_experiment(recorded_folder, inputs)


def test_a_file_changed_after_recording_is_noticed(recorded_folder):
    path = recorded_folder / "preds_fold_0.csv"
    path.write_text(path.read_text().replace("x-0-0001", "x-0-9999"))
    with pytest.raises(ResultsError, match=r"preds_fold_0\.csv differs from the recorded file"):
        read_recorded(recorded_folder)


def test_a_file_lost_after_recording_is_noticed(recorded_folder):
    (recorded_folder / "model_fold_0.pth").unlink()
    with pytest.raises(ResultsError, match=r"model_fold_0\.pth is missing"):
        read_recorded(recorded_folder)


def test_results_of_another_format_are_refused(recorded_folder):
    path = recorded_folder / "results.json"
    content = json.loads(path.read_text()) | {"format": 2}
    content["run"]["checksum"] = checksum_of(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ResultsError, match="has format 2"):
        read_recorded(recorded_folder)


def test_any_flipped_bit_in_results_json_is_noticed(recorded_folder):
    path = recorded_folder / "results.json"
    whole, chance = path.read_bytes(), random.Random(3)
    for place in chance.sample(range(len(whole)), 300):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            content = read_recorded(recorded_folder).content
        except ResultsError:
            continue
        assert content == json.loads(whole), f"byte {place} {whole[place : place + 1]!r}"  # only whitespace changed


def test_results_without_a_checksum_are_read(recorded_folder):
    path = recorded_folder / "results.json"
    content = json.loads(path.read_text())
    del content["run"]["checksum"]
    path.write_text(json.dumps(content))
    assert read_recorded(recorded_folder).folds == (0, 1)


@pytest.mark.parametrize(
    "hostile", ["[" * 10**5, '{"format": 1, "run": {"files": {"../../outside": {}}}}', "[]", "nan"]
)
def test_a_hostile_results_json_is_an_error(recorded_folder, hostile):
    (recorded_folder / "results.json").write_text(hostile)
    with pytest.raises(ResultsError):
        read_recorded(recorded_folder)


def test_all_folds_read_back_in_one_table(recorded_folder):
    recorded = read_recorded(recorded_folder)
    assert recorded.folds == (0, 1)
    assert len(recorded.all_predictions) == sum(len(recorded.predictions[fold]) for fold in (0, 1)) == 80


def test_the_newest_results_of_a_name_are_found_by_folder_or_experiment(tmp_path, recorded_folder, fill, inputs):
    results = tmp_path / "results"
    newer = fill(results / "daily" / "2026-12-01" / "small_renamed")
    record_experiment(newer, inputs)
    assert newest_folder([results], "small") == recorded_folder
    assert newest_folder([results], "small_renamed") == newer
    with pytest.raises(ResultsError, match="Complete results exist for: small, small_renamed"):
        newest_folder([results], "big")


def test_of_results_in_two_places_the_later_recording_is_used(tmp_path, recorded_folder, fill, inputs):
    live, published = tmp_path / "live", recorded_folder.parents[2]
    newer = fill(live / "daily" / recorded_folder.parent.name / recorded_folder.name)
    record_experiment(newer, dataclasses.replace(inputs, recorded_at=inputs.recorded_at + 60.0))
    assert newest_folder([live, published], "small") == newer
    assert newest_folder([published, live], "small") == newer
    (newer / "results.json").write_text("{")
    assert newest_folder([live, published], "small") == recorded_folder


def test_the_page_says_why_a_part_of_a_matbench_task_does_not_compare_with_its_leaderboard(tmp_path, fill, inputs):
    renamed = dataclasses.replace(inputs.dataset, name="matbench_mp_e_form")
    folder = fill(tmp_path / "part")
    record_experiment(folder, dataclasses.replace(inputs, dataset=renamed))
    page = (folder / "RESULTS.md").read_text()
    assert (
        "**Not comparable with the leaderboard**: the crystals are not from the official file of matbench_mp_e_form"
        in page
    )
    assert "| coGN | 0.0170 |" in page


def test_the_page_of_own_data_shows_no_leaderboard_but_the_overlap(recorded_folder):
    page = (recorded_folder / "RESULTS.md").read_text()
    assert "leaderboard" not in page
    assert "may have seen many of these crystals" in page
    assert "two atoms on one place" in page
    assert not (recorded_folder / "matbench_results.json.gz").exists()


def test_the_page_shows_a_resume_under_other_conditions(tmp_path, fill, inputs):
    change = {"fold": 1, "epoch": 2, "step": 30, "changes": {"device": ["Tesla T4", "NVIDIA L4"]}}
    record_experiment(fill(tmp_path), dataclasses.replace(inputs, fingerprint_changes=[change]))
    page = (tmp_path / "RESULTS.md").read_text()
    assert "resumed under different conditions at fold 1, epoch 2, step 30 (device: Tesla T4 → NVIDIA L4)" in page


def test_every_file_on_the_page_is_in_the_folder(recorded_folder):
    page = (recorded_folder / "RESULTS.md").read_text()
    others = {path.name for path in recorded_folder.iterdir()} - {"RESULTS.md"}
    assert "results.json" in others
    for name in others:
        assert f"`{name}`" in page


def test_elements_that_a_training_part_lacks_are_reported(tmp_path, fill, inputs):
    content = record_experiment(fill(tmp_path), dataclasses.replace(inputs, absent_elements={1: ["Xe", "Ac"]}))
    assert content["folds"]["0"]["absent_elements"] == []
    assert content["folds"]["1"]["absent_elements"] == ["Ac", "Xe"]


def test_results_name_the_family_of_the_models(tmp_path, fill, inputs, monkeypatch):
    other = dataclasses.replace(
        families.CHGNET,
        name="Other",
        pretrained={"large": ""},
        loader="`Other.load`",
        pretraining="Other was pretrained on dice.",
    )
    monkeypatch.setattr(families, "FAMILIES", (families.CHGNET, other))
    pages = {}
    for weights in ("0.3.0", "large"):
        spec = {**inputs.spec, "model": {**inputs.spec["model"], "pretrained": weights}}
        folder = fill(tmp_path / weights)
        content = record_experiment(folder, dataclasses.replace(inputs, spec=spec))
        pages[weights] = (folder / "RESULTS.md").read_text()
        assert content["notes"]["pretraining_overlap"] in pages[weights]
    assert "Other" not in pages["0.3.0"]
    assert "CHGNet" not in pages["large"]
    for text in ("- Other large, trained: ", "within Other's cut-off", "`Other.load` loads them", "pretrained on dice"):
        assert text in pages["large"]
