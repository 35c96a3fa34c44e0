"""The GPU kernels compiled for chips that are not there: registers, spills, shared memory."""

from __future__ import annotations

import offline
import pytest

PRECISIONS = {75: ["float32", "fp16"], 80: ["float32"], 86: ["float32"], 89: ["float32"], 90: ["float32"]}


@pytest.mark.parametrize(("capability", "precision"), [(c, p) for c, each in PRECISIONS.items() for p in each])
def test_kernels_fit_the_chip_and_spill_next_to_nothing(capability: int, precision: str) -> None:
    table = {
        name: offline.compiled(kernel, capability, warps, constants)
        for name, kernel, warps, constants in offline.kernels_of(capability, precision)
    }
    print(f"\ncompute capability {capability / 10}, {precision}")  # noqa: T201  the table is what a person wants to see
    for name, figures in table.items():
        print(f"{name:26}", *(f"{value:7} {what}" for what, value in figures.items()))  # noqa: T201
    for name, figures in table.items():
        assert figures["spilled"] <= 64, f"{name} on {capability}: {figures}"
        assert figures["shared"] <= offline.SHARED[capability], f"{name} on {capability}: {figures}"
