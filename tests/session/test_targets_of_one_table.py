"""Experiments on different columns of a table share the converted crystals and the backbone's outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pymatgen.core import Lattice, Structure
from small_project import RememberedReport, enqueue, make_project

from mbqueue.data import graph_cache
from mbqueue.experiment import load_spec
from mbqueue.session.outcome import Ending
from mbqueue.session.worker import WorkOptions, work
from mbqueue.train import chgnet

N = 30
TARGETS = {
    "gap": {"name": "band gap", "unit": "eV", "kind": "scalar", "column": "gap"},
    "metal": {"name": "metallicity", "kind": "class", "column": "metal"},
    "formation": {"column": "e_form"},
    "modulus": {"name": "modulus", "unit": "GPa", "kind": "scalar", "column": "K"},
}


def table(path: Path) -> Path:
    rows = []
    for number in range(N):
        crystal = Structure(Lattice.cubic(2.6 + 0.02 * number), [("Fe", "Cu")[number % 2]], [[0, 0, 0]])
        values = {"gap": 0.1 * number, "metal": number % 3 == 0, "e_form": -0.01 * number, "K": 200.0 - number}
        rows.append(json.dumps({"id": str(number), "structure": crystal.as_dict(), **values}))
    path.write_text("\n".join(rows))
    return path


@pytest.mark.parametrize("first", ["gap", "formation"])
def test_experiments_on_all_columns_convert_once_and_share_the_backbones_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: RememberedReport, first: str
) -> None:
    converted: list[int] = []
    computed: list[int] = []
    convert, atom_features = graph_cache.convert, chgnet.atom_features

    def counted_convert(crystals: Any, first: int, stop: int, **options: Any) -> Any:
        converted.extend(range(first, stop))
        return convert(crystals, first, stop, **options)

    def counted_features(model: Any, batch: Any) -> Any:
        computed.extend(batch.rows.tolist())
        return atom_features(model, batch)

    monkeypatch.setattr(graph_cache, "convert", counted_convert)
    monkeypatch.setattr(chgnet, "atom_features", counted_features)
    monkeypatch.setattr(graph_cache, "SHARD_CRYSTALS", 16)
    project = make_project(tmp_path)
    data = table(tmp_path / "mine.jsonl")
    for name in sorted(TARGETS, key=lambda name: name != first):
        options = {f"target.{key}": value for key, value in TARGETS[name].items()}
        options |= {
            "name": name,
            "results_name": name,
            "data.dataset": str(data),
            "train.epochs": 1,
            "folds": [0],
            "train.batch_size": 8,
        }
        enqueue(project, load_spec(project.jobs_dir / "head_finetune.toml", overrides=options))
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.DONE
    assert sorted(converted) == list(range(N))
    assert sorted(computed) == list(range(N))
