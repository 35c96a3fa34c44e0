"""What goes wrong in a step: numbers that are none, and memory that is too small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbqueue.errors import DeviceTooSmall, NonFiniteLoss
from mbqueue.train.arithmetic import calculating
from mbqueue.train.checkpoint import Checkpoints
from mbqueue.train.feeds import GraphFeed, ahead
from mbqueue.train.gated import PRODUCTS


def shrink_device(monkeypatch: pytest.MonkeyPatch, bears: int) -> None:
    """Let the device run out of memory with more than so many crystals at once."""
    whole = GraphFeed.predict

    def predict(self: GraphFeed, model: Any, batch: Any) -> torch.Tensor:
        if len(batch) > bears:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return whole(self, model, batch)

    monkeypatch.setattr(GraphFeed, "predict", predict)


def test_a_loss_that_is_no_number_stops_before_the_weights_change(bench: Any, helpers: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path)
    helpers.train_epoch(run, 1)
    targets = run._crystals.targets.copy()
    bad = run.rows.train[3]
    run._feed._cache.crystals.targets[bad] = np.nan
    try:
        with pytest.raises(NonFiniteLoss, match=f"crystal-{bad}") as caught:
            helpers.train_epoch(run, 2, fence=2)
    finally:
        run._feed._cache.crystals.targets[:] = targets
    assert "weights are as before" in str(caught.value)
    newest = Checkpoints(tmp_path).newest()
    assert newest is not None
    assert newest.stem == "e0001-done-f0001"
    assert helpers.train_epoch(run, 2, fence=3).finished, "the last good commit is where it goes on"


def test_a_gradient_that_is_no_number_stops_too(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_args: torch.tensor(float("inf")))
    with pytest.raises(NonFiniteLoss, match=r"gradient norm \(inf\)"):
        helpers.train_epoch(bench.run(tmp_path / "c"), 1)
    assert not (tmp_path / "c").exists()


def test_running_out_of_memory_halves_the_micro_batch_and_keeps_the_effective_one(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = helpers.train_epoch(bench.run(tmp_path / "whole"), 1)
    shrink_device(monkeypatch, bears=3)
    memory, told = tmp_path / "memory.json", list[str]()
    run = bench.run(tmp_path / "small", memory_file=memory)
    run._note = told.append
    outcome = helpers.train_epoch(run, 1)
    assert outcome.history_row["train_mae"] == pytest.approx(whole.history_row["train_mae"], rel=1e-3)
    assert outcome.history_row["val_mae"] == pytest.approx(whole.history_row["val_mae"], rel=1e-3)
    assert outcome.steps_per_epoch == whole.steps_per_epoch
    assert len(told) == 2, "8 to 4, 4 to 2"
    assert "at most 2 go together" in told[-1]
    remembered = json.loads(memory.read_text())
    assert {key.rpartition("|")[2]: value for key, value in remembered.items()} == {"train": 2, "infer": 2}
    again = bench.run(tmp_path / "again", memory_file=memory)
    again._note = told.append
    assert helpers.train_epoch(again, 1).finished
    assert len(told) == 2, "what is remembered need not be learned again"


def test_a_crystal_that_does_not_fit_alone_is_named(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_device(monkeypatch, bears=0)
    with pytest.raises(DeviceTooSmall, match=r"crystal-\d+ alone does not fit"):
        helpers.train_epoch(bench.run(tmp_path / "c"), 1)


def test_a_memory_file_that_is_damaged_is_only_forgotten(bench: Any, helpers: Any, tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text("{")
    assert helpers.train_epoch(bench.run(tmp_path / "c", memory_file=tmp_path / "memory.json"), 1).finished


def test_batches_made_ahead_come_in_order_and_their_errors_in_place() -> None:
    def make(index: int) -> int:
        if index == 3:
            raise ValueError("the third")
        return index

    batches = ahead(make, 6)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(batches)


def test_closing_early_ends_the_thread_that_makes_batches() -> None:
    made = []
    batches = ahead(lambda index: made.append(index) or index, 1000)
    assert next(batches) == 0
    batches.close()
    count = len(made)
    assert count < 10
    assert len(made) == count


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_settings_of_a_gpu_hold_within_the_block_and_not_after_it(precision: str) -> None:
    def settings() -> tuple[Any, ...]:
        return (
            torch.backends.cuda.matmul.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            PRODUCTS.get(),
        )

    before = settings()
    with calculating(torch.device("cuda"), precision):
        assert settings() == (precision == "tf32", True, False, torch.bfloat16 if precision == "bf16" else None)
    assert settings() == before
    with calculating(torch.device("cpu"), precision):
        assert settings() == before
