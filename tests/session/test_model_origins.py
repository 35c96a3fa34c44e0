"""`predict` warns about elements that a model was not trained on, wherever the model file is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pymatgen.core import Lattice, Structure
from small_project import RememberedReport, enqueue, make_project, small_spec

from mbqueue.api import Project
from mbqueue.results.tables import model_file
from mbqueue.session.options import WorkOptions
from mbqueue.session.worker import work


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of a recorded experiment with one fold."""
    project = make_project(tmp_path_factory.mktemp("recorded") / "project", checkpoint_minutes=60.0)
    enqueue(project, small_spec(project, "pretrained_infer"))
    work(project, WorkOptions(device="cpu"), report=RememberedReport())
    return Project(project.root).results("pretrained_infer").folder


@pytest.fixture
def crystals(tmp_path: Path, results: Path) -> Path:
    """A table of three crystals: two of a trained element and plutonium, which the sample does not contain."""
    absent = json.loads((results / "results.json").read_text())["folds"]["0"]["absent_elements"]
    assert "Pu" in absent
    assert "O" not in absent
    cells = {name: Structure(Lattice.cubic(3.5), [name], [[0, 0, 0]]) for name in ("O", "Pu")}
    cells["PuO"] = Structure(Lattice.cubic(5.0), ["Pu", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    rows = [json.dumps({"id": name, "structure": cell.as_dict()}) for name, cell in cells.items()]
    (tmp_path / "new.jsonl").write_text("\n".join(rows))
    return tmp_path / "new.jsonl"


@pytest.mark.parametrize("known_from", ["the queue", "results.json", "nowhere"])
def test_predict_warns_about_elements_that_the_model_was_not_trained_on(
    results: Path, crystals: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, known_from: str
) -> None:
    project, model = Project.create(tmp_path / "other"), tmp_path / "mine.pth"
    if known_from == "results.json":
        model = model_file(results, 0)
    else:
        shutil.copy(model_file(results, 0), model)
    if known_from == "the queue":
        project = Project(results.parents[3])
    project.predict(crystals, [model, model], device="cpu")
    warning = f"{model}, {model}: no training crystals with Pu, so predictions are poor for 2 of 3 crystals (Pu, PuO)."
    assert (warning in caplog.text) == (known_from != "nowhere")
    assert ("no training crystals" in caplog.text) == (known_from != "nowhere")


def test_predict_does_not_warn_about_elements_that_the_model_was_trained_on(
    results: Path, crystals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crystals.write_text(crystals.read_text().splitlines()[0])
    Project(results.parents[3]).predict(crystals, [model_file(results, 0)], device="cpu")
    assert "no training crystals" not in caplog.text
