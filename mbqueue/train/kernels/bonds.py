"""CPU kernels for messages from bonds to atoms, and for their gradients."""

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

_compiled = partial(compiled, fastmath=FAST)


@inlined
def _bond_block(first: int, n: int, graph: Any, inputs: Any, pre: Any) -> None:
    center, neighbor, undirected = graph
    atoms, bonds, _ = inputs
    for r in range(n):
        c, o, u = center[first + r], neighbor[first + r], undirected[first + r]
        for j in range(128):
            pre[r, j] = atoms[c, j] + atoms[o, 128 + j] + bonds[u, j]


@_compiled
def bonds_forward(begin: int, end: int, graph: Any, inputs: Any, gate: Any, out: Any) -> None:
    """Add the messages of directed bonds ``begin`` to ``end`` to their centres in ``out`` [A, 64].

    Args:
        begin, end: index of the first bond, and index after the last bond.
        graph: centre, neighbour and undirected bond of each directed bond, [D] each.
        inputs: contributions to the first layer of centre (with the bias) ‖ neighbour [A, 256] and of the bond
            [U, 128], and the bonds' weights [U, 64].
        gate: second layers [128, 64] (transposed, core above gate), their bias, scale and shift of the norms, [128].
        out: the array to add to.
    """
    center, _, undirected = graph
    second, bias, scale, shift = gate
    weights = inputs[2]
    pre, z = np.zeros((ROWS, 128), np.float32), np.zeros((ROWS, 128), np.float32)
    inverse = np.empty((ROWS, 2), np.float32)
    for first in range(begin, end, ROWS):
        n = min(ROWS, end - first)
        _bond_block(first, n, graph, inputs, pre)
        silu(pre, n)
        second_layer(pre, second, bias, z, n)
        normalise(z, n, inverse)
        for r in range(n):
            c, u = center[first + r], undirected[first + r]
            for j in range(64):
                out[c, j] += gated(z, r, j, scale, shift) * weights[u, j]


@_compiled
def bonds_backward(
    begin: int, end: int, graph: Any, inputs: Any, gate: Any, second_back: Any, d_out: Any, d_inputs: Any, sums: Any
) -> None:
    """Compute the gradients of ``bonds_forward``.

    Args:
        begin, end, graph, inputs, gate: as in ``bonds_forward``.
        second_back: the second layers, not transposed, [128, 64].
        d_out: gradient of ``out``.
        d_inputs: arrays to which the gradients of ``inputs`` are added.
        sums: this range's gradients of the second layers, [128, 64], and of scale, shift and bias, [3, 128].
    """
    center, neighbor, undirected = graph
    second, bias, scale, shift = gate
    weights = inputs[2]
    d_atoms, d_bonds, d_weights = d_inputs
    d_second, d_norm = sums
    pre, z = np.zeros((ROWS, 128), np.float32), np.zeros((ROWS, 128), np.float32)
    slope, d = np.zeros((ROWS, 128), np.float32), np.zeros((ROWS, 128), np.float32)
    inverse = np.empty((ROWS, 2), np.float32)
    for first in range(begin, end, ROWS):
        n = min(ROWS, end - first)
        _bond_block(first, n, graph, inputs, pre)
        silu_and_slope(pre, slope, n)
        second_layer(pre, second, bias, z, n)
        normalise(z, n, inverse)
        for r in range(n):
            c, u = center[first + r], undirected[first + r]
            for j in range(64):
                message, by_core, by_gate = gated_back(z, r, j, scale, shift)
                dm = d_out[c, j]
                d_weights[u, j] += dm * message
                dm *= weights[u, j]
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
            c, o, u = center[first + r], neighbor[first + r], undirected[first + r]
            for j in range(128):
                g = z[r, j] * slope[r, j]
                d_atoms[c, j] += g
                d_atoms[o, 128 + j] += g
                d_bonds[u, j] += g
