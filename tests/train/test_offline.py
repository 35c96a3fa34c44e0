"""The GPU kernels compiled for chips that are not there: registers, spills, shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import offline
import pytest

PRECISIONS = {75: ["float32", "fp16"], 80: ["float32"], 86: ["float32"], 89: ["float32"], 90: ["float32"]}


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Two processes that compile."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        yield processes


@pytest.mark.parametrize(("capability", "precision"), [(c, p) for c, each in PRECISIONS.items() for p in each])
def test_kernels_fit_the_chip_and_spill_next_to_nothing(
    pool: ProcessPoolExecutor, capability: int, precision: str
) -> None:
    table = offline.table(pool, capability, precision)
    print(f"\ncompute capability {capability / 10}, {precision}")  # noqa: T201  the table is what a person wants to see
    for name, figures in table.items():
        print(f"{name:26}", *(f"{value:7} {what}" for what, value in figures.items()))  # noqa: T201
    for name, figures in table.items():
        assert figures["spilled"] <= 64, f"{name} on {capability}: {figures}"
        assert figures["shared"] <= offline.SHARED[capability], f"{name} on {capability}: {figures}"
