"""The submission folder for the leaderboard."""

from __future__ import annotations

import dataclasses
import json

import pytest
from official_folds import SMALLEST_TASK

from mbqueue import families, files
from mbqueue.errors import ResultsError, UsageError
from mbqueue.experiment import Spec, load_spec
from mbqueue.results import export
from mbqueue.results.compare import compare
from mbqueue.results.export import export_submission, spec_as_toml
from mbqueue.results.folder import read_recorded
from mbqueue.results.leaderboard import overlap_note
from mbqueue.results.matbench_file import read_matbench_scores
from mbqueue.results.report.comparison import write_comparison


@pytest.fixture(scope="module")
def official(recorded_task):
    return recorded_task(SMALLEST_TASK)


def test_five_official_folds_become_a_folder_in_matbench_form(official, tmp_path):
    folder = export_submission([official], tmp_path, authors="Ada Lovelace", algorithm="CHGNet finetuned")
    assert folder == tmp_path / "matbench_v0.1_CHGNet_finetuned"
    info = json.loads((folder / "info.json").read_text())
    assert list(info) == ["authors", "algorithm", "algorithm_long", "bibtex_refs", "notes", "requirements"]
    assert info["authors"] == "Ada Lovelace"
    assert "torch==2.13.0" in info["requirements"]["python"]
    assert "MPtrj" in info["notes"]
    scores = read_matbench_scores(folder / "results.json.gz")
    assert scores[SMALLEST_TASK.dataset]["mae"]["mean"] == pytest.approx(official.content["summary"]["mae"]["mean"])


def test_the_exported_experiment_file_is_the_same_experiment(official, tmp_path):
    folder = export_submission([official], tmp_path, authors="A")
    assert load_spec(folder / "experiment.toml").hash == official.content["spec_hash"]
    compile((folder / "run_experiment.py").read_text(), "run_experiment.py", "exec")


def test_the_export_of_a_blend_makes_its_members_and_then_the_blend(official, tmp_path):
    members = [{**official.content["spec"], "name": f"seed{seed}", "seed": seed} for seed in (0, 1)]
    strained = {**members[1], "name": "strained", "train": {**members[1]["train"], "test_strains": 8}}
    members[1] = {**strained, "made_from": {"members": [{"experiment": "seed1", "spec": members[1]}]}}
    made_from = {"weights": "mean", "members": [{"experiment": one["name"], "spec": one} for one in members]}
    spec = {**official.content["spec"], "name": "both", "made_from": made_from}
    blend = dataclasses.replace(official, content={**official.content, "spec": spec})
    folder = export_submission([blend], tmp_path, authors="A")
    assert [load_spec(folder / f"experiment_seed{seed}.toml").seed for seed in (0, 1)] == [0, 1]
    assert not (folder / "experiment.toml").exists()
    script = (folder / "run_experiment.py").read_text()
    steps = (
        '["predict-again", "seed1", "--test-strains", "8", "--name", "strained"], '
        '["blend", "seed0", "strained", "--weights", "mean", "--name", "both"]'
    )
    assert steps in script
    compile(script, "run_experiment.py", "exec")
    assert "Made from seed0 and strained" in json.loads((folder / "info.json").read_text())["algorithm_long"]


def test_an_export_describes_and_cites_every_family_of_models(official, tmp_path, monkeypatch):
    other = dataclasses.replace(
        families.CHGNET,
        name="Other",
        pretrained={"large": ""},
        description="a tree",
        citation="@article{other}",
        pretraining="Other was pretrained on trees.",
    )
    monkeypatch.setattr(families, "FAMILIES", (families.CHGNET, other))
    first = official.content["spec"]
    second = {**first, "name": "second", "model": {**first["model"], "pretrained": "large"}}
    members = [{"experiment": one["name"], "spec": one} for one in (first, second)]
    blend = {**first, "name": "both", "made_from": {"weights": "mean", "members": members}}

    def info(spec):
        one = dataclasses.replace(official, content={**official.content, "spec": spec})
        folder = export_submission([one], tmp_path, authors="A", force=True, algorithm="x")
        return json.loads((folder / "info.json").read_text())

    chgnet = "CHGNet 0.3.0, a graph neural network potential pretrained on MPtrj"
    assert chgnet in info(first)["algorithm_long"]
    assert info(first)["bibtex_refs"] == families.CHGNET.citation
    assert "Other large, a tree. " in info(second)["algorithm_long"]
    assert info(second)["bibtex_refs"] == "@article{other}"
    assert "pretrained on trees" in info(second)["notes"]
    assert "MPtrj" not in info(second)["notes"]
    assert f"{chgnet} and Other, a tree. Made from" in info(blend)["algorithm_long"]
    assert info(blend)["bibtex_refs"] == f"{families.CHGNET.citation}\n@article{{other}}"
    assert all(data in info(blend)["notes"] for data in ("MPtrj", "pretrained on trees"))


