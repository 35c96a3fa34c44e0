"""GPU kernels for messages from bonds to atoms, and for their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mbqueue.train.kernels.launching import launch, room
from mbqueue.train.kernels.tiles import SUM_ROWS
from mbqueue.train.kernels.triton_gate import (
    MATRICES,
    WIDTH,
    by_segment,
    gated,
    gated_back,
    gradient_times,
    outer,
    second_layer,
    sigmoid,
    silu_slope,
    store_matrices,
    store_vectors,
    through_norm,
)
from mbqueue.train.kernels.triton_sums import bonds_to_atoms_kernel

if TYPE_CHECKING:
    from mbqueue.train.gated import Gate
    from mbqueue.train.triton_plan import Plan

#: Number of columns in the partial sums: gradients of the second weight matrix, the bias, the scale and the shift.
COLUMNS = 128 * 64 + 3 * 128


class BondGradients(NamedTuple):
    """Gradients of ``bonds_forward``; the gate's gradients are partial sums, [P, second ‖ bias ‖ scale ‖ shift]."""

    atoms: Tensor
    bonds: Tensor
    weights: Tensor
    shorts: Tensor | None
    partials: Tensor


@triton.jit
def _first_layer(
    here, there, bond, valid, atoms, bonds, shorts, short_offsets,
    atoms_stride, bonds_stride, shorts_stride, half, HAS_SHORTS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Apply the first layer's core (``half`` 0) or gate (``half`` 1) to a tile of bonds."""
    column = (tl.arange(0, WIDTH) + half * WIDTH)[None, :]
    mask = valid[:, None]
    pre = tl.load(atoms + here[:, None] * atoms_stride + column, mask=mask, other=0.0)
    pre += tl.load(atoms + there[:, None] * atoms_stride + 2 * WIDTH + column, mask=mask, other=0.0)
    if HAS_SHORTS:
        short = tl.load(short_offsets + bond, mask=valid, other=0)
        is_short = tl.load(short_offsets + bond + 1, mask=valid, other=0) > short
        pre += tl.load(bonds + bond[:, None] * bonds_stride + column, mask=mask & (is_short == 0)[:, None], other=0.0)
        pre += tl.load(shorts + short[:, None] * shorts_stride + column, mask=is_short[:, None], other=0.0)
    else:
        pre += tl.load(bonds + bond[:, None] * bonds_stride + column, mask=mask, other=0.0)
    return pre


@triton.jit(do_not_specialize=["n_atoms"])
def bonds_forward_kernel(
    center, neighbor, undirected, offsets, short_offsets,
    atoms, bonds, shorts, weights, second, bias, scale, shift, out,
    n_atoms, atoms_stride, bonds_stride, shorts_stride, weights_stride,
    HAS_SHORTS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, ATOMS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Sum the messages to each atom; each program handles ``ATOMS`` consecutive atoms."""
    first = tl.program_id(0) * ATOMS
    begin = tl.load(offsets + first)
    end = tl.load(offsets + tl.minimum(first + ATOMS, n_atoms))
    column = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([16, WIDTH], out.dtype.element_ty)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < end
        here = tl.load(center + row, mask=valid, other=0)
        there = tl.load(neighbor + row, mask=valid, other=0)
        bond = tl.load(undirected + row, mask=valid, other=0)
        core = _first_layer(
            here, there, bond, valid, atoms, bonds, shorts, short_offsets,
            atoms_stride, bonds_stride, shorts_stride, 0, HAS_SHORTS,
        )  # fmt: skip
        core = second_layer(core, second, bias, 0, PRECISION, IS_BACKWARD=False)
        gate = _first_layer(
            here, there, bond, valid, atoms, bonds, shorts, short_offsets,
            atoms_stride, bonds_stride, shorts_stride, 1, HAS_SHORTS,
        )  # fmt: skip
        gate = second_layer(gate, second, bias, 1, PRECISION, IS_BACKWARD=False)
        weight = tl.load(weights + bond[:, None] * weights_stride + column, mask=valid[:, None], other=0.0)
        total += by_segment(here - first, gated(core, gate, scale, shift) * weight, 16)
    atom = tl.arange(0, 16)
    mask = (atom < ATOMS) & (first + atom < n_atoms)
    tl.store(out + (first + atom)[:, None] * WIDTH + column, total, mask=mask[:, None])


@triton.jit(do_not_specialize=["n_bonds", "tiles"])
def bonds_backward_kernel(  # noqa: PLR0915  one pass over the data
    center, neighbor, reverse, bond_first, short_offsets,
    atoms, bonds, shorts, weights, second, bias, scale, shift,
    d_out, d_pre, d_bonds, d_shorts, d_weights, partials,
    n_bonds, tiles, atoms_stride, bonds_stride, shorts_stride, weights_stride, d_weights_stride,
    HAS_SHORTS: tl.constexpr, ADDS: tl.constexpr, OF_INPUTS: tl.constexpr, PRECISION: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Compute gradients of the messages; each program processes ``tiles`` tiles.

    The two directions of an undirected bond are adjacent rows of a tile. The first launch computes the gradients of the
    inputs (``OF_INPUTS``), and the second launch computes the gradients of the gate's parameters. A multiprocessor's
    registers cannot hold all gradients at once, so the second launch recomputes all intermediate values.
    """
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)[None, :]
    row = tl.arange(0, ROWS)
    dtype = partials.dtype.element_ty
    d_second_core, d_second_gate = tl.zeros([WIDTH, WIDTH], dtype), tl.zeros([WIDTH, WIDTH], dtype)
    d_bias_core, d_bias_gate = tl.zeros([WIDTH], dtype), tl.zeros([WIDTH], dtype)
    d_scale_core, d_scale_gate = tl.zeros([WIDTH], dtype), tl.zeros([WIDTH], dtype)
    d_shift_core, d_shift_gate = tl.zeros([WIDTH], dtype), tl.zeros([WIDTH], dtype)
    for tile in range(program * tiles, (program + 1) * tiles):
        bond = tile * (ROWS // 2) + row // 2
        valid = bond < n_bonds
        mask = valid[:, None]
        directed = tl.load(bond_first + bond, mask=valid, other=0)
        directed = tl.where(row % 2 == 0, directed, tl.load(reverse + directed, mask=valid, other=0))
        here = tl.load(center + directed, mask=valid, other=0)
        there = tl.load(neighbor + directed, mask=valid, other=0)
        core_pre = _first_layer(
            here, there, bond, valid, atoms, bonds, shorts, short_offsets,
            atoms_stride, bonds_stride, shorts_stride, 0, HAS_SHORTS,
        )  # fmt: skip
        gate_pre = _first_layer(
            here, there, bond, valid, atoms, bonds, shorts, short_offsets,
            atoms_stride, bonds_stride, shorts_stride, 1, HAS_SHORTS,
        )  # fmt: skip
        core = second_layer(core_pre, second, bias, 0, PRECISION)
        gate = second_layer(gate_pre, second, bias, 1, PRECISION)
        d = tl.load(d_out + here[:, None] * WIDTH + column, mask=mask, other=0.0)
        weight = tl.load(weights + bond[:, None] * weights_stride + column, mask=mask, other=0.0)
        message, d_core, d_gate, core, gate, core_inverse, gate_inverse = gated_back(core, gate, scale, shift)
        d_core, d_gate = d_core * (d * weight), d_gate * (d * weight)
        core_slope, gate_slope = sigmoid(core_pre), sigmoid(gate_pre)
        if OF_INPUTS:
            d_core = through_norm(d_core, core, core_inverse, scale, 0)
            d_gate = through_norm(d_gate, gate, gate_inverse, scale, 1)
            d_core = gradient_times(d_core, second, WIDTH, 1, PRECISION) * silu_slope(core_pre, core_slope)
            d_gate = gradient_times(d_gate, second + WIDTH * WIDTH, WIDTH, 1, PRECISION)
            d_gate = d_gate * silu_slope(gate_pre, gate_slope)
            at = d_pre + directed[:, None] * (2 * WIDTH) + column
            tl.store(at, d_core, mask=mask)
            tl.store(at + WIDTH, d_gate, mask=mask)
            _store_sums_of_two(
                tile, d * message, d_core, d_gate, d_bonds, d_shorts, d_weights, short_offsets, n_bonds,
                d_weights_stride, HAS_SHORTS, ADDS, ROWS,
            )  # fmt: skip
        else:
            d_scale_core += tl.sum(d_core * core, axis=0)
            d_shift_core += tl.sum(d_core, axis=0)
            d_core = through_norm(d_core, core, core_inverse, scale, 0)
            d_bias_core += tl.sum(d_core, axis=0)
            d_scale_gate += tl.sum(d_gate * gate, axis=0)
            d_shift_gate += tl.sum(d_gate, axis=0)
            d_gate = through_norm(d_gate, gate, gate_inverse, scale, 1)
            d_bias_gate += tl.sum(d_gate, axis=0)
            if n_bonds > 0:  # always true; this `if` gives `outer` a separate block
                d_second_core += outer(d_core, core_pre * core_slope, PRECISION)
                d_second_gate += outer(d_gate, gate_pre * gate_slope, PRECISION)
    if not OF_INPUTS:
        at = partials + program * (MATRICES + 6 * WIDTH)
        store_matrices(at, d_second_core, d_second_gate)
        at += MATRICES
        store_vectors(at, d_bias_core, d_bias_gate)
        store_vectors(at + 2 * WIDTH, d_scale_core, d_scale_gate)
        store_vectors(at + 4 * WIDTH, d_shift_core, d_shift_gate)


@triton.jit
def _store_sums_of_two(
    tile, by_weight, d_core, d_gate, d_bonds, d_shorts, d_weights, short_offsets, n_bonds, d_weights_stride,
    HAS_SHORTS: tl.constexpr, ADDS: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Sum gradients over the two directions of each undirected bond in a tile, and store the sums."""
    column = tl.arange(0, WIDTH)[None, :]
    bond = tile * (ROWS // 2) + tl.arange(0, ROWS // 2)
    mask = (bond < n_bonds)[:, None]
    by_weight = tl.sum(tl.reshape(by_weight, [ROWS // 2, 2, WIDTH]), axis=1)
    d_core = tl.sum(tl.reshape(d_core, [ROWS // 2, 2, WIDTH]), axis=1)
    d_gate = tl.sum(tl.reshape(d_gate, [ROWS // 2, 2, WIDTH]), axis=1)
    at = d_weights + bond[:, None] * d_weights_stride + column
    if ADDS:
        by_weight += tl.load(at, mask=mask, other=0.0)
    tl.store(at, by_weight, mask=mask)
    if HAS_SHORTS:
        short = tl.load(short_offsets + bond, mask=bond < n_bonds, other=0)
        is_short = (tl.load(short_offsets + bond + 1, mask=bond < n_bonds, other=0) > short)[:, None]
        at = d_shorts + short[:, None] * (2 * WIDTH) + column
        tl.store(at, d_core, mask=is_short)
        tl.store(at + WIDTH, d_gate, mask=is_short)
        d_core = tl.where(is_short, 0.0, d_core)
        d_gate = tl.where(is_short, 0.0, d_gate)
    at = d_bonds + bond[:, None] * (2 * WIDTH) + column
    tl.store(at, d_core, mask=mask)
    tl.store(at + WIDTH, d_gate, mask=mask)


def bonds_forward(
    plan: Plan, atoms: Tensor, bonds: Tensor, weights: Tensor, gate: Gate, shorts: Tensor | None = None
) -> Tensor:
    """Sum each atom's messages from its bonds, [A, 64]; see `PlainMessages.of_bonds`.

    Args:
        atoms: [A, 256]; ``atoms``, ``bonds`` and ``weights`` may have any stride between rows.
        bonds: [U, 128].
        weights: [U, 64].
        gate: the layers after the first.
        shorts: contributions of the short bonds, [S, 128], which replace their rows in ``bonds``.
    """
    batch, tiles = plan.batch, plan.tiles
    out = room(atoms, len(batch.atomic_numbers), 64)
    launch(
        bonds_forward_kernel, -(-len(out) // tiles.bond_atoms),
        batch.bond_center, batch.bond_neighbor, batch.bond_undirected, batch.bond_offsets, batch.short_offsets,
        atoms, bonds, bonds if shorts is None else shorts, weights, gate.second, gate.bias, gate.scale, gate.shift, out,
        len(out), atoms.stride(0), bonds.stride(0), 0 if shorts is None else shorts.stride(0), weights.stride(0),
        warps=tiles.bond_warps, HAS_SHORTS=shorts is not None, PRECISION=plan.precision, ROWS=tiles.bond_rows,
        ATOMS=tiles.bond_atoms,
    )  # fmt: skip
    return out


def bonds_backward(
    plan: Plan, atoms: Tensor, bonds: Tensor, weights: Tensor, gate: Gate, d_total: Tensor,
    shorts: Tensor | None = None, d_weights: Tensor | None = None,
) -> BondGradients:  # fmt: skip
    """Compute the gradients of ``bonds_forward``.

    Args:
        plan, atoms, bonds, weights, gate: as in ``bonds_forward``.
        d_total: gradient of the sums, contiguous [A, 64].
        shorts: as in ``bonds_forward``. With ``shorts``, the gradient of ``bonds`` is 0 in the rows of short bonds.
        d_weights: array to which the gradient of ``weights`` is added, [U, 64], with any stride between rows; by
            default a new one.
    """
    batch, tiles = plan.batch, plan.tiles
    n_atoms, n_bonds = len(batch.atomic_numbers), len(batch.bond_length)
    d_pre, d_bonds = room(atoms, 2 * n_bonds, 128), room(atoms, n_bonds, 128)
    d_shorts = None if shorts is None else room(atoms, len(batch.short_bond), 128)
    by_weights = room(atoms, n_bonds, 64) if d_weights is None else d_weights
    partials = room(atoms, plan.shares(2 * n_bonds, tiles.bond_sum_rows)[0], COLUMNS)
    for of_inputs, rows, warps in (
        (True, tiles.bond_back_rows, tiles.bond_back_warps),
        (False, tiles.bond_sum_rows, tiles.bond_sum_warps),
    ):
        programs, per_program = plan.shares(2 * n_bonds, rows)
        launch(
            bonds_backward_kernel, programs,
            batch.bond_center, batch.bond_neighbor, batch.bond_reverse, batch.bond_first, batch.short_offsets,
            atoms, bonds, bonds if shorts is None else shorts, weights, gate.second, gate.bias, gate.scale, gate.shift,
            d_total, d_pre, d_bonds, d_bonds if d_shorts is None else d_shorts, by_weights, partials,
            n_bonds, per_program, atoms.stride(0), bonds.stride(0), 0 if shorts is None else shorts.stride(0),
            weights.stride(0), by_weights.stride(0),
            warps=warps, HAS_SHORTS=shorts is not None, ADDS=d_weights is not None, OF_INPUTS=of_inputs,
            PRECISION=plan.precision, ROWS=rows,
        )  # fmt: skip
    d_atoms = room(atoms, n_atoms, 256)
    launch(
        bonds_to_atoms_kernel, n_atoms, d_pre, batch.bond_reverse, batch.bond_offsets, d_atoms, warps=4, ROWS=SUM_ROWS
    )
    return BondGradients(d_atoms, d_bonds, by_weights, d_shorts, partials)
