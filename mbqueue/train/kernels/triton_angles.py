"""GPU kernels for messages from angles to bonds, for the angle update, and for their gradients."""

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
    times,
)
from mbqueue.train.kernels.triton_sums import angles_to_atoms_kernel, angles_to_shorts_kernel

if TYPE_CHECKING:
    from mbqueue.train.gated import Gate
    from mbqueue.train.triton_plan import Plan

#: Number of columns in the partial sums of a message layer: gradients of the first and second weight matrices, the
#: bias, the scale and the shift.
COLUMNS = 2 * 128 * 64 + 3 * 128
#: Number of columns in the partial sums of an angle update: gradients of the weight matrix, the scale and the shift.
UPDATE_COLUMNS = 128 * 64 + 2 * 128


class AngleGradients(NamedTuple):
    """Gradients of ``angles_forward`` or ``update_forward``; parameter gradients are partial sums, [P, columns]."""

    atoms: Tensor
    shorts: Tensor
    angles: Tensor
    weights: Tensor | None
    partials: Tensor


@triton.jit
def _first_layer(
    features, here, first_bond, second_bond, valid, atoms, shorts, first, atoms_stride, shorts_stride, half,
    PRECISION: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Apply the first layer's core (``half`` 0) or gate (``half`` 1) to a tile of angles."""
    column = (tl.arange(0, WIDTH) + half * WIDTH)[None, :]
    mask = valid[:, None]
    pre = times(features, first + half * (WIDTH * WIDTH), 1, WIDTH, PRECISION)
    pre += tl.load(atoms + here[:, None] * atoms_stride + column, mask=mask, other=0.0)
    pre += tl.load(shorts + first_bond[:, None] * shorts_stride + column, mask=mask, other=0.0)
    pre += tl.load(shorts + second_bond[:, None] * shorts_stride + 2 * WIDTH + column, mask=mask, other=0.0)
    return pre


@triton.jit
def _away(number, RESIDENT: tl.constexpr):  # noqa: N803
    """Return zero: a compile-time constant if RESIDENT, otherwise a value that is computed at run time.

    A matrix stays in shared memory between tiles only if its offset is constant.
    """
    if RESIDENT:
        return 0
    return tl.minimum(number, 0) * WIDTH


@triton.jit(do_not_specialize=["n_shorts"])
def angles_forward_kernel(
    center, bond_i, bond_j, offsets, atoms, shorts, angles, first, weights, second, bias, scale, shift, out,
    n_shorts, atoms_stride, shorts_stride, weights_stride,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, SHORTS: tl.constexpr, RESIDENT: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Sum the messages to each short bond; each program handles ``SHORTS`` consecutive short bonds."""
    begin_short = tl.program_id(0) * SHORTS
    begin = tl.load(offsets + begin_short)
    end = tl.load(offsets + tl.minimum(begin_short + SHORTS, n_shorts))
    column = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([16, WIDTH], out.dtype.element_ty)
    for start in range(begin, end, ROWS):
        away = _away(start, RESIDENT)
        row = start + tl.arange(0, ROWS)
        valid = row < end
        mask = valid[:, None]
        here = tl.load(center + row, mask=valid, other=0)
        one = tl.load(bond_i + row, mask=valid, other=0)
        other = tl.load(bond_j + row, mask=valid, other=0)
        features = tl.load(angles + row[:, None] * WIDTH + column, mask=mask, other=0.0)
        core = _first_layer(
            features, here, one, other, valid, atoms, shorts, first + away, atoms_stride, shorts_stride, 0, PRECISION
        )
        core = second_layer(core, second, bias, 0, PRECISION, IS_BACKWARD=False)
        gate = _first_layer(
            features, here, one, other, valid, atoms, shorts, first, atoms_stride, shorts_stride, 1, PRECISION
        )
        gate = second_layer(gate, second + away, bias, 1, PRECISION, IS_BACKWARD=False)
        weight = tl.load(weights + one[:, None] * weights_stride + column, mask=mask, other=0.0)
        weight *= tl.load(weights + other[:, None] * weights_stride + column, mask=mask, other=0.0)
        total += by_segment(one - begin_short, gated(core, gate, scale, shift) * weight, 16)
    short = tl.arange(0, 16)
    mask = (short < SHORTS) & (begin_short + short < n_shorts)
    tl.store(out + (begin_short + short)[:, None] * WIDTH + column, total, mask=mask[:, None])


@triton.jit(do_not_specialize=["n_angles"])
def update_forward_kernel(
    center, bond_i, bond_j, atoms, shorts, angles, first, scale, shift, out, n_angles, atoms_stride, shorts_stride,
    PRECISION: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Add a gated layer's output to the features of a tile of angles."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    valid = row < n_angles
    mask = valid[:, None]
    here = tl.load(center + row, mask=valid, other=0)
    one = tl.load(bond_i + row, mask=valid, other=0)
    other = tl.load(bond_j + row, mask=valid, other=0)
    features = tl.load(angles + row[:, None] * WIDTH + column, mask=mask, other=0.0)
    core = _first_layer(
        features, here, one, other, valid, atoms, shorts, first, atoms_stride, shorts_stride, 0, PRECISION
    )
    gate = _first_layer(
        features, here, one, other, valid, atoms, shorts, first, atoms_stride, shorts_stride, 1, PRECISION
    )
    tl.store(out + row[:, None] * WIDTH + column, features + gated(core, gate, scale, shift), mask=mask)


@triton.jit(do_not_specialize=["n_angles", "tiles"])
def angles_backward_kernel(  # noqa: PLR0912, PLR0915  one pass over the data
    center, bond_i, bond_j, atoms, shorts, angles, first, weights, second, bias, scale, shift,
    d_out, d_pre, products, d_angles, partials,
    n_angles, tiles, atoms_stride, shorts_stride, weights_stride,
    IS_UPDATE: tl.constexpr, ADDS: tl.constexpr, OF_INPUTS: tl.constexpr, PRECISION: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RESIDENT: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Compute gradients of the messages or of the angle update; each program processes ``tiles`` tiles of angles.

    As with bonds, the first launch computes the gradients of the inputs (``OF_INPUTS``), and the second launch computes
    the gradients of the gate's parameters. A separate kernel computes the gradient of the first layer's matrix. The
    angle update has only one layer, so the first launch also computes the gradients of the norms.
    """
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)[None, :]
    dtype = partials.dtype.element_ty
    d_second_core, d_second_gate = tl.zeros([WIDTH, WIDTH], dtype), tl.zeros([WIDTH, WIDTH], dtype)
    d_bias_core, d_bias_gate = tl.zeros([WIDTH], dtype), tl.zeros([WIDTH], dtype)
    d_scale_core, d_scale_gate = tl.zeros([WIDTH], dtype), tl.zeros([WIDTH], dtype)
    d_shift_core, d_shift_gate = tl.zeros([WIDTH], dtype), tl.zeros([WIDTH], dtype)
    for tile in range(program * tiles, (program + 1) * tiles):
        away = _away(tile, RESIDENT)
        row = tile * ROWS + tl.arange(0, ROWS)
        valid = row < n_angles
        mask = valid[:, None]
        here = tl.load(center + row, mask=valid, other=0)
        one = tl.load(bond_i + row, mask=valid, other=0)
        other = tl.load(bond_j + row, mask=valid, other=0)
        features = tl.load(angles + row[:, None] * WIDTH + column, mask=mask, other=0.0)
        core_pre = _first_layer(
            features, here, one, other, valid, atoms, shorts, first, atoms_stride, shorts_stride, 0, PRECISION
        )
        gate_pre = _first_layer(
            features, here, one, other, valid, atoms, shorts, first, atoms_stride, shorts_stride, 1, PRECISION
        )
        if IS_UPDATE:
            d = tl.load(d_out + row[:, None] * WIDTH + column, mask=mask, other=0.0)
            message, d_core, d_gate, core, gate, core_inverse, gate_inverse = gated_back(
                core_pre, gate_pre, scale, shift
            )
        else:
            core = second_layer(core_pre, second + away, bias, 0, PRECISION)
            gate = second_layer(gate_pre, second + away, bias, 1, PRECISION)
            d = tl.load(d_out + one[:, None] * WIDTH + column, mask=mask, other=0.0)
            message, d_core, d_gate, core, gate, core_inverse, gate_inverse = gated_back(core, gate, scale, shift)
            if OF_INPUTS:
                tl.store(products + row[:, None] * WIDTH + column, d * message, mask=mask)
            d *= tl.load(weights + one[:, None] * weights_stride + column, mask=mask, other=0.0)
            d *= tl.load(weights + other[:, None] * weights_stride + column, mask=mask, other=0.0)
        d_core *= d
        d_gate *= d
        if IS_UPDATE or not OF_INPUTS:
            d_scale_core += tl.sum(d_core * core, axis=0)
            d_shift_core += tl.sum(d_core, axis=0)
            d_scale_gate += tl.sum(d_gate * gate, axis=0)
            d_shift_gate += tl.sum(d_gate, axis=0)
        d_core = through_norm(d_core, core, core_inverse, scale, 0)
        d_gate = through_norm(d_gate, gate, gate_inverse, scale, 1)
        if not IS_UPDATE:
            core_slope, gate_slope = sigmoid(core_pre), sigmoid(gate_pre)
            if OF_INPUTS:
                d_core = gradient_times(d_core, second, WIDTH, 1, PRECISION) * silu_slope(core_pre, core_slope)
                d_gate = gradient_times(d_gate, second + WIDTH * WIDTH, WIDTH, 1, PRECISION)
                d_gate = d_gate * silu_slope(gate_pre, gate_slope)
            else:
                d_bias_core += tl.sum(d_core, axis=0)
                d_bias_gate += tl.sum(d_gate, axis=0)
                if n_angles > 0:  # always true; this `if` gives `outer` a separate block
                    d_second_core += outer(d_core, core_pre * core_slope, PRECISION)
                    d_second_gate += outer(d_gate, gate_pre * gate_slope, PRECISION)
        if OF_INPUTS:
            at = d_pre + row[:, None] * (2 * WIDTH) + column
            tl.store(at, d_core, mask=mask)
            tl.store(at + WIDTH, d_gate, mask=mask)
            d_core = gradient_times(d_core, first, WIDTH, 1, PRECISION)
            d_core += gradient_times(d_gate, first + WIDTH * WIDTH, WIDTH, 1, PRECISION)
            at = d_angles + row[:, None] * WIDTH + column
            if IS_UPDATE:
                d_core += tl.load(d_out + row[:, None] * WIDTH + column, mask=mask, other=0.0)
            if ADDS:
                d_core += tl.load(at, mask=mask, other=0.0)
            tl.store(at, d_core, mask=mask)
    at = partials + program * COLUMNS + MATRICES
    if IS_UPDATE:
        store_vectors(at, d_scale_core, d_scale_gate)
        store_vectors(at + 2 * WIDTH, d_shift_core, d_shift_gate)
    elif not OF_INPUTS:
        store_matrices(at, d_second_core, d_second_gate)
        at += MATRICES
        store_vectors(at, d_bias_core, d_bias_gate)
        store_vectors(at + 2 * WIDTH, d_scale_core, d_scale_gate)
        store_vectors(at + 4 * WIDTH, d_shift_core, d_shift_gate)


@triton.jit(do_not_specialize=["n_angles", "tiles"])
def first_backward_kernel(
    d_pre, angles, partials, n_angles, tiles,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Compute the gradient of the first layer's matrix; each program processes ``tiles`` tiles of angles."""
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)[None, :]
    d_core = tl.zeros([WIDTH, WIDTH], partials.dtype.element_ty)
    d_gate = tl.zeros([WIDTH, WIDTH], partials.dtype.element_ty)
    for tile in range(program * tiles, (program + 1) * tiles):
        row = (tile * ROWS + tl.arange(0, ROWS))[:, None]
        mask = row < n_angles
        features = tl.load(angles + row * WIDTH + column, mask=mask, other=0.0)
        at = d_pre + row * (2 * WIDTH) + column
        d_core += outer(tl.load(at, mask=mask, other=0.0), features, PRECISION)
        d_gate += outer(tl.load(at + WIDTH, mask=mask, other=0.0), features, PRECISION)
    store_matrices(partials + program * COLUMNS, d_core, d_gate)


def angles_forward(
    plan: Plan, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, weights: Tensor, gate: Gate
) -> Tensor:
    """Sum each short bond's messages from its angles, [S, 64]; see `PlainMessages.of_angles`.

    Args:
        atoms: [A, 128]; ``atoms``, ``shorts`` and ``weights`` may have any stride between rows.
        shorts: [S, 256].
        angles: contiguous [T, 64].
        first: contiguous [128, 64].
        weights: [S, 64].
        gate: the layers after the first.
    """
    batch, tiles = plan.batch, plan.tiles
    out = room(atoms, len(batch.short_bond), 64)
    launch(
        angles_forward_kernel, -(-len(out) // tiles.angle_shorts),
        batch.angle_center, batch.angle_bond_i, batch.angle_bond_j, batch.angle_offsets,
        atoms, shorts, angles, first, weights, gate.second, gate.bias, gate.scale, gate.shift, out,
        len(out), atoms.stride(0), shorts.stride(0), weights.stride(0),
        warps=tiles.angle_warps, PRECISION=plan.precision, ROWS=tiles.angle_rows, SHORTS=tiles.angle_shorts,
        RESIDENT=tiles.resident,
    )  # fmt: skip
    return out


def update_forward(plan: Plan, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, gate: Gate) -> Tensor:
    """Compute new angle features, [T, 64]; ``angles_forward`` explains the arguments."""
    batch, tiles = plan.batch, plan.tiles
    out = room(atoms, len(batch.angle), 64)
    launch(
        update_forward_kernel, -(-len(out) // tiles.angle_rows),
        batch.angle_center, batch.angle_bond_i, batch.angle_bond_j,
        atoms, shorts, angles, first, gate.scale, gate.shift, out, len(out), atoms.stride(0), shorts.stride(0),
        warps=tiles.angle_warps, PRECISION=plan.precision, ROWS=tiles.angle_rows,
    )  # fmt: skip
    return out


def angles_backward(
    plan: Plan, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, weights: Tensor, gate: Gate,
    d_total: Tensor, d_weights: Tensor | None = None, d_angles: Tensor | None = None,
) -> AngleGradients:  # fmt: skip
    """Compute the gradients of ``angles_forward``; partial sums have columns first ‖ second ‖ bias ‖ scale ‖ shift.

    Args:
        plan, atoms, shorts, angles, first, weights, gate: as in ``angles_forward``.
        d_total: gradient of the sums, contiguous [S, 64].
        d_weights: array to which the gradient of ``weights`` is added, [S, 64], with any stride between rows; by
            default a new one.
        d_angles: array to which the gradient of ``angles`` is added, contiguous [T, 64]; by default a new one.
    """
    batch, tiles = plan.batch, plan.tiles
    n_angles, n_shorts = len(batch.angle), len(batch.short_bond)
    d_pre, products = room(atoms, n_angles, 128), room(atoms, n_angles, 64)
    by_angles = room(atoms, n_angles, 64) if d_angles is None else d_angles
    by_weights = room(atoms, n_shorts, 64) if d_weights is None else d_weights
    programs, per_program = plan.shares(n_angles, tiles.angle_sum_rows)
    partials = room(atoms, programs, COLUMNS)
    for of_inputs, rows, warps in (
        (True, tiles.angle_back_rows, tiles.angle_back_warps),
        (False, tiles.angle_sum_rows, tiles.angle_sum_warps),
    ):
        shares = plan.shares(n_angles, rows)
        launch(
            angles_backward_kernel, shares[0],
            batch.angle_center, batch.angle_bond_i, batch.angle_bond_j,
            atoms, shorts, angles, first, weights, gate.second, gate.bias, gate.scale, gate.shift,
            d_total, d_pre, products, by_angles, partials,
            n_angles, shares[1], atoms.stride(0), shorts.stride(0), weights.stride(0),
            warps=warps, IS_UPDATE=False, ADDS=d_angles is not None, OF_INPUTS=of_inputs, PRECISION=plan.precision,
            ROWS=rows, COLUMNS=COLUMNS, RESIDENT=tiles.resident,
        )  # fmt: skip
    launch(
        first_backward_kernel, programs, d_pre, angles, partials, n_angles, per_program,
        warps=tiles.angle_sum_warps, PRECISION=plan.precision, ROWS=tiles.angle_sum_rows, COLUMNS=COLUMNS,
    )  # fmt: skip
    d_shorts = room(atoms, n_shorts, 256)
    launch(
        angles_to_shorts_kernel, n_shorts,
        d_pre, products, batch.angle_bond_i, batch.angle_bond_j, batch.angle_offsets, batch.angle_by_j,
        batch.by_j_offsets, weights, d_shorts, by_weights, weights.stride(0), by_weights.stride(0),
        warps=4, HAS_WEIGHTS=True, ADDS=d_weights is not None, ROWS=SUM_ROWS,
    )  # fmt: skip
    return AngleGradients(_by_atoms(plan, d_pre), d_shorts, by_angles, by_weights, partials)


def update_backward(
    plan: Plan, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, gate: Gate, d_out: Tensor
) -> AngleGradients:
    """Compute the gradients of ``update_forward``; partial sums have columns first ‖ scale ‖ shift.

    Args:
        plan, atoms, shorts, angles, first, gate: as in ``angles_forward``.
        d_out: gradient of the new features, contiguous [T, 64]; also part of the gradient of the old features.
    """
    batch, tiles = plan.batch, plan.tiles
    n_angles, n_shorts = len(batch.angle), len(batch.short_bond)
    d_pre, d_angles = room(atoms, n_angles, 128), room(atoms, n_angles, 64)
    programs, per_program = plan.shares(n_angles, tiles.angle_back_rows)
    partials = room(atoms, programs, UPDATE_COLUMNS)
    unused = d_pre  # an angle update has neither weights nor a second layer
    launch(
        angles_backward_kernel, programs,
        batch.angle_center, batch.angle_bond_i, batch.angle_bond_j,
        atoms, shorts, angles, first, unused, unused, unused, gate.scale, gate.shift,
        d_out, d_pre, unused, d_angles, partials, n_angles, per_program, atoms.stride(0), shorts.stride(0), 0,
        warps=tiles.angle_back_warps, IS_UPDATE=True, ADDS=False, OF_INPUTS=True, PRECISION=plan.precision,
        ROWS=tiles.angle_back_rows, COLUMNS=UPDATE_COLUMNS, RESIDENT=tiles.resident,
    )  # fmt: skip
    launch(
        first_backward_kernel, programs, d_pre, angles, partials, n_angles,
        per_program * tiles.angle_back_rows // tiles.angle_sum_rows,
        warps=tiles.angle_sum_warps, PRECISION=plan.precision, ROWS=tiles.angle_sum_rows, COLUMNS=UPDATE_COLUMNS,
    )  # fmt: skip
    d_shorts = room(atoms, n_shorts, 256)
    launch(
        angles_to_shorts_kernel, n_shorts,
        d_pre, unused, batch.angle_bond_i, batch.angle_bond_j, batch.angle_offsets, batch.angle_by_j,
        batch.by_j_offsets, unused, d_shorts, unused, 0, 0, warps=4, HAS_WEIGHTS=False, ADDS=False, ROWS=SUM_ROWS,
    )  # fmt: skip
    return AngleGradients(_by_atoms(plan, d_pre), d_shorts, d_angles, None, partials)


def _by_atoms(plan: Plan, d_pre: Tensor) -> Tensor:
    batch = plan.batch
    d_atoms = room(d_pre, len(batch.atomic_numbers), 128)
    launch(
        angles_to_atoms_kernel, len(d_atoms), d_pre, batch.angle_by_center, batch.by_center_offsets, d_atoms,
        warps=4, ROWS=SUM_ROWS,
    )  # fmt: skip
    return d_atoms
