"""`benchmarks.gpu_model` predicts times on GPUs from counts of operations, bytes and launches."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType

import pytest
import torch

# CHGNet turns a tensor of volumes into a list of numbers, which torch ≥ 2.13 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(request.config.rootpath))
    return importlib.import_module("benchmarks.gpu_model")


def gpu(model: ModuleType, name: str) -> object:
    return next(gpu for gpu in model.GPUS if gpu.name == name)


def test_the_full_finetune_fits_one_session_on_an_l4_and_three_on_a_t4_at_half_of_their_peaks(
    model: ModuleType,
) -> None:
    l4, t4 = (model.prediction_of_fused(gpu(model, name), 0.5) for name in ("L4", "T4"))
    assert l4.hours <= 1 + 50 / 60
    assert t4.sessions <= 3


def test_hours_are_those_of_all_steps_and_forward_passes(model: ModuleType) -> None:
    found = model.predicted(step=0.064, forward=0.016, sizes=model.MATBENCH)
    trained = 5 * 20 * 132_752 * 0.8 * 0.95
    inferred = 5 * 20 * 132_752 * 0.8 * 0.05 + 132_752
    assert found.rate == pytest.approx(1000)
    assert found.hours == pytest.approx((trained * 1e-3 + inferred * 0.25e-3) / 3600)
    assert found.sessions == 2


def test_a_kernel_is_bound_by_bytes_or_by_operations_and_a_step_by_kernels_or_launches(model: ModuleType) -> None:
    card = model.Gpu("card", bandwidth=100, tflops=1, launch_us=10, l2=1)
    assert model.Work("copy", 1, 1e9, 0).seconds(card, 0.5) == pytest.approx(0.02)
    assert model.Work("product", 1, 1, 1e10).seconds(card, 0.5) == pytest.approx(0.02)
    assert model.step_seconds([model.Work("small", 5000, 1, 1)], card, 0.5) == pytest.approx(0.05)


def test_rows_are_read_again_only_where_the_cache_does_not_hold_their_table(model: ModuleType) -> None:
    assert model.gathered(1000, 100, 128, l2=1.0) == 100 * 128 * 4
    assert model.gathered(1000, 2000, 128, l2=4.0) == 1000 * 128 * 4
    assert model.gathered(4000, 2000, 128, l2=1.0) == 4000 * 128 * 4


def test_counting_separates_bytes_operations_and_launches_and_ignores_views(model: ModuleType) -> None:
    sizes = model.Sizes(2, 10, 400, 200, 50, 300)
    rows, weight = torch.ones(400, 64), torch.ones(64, 128)
    index = torch.zeros(400, dtype=torch.int32)
    with model.Counting(sizes, replace(sizes, directed=800)) as counting:
        (rows @ weight).view(-1, 2)
        rows[:10].clone()
        rows.index_select(0, index)
    found = {work.name: work for work in counting.found()}
    assert set(found) == {"mm", "clone", "index_select"}
    assert found["mm"].launches == 1
    assert found["mm"].flops == 2 * (2 * 400 * 64 * 128), "twice the directed bonds, twice the work"
    assert found["mm"].bytes == 2 * 4 * (400 * 64 + 64 * 128 + 400 * 128)
    assert found["clone"].bytes == 2 * 4 * 10 * 64, "too small to grow"
    assert found["index_select"].bytes == 2 * (2 * 4 * 400 * 64 + 4 * 400)


def test_counts_of_few_crystals_predict_counts_of_many(model: ModuleType) -> None:
    from_few, from_more = (model.counted_steps(None, n, model.MATBENCH) for n in (4, 16))
    for way in ("stock", "plain"):
        few, more = (sum(work.bytes for work in found[way]) for found in (from_few, from_more))
        assert few == pytest.approx(more, rel=0.15)
    plain = {work.name: work for work in from_few["plain"]}
    assert plain["segment_reduce"].launches > 10
    assert sum(work.launches for work in from_few["plain"]) < sum(work.launches for work in from_few["stock"])


def test_the_command_prints_every_gpu_in_every_way(model: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    model.main(["--crystals", "4", "--kernels", "--gpu", "mine,100,5,5,6"])
    said = capsys.readouterr().out
    assert said.startswith("Predicted, not measured")
    assert [said.count(f"| mine | {way} |") for way in ("stock", "plain", "fused")] == [1, 1, 1]
    assert "| bond messages, backward |" in said
