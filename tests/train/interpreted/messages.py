"""The Triton kernels of messages give plain torch's values and gradients, and equal bytes in each run.

`test_interpreted` runs this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from graph_making import graph_of
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import backwards, quicken
from torch import Tensor

from benchmarks.triton_messages import TritonMessages
from mbqueue.data.batch import Batch
from mbqueue.data.batches import make_batch
from mbqueue.data.datasets import load
from mbqueue.data.graph_cache import GraphCache
from mbqueue.train.gated import Gate, PlainMessages
from mbqueue.train.kernels.tiles import TILES, Tiles

EXACT = {torch.float64: 1e-13, torch.float32: 3e-6}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield


class Inputs:
    """Random inputs of all three functions, about as large as in trained models."""

    def __init__(self, batch: Batch, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = scale * torch.randn(*shape, dtype=torch.float64, generator=generator)
            return drawn.to(dtype).requires_grad_()

        atoms, shorts = len(batch.atomic_numbers), len(batch.short_bond)
        self.atoms, self.bonds = draw(atoms, 256), draw(len(batch.bond_length), 128)
        self.weights, self.short_weights = draw(len(batch.bond_length), 64), draw(shorts, 64)
        self.shorts, self.angles, self.first = draw(shorts, 256), draw(len(batch.angle), 64), draw(128, 64, scale=0.2)
        self.gates = [
            Gate(draw(128, 64, scale=0.2), draw(128), draw(128), draw(128), None),
            Gate(draw(128, 64, scale=0.2), draw(128), draw(128), draw(128), None),
            Gate(None, None, draw(128), draw(128), None),
        ]

    def tensors(self) -> dict[str, Tensor]:
        found = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        for number, gate in enumerate(self.gates):
            found |= {f"gates[{number}].{n}": v for n, v in vars(gate).items() if isinstance(v, Tensor)}
        return found


def outcome(messages: PlainMessages, inputs: Inputs, factor: float = 1.0) -> dict[str, Tensor]:
    """Return the values of all three functions, and the gradients of ``factor`` times the sum of their squares."""
    one, two, three = inputs.gates
    outs = {
        "of_bonds": messages.of_bonds(inputs.atoms, inputs.bonds, inputs.weights, one),
        "of_angles": messages.of_angles(
            inputs.atoms[:, :128], inputs.shorts, inputs.angles, inputs.first, inputs.short_weights, two
        ),
        "updated_angles": messages.updated_angles(
            inputs.atoms[:, 128:], inputs.shorts, inputs.angles, inputs.first, three
        ),
    }
    tensors = inputs.tensors()
    found = torch.autograd.grad(sum(factor * (out**2).sum() for out in outs.values()), list(tensors.values()))
    return {name: out.detach() for name, out in outs.items()} | dict(zip(tensors, found, strict=True))


def assert_same(batch: Batch, dtype: torch.dtype, tiles: Tiles | None = None, seed: int = 0) -> None:
    plain = outcome(PlainMessages(batch), Inputs(batch, torch.float64, seed))
    fused = outcome(TritonMessages(batch, tiles, "float32"), Inputs(batch, dtype, seed))
    assert plain.keys() == fused.keys()
    for name, expected in plain.items():
        if expected.numel():
            error = float((fused[name].double() - expected).norm() / expected.norm().clamp_min(1e-12))
            assert error < EXACT[dtype], f"{name}: {error}"


crystals = st.tuples(st.integers(1, 6), st.integers(0, 24), st.integers(0, 6)).map(
    lambda c: (c[0], c[1], min(c[1], c[2]))
)


@settings(max_examples=2, deadline=None)
@given(sizes=st.lists(crystals, min_size=1, max_size=3), dtype=st.sampled_from(list(EXACT)), seed=st.integers(0, 99))
def test_values_and_gradients_are_those_of_plain_torch_on_any_graph(
    sizes: list[tuple[int, int, int]], dtype: torch.dtype, seed: int
) -> None:
    assert_same(graph_of(sizes, seed), dtype, seed=seed)


#: Name of a batch → for each crystal, how many atoms, undirected bonds and short bonds it has.
SHAPES = {
    "no angles": [(3, 8, 0), (2, 5, 0)],
    "cells of one atom": [(1, 6, 3), (1, 1, 1)],
    "no bonds at all": [(2, 0, 0)],
    "atoms and short bonds without any segment": [(6, 4, 3), (4, 0, 0), (2, 3, 1)],
}


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_plain_torch_on_odd_graphs(shape: str, dtype: torch.dtype) -> None:
    batch = graph_of(SHAPES[shape], seed=7, angles_per_bond=12)
    bonds, angles = batch.ordered().bond_offsets.diff(), batch.ordered().angle_offsets.diff()
    assert (len(batch.angle) == 0) == (shape in ("no angles", "no bonds at all"))
    if shape.startswith("atoms"):
        assert int(bonds.min()) == 0
        assert int(angles.min()) == 0
    assert_same(batch, dtype)


@pytest.mark.parametrize(
    ("tiles", "dtype"), list(zip(sorted(set(TILES.values()), key=str), EXACT, strict=True)), ids=str
)
def test_every_tile_size_of_the_table_and_segments_longer_than_a_tile(tiles: Tiles, dtype: torch.dtype) -> None:
    batch = graph_of([(1, 34, 6), (3, 6, 0), (2, 0, 0)], seed=1, angles_per_bond=20)
    assert int(batch.ordered().bond_offsets.diff().max()) > 2 * tiles.bond_rows
    assert int(batch.ordered().angle_offsets.diff().max()) > tiles.angle_rows
    assert_same(batch, dtype, tiles)


def test_a_crystal_of_70_atoms_beside_one_of_1() -> None:
    assert_same(graph_of([(70, 30, 5), (1, 3, 1)], seed=2), torch.float32)


def test_a_real_crystal_of_the_sample(tmp_path: Any) -> None:
    data = load("sample", limit=40, seed=5).crystals
    cache = GraphCache.build(data, tmp_path / "graphs", workers=1)
    assert cache is not None
    cost = cache.index[:, 1] + 2 * cache.index[:, 4] + 10**9 * (cache.index[:, 4] == 0)
    assert_same(make_batch(cache, [int(np.argmin(cost))]), torch.float32)


def test_the_order_of_programs_changes_no_byte() -> None:
    batch = graph_of([(5, 20, 6), (2, 3, 2)], seed=3)
    forwards = outcome(TritonMessages(batch, precision="float32"), Inputs(batch, torch.float32))
    with backwards():
        again = outcome(TritonMessages(batch, precision="float32"), Inputs(batch, torch.float32))
    assert all(torch.equal(forwards[name], again[name]) for name in forwards)


def test_more_tiles_than_partial_sums_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbqueue.train.triton_plan.PARTIALS", 2)
    batch, tiles = graph_of([(1, 20, 5)], seed=4, angles_per_bond=10), TILES[min(TILES)]
    assert len(batch.bond_center) > 2 * tiles.bond_sum_rows
    assert len(batch.angle) > 2 * tiles.angle_sum_rows
    assert_same(batch, torch.float64, tiles)


def test_rows_of_short_bonds_can_come_from_elsewhere_and_gradients_can_be_added_to() -> None:
    from mbqueue.train.kernels.triton_bonds import bonds_backward, bonds_forward

    batch = graph_of([(4, 30, 7)], seed=5)
    inputs, plan = Inputs(batch, torch.float64), TritonMessages(batch, precision="float32").plan
    gate = inputs.gates[0]
    atoms, bonds, weights = (t.detach() for t in (inputs.atoms, inputs.bonds, inputs.weights))
    shorts = inputs.shorts.detach()[:, :128]  # a view whose rows are not adjacent in memory
    short = batch.short_bond.long()
    mixed = bonds.index_copy(0, short, shorts)
    d_total = torch.ones(4, 64, dtype=torch.float64)
    assert torch.equal(
        bonds_forward(plan, atoms, bonds, weights, gate, shorts), bonds_forward(plan, atoms, mixed, weights, gate)
    )
    plain = bonds_backward(plan, atoms, mixed, weights, gate, d_total)
    before = torch.ones_like(weights)
    found = bonds_backward(plan, atoms, bonds, weights, gate, d_total, shorts, before)
    assert found.weights is before
    assert torch.equal(before, plain.weights + 1)
    assert found.shorts is not None
    assert torch.equal(found.shorts, plain.bonds[short])
    assert torch.equal(found.bonds, plain.bonds.index_fill(0, short, 0.0))
    assert torch.equal(found.atoms, plain.atoms)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_rougher_products_stay_close_even_where_gradients_are_tiny(precision: str) -> None:
    batch = graph_of([(4, 30, 7)], seed=6)
    exact = outcome(PlainMessages(batch), Inputs(batch, torch.float64), factor=1e-9)
    rough = outcome(TritonMessages(batch, precision=precision), Inputs(batch, torch.float32), factor=1e-9)
    for name, expected in exact.items():
        error = float((rough[name].double() - expected).norm() / expected.norm())
        assert error < {"bf16": 2e-2, "fp16": 2e-3, "tf32": 2e-3}[precision], f"{name}: {error}"
