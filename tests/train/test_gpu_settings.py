"""Settings and queries of a GPU, as far as a CPU can test them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbqueue.cli.doctor import _device
from mbqueue.train import arithmetic
from mbqueue.train.arithmetic import calculating, differences, fingerprint, usable_precision
from mbqueue.train.conditions import Conditions
from mbqueue.train.gated import PRODUCTS, PlainMessages
from mbqueue.train.state import random_states, restore_random_states

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MATMUL = torch.backends.cuda.matmul


def settings() -> dict[str, Any]:
    """Everything that `calculating` changes; ``None`` if two of torch's own settings contradict each other."""
    try:
        legacy: bool | None = MATMUL.allow_tf32
    except RuntimeError:
        legacy = None
    try:
        precision: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        precision = None
    return {
        "tf32": legacy,
        "fp32_precision": MATMUL.fp32_precision,
        "float32_matmul_precision": precision,
        "bf16_reduction": MATMUL.allow_bf16_reduced_precision_reduction,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "products": PRODUCTS.get(),
    }


@pytest.fixture
def untouched() -> Iterator[None]:
    """Restore torch's settings after each test."""
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = "none"


def notebook_that(kind: str) -> None:
    """Change settings as a notebook may before a session in the same process."""
    match kind:
        case "asked for tf32 in the new way":
            MATMUL.fp32_precision = "tf32"
        case "asked for tf32 everywhere":
            torch.backends.fp32_precision = "tf32"
        case "asked for tf32 in the old way":
            MATMUL.allow_tf32 = True
        case "asked for medium precision":
            torch.set_float32_matmul_precision("medium")
        case "forbade it in the new way":
            MATMUL.fp32_precision = "ieee"


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "kind",
    [
        "set nothing",
        "asked for tf32 in the new way",
        "asked for tf32 everywhere",
        "asked for tf32 in the old way",
        "asked for medium precision",
        "forbade it in the new way",
    ],
)
def test_settings_hold_within_the_block_and_are_as_before_after_it(precision: str, kind: str) -> None:
    notebook_that(kind)
    before = settings()
    with calculating(CUDA, precision):
        within = settings()
        # torch up to 2.8 reads two settings for tf32, and refuses matrix products if the two contradict each other.
        assert within["tf32"] is (precision == "tf32")
        assert within["fp32_precision"] == ("tf32" if precision == "tf32" else "ieee")
        assert not within["bf16_reduction"]
        assert within["deterministic"]
        assert not within["fill"]
        assert within["products"] == {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    assert settings() == before
    with calculating(CPU, precision):
        assert settings() == before


@pytest.mark.parametrize(("precision", "on_7"), [("tf32", "float32"), ("bf16", "float32"), ("fp16", "fp16")])
def test_a_gpu_without_an_arithmetic_computes_in_float32(
    precision: str, on_7: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gpu(major: int) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (major, 5))
        return usable_precision(CUDA, precision)

    assert [gpu(major) for major in (6, 7, 8, 9)] == ["float32", on_7, precision, precision]
    assert usable_precision(CPU, precision) == "float32"


def test_a_missing_precision_is_noted_and_the_used_one_is_recorded(
    helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def on(major: int) -> Conditions:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (major, 5))
        spec = helpers.small_spec(precision="bf16")
        return Conditions(spec, CUDA, memory_file=None, extra={"converter": 3}, on_note=told.append)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla T4")
    older = on(7)
    assert len(told) == 1
    assert told[0].startswith("Tesla T4 does not support bf16, so it computes matrix products in float32")
    newer = on(8)
    assert len(told) == 1
    assert differences(older.fingerprint(), newer.fingerprint()) == {"precision": ["float32", "bf16"]}


def test_doctor_lists_precisions_that_a_gpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 15 << 30

    def told(major: int) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (major, 5))
        return _device().found

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: Properties)
    assert told(6) == "cuda: Tesla T4, 15 GiB, no tf32 or bf16 or fp16 (float32 is used instead)"
    assert told(7) == "cuda: Tesla T4, 15 GiB, no tf32 or bf16 (float32 is used instead)"
    assert told(8) == "cuda: Tesla T4, 15 GiB"


