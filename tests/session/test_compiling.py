"""The GPU kernels compile while a session loads its data. A session reports a failed compilation, and continues."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_family
import torch

from mbqueue import families
from mbqueue.session import working_set
from mbqueue.session.compiling import Compiling
from mbqueue.train import chgnet, gpu_path
from mbqueue.train.triton_plan import products_in_use

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Model(torch.nn.Module):
    """A model with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend that no kernel has been checked on this GPU; return the kernels' folder, which does not exist."""
    monkeypatch.setattr(gpu_path, "_verdicts", {})
    monkeypatch.setattr(gpu_path, "device_name", lambda _device: "NVIDIA L4")
    monkeypatch.setattr(Compiling, "_tried_on", lambda *_: (Model(), torch.tensor([1.0, 3.0])))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def predicts(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Let the model call a function before it predicts."""

    def put(before: Callable[[], None]) -> None:
        def predict(model: Model, batch: torch.Tensor) -> torch.Tensor:
            before()
            return batch * model.weight

        monkeypatch.setattr(chgnet, "predict", predict)

    return put


Predicts = Callable[[Callable[[], None]], None]


def test_kernels_are_compiled_while_the_session_works(predicts: Predicts) -> None:
    session_went_on, used = threading.Event(), []

    def compile_slowly() -> None:
        assert session_went_on.wait(30)
        used.append(gpu_path.uses_kernels(CUDA))

    predicts(compile_slowly)
    begun = Compiling(CUDA, lambda _text: None)
    assert used == []
    assert not gpu_path.uses_kernels(CUDA), "only the thread that compiles uses kernels that are not checked yet"
    session_went_on.set()
    begun.wait()
    assert used == [True]


def test_the_precision_of_an_experiment_is_compiled_too_once_and_after_float32(
    predicts: Predicts, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))
    predicts(lambda: used.append(products_in_use()))
    begun = Compiling(CUDA, lambda _text: None)
    for precision in ("bf16", "float32", "bf16", "tf32"):
        begun.also(precision, "0.3.0")
    begun.wait()
    assert used == ["float32", "bf16", "tf32"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    begun = Compiling(CUDA, lambda _text: None)
    begun.also("bf16", "r2scan")
    begun.wait()
    assert used[3:] == ["float32"], "a T4 has no bf16"


def test_the_kernels_of_another_family_are_compiled_too_and_once(
    predicts: Predicts, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    monkeypatch.setattr(families, "FAMILIES", (families.CHGNET, tiny_family.FAMILY))
    monkeypatch.setattr(tiny_family, "predict", lambda model, batch: used.append("tiny") or batch * model.weight)
    predicts(lambda: used.append("chgnet"))
    begun = Compiling(CUDA, lambda _text: None)
    for pretrained in ("r2scan", "tiny", "tiny"):
        begun.also("float32", pretrained)
    begun.wait()
    assert used == ["chgnet", "tiny"]


def test_the_cpu_has_nothing_to_compile(predicts: Predicts) -> None:
    predicted: list[str] = []
    told: list[str] = []
    predicts(lambda: predicted.append("it predicted"))
    Compiling(CPU, told.append).wait()
    assert (predicted, told) == ([], [])


def test_sessions_note_that_kernels_compile_until_compiled_kernels_are_stored(predicts: Predicts, kept: Path) -> None:
    told: list[str] = []
    predicts(lambda: None)
    Compiling(CUDA, told.append).wait()
    assert ["Compiling the GPU kernels" in text for text in told] == [True]
    (kept / "kernel").mkdir(parents=True)
    Compiling(CUDA, told.append).wait()
    assert len(told) == 1


@pytest.mark.parametrize("error", [RuntimeError("ptxas failed\nwith details"), ModuleNotFoundError("no triton")])
def test_if_kernels_do_not_compile_plain_torch_is_used_and_noted_once(
    predicts: Predicts, kept: Path, error: Exception
) -> None:
    (kept / "kernel").mkdir(parents=True)
    told: list[str] = []

    def fail() -> None:
        raise error

    predicts(fail)
    Compiling(CUDA, told.append).wait()
    checked = (CUDA, "float32", Model(), lambda *_: pytest.fail("it was checked"), torch.tensor([1.0]))
    gpu_path.check_once(*checked, told.append)  # type: ignore[arg-type]
    Compiling(CUDA, told.append).wait()
    assert not gpu_path.uses_kernels(CUDA)
    assert gpu_path.described(CUDA) == {"messages": "plain"}
    reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert len(told) == 1
    assert told[0].startswith(
        f"mbqueue does not use the fused GPU kernels on NVIDIA L4: {reason}. Training uses plain torch"
    )


def test_without_a_sample_kernels_are_compiled_at_the_check_of_the_first_batch(
    monkeypatch: pytest.MonkeyPatch, kept: Path
) -> None:
    (kept / "kernel").mkdir(parents=True)
    told: list[str] = []

    def fail(*_: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(Compiling, "_tried_on", fail)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))
    Compiling(CUDA, told.append).wait()
    assert ["(OSError: no space left). mbqueue compiles them at the first batch" in text for text in told] == [True]
    model, batch = Model(), torch.tensor([1.0, 3.0])
    gpu_path.check_once(CUDA, "float32", model, lambda m, b: b * m.weight, batch, told.append)  # type: ignore[operator]
    assert gpu_path.uses_kernels(CUDA)
    assert len(told) == 1


def test_kernels_are_tried_on_two_real_crystals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model, batch = Compiling(CPU, pytest.fail)._tried_on(families.CHGNET)
    energies = chgnet.predict(model, batch)
    assert energies.shape == (2,)
    assert bool(torch.isfinite(energies).all())


def test_compiling_begins_before_a_fold_is_loaded_and_ends_before_it_is_put_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    happened: list[str] = []

    class FakeWorkingSet(working_set.WorkingSet):
        """A stand-in for `WorkingSet` that records its calls."""

        def __init__(self) -> None:
            self._fold = None

        def __getattr__(self, name: str) -> Any:
            return Anything()

    class Anything:
        """A stand-in for a cache that has every crystal."""

        def __getattr__(self, _name: str) -> Any:
            return Anything()

        def __call__(self, *_args: Any, **_named: Any) -> Any:
            return Anything()

    class Waited:
        """A stand-in for `Compiling` that records when a caller waits for it."""

        def also(self, precision: Any, pretrained: Any) -> None:
            happened.append("begun")

        def wait(self) -> None:
            happened.append("waited")

    fake: Any = FakeWorkingSet()
    fake._compiling = Waited()
    for name in ("data_for", "_checkpoints", "frozen_for"):
        setattr(fake, name, lambda *_args: Anything())
    monkeypatch.setattr(working_set, "kinds_needed", lambda _spec: ())
    monkeypatch.setattr(working_set, "FoldRun", lambda **_named: happened.append("fold"))
    lease: Any = Anything()
    lease.job = Anything()
    lease.job.fold = 0
    Anything.fingerprint = {}  # type: ignore[attr-defined]
    fake.fold_run(lease, Anything(), Anything())
    assert happened == ["begun", "waited", "fold"]
