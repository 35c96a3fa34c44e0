"""CPU kernels for messages from angles to bonds, for the angle update, and for their gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from mbqueue.data.machine_code import compiled
from mbqueue.train.kernels.blocks import (
    FAST,
    ROWS,
    add_outer,
    add_product,
    clear,
    gated,
    gated_back,
    inlined,
    normalise,
    second_layer,
    silu,
    silu_and_slope,
    through_norm,
)

_ZERO = np.float32(0)
_compiled = partial(compiled, fastmath=FAST)


@inlined
def _angle_block(first: int, n: int, graph: Any, inputs: Any, weight: Any, features: Any, pre: Any) -> None:
    """Apply the first layer to the concatenation [bond i ‖ bond j ‖ angle ‖ centre] for ``n`` angles."""
    center, bond_i, bond_j = graph
    atoms, shorts, angles = inputs
    for r in range(n):
        c, i, k = center[first + r], bond_i[first + r], bond_j[first + r]
        for j in range(64):
            features[r, j] = angles[first + r, j]
        for j in range(128):
            pre[r, j] = atoms[c, j] + shorts[i, j] + shorts[k, 128 + j]
    add_product(features, 0, weight, 0, pre, 0, n + (n & 1))
    add_product(features, 0, weight, 64, pre, 64, n + (n & 1))


@inlined
def _angle_block_back(
    first: int, n: int, graph: Any, features: Any, g: Any, back: Any, weight_back: Any, d_inputs: Any, d_weight: Any
) -> None:
    """Back-propagate ``g`` [64, 128], whose rows from ``n`` onwards are zero, through ``_angle_block``.

    ``back`` is scratch memory.
    """
    center, bond_i, bond_j = graph
    d_atoms, d_shorts, d_angles = d_inputs
    add_outer(g, 0, features, 0, d_weight, 0)
    add_outer(g, 64, features, 0, d_weight, 64)
    for r in range(ROWS):
        for j in range(64):
            back[r, j] = _ZERO
    add_product(g, 0, weight_back, 0, back, 0, n + (n & 1))
    add_product(g, 64, weight_back, 64, back, 0, n + (n & 1))
    for r in range(n):
        c, i, k = center[first + r], bond_i[first + r], bond_j[first + r]
        for j in range(64):
            d_angles[first + r, j] += back[r, j]
        for j in range(128):
            d_atoms[c, j] += g[r, j]
            d_shorts[i, j] += g[r, j]
            d_shorts[k, 128 + j] += g[r, j]


@_compiled
def angles_forward(
    begin: int, end: int, graph: Any, inputs: Any, weights: Any, weight: Any, gate: Any, out: Any
) -> None:
    """Add the messages of angles ``begin`` to ``end`` to their first bonds in ``out`` [S, 64].

    Args:
        begin, end: index of the first angle, and index after the last angle.
        graph: centre, first and second short bond of each angle, [T] each.
        inputs: contributions to the first layer of the centre (with the bias) [A, 128] and of bond i ‖ bond j [S, 256],
            and angle features [T, 64].
        weights: the short bonds' weights, [S, 64].
        weight: the first layer's matrix for angles, [128, 64] (transposed, core above gate).
        gate: as in ``bonds_forward``.
        out: the array to add to.
    """
    _, bond_i, bond_j = graph
    second, bias, scale, shift = gate
    pre, z = np.zeros((ROWS, 128), np.float32), np.zeros((ROWS, 128), np.float32)
    features, inverse = np.zeros((ROWS, 64), np.float32), np.empty((ROWS, 2), np.float32)
    for first in range(begin, end, ROWS):
        n = min(ROWS, end - first)
        _angle_block(first, n, graph, inputs, weight, features, pre)
        silu(pre, n)
        second_layer(pre, second, bias, z, n)
        normalise(z, n, inverse)
        for r in range(n):
            i, k = bond_i[first + r], bond_j[first + r]
            for j in range(64):
                out[i, j] += gated(z, r, j, scale, shift) * weights[i, j] * weights[k, j]


@_compiled
def angles_backward(
    begin: int, end: int, graph: Any, inputs: Any, weights: Any, weight: Any, gate: Any, backs: Any, d_out: Any,
    d_inputs: Any, d_weights: Any, sums: Any,
) -> None:  # fmt: skip
    """Compute the gradients of ``angles_forward``.

    Args:
        begin, end, graph, inputs, weights, weight, gate: as in ``angles_forward``.
        backs: the first layer's matrix for angles, and the second layers, not transposed, [128, 64] each.
        d_out: gradient of ``out``.
        d_inputs: arrays to which the gradients of ``inputs`` are added.
        d_weights: array to which the gradient of ``weights`` is added.
        sums: this range's gradients of the first and second layers, [128, 64] each, and of scale, shift and bias,
            [3, 128].
    """
    _, bond_i, bond_j = graph
    second, bias, scale, shift = gate
    first_back, second_back = backs
    d_first, d_second, d_norm = sums
    pre, z = np.zeros((ROWS, 128), np.float32), np.zeros((ROWS, 128), np.float32)
    slope, d = np.zeros((ROWS, 128), np.float32), np.zeros((ROWS, 128), np.float32)
    features, inverse = np.zeros((ROWS, 64), np.float32), np.empty((ROWS, 2), np.float32)
    back = np.zeros((ROWS, 64), np.float32)
    for first in range(begin, end, ROWS):
        n = min(ROWS, end - first)
        _angle_block(first, n, graph, inputs, weight, features, pre)
        silu_and_slope(pre, slope, n)
        second_layer(pre, second, bias, z, n)
        normalise(z, n, inverse)
        for r in range(n):
            i, k = bond_i[first + r], bond_j[first + r]
            for j in range(64):
                message, by_core, by_gate = gated_back(z, r, j, scale, shift)
                dm, wi, wk = d_out[i, j], weights[i, j], weights[k, j]
                d_weights[i, j] += dm * message * wk
                d_weights[k, j] += dm * message * wi
                dm *= wi * wk
                d[r, j] = dm * by_core
                d[r, 64 + j] = dm * by_gate
            through_norm(d, z, inverse, scale, r, d_norm)
        clear(d, n)
        add_outer(d, 0, pre, 0, d_second, 0)
        add_outer(d, 64, pre, 64, d_second, 64)
        clear(z, 0)
        add_product(d, 0, second_back, 0, z, 0, n + (n & 1))
        add_product(d, 64, second_back, 64, z, 64, n + (n & 1))
        for r in range(n):
            for j in range(128):
                z[r, j] *= slope[r, j]
        _angle_block_back(first, n, graph, features, z, back, first_back, d_inputs, d_first)


@_compiled
def update_forward(
    begin: int, end: int, graph: Any, inputs: Any, weight: Any, scale: Any, shift: Any, out: Any
) -> None:
    """Add a gated layer's output to the features of angles ``begin`` to ``end``; write the sums to ``out`` [T, 64].

    Args:
        begin, end, graph, inputs, weight: as in ``angles_forward``.
        scale: scale of the norms, [128].
        shift: shift of the norms, [128].
        out: the array to write.
    """
    pre, features = np.zeros((ROWS, 128), np.float32), np.zeros((ROWS, 64), np.float32)
    inverse = np.empty((ROWS, 2), np.float32)
    for first in range(begin, end, ROWS):
        n = min(ROWS, end - first)
        _angle_block(first, n, graph, inputs, weight, features, pre)
        normalise(pre, n, inverse)
        for r in range(n):
            for j in range(64):
                out[first + r, j] = features[r, j] + gated(pre, r, j, scale, shift)


@_compiled
def update_backward(
    begin: int, end: int, graph: Any, inputs: Any, weight: Any, scale: Any, shift: Any, weight_back: Any, d_out: Any,
    d_inputs: Any, sums: Any,
) -> None:  # fmt: skip
    """Compute the gradients of ``update_forward``.

    Args:
        begin, end, graph, inputs, weight, scale, shift: as in ``update_forward``.
        weight_back: the first layer's matrix for angles, not transposed, [128, 64].
        d_out: gradient of ``out``.
        d_inputs: arrays to which the gradients of ``inputs`` are added. The gradient array for the angle features must
            already contain ``d_out``.
        sums: this range's gradients of the first layer, [128, 64], and of scale, shift and bias, [3, 128].
    """
    d_first, d_norm = sums
    pre, d = np.zeros((ROWS, 128), np.float32), np.zeros((ROWS, 128), np.float32)
    features, inverse = np.zeros((ROWS, 64), np.float32), np.empty((ROWS, 2), np.float32)
    back = np.zeros((ROWS, 64), np.float32)
    for first in range(begin, end, ROWS):
        n = min(ROWS, end - first)
        _angle_block(first, n, graph, inputs, weight, features, pre)
        normalise(pre, n, inverse)
        for r in range(n):
            for j in range(64):
                _, by_core, by_gate = gated_back(pre, r, j, scale, shift)
                dm = d_out[first + r, j]
                d[r, j] = dm * by_core
                d[r, 64 + j] = dm * by_gate
            through_norm(d, pre, inverse, scale, r, d_norm)
        clear(d, n)
        _angle_block_back(first, n, graph, features, d, back, weight_back, d_inputs, d_first)
