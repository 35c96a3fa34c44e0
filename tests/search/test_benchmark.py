"""The search files of `benchmarks.search`, the changes to their base experiments, and the replay of pruning."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from mbqueue.experiment import load_spec
from mbqueue.search.file import load_search
from mbqueue.search.trials import Trial, TrialState

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return importlib.import_module("benchmarks.search")


@pytest.mark.parametrize("recipe", ["recipe_head", "recipe_full"])
def test_the_recipes_search_the_shipped_files_with_the_given_values(benchmark, tmp_path, recipe):
    file = ROOT / "benchmarks" / f"{recipe}.toml"
    values = {"dataset": "/data/a file.jsonl.gz", "limit": 300, "epochs": 3, "validation": 0.2}
    base = benchmark.prepare(tmp_path, file, values)
    changed = load_search(file, base=lambda name: load_spec(tmp_path / "jobs" / f"{name}.toml")).base_spec
    shipped = load_spec(ROOT / "jobs" / f"{base}.toml").to_json()
    shipped["data"] |= {"dataset": values["dataset"], "limit": 300}
    shipped["train"] |= {"epochs": 3, "validation": 0.2}
    assert changed == shipped


def test_only_small_crystals_are_taken(benchmark, tmp_path):
    rows = [{"id": str(n), "structure": {"sites": [{}] * n}} for n in (1, 8, 9)]
    source, chosen = tmp_path / "all.jsonl.gz", tmp_path / "small.jsonl.gz"
    source.write_bytes(gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode()))
    with gzip.open(benchmark.small_crystals(source, 8, chosen), "rt") as lines:
        assert [json.loads(line)["id"] for line in lines] == ["1", "8"]


def test_a_replay_prunes_like_sessions(benchmark):
    search = benchmark.as_searched(ROOT / "benchmarks" / "recipe_head.toml")
    curves = [[5.0, 4.0, 3.0, 2.0], [5.0, 4.5, 1.0, 1.0], [4.0, 3.0, 2.0, 1.5]]
    trials = [
        Trial(
            number=number,
            experiment=f"hunt.{number:03d}",
            settings={},
            state=TrialState.DONE,
            curves={0: curve},
            epochs=4,
            is_trained=True,
            is_paused=False,
            priority=0,
            seconds=0.0,
            epoch_seconds=0.0,
        )
        for number, curve in enumerate(curves)
    ]
    assert benchmark.replayed(search, trials) == (4 + 2 + 4, 1.5)
    assert benchmark.replayed(search, [trials[1], trials[0], trials[2]]) == (4 + 4 + 4, 1.0)