def test_validation_and_predictions_are_float32_whatever_training_is(
    bench: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbqueue.train.forward.FusedMessages", PlainMessages)
    monkeypatch.setattr("mbqueue.train.conditions.usable_precision", lambda _device, wanted: wanted)
    used: list[tuple[bool, Any]] = []
    run = bench.run(tmp_path, precision="bf16")
    predict = run._feed.predict
    # On the CPU, `calculating` changes nothing, so pretend that the CPU is a GPU.
    monkeypatch.setattr("mbqueue.train.fold.calculating", lambda _device, precision: calculating(CUDA, precision))

    def watched(model: Any, batch: Any) -> torch.Tensor:
        used.append((model.training, PRODUCTS.get()))
        found: torch.Tensor = predict(model, batch)
        return found

    monkeypatch.setattr(run._feed, "predict", watched)
    outcome = helpers.train_epoch(run, 1)
    assert set(used) == {(True, torch.bfloat16), (False, None)}
    used.clear()
    best = run.best_model()
    run.predict_test(best)
    assert set(used) == {(False, None)}
    monkeypatch.undo()
    monkeypatch.setattr("mbqueue.train.forward.FusedMessages", PlainMessages)
    rows = run.rows.validation
    exact = run._inference.outputs(best, rows, should_stop=lambda: False)
    mae = float(np.abs(exact - bench.crystals.targets[rows]).mean())
    assert outcome.history_row["val_mae"] == mae, "the model that is kept gives the validation's own numbers"


def test_the_fingerprint_of_a_gpu_names_its_library_of_products_and_the_override(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arithmetic, "device_name", lambda _device: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    versions = {"nvidia-cublas-cu12": "12.8.4.1"}
    monkeypatch.setattr(arithmetic, "version", lambda name: versions.get(name) or _absent(name))
    before = fingerprint(CUDA, "tf32")
    assert (before["cublas"], before["tf32_override"], before["precision"]) == ("12.8.4.1", "0", "tf32")
    versions["nvidia-cublas-cu12"] = "12.9.0.0"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert differences(before, fingerprint(CUDA, "tf32")) == {
        "cublas": ["12.8.4.1", "12.9.0.0"],
        "tf32_override": ["0", "1"],
    }
    on_cpu = fingerprint(CPU, "tf32")
    assert (on_cpu["cublas"], on_cpu["tf32_override"], on_cpu["precision"]) == ("", "", "float32")


def _absent(name: str) -> str:
    if name.startswith("nvidia-"):
        raise arithmetic.PackageNotFoundError(name)
    return "1.0"


def test_facts_that_an_older_commit_lacks_do_not_count_as_differences() -> None:
    now = fingerprint(CPU, "float32")
    older = {key: value for key, value in now.items() if key not in {"cublas", "tf32_override", "validated_in"}}
    assert differences(older, now) == {}
    assert differences({}, now) == {}
    assert differences({**older, "precision": "bf16"}, {**now, "precision": "bf16"}) == {
        "validated_in": ["bf16", "float32"]
    }, "earlier versions validated in the precision that they trained in"


def test_a_session_on_the_cpu_never_touches_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: Any) -> Any:
        raise RuntimeError("CUDA unknown error")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state_all", "set_rng_state_all", "get_rng_state", "set_rng_state", "device_count"):
        monkeypatch.setattr(torch.cuda, name, broken)
    states = random_states(CPU)
    assert states["cuda"] == []
    restore_random_states({**states, "cuda": [torch.zeros(16, dtype=torch.uint8)]}, CPU)


def test_a_session_on_a_gpu_keeps_and_restores_its_own_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {0: torch.full((16,), 1, dtype=torch.uint8), 1: torch.full((16,), 2, dtype=torch.uint8)}
    second = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: held[device.index].clone())
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: held.__setitem__(device.index, state.clone())
    )
    states = random_states(second)
    assert [state.tolist() for state in states["cuda"]] == [[2] * 16]
    restore_random_states(states, torch.device("cuda:0"))
    assert held[0].tolist() == [2] * 16
    earlier = {**states, "cuda": [torch.full((16,), 7, dtype=torch.uint8)] * 4}  # earlier versions saved every GPU
    restore_random_states(earlier, second)
    assert held[1].tolist() == [7] * 16