def test_results_with_weights_that_this_version_does_not_know_are_compared_and_exported(official, tmp_path):
    spec = {**official.content["spec"], "model": {"pretrained": "9.9", "trainable": "all"}}
    content = {**official.content, "spec": spec, "notes": {"pretraining_overlap": "It has seen all test crystals."}}
    newer = dataclasses.replace(official, content=content)
    folder = export_submission([newer], tmp_path, authors="A")
    info = json.loads((folder / "info.json").read_text())
    assert info["notes"] == "It has seen all test crystals."
    assert "9.9. All weights are finetuned" in info["algorithm_long"]
    page = write_comparison(compare([newer, official]), tmp_path / "compare.html").read_text()
    assert "It has seen all test crystals." in page
    assert "9.9 saw in pretraining" in overlap_note(newer.target, spec, dataset="own.csv"), "not recorded yet"


def test_an_earlier_export_is_replaced_when_asked_for_and_no_other_folder_ever_is(official, tmp_path):
    folder = export_submission([official], tmp_path, authors="A")
    with pytest.raises(UsageError, match="--force"):
        export_submission([official], tmp_path, authors="B")
    assert export_submission([official], tmp_path, authors="B", force=True) == folder
    assert json.loads((folder / "info.json").read_text())["authors"] == "B"
    (folder / "notebook.ipynb").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match=r"contains notebook\.ipynb"):
        export_submission([official], tmp_path, authors="C", force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_export_that_fails_leaves_the_earlier_one_and_nothing_else(official, tmp_path, monkeypatch):
    folder = export_submission([official], tmp_path, authors="A")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path, _content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_json", full)  # `export` calls write_json only for its last file, info.json
    with pytest.raises(OSError, match="No space"):
        export_submission([official], tmp_path, authors="B", force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_an_export_is_refused_before_anything_is_compared(official, tmp_path, monkeypatch):
    folder = export_submission([official], tmp_path, authors="A")
    monkeypatch.setattr(export, "_compare_with_matbench", lambda _one: pytest.fail("it computed"))
    with pytest.raises(UsageError, match="--force"):
        export_submission([official], tmp_path, authors="B")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / folder.name).symlink_to(folder)
    with pytest.raises(UsageError, match="is not a folder"):
        export_submission([official], tmp_path / "link", authors="B", force=True)
    with pytest.raises(UsageError, match="reads"):
        export_submission([official], official.folder, authors="B", force=True)


def test_own_data_and_missing_folds_are_refused_with_every_reason(recorded_folder, tmp_path):
    with pytest.raises(ResultsError) as caught:
        export_submission([read_recorded(recorded_folder)], tmp_path / "out", authors="A")
    assert "not from the official file of a matbench task" in str(caught.value)
    assert "folds 2, 3, 4 are missing" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_experiment_is_refused(official, tmp_path):
    with pytest.raises(ResultsError, match="not been recorded yet"):
        export_submission([dataclasses.replace(official, is_complete=False)], tmp_path, authors="A")


def test_an_export_without_authors_is_refused(official, tmp_path):
    with pytest.raises(UsageError, match="--authors"):
        export_submission([official], tmp_path, authors=" ")


def test_a_matbench_file_of_another_run_is_refused(official, tmp_path):
    other = {**official.content, "summary": {**official.content["summary"], "mae": {"mean": 0.5, "std": 0.0}}}
    with pytest.raises(ResultsError, match="different runs"):
        export_submission([type(official)(official.folder, other)], tmp_path, authors="A")


@pytest.mark.parametrize("description", ["", 'with "quotes" and \\', "line\nbreak", "ünïcode 🧪", "\x7f"])
def test_any_spec_survives_as_toml(tmp_path, description):
    spec = Spec(name="x", description=description, train={"lr": 1e-5, "epochs": 3}, folds=(1, 3))
    (tmp_path / "x.toml").write_text(spec_as_toml(spec.to_json()), encoding="utf-8", newline="")
    assert load_spec(tmp_path / "x.toml") == spec
