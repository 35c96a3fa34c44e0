"""Results stay the same if a step begins before the results of the previous step have been read."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept_commits import small_commits
from torch.utils._python_dispatch import TorchDispatchMode

from mbqueue.clock import SystemClock
from mbqueue.errors import NonFiniteLoss
from mbqueue.train import chgnet
from mbqueue.train import stepper as stepper_module
from mbqueue.train.arrivals import Arrived, arriving
from mbqueue.train.chgnet import load_pretrained
from mbqueue.train.feeds import GraphFeed
from mbqueue.train.learner import Learner
from mbqueue.train.memory import OutOfMemory
from mbqueue.train.objective import Objective
from mbqueue.train.optim import open_for_training
from mbqueue.train.outcome import StepReport
from mbqueue.train.stepper import Stepper

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def one_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU start a step before it has read the previous step's results, as on a GPU."""
    monkeypatch.setattr(stepper_module, "steps_in_flight", lambda _device: 1)


def learner_of(helpers: Any, **options: Any) -> Learner:
    learner = Learner(
        helpers.small_spec(**options),
        0,
        dataset_hash="x",
        first=load_pretrained("0.3.0"),
        device=CPU,
        steps_per_epoch=4,
    )
    open_for_training(chgnet, learner.model, learner.trained, head_only=False)
    learner.model.train()
    return learner


def stepper_of(bench: Any, helpers: Any, learner: Learner, told: list[StepReport]) -> Stepper:
    return Stepper(
        learner,
        GraphFeed(chgnet, bench.cache),
        Objective(helpers.small_spec().train, "energy"),
        device=CPU,
        ids=bench.crystals.ids,
        clock=SystemClock(),
        on_step=told.append,
    )


def batch_of(bench: Any, rows: range) -> list[Arrived]:
    return next(arriving([[GraphFeed(chgnet, bench.cache).load(np.array(rows))]], CPU))


def everything(learner: Learner) -> dict[str, Any]:
    """Copy all tensors that a training step changes."""
    tensors = dict(learner.model.state_dict())
    for name, state in zip(learner.trained, map(learner.optimizer.state.get, learner.trained.values()), strict=True):
        tensors |= {f"{name}/{key}": value for key, value in (state or {}).items()}
    return copy.deepcopy(tensors)


