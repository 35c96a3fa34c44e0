"""The GPU benchmark runs to its end on the CPU in Triton's interpreter."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

WAYS = ("stock", "plain", "fused")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, Any]:
    """Run `benchmarks.gpu` on the CPU, and return its results."""
    file = tmp_path_factory.mktemp("benchmark") / "gpu.json"
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--out", str(file)],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "| batch | | stock | plain | fused | fused, predicted for L4 |" in ran.stdout
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return read


def test_every_part_ran_and_no_figure_is_missing_or_not_a_number(found: dict[str, Any]) -> None:
    parts = "machine equality determinism resume speed precision epoch kernels prediction seconds"
    assert list(found) == parts.split()

    def require(value: Any, where: str) -> None:
        if isinstance(value, dict | list):
            assert value, where
            for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                require(each, f"{where}/{key}")
        elif isinstance(value, float):
            assert math.isfinite(value), where

    require(found, "")


def test_both_methods_give_stock_values_and_gradients(found: dict[str, Any]) -> None:
    for way in ("plain", "fused"):
        assert 0 < found["equality"][way]["energy_ev_per_atom"] < 1e-5
        assert 0 < found["equality"][way]["gradient_relative"] < 1e-4
    assert found["equality"]["plain"] != found["equality"]["fused"], "the kernels were not used"


def test_both_methods_give_the_same_bytes_twice_and_after_a_stop_at_every_step(found: dict[str, Any]) -> None:
    assert found["determinism"] == {"plain": True, "fused": True}
    for way in ("plain", "fused"):
        assert found["resume"][way]["same_bytes"]
        assert found["resume"][way]["stops"] >= 2


def test_time_and_peak_memory_are_printed_by_batch_size_and_method(found: dict[str, Any]) -> None:
    assert list(found["speed"]) == ["2", "3"]
    for kinds in found["speed"].values():
        assert list(kinds) == ["training", "inference"]
        for ways in kinds.values():
            assert tuple(ways) == WAYS
            for figures in ways.values():
                assert min(figures[name] for name in ("ms", "crystals_per_second", "peak_mib")) > 0


def test_each_precision_has_an_error_and_a_time(found: dict[str, Any]) -> None:
    assert list(found["precision"]) == ["float32"], "the CPU has no other"
    figures = found["precision"]["float32"]
    assert 0 < figures["energy_mev_per_atom_mean"] <= figures["energy_mev_per_atom_largest"] < 0.1
    assert 0 < figures["gradient_relative"] < 1e-3
    assert figures["step_ms"] > 0


def test_epoch_kernels_and_prediction_have_figures(found: dict[str, Any]) -> None:
    for way in ("plain", "fused"):
        assert found["epoch"][way]["crystals_per_second"] > 0
    assert found["kernels"][0]["ms"] > 0
    assert all(row["calls"] > 0 for row in found["kernels"])
    assert found["prediction"]["gpu"] == "L4"
    assert not found["prediction"]["is_measured_gpu"]
    assert min(found["prediction"]["step_ms"].values()) > 0
    assert list(found["prediction"]["step_ms"]) == list(found["speed"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Any:
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath))
    return importlib.import_module("benchmarks.gpu")


def test_a_method_that_does_not_fit_has_no_figures_but_the_others_do(gpu: Any) -> None:
    def too_large(rows: Any) -> None:
        if len(rows) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def wrong(_rows: Any) -> None:
        raise RuntimeError("something else")

    bench: Any = SimpleNamespace(device=torch.device("cpu"), way=lambda _name: nullcontext())
    found = gpu._in_turn(bench, {"stock": too_large, "plain": lambda _rows: sum(range(9))}, [np.arange(3)], 2)
    assert found["stock"] == {}
    assert found["plain"]["ms"] > 0
    with pytest.raises(RuntimeError, match="something else"):
        gpu._in_turn(bench, {"plain": wrong}, [np.arange(3)], 1)
    figures = {"speed": {"64": {"training": {**found, "fused": {"ms": 2.0}}}}}
    rows = gpu.table(
        {"machine": {"device": "T4", "torch": "2"}, "prediction": {"gpu": "T4", "step_ms": {"64": 1.5}}, **figures}
    )
    assert rows[-1].startswith("| 64 | training | does not fit |")
    assert rows[-1].endswith("| 2.0 ms | 1.5 ms |")


def test_a_failing_part_is_reported_and_the_others_run(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_args: Any) -> None:
        raise ValueError("not today\nwith details")

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # `gpu.main` sets this variable, so let pytest restore it
    monkeypatch.setattr(gpu, "_interpret", lambda: None)
    monkeypatch.setattr(gpu, "Bench", lambda *_args: None)
    monkeypatch.setattr(gpu, "PARTS", {"one": fails, "two": lambda *_args: 2})
    with pytest.raises(SystemExit, match="Failed: one"):
        gpu.main(["--device", "cpu", "--out", str(tmp_path / "gpu.json")])
    read = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert read["failed"] == {"one": "ValueError: not today"}
    assert read["two"] == 2
