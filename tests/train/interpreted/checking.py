"""The self-check rejects kernels with deliberate errors, and reports the reason. Run by ``test_interpreted``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_making import graph_of
from interpreted import quicken
from torch import Tensor, nn

from benchmarks.triton_messages import TritonMessages
from mbqueue.data.batch import Batch
from mbqueue.train.gated import Gate, PlainMessages
from mbqueue.train.kernel_check import check
from mbqueue.train.kernels import triton_bonds

BATCH = graph_of([(3, 20, 4), (2, 9, 2)], seed=8)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


class Bonds(nn.Module):
    """A module whose parameters are the inputs of the bond kernels: parts of the first layer, and the gate after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        shapes = {"atoms": (5, 256), "bonds": (29, 128), "weights": (29, 64)}
        shapes |= {"second": (128, 64), "bias": (128,), "scale": (128,), "shift": (128,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(0.5 * torch.randn(shape)))


def predicting(messages: Callable[[Batch], PlainMessages]) -> Callable[[Any, Batch], Tensor]:
    def predict(model: Any, batch: Batch) -> Tensor:
        gate = Gate(model.second, model.bias, model.scale, model.shift, None)
        total = messages(batch).of_bonds(model.atoms, model.bonds, model.weights, gate)
        return torch.stack([part.sum() for part in total.split(batch.n_atoms.tolist())])

    return predict


def verdict(tolerance: float = 1e-4) -> str | None:
    return check(Bonds(), BATCH, predicting(PlainMessages), predicting(TritonMessages), tolerance=tolerance)


def test_sound_kernels_pass() -> None:
    assert verdict() is None
    assert verdict(tolerance=1e-9) is not None, "it compares, and float32 is not exact"


def test_a_kernel_with_wrong_values_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton_bonds.by_segment
    monkeypatch.setattr(triton_bonds, "by_segment", lambda segment, x, n: right(segment, x, n) * 1.001)
    said = verdict()
    assert said is not None
    assert said.startswith("values differ by ")


def test_a_kernel_with_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_bonds, "silu_slope", lambda _x, s: s)
    said = verdict()
    assert said is not None
    assert said.startswith("the gradient of atoms differs by ")


def test_a_kernel_that_gives_no_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton_bonds.silu_slope
    monkeypatch.setattr(triton_bonds, "silu_slope", lambda x, s: right(x, s) * float("nan"))
    said = verdict()
    assert said is not None
    assert "nan" in said


def test_a_kernel_that_does_not_compile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: Any) -> None:
        raise RuntimeError("PTXAS error: Internal Triton PTX codegen error\nmore")

    monkeypatch.setattr(triton_bonds, "gated", fails)
    said = verdict()
    assert said is not None
    assert "PTXAS error: Internal Triton PTX codegen error" in said
