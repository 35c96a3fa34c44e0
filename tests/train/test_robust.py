"""Training steps that run out of memory, or whose loss or gradient is not finite."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept_commits import small_commits

from mbqueue.errors import DeviceBusy, DeviceTooSmall, NonFiniteLoss, next_step
from mbqueue.train import memory as memory_module
from mbqueue.train.feeds import GraphFeed, ahead
from mbqueue.train.memory import DeviceMemory, Shortage, is_out_of_memory


def shrink_device(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    """Make the device run out of memory on batches of more than ``largest`` crystals."""
    whole = GraphFeed.predict

    def predict(self: GraphFeed, model: Any, batch: Any) -> torch.Tensor:
        if len(batch) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return whole(self, model, batch)

    monkeypatch.setattr(GraphFeed, "predict", predict)


def test_a_nan_loss_stops_training_before_the_weights_change(bench: Any, helpers: Any, tmp_path: Path) -> None:
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
    assert "weights are unchanged" in str(caught.value)
    assert "retry" not in next_step(str(caught.value), "mine"), "the loss would be nan again"
    newest = small_commits(tmp_path).manifests()[-1]
    assert newest.stem == "e0001-done-f0001"
    assert helpers.train_epoch(run, 2, fence=3).finished, "it resumes from the last good commit"


def test_a_nan_gradient_stops_training(
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
    shrink_device(monkeypatch, largest=3)
    memory, told = tmp_path / "memory.json", list[str]()
    run = bench.run(tmp_path / "small", memory_file=memory, on_note=told.append)
    steps = list[int]()
    outcome = helpers.train_epoch(run, 1, on_step=lambda report: steps.append(report.step))
    assert outcome.history_row["train_mae"] == pytest.approx(whole.history_row["train_mae"], rel=1e-3)
    assert outcome.history_row["val_mae"] == pytest.approx(whole.history_row["val_mae"], rel=1e-3)
    assert steps == list(range(1, run.steps_per_epoch + 1))
    assert len(told) == 3, "8 to 4 and 4 to 2 in training, 5 to 2 in validation"
    assert all("runs at most 2 crystals at once" in text for text in told[1:])
    remembered = json.loads(memory.read_text())
    assert {key.rpartition("|")[2]: value for key, value in remembered.items()} == {
        "train": {"limit": 2},
        "infer": {"limit": 2},
    }
    newest = small_commits(tmp_path / "small").manifests()[-1]
    assert (newest.fingerprint["micro_batch"], newest.fingerprint["infer_batch"]) == (2, 2)
    [change] = newest.fingerprint_changes
    assert change["changes"] == {"micro_batch": [8, 2], "infer_batch": [8, 2]}
    told.clear()
    again = bench.run(tmp_path / "again", memory_file=memory, on_note=told.append)
    assert len(told) == 2, "a session says at its start that batches go in parts"
    assert all("at most 2 crystals at once" in text and str(memory) in text for text in told)
    assert helpers.train_epoch(again, 1).finished
    assert len(told) == 2, "what is remembered need not be learned again"


@pytest.mark.parametrize("kind", ["scalar", "class"])
def test_a_fold_of_any_kind_that_changes_to_a_smaller_device_ends_like_a_whole_one(
    bench_of: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bench = bench_of(kind)
    whole = helpers.train_epoch(bench.run(tmp_path / "whole"), 1)
    helpers.train_epoch(bench.run(tmp_path / "moved"), 1, stop_after=1)
    shrink_device(monkeypatch, largest=3)
    moved = helpers.train_epoch(bench.run(tmp_path / "moved"), 1, fence=2)
    for score in ("train_loss", "train_mae", "val_loss", "val_mae"):
        assert moved.history_row[score] == pytest.approx(whole.history_row[score], rel=1e-3)
    [change] = small_commits(tmp_path / "moved").manifests()[-1].fingerprint_changes
    assert (change["step"], change["changes"]["micro_batch"]) == (3, [8, 2])


def busy(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    """Pretend that other processes use ``gib`` GiB of a device with 15 GiB."""
    monkeypatch.setattr(memory_module, "bytes_in_use", lambda _device: (int(gib * 2**30), 15 << 30))


def test_a_limit_learned_while_others_hold_memory_is_for_that_job_alone(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, told = tmp_path / "memory.json", list[str]()
    run = bench.run(tmp_path / "c", memory_file=memory, on_note=told.append)
    busy(monkeypatch, 9.5)
    with monkeypatch.context() as patched:
        shrink_device(patched, largest=3)
        helpers.train_epoch(run, 1)
    assert len(told) == 3
    assert all("9.5 of 15.0 GiB" in text for text in told)
    assert not memory.exists()
    told.clear()
    assert helpers.train_epoch(run, 2).finished
    newest = small_commits(tmp_path / "c").manifests()[-1]
    assert (newest.fingerprint["micro_batch"], newest.fingerprint["infer_batch"]) == (8, 8)
    assert [change["changes"]["micro_batch"] for change in newest.fingerprint_changes] == [[8, 2], [2, 8]]
    assert told == []
    bench.run(tmp_path / "later", memory_file=memory, on_note=told.append)
    assert told == []


def test_memory_of_the_process_itself_does_not_make_a_device_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = DeviceMemory(tmp_path / "memory.json", "k")
    busy(monkeypatch, 0.9)
    memory.make_room(Shortage([1, 2, 3, 4], "CUDA out of memory"), torch.device("cpu"), ["a"] * 5)
    assert DeviceMemory(tmp_path / "memory.json", "k").limit == 2
    memory.begin()
    assert memory.limit == 2


def test_an_unchecked_limit_of_an_earlier_version_is_learned_again(tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text('{"k": 1, "other": 3}')
    memory = DeviceMemory(tmp_path / "memory.json", "k")
    assert memory.limit == memory_module.UNLIMITED
    memory.make_room(Shortage([1, 2], "CUDA out of memory"), torch.device("cpu"), ["a"] * 3)
    assert json.loads((tmp_path / "memory.json").read_text()) == {"k": {"limit": 1}, "other": 3}


def test_a_crystal_that_does_not_fit_beside_others_sets_no_limit(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_device(monkeypatch, largest=0)
    busy(monkeypatch, 13.2)
    with pytest.raises(
        DeviceBusy, match=r"crystal-\d+ needs more GPU memory than other processes leave free.*13\.2 of 15\.0 GiB"
    ):
        helpers.train_epoch(bench.run(tmp_path / "c", memory_file=tmp_path / "memory.json"), 1)
    assert not (tmp_path / "memory.json").exists()


@pytest.mark.parametrize("where", ["forward", "backward", "gradient norm", "inference"])
def test_an_attempt_that_did_not_fit_leaves_no_memory_in_use(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    left: list[bool] = []
    whole, make_room, clip = GraphFeed.predict, DeviceMemory.make_room, torch.nn.utils.clip_grad_norm_

    def fail(*_arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    def predict(self: GraphFeed, model: Any, batch: Any) -> torch.Tensor:
        large = model.mlp.layers[0].weight.exp() if model.training else torch.ones(1000)
        held.append(weakref.ref(large))
        if not left and where == ("forward" if model.training else "inference"):
            fail()
        if not left and where == "backward" and model.training:
            large.register_hook(fail)
        return whole(self, model, batch) + 0.0 * large.sum()

    def clipped(*arguments: Any) -> torch.Tensor:
        if not left and where == "gradient norm":
            fail()
        return clip(*arguments)

    def roomy(self: DeviceMemory, *arguments: Any) -> None:
        left.extend(reference() is not None for reference in held)
        make_room(self, *arguments)

    monkeypatch.setattr(GraphFeed, "predict", predict)
    monkeypatch.setattr(DeviceMemory, "make_room", roomy)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    assert helpers.train_epoch(bench.run(tmp_path / "c"), 1).finished
    assert left
    assert not any(left)


def test_an_allocation_failure_in_another_library_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_weights_that_diverge_in_the_last_step_are_found_by_the_validation(
    bench: Any, helpers: Any, tmp_path: Path
) -> None:
    run = bench.run(tmp_path)
    helpers.train_epoch(run, 1)

    def diverge(report: Any) -> None:
        if report.step == run.steps_per_epoch:
            with torch.no_grad():
                learner.model.mlp.layers[0].weight.fill_(float("nan"))

    learner = run._learner
    with pytest.raises(
        NonFiniteLoss, match=r"predictions of 5 of 5 crystals are not finite.*crystal-\d+, .*lower train.lr.*new name"
    ) as caught:
        helpers.train_epoch(run, 2, fence=2, on_step=diverge)
    assert "retry" not in next_step(str(caught.value), "mine"), "training would diverge again"
    newest = small_commits(tmp_path).manifests()[-1]
    assert newest.stem == "e0001-done-f0001"


def test_a_nan_prediction_names_its_crystals(bench: Any, helpers: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path)
    helpers.train_epoch(run, 1)
    model = run.best_model()
    with torch.no_grad():
        model.atom_embedding.embedding.weight[10] = float("nan")  # Na
    with_sodium = [row for row in run.rows.test if 11 in bench.crystals.structure(row).atomic_numbers]
    assert 0 < len(with_sodium) < len(run.rows.test)
    with pytest.raises(NonFiniteLoss, match=f"predictions of {len(with_sodium)} of .*crystal-{with_sodium[0]}"):
        run.predict_test(model)


def test_a_crystal_that_does_not_fit_alone_is_named(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_device(monkeypatch, largest=0)
    with pytest.raises(DeviceTooSmall, match=r"crystal-\d+ alone does not fit"):
        helpers.train_epoch(bench.run(tmp_path / "c"), 1)


def test_a_damaged_memory_file_is_ignored(bench: Any, helpers: Any, tmp_path: Path) -> None:
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
