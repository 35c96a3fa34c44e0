"""Sum rows of other kernels' outputs on a GPU; each program computes one row of the result, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mbqueue.train.kernels.launching import launch, room
from mbqueue.train.kernels.tiles import ELEMENT_ROWS
from mbqueue.train.kernels.triton_gate import WIDTH


@triton.jit
def bonds_to_atoms_kernel(d_pre, reverse, offsets, d_atoms, ROWS: tl.constexpr):  # noqa: N803
    """For each atom, sum the rows of the bonds that start at the atom, and of the bonds that end at the atom."""
    atom = tl.program_id(0)
    begin, end = tl.load(offsets + atom), tl.load(offsets + atom + 1)
    column = tl.arange(0, 2 * WIDTH)[None, :]
    as_center = tl.zeros([ROWS, 2 * WIDTH], d_pre.dtype.element_ty)
    as_neighbor = tl.zeros([ROWS, 2 * WIDTH], d_pre.dtype.element_ty)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None]
        back = tl.load(reverse + row, mask=row < end, other=0)
        as_center += tl.load(d_pre + row[:, None] * (2 * WIDTH) + column, mask=mask, other=0.0)
        as_neighbor += tl.load(d_pre + back[:, None] * (2 * WIDTH) + column, mask=mask, other=0.0)
    at = d_atoms + atom * (4 * WIDTH) + tl.arange(0, 2 * WIDTH)
    tl.store(at, tl.sum(as_center, axis=0))
    tl.store(at + 2 * WIDTH, tl.sum(as_neighbor, axis=0))


@triton.jit
def angles_to_shorts_kernel(
    d_pre, products, bond_i, bond_j, offsets, by_j, by_j_offsets, weights,
    d_shorts, d_weights, weights_stride, d_weights_stride,
    HAS_WEIGHTS: tl.constexpr, ADDS: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Sum the rows of each short bond's angles, separately for angles in which the bond comes first and second.

    The kernel stores a short bond's two sums side by side, and also computes the gradient of the bond's weight.

    ``products`` [T, 64] contains each angle's message times the gradient of the sum at its first bond.
    """
    short = tl.program_id(0)
    column, wide = tl.arange(0, WIDTH)[None, :], tl.arange(0, 2 * WIDTH)[None, :]
    total = tl.zeros([ROWS, 2 * WIDTH], d_pre.dtype.element_ty)
    by_weight = tl.zeros([ROWS, WIDTH], d_pre.dtype.element_ty)
    begin, end = tl.load(offsets + short), tl.load(offsets + short + 1)
    for start in range(begin, end, ROWS):
        angle = start + tl.arange(0, ROWS)
        mask = angle < end
        total += tl.load(d_pre + angle[:, None] * (2 * WIDTH) + wide, mask=mask[:, None], other=0.0)
        if HAS_WEIGHTS:
            other = tl.load(bond_j + angle, mask=mask, other=0)
            share = tl.load(products + angle[:, None] * WIDTH + column, mask=mask[:, None], other=0.0)
            by_weight += share * tl.load(
                weights + other[:, None] * weights_stride + column, mask=mask[:, None], other=0.0
            )
    at = d_shorts + short * (4 * WIDTH) + tl.arange(0, 2 * WIDTH)
    tl.store(at, tl.sum(total, axis=0))

    total = tl.zeros([ROWS, 2 * WIDTH], d_pre.dtype.element_ty)
    begin, end = tl.load(by_j_offsets + short), tl.load(by_j_offsets + short + 1)
    for start in range(begin, end, ROWS):
        mask = start + tl.arange(0, ROWS) < end
        angle = tl.load(by_j + start + tl.arange(0, ROWS), mask=mask, other=0)
        total += tl.load(d_pre + angle[:, None] * (2 * WIDTH) + wide, mask=mask[:, None], other=0.0)
        if HAS_WEIGHTS:
            other = tl.load(bond_i + angle, mask=mask, other=0)
            share = tl.load(products + angle[:, None] * WIDTH + column, mask=mask[:, None], other=0.0)
            by_weight += share * tl.load(
                weights + other[:, None] * weights_stride + column, mask=mask[:, None], other=0.0
            )
    tl.store(at + 2 * WIDTH, tl.sum(total, axis=0))
    if HAS_WEIGHTS:
        at = d_weights + short * d_weights_stride + tl.arange(0, WIDTH)
        found = tl.sum(by_weight, axis=0)
        if ADDS:
            found += tl.load(at)
        tl.store(at, found)


@triton.jit
def angles_to_atoms_kernel(d_pre, order, offsets, d_atoms, ROWS: tl.constexpr):  # noqa: N803
    """Sum the rows of the angles around each atom."""
    atom = tl.program_id(0)
    begin, end = tl.load(offsets + atom), tl.load(offsets + atom + 1)
    column = tl.arange(0, 2 * WIDTH)
    total = tl.zeros([ROWS, 2 * WIDTH], d_pre.dtype.element_ty)
    for start in range(begin, end, ROWS):
        mask = start + tl.arange(0, ROWS) < end
        angle = tl.load(order + start + tl.arange(0, ROWS), mask=mask, other=0)
        total += tl.load(d_pre + angle[:, None] * (2 * WIDTH) + column[None, :], mask=mask[:, None], other=0.0)
    tl.store(d_atoms + atom * (2 * WIDTH) + column, tl.sum(total, axis=0))


@triton.jit
def sum_by_number(x, order, offsets, out, ROWS: tl.constexpr):  # noqa: N803
    """Sum the rows of ``x``, [A, 64], over the atoms of each element, and return [94, 64]."""
    number = tl.program_id(0)
    column = tl.arange(0, 64)
    begin, end = tl.load(offsets + number), tl.load(offsets + number + 1)
    total = tl.zeros([64], out.dtype.element_ty)
    for start in range(begin, end, ROWS):
        position = start + tl.arange(0, ROWS)
        mask = position < end
        row = tl.load(order + position, mask=mask, other=0)
        total += tl.sum(tl.load(x + row[:, None] * 64 + column[None, :], mask=mask[:, None], other=0.0), axis=0)
    tl.store(out + number * 64 + column, total)


def by_number(x: Tensor, order: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    """Sum the rows of ``x``, [A, 64], over the atoms of each element, and return [94, 64].

    Args:
        x: one row for each atom.
        order: atoms sorted by atomic number, int32 [A].
        offsets: first position in ``order`` of each atomic number from 1, int32 [95].
        out: where to write the sums; None to allocate memory.
    """
    out = room(x, len(offsets) - 1, 64) if out is None else out
    launch(sum_by_number, len(out), x, order, offsets, out, warps=1, ROWS=ELEMENT_ROWS)
    return out
