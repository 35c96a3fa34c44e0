"""A GPU uses its kernels only after they have agreed with plain torch, and reports a disagreement."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mbqueue.data.machine_code import keep_gpu_code
from mbqueue.errors import TrainingError, next_step
from mbqueue.train import arithmetic, forward, gpu_path, triton_forward
from mbqueue.train.gpu_path import check_once, described, uses_kernels, using
from mbqueue.train.kernels.launching import launch
from mbqueue.train.kernels.tiles import TILES, tiles_of
from mbqueue.train.triton_plan import Plan, fits

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this process has an L4 GPU and has not yet checked any kernel."""
    monkeypatch.setattr(gpu_path, "_verdicts", {})
    monkeypatch.setattr(gpu_path, "device_name", lambda _device: "NVIDIA L4")
    monkeypatch.setattr(arithmetic, "device_name", lambda _device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (8, 9))


class Model(torch.nn.Module):
    """A model with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))


def predict(wrong: float = 0.0) -> Any:
    """A function that predicts with a model; with GPU kernels, predictions have a relative error of ``wrong``."""

    def values(model: Model, batch: Any) -> torch.Tensor:
        assert isinstance(batch, torch.Tensor)
        return batch * model.weight * (1 + wrong * uses_kernels(CUDA))

    return values


def checked(precision: str, wrong: float, told: list[str]) -> None:
    check_once(CUDA, precision, Model(), predict(wrong), torch.tensor([1.0, 3.0]), told.append)


def test_kernels_are_used_once_they_agree_and_the_fingerprint_tells_their_version_and_tiles() -> None:
    told: list[str] = []
    assert not uses_kernels(CUDA)
    assert described(CUDA) == {"messages": "plain"}
    checked("float32", 1e-6, told)
    assert uses_kernels(CUDA)
    assert not uses_kernels(CPU)
    assert told == []
    assert described(CUDA)["messages"].startswith("fused ")
    assert "triton" in described(CUDA)["messages"]
    cut = described(CUDA)["messages"]
    assert "bond_rows=32" in cut
    assert "partials=512 basis_rows=32 basis_partials=256 read_out_atoms=16 sum_rows=16" in cut
    assert "product_rows=32 element_rows=32" in cut
    assert described(CPU) == {}


def test_wrong_kernels_are_not_used_and_noted_once() -> None:
    told: list[str] = []
    checked("float32", 1e-3, told)
    checked("float32", 0.0, told)
    assert not uses_kernels(CUDA)
    assert len(told) == 1
    assert "not use the fused GPU kernels on NVIDIA L4: values differ by 1.0e-03 relative to the largest" in told[0]
    assert described(CUDA) == {"messages": "plain"}


def test_a_reduced_precision_is_checked_besides_float32_with_room_for_its_rounding() -> None:
    told: list[str] = []
    checked("bf16", 5e-5, told)
    assert uses_kernels(CUDA)
    found: list[str] = []
    check_once(CUDA, "tf32", Model(), predict(1e-2), torch.tensor([1.0]), found.append)
    assert not uses_kernels(CUDA), "the session falls back when one precision fails"
    assert "differ by 1.0e-02" in found[0]


@pytest.mark.parametrize("error", [RuntimeError("ptxas failed\nwith details"), MemoryError()])
def test_kernels_that_do_not_run_are_left_out(error: Exception) -> None:
    told: list[str] = []

    def broken(model: Model, batch: torch.Tensor) -> torch.Tensor:
        if uses_kernels(CUDA):
            raise error
        return batch * model.weight

    check_once(CUDA, "float32", Model(), broken, torch.tensor([1.0]), told.append)
    assert not uses_kernels(CUDA)
    assert type(error).__name__ in told[0]


def test_a_gpu_older_than_the_table_of_tiles_computes_plainly_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (7, 0))
    told: list[str] = []
    checked("float32", 0.0, told)
    assert described(CUDA) == {"messages": "plain"}
    assert "its compute capability is 7.0, but the kernels need 7.5 or higher" in told[0]


def test_a_gpu_newer_than_the_table_takes_the_newest_entry() -> None:
    assert tiles_of(120) is TILES[max(TILES)]
    assert tiles_of(87) is TILES[86]


@pytest.mark.parametrize(("of", "most"), [("bond_center", 2**24), ("angle", 2**24), ("short_bond", 2**31 // 640 + 1)])
def test_a_batch_whose_places_pass_int32_is_refused_and_never_computed_another_way(of: str, most: int) -> None:
    def batch(rows: int) -> Any:
        names = ("rows", "bond_center", "angle", "atomic_numbers", "short_bond")
        return SimpleNamespace(**{name: torch.empty(rows if name == of else 1, device="meta") for name in names})

    assert fits(batch(most - 1))
    with pytest.raises(TrainingError, match=r"larger than the GPU kernels can address.*train\.batch_size") as refused:
        Plan.of(batch(most))
    assert next_step(str(refused.value), "mine") == "after fixing the cause: mbqueue retry mine", "a CPU may suffice"
    # The fingerprint says that training uses the kernels, so every batch must use them.
    model: Any = SimpleNamespace(model_args={"n_conv": 4})
    large = SimpleNamespace(**vars(batch(most)), bond_length=torch.empty(1))
    with using(kernels=True):
        assert forward._gpu_forward(model, large) is triton_forward


def test_kernels_run_on_the_gpu_that_holds_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton uses the current device, which is cuda:0 even in a session on cuda:1."""
    happened: list[Any] = []

    class Current:
        """A stand-in for `torch.cuda.device_of` that records when its block begins and ends."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self._tensor = tensor

        def __enter__(self) -> None:
            happened.append(self._tensor)

        def __exit__(self, *_error: object) -> None:
            happened.append("left")

    class Kernel:
        """A stand-in for a kernel that only records its launches."""

        __name__ = "kernel"

        def __getitem__(self, grid: Any) -> Any:
            return lambda *_args, **_named: happened.append(grid)

    monkeypatch.setattr(torch.cuda, "device_of", Current)
    tensor = torch.ones(1)
    launch(Kernel(), 3, tensor, 1, warps=4)
    assert happened[0] is tensor
    assert happened[1:] == [(3,), "left"]


def test_the_cpu_is_never_checked() -> None:
    check_once(CPU, "float32", Model(), None, torch.tensor([1.0]), pytest.fail)  # type: ignore[arg-type]
    assert not uses_kernels(CPU)


def test_kernels_are_used_only_within_the_block() -> None:
    with using(kernels=True):
        assert uses_kernels(CPU)
        with using(kernels=False):
            assert not uses_kernels(CPU)
    assert not uses_kernels(CPU)


def test_compiled_kernels_are_kept_beside_numbas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert keep_gpu_code() == tmp_path / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    assert keep_gpu_code() == tmp_path / "mine"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert keep_gpu_code() is None