def newest_bytes(folder: Path) -> tuple[str, int, bytes]:
    newest = small_commits(folder).manifests()[-1]
    return newest.stem, newest.step, (folder / f"{newest.stem}.pt").read_bytes()


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "unfreeze_epochs": 1, "max_bonds": 900}])
def test_steps_in_flight_change_no_byte(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    for folder in ("each", "one in flight", "stopped"):
        if folder == "one in flight":
            monkeypatch.setattr(stepper_module, "steps_in_flight", lambda _device: 1)
        run = bench.run(tmp_path / folder, **options)
        for epoch in (1, 2):
            if folder == "stopped":
                assert not helpers.train_epoch(run, epoch, stop_after=2).finished
                assert newest_bytes(tmp_path / folder)[1] == 2
            assert helpers.train_epoch(run, epoch).finished
    _, _, each = newest_bytes(tmp_path / "each")
    assert newest_bytes(tmp_path / "one in flight")[2] == each
    assert newest_bytes(tmp_path / "stopped")[2] == each


@pytest.mark.usefixtures("one_in_flight")
def test_a_commit_in_mid_epoch_has_every_step_that_was_begun(bench: Any, helpers: Any, tmp_path: Path) -> None:
    run = bench.run(tmp_path)
    saved: list[tuple[int, int]] = []

    def save(staged: Any) -> None:
        saved.append((staged.manifest.step, run.steps_per_epoch))
        staged.publish()

    helpers.train_epoch(run, 1, save=save, checkpoint_seconds=0.0)
    assert saved[-1][0] == run.steps_per_epoch
    assert all(step >= 1 for step, _ in saved)


@pytest.mark.usefixtures("one_in_flight")
def test_a_step_that_is_not_finite_stops_the_one_begun_after_it_too(bench: Any, helpers: Any) -> None:
    learner, told = learner_of(helpers, ema_decay=0.9), list[StepReport]()
    stepper = stepper_of(bench, helpers, learner, told)
    stepper.step(batch_of(bench, range(8)))
    before = everything(learner)
    bad = batch_of(bench, range(8, 16))
    bad[0].batch.targets[3] = float("nan")
    stepper.step(bad)
    assert [report.step for report in told] == [1], "of the second step nothing is known yet"
    with pytest.raises(NonFiniteLoss, match=r"loss \(nan\).*weights are unchanged.*crystal-11"):
        stepper.step(batch_of(bench, range(16, 24)))
    after = everything(learner)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("one_in_flight")
def test_a_step_that_does_not_fit_leaves_the_one_before_it_counted(
    bench: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, told = learner_of(helpers), list[StepReport]()
    stepper = stepper_of(bench, helpers, learner, told)
    stepper.step(batch_of(bench, range(8)))

    def full(*_arguments: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    with monkeypatch.context() as patched:
        patched.setattr(GraphFeed, "predict", full)
        with pytest.raises(OutOfMemory) as caught:
            stepper.step(batch_of(bench, range(8, 16)))
    assert caught.value.shortage.rows == list(range(8, 16))
    assert told == []
    stepper.settle()
    assert (learner.step, [report.step for report in told]) == (1, [1])
    assert learner.state().steps_done == 1


class Operations(TorchDispatchMode):
    """Remembers the name of every torch operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_beginning_a_step_does_not_wait_for_the_device(
    bench: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(helpers)
    monkeypatch.setattr(stepper_module, "steps_in_flight", lambda _device: 2)
    stepper = stepper_of(bench, helpers, learner, [])
    batches = [batch_of(bench, range(first, first + 8)) for first in (0, 8)]
    with Operations() as operations:
        for batch in batches:
            stepper.step(batch)
    assert "_fused_adamw_" in operations.seen
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"} & set(operations.seen)
    with Operations() as operations:
        stepper.settle()
    assert operations.seen.count("_local_scalar_dense") == 0, "the figures are in host memory then"
    assert learner.step == 2


@dataclass
class Travelling:
    """A stand-in for a batch that records in which order it is used."""

    rows: torch.Tensor
    told: list[str]
    name: str

    def to(self, device: torch.device, *, non_blocking: bool) -> Travelled:
        assert (device, non_blocking) == (CUDA, True)
        self.told.append(f"copy {self.name}")
        return Travelled(Field(self.told, self.name), Field(self.told, self.name))


@dataclass
class Field:
    told: list[str]
    name: str

    def record_stream(self, stream: Any) -> None:
        self.told.append(f"{stream.name} uses {self.name}")


@dataclass
class Travelled:
    first: Field
    second: Field


@dataclass
class Stream:
    name: str
    told: list[str]

    def wait_stream(self, other: Stream) -> None:
        self.told.append(f"{self.name} waits for {other.name}")


def test_batches_are_copied_on_a_separate_stream_without_blocking_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        told.append(f"on {stream.name}")
        yield
        told.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: Stream("copying", told))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream("computing", told))
    monkeypatch.setattr(torch.cuda, "stream", on)
    batches = arriving(
        [[Travelling(torch.tensor([4, 2]), told, "a")], [Travelling(torch.tensor([7]), told, "b")]], CUDA
    )
    [first] = next(batches)
    assert first.rows == [4, 2]
    assert told == ["on copying", "copy a", "off copying", "computing waits for copying"] + ["computing uses a"] * 2
    told.clear()
    [second] = next(batches)
    assert second.rows == [7]
    assert told[:2] == ["on copying", "copy b"]


def test_a_batch_that_does_not_fit_while_it_is_copied_counts_as_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        rows = torch.tensor([1, 2, 3])

        def to(self, _device: torch.device, *, non_blocking: bool) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: torch.enable_grad())
    with pytest.raises(OutOfMemory) as caught:
        next(arriving([[Large()]], CUDA))
    assert caught.value.shortage.rows == [1, 2, 3]
