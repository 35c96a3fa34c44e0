"""Registers, spills and shared memory of the GPU kernels, compiled for GPUs that this machine lacks.

``make test-kernels`` compiles every kernel for every chip and precision. ``make test`` compiles every kernel once, and
for every chip and precision at least one kernel. The selection changes daily.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context

import offline
import pytest

from mbqueue.experiment import NEEDED_CAPABILITY
from mbqueue.train.kernels.tiles import TILES

KINDS = [
    (capability, precision)
    for capability in TILES
    for precision in ("float32", *NEEDED_CAPABILITY)
    if capability >= 10 * NEEDED_CAPABILITY.get(precision, 0)
]
ALL = os.environ.get("MBQUEUE_TEST_KERNELS") == "all"


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Two worker processes that compile kernels."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        yield processes


def chosen(capability: int, precision: str) -> list[int]:
    """Return the numbers of the kernels to compile: all if ``ALL`` is set, otherwise a share that changes daily."""
    numbers = list(range(len(offline.kernels_of(capability, precision))))
    if not ALL:
        seed = os.environ.get("MBQUEUE_TEST_SEED") or str(date.today())
        random.Random(seed).shuffle(numbers)
        numbers = numbers[KINDS.index((capability, precision)) :: len(KINDS)]
    return sorted(numbers)


def test_every_precision_that_a_chip_has_is_compiled_for_it() -> None:
    assert (75, "fp16") in KINDS
    assert (75, "bf16") not in KINDS
    assert len(KINDS) == 2 + 4 * 4


def test_every_kernel_and_every_kind_of_chip_has_its_share() -> None:
    shares = [chosen(*kind) for kind in KINDS]
    assert all(shares)
    assert {number for share in shares for number in share} == set(range(len(offline.kernels_of(89, "float32"))))


@pytest.mark.parametrize(("capability", "precision"), KINDS)
def test_kernels_fit_the_chip_and_spill_next_to_nothing(
    pool: ProcessPoolExecutor, capability: int, precision: str
) -> None:
    table = offline.table(pool, capability, precision, chosen(capability, precision))
    print(f"\ncompute capability {capability / 10}, {precision}")  # noqa: T201  the table is what a person wants to see
    for name, figures in table.items():
        print(f"{name:26}", *(f"{value:7} {what}" for what, value in figures.items()))  # noqa: T201
    for name, figures in table.items():
        assert figures["spilled"] <= 64, f"{name} on {capability}: {figures}"
        assert figures["shared"] <= offline.SHARED[capability], f"{name} on {capability}: {figures}"
