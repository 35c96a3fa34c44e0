"""The training benchmark treats mbqueue and stock CHGNet equally."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(request.config.rootpath))
    return importlib.import_module("benchmarks.training")


def test_every_side_has_seen_every_batch_before_anything_is_timed(
    training: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def works(side: str) -> list[Callable[[], object]]:
        return [lambda batch=batch: calls.append(f"{side}{batch}") for batch in (1, 2)]

    found = training.sides(works("stock "), works("mbqueue "), torch.device("cpu"), "float32")
    training.compare("step", found, torch.device("cpu"), repeats=1)
    warm = ["stock 1", "stock 2", "mbqueue 1", "mbqueue 2"]
    assert calls == [*warm, "stock 1", "mbqueue 1", "stock 2", "mbqueue 2"]
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["stock", "mbqueue"]


def test_on_a_gpu_stock_runs_under_torchs_own_settings_and_once_more_under_those_of_a_fold(
    training: ModuleType,
) -> None:
    under: dict[str, tuple[bool, bool]] = {}
    found = training.sides([], [], torch.device("cuda"), "tf32")
    for side in found:
        with side.within():
            under[side.name] = (
                torch.are_deterministic_algorithms_enabled(),
                torch.backends.cuda.matmul.allow_tf32,
            )
    assert under == {"stock": (False, False), "stock, deterministic": (True, False), "mbqueue": (True, True)}
    assert found[0].within is nullcontext
