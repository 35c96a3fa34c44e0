"""A comparison of whole files with pymatgen and CHGNet counts equal crystals and names the others."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from mbqueue.data import datasets, graphs
from mbqueue.data.datasets import SAMPLE_FILE, Dataset


@pytest.fixture
def equality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    return importlib.import_module("benchmarks.equality")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """A function that makes the reader add ``offset`` to every target."""
    real = datasets.load

    def put(offset: float) -> None:
        def load(*arguments, **options) -> Dataset:
            read = real(*arguments, **options)
            moved = dataclasses.replace(read.crystals, targets=read.crystals.targets + offset)
            return dataclasses.replace(read, crystals=moved)

        monkeypatch.setattr(datasets, "load", load)

    return put


def test_equal_crystals_and_graphs_are_counted(equality):
    told = equality.compare(SAMPLE_FILE, (20, 30))
    assert told["crystals"] == 10
    assert [told[what] for what in equality.WHAT] == [{}, [], [], []]


def test_crystals_that_are_read_otherwise_are_named(equality, sample, load):
    load(1e-12)
    assert equality.compare(SAMPLE_FILE, (20, 23))["read otherwise"] == sample.crystals.ids[20:23]


def test_graphs_that_differ_are_named(equality, sample, monkeypatch):
    monkeypatch.setattr(graphs, "convert", partial(graphs.convert, bond_cutoff=2.0))
    differ = equality.compare(SAMPLE_FILE, (20, 30))["converted otherwise"]
    assert differ
    assert set(differ) <= set(sample.crystals.ids[20:30])


def test_parts_that_are_noted_are_not_compared_again(equality, tmp_path: Path, capsys):
    file, state = tmp_path / "few.jsonl.gz", tmp_path / "state.jsonl"
    with gzip.open(SAMPLE_FILE) as whole, gzip.open(file, "wb") as few:
        few.writelines(line for line, _ in zip(whole, range(4), strict=False))
    assert equality.compare_all(file, 0, 1, state)
    noted = state.read_text()
    state.write_text(noted.replace('"converted otherwise": []', '"converted otherwise": ["noted"]'))
    assert not equality.compare_all(file, 0, 1, state)
    assert "converted otherwise: 1 noted" in capsys.readouterr().out
