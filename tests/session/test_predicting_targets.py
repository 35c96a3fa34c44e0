"""`predict` gives scalars in their unit and classes as probabilities, and never mixes two targets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_family
import torch
from pymatgen.core import Lattice, Structure

from mbqueue import families
from mbqueue.api import Project
from mbqueue.errors import UsageError
from mbqueue.files import write_bytes
from mbqueue.task import FORMATION_ENERGY, Target
from mbqueue.train.chgnet import load_pretrained, model_bytes, target_of_model

CLASS = Target(name="metallicity", unit="", kind="class", column="is_metal")
MODULUS = Target(name="bulk modulus", unit="GPa", kind="scalar", column="K")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project, and a table of two crystals without targets next to it."""
    crystals = [Structure(Lattice.cubic(side), ["Fe"], [[0, 0, 0]]).as_dict() for side in (2.8, 3.1)]
    rows = [json.dumps({"id": str(number), "structure": crystal}) for number, crystal in enumerate(crystals)]
    (tmp_path / "new.jsonl").write_text("\n".join(rows))
    return Project.create(tmp_path / "project")


def saved(path: Path, target: Target) -> Path:
    write_bytes(path, model_bytes(load_pretrained("0.3.0"), target))
    return path


def test_a_model_file_says_what_it_predicts_unless_that_is_the_formation_energy(tmp_path: Path) -> None:
    assert target_of_model(saved(tmp_path / "a.pth", MODULUS)) == MODULUS
    assert target_of_model(saved(tmp_path / "b.pth", FORMATION_ENERGY.target)) == FORMATION_ENERGY.target
    assert set(torch.load(tmp_path / "b.pth", weights_only=True)) == {"model"}


def test_ensembles_of_a_class_average_probabilities(project: Project, tmp_path: Path) -> None:
    data = tmp_path / "new.jsonl"
    [logits] = project.predict(data, [saved(tmp_path / "a.pth", MODULUS)], device="cpu").predictions.each
    table = project.predict(data, [saved(tmp_path / f"{name}.pth", CLASS) for name in "bc"], device="cpu")
    assert table.target == CLASS
    assert table.predictions.mean == pytest.approx(1 / (1 + np.exp(-logits)))
    assert table.mae is None


def test_models_of_different_targets_are_refused_as_an_ensemble(project: Project, tmp_path: Path) -> None:
    models = [saved(tmp_path / "a.pth", MODULUS), saved(tmp_path / "b.pth", CLASS)]
    with pytest.raises(UsageError, match=r"predicts the bulk modulus \(GPa\), but .* predicts the metallicity"):
        project.predict(tmp_path / "new.jsonl", models, device="cpu")


def test_an_ensemble_is_predicted_by_the_family_that_reads_its_files(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "FAMILIES", (families.CHGNET, tiny_family.FAMILY))
    monkeypatch.setattr(tiny_family, "worker", 0)
    model, path = tiny_family.TinyModel(), tmp_path / "tiny.pth"
    write_bytes(path, tiny_family.model_bytes(model, FORMATION_ENERGY.target))
    found = project.predict(tmp_path / "new.jsonl", [path, path], device="cpu").predictions.each
    iron = torch.sin(torch.full((1, 1), 26) * torch.arange(1, tiny_family.FEATURES + 1) / tiny_family.FEATURES)
    assert found == pytest.approx(np.full((2, 2), model.read_out(iron).item()))
    stock = saved(tmp_path / "a.pth", FORMATION_ENERGY.target)
    with pytest.raises(UsageError, match=r"a\.pth and .*tiny\.pth are models of different kinds"):
        project.predict(tmp_path / "new.jsonl", [stock, path], device="cpu")
