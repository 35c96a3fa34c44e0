"""Compiled kernels of CHGNet's gated messages for the CPU, float32: one pass over bonds or angles, all in cache.

What a message needs between its gathers and its sum (two linear layers, two layer norms, SiLU, sigmoid, products) is
done for a block of rows at a time in buffers of some 100 KB, so that nothing of the size [bonds, features] is ever
written to memory. The backward kernels compute a block again instead of reading it back.

Every kernel works on a range of rows that belong to whole crystals. Crystals share nothing, so ranges can run in
different threads, each adds up in its own order, and the result does not depend on the number of threads.

Shapes: 64 features; "core ‖ gate" are the two halves of a gated MLP, 128 wide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from mbqueue.data.machine_code import compiled

_N = 64
_ROWS = 64
#: Layer norm's epsilon, as in torch and CHGNet.
_EPS = np.float32(1e-5)
_ONE = np.float32(1)
_ZERO = np.float32(0)
_64TH = np.float32(1 / 64)

# Without nnan and ninf: what is not a number must come out as not a number, so that the step is refused.
_FAST = {"contract", "reassoc", "nsz", "arcp"}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiled(function: _Function) -> _Function:
    return compiled(function, fastmath=_FAST)


def _inlined(function: _Function) -> _Function:
    """Compiled into its callers, so that offsets and sizes are constants there; else loops are not vectorised."""
    return compiled(function, fastmath=_FAST, forceinline=True)


@intrinsic  # type: ignore[untyped-decorator]
def _float_of_bits(_typing_context: Any, _bits: Any) -> Any:
    """A float32 from the bits of an int32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@_inlined
def _sigmoid(x: Any) -> Any:
    """1 / (1 + exp(−x)) in float32 to about 2e-7, in a form that vectorises.

    exp(y) = 2^n · exp(r) with n = round(y / ln 2); the polynomial of exp(r) is Cephes' expf.
    """
    y = -x
    # Written so that nan passes: every comparison with it is false.
    y = np.float32(87.0) if y > np.float32(87.0) else y
    y = np.float32(-87.0) if y < np.float32(-87.0) else y
    n = np.floor(y * np.float32(1.44269504088896341) + np.float32(0.5))
    r = y - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + _ONE
    return _ONE / (_ONE + p * _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23)))


@_inlined
def _product(x: Any, x0: int, weight: Any, w0: int, out: Any, o0: int, n: int) -> None:
    """out[r, o0 : o0 + 64] += x[r, x0 : x0 + 64] @ weight[w0 : w0 + 64, :] for an even number ``n`` of rows."""
    for r in range(0, n, 2):
        for k in range(0, 64, 8):
            a0, a1, a2, a3 = x[r, x0 + k], x[r, x0 + k + 1], x[r, x0 + k + 2], x[r, x0 + k + 3]
            a4, a5, a6, a7 = x[r, x0 + k + 4], x[r, x0 + k + 5], x[r, x0 + k + 6], x[r, x0 + k + 7]
            b0, b1, b2, b3 = x[r + 1, x0 + k], x[r + 1, x0 + k + 1], x[r + 1, x0 + k + 2], x[r + 1, x0 + k + 3]
            b4, b5, b6, b7 = x[r + 1, x0 + k + 4], x[r + 1, x0 + k + 5], x[r + 1, x0 + k + 6], x[r + 1, x0 + k + 7]
            for j in range(64):
                w = w0 + k
                out[r, o0 + j] += (
                    a0 * weight[w, j]
                    + a1 * weight[w + 1, j]
                    + a2 * weight[w + 2, j]
                    + a3 * weight[w + 3, j]
                    + a4 * weight[w + 4, j]
                    + a5 * weight[w + 5, j]
                    + a6 * weight[w + 6, j]
                    + a7 * weight[w + 7, j]
                )
                out[r + 1, o0 + j] += (
                    b0 * weight[w, j]
                    + b1 * weight[w + 1, j]
                    + b2 * weight[w + 2, j]
                    + b3 * weight[w + 3, j]
                    + b4 * weight[w + 4, j]
                    + b5 * weight[w + 5, j]
                    + b6 * weight[w + 6, j]
                    + b7 * weight[w + 7, j]
                )


@_inlined
def _outer(x: Any, x0: int, y: Any, y0: int, out: Any, o0: int) -> None:
    """out[o0 + i, :] += Σ_r x[r, x0 + i] · y[r, y0 : y0 + 64] over all 64 rows (unused rows of x are zero)."""
    for i in range(0, 64, 2):
        for r in range(0, 64, 8):
            a0, a1, a2, a3 = x[r, x0 + i], x[r + 1, x0 + i], x[r + 2, x0 + i], x[r + 3, x0 + i]
            a4, a5, a6, a7 = x[r + 4, x0 + i], x[r + 5, x0 + i], x[r + 6, x0 + i], x[r + 7, x0 + i]
            b0, b1, b2, b3 = x[r, x0 + i + 1], x[r + 1, x0 + i + 1], x[r + 2, x0 + i + 1], x[r + 3, x0 + i + 1]
            b4, b5, b6, b7 = x[r + 4, x0 + i + 1], x[r + 5, x0 + i + 1], x[r + 6, x0 + i + 1], x[r + 7, x0 + i + 1]
            for j in range(64):
                out[o0 + i, j] += (
                    a0 * y[r, y0 + j]
                    + a1 * y[r + 1, y0 + j]
                    + a2 * y[r + 2, y0 + j]
                    + a3 * y[r + 3, y0 + j]
                    + a4 * y[r + 4, y0 + j]
                    + a5 * y[r + 5, y0 + j]
                    + a6 * y[r + 6, y0 + j]
                    + a7 * y[r + 7, y0 + j]
                )
                out[o0 + i + 1, j] += (
                    b0 * y[r, y0 + j]
                    + b1 * y[r + 1, y0 + j]
                    + b2 * y[r + 2, y0 + j]
                    + b3 * y[r + 3, y0 + j]
                    + b4 * y[r + 4, y0 + j]
                    + b5 * y[r + 5, y0 + j]
                    + b6 * y[r + 6, y0 + j]
                    + b7 * y[r + 7, y0 + j]
                )


@_inlined
def _normalise(z: Any, n: int, inverse: Any) -> None:
    """Layer norm without its scale and shift, of both halves of ``n`` rows in place; 1/σ goes to ``inverse`` [., 2]."""
    for r in range(n):
        # Both halves in each loop: their sums do not wait for each other.
        core, gate = _ZERO, _ZERO
        for j in range(64):
            core += z[r, j]
            gate += z[r, 64 + j]
        core *= _64TH
        gate *= _64TH
        core_squares, gate_squares = _ZERO, _ZERO
        for j in range(64):
            z[r, j] -= core
            z[r, 64 + j] -= gate
            core_squares += z[r, j] * z[r, j]
            gate_squares += z[r, 64 + j] * z[r, 64 + j]
        core = _ONE / np.sqrt(core_squares * _64TH + _EPS)
        gate = _ONE / np.sqrt(gate_squares * _64TH + _EPS)
        inverse[r, 0], inverse[r, 1] = core, gate
        for j in range(64):
            z[r, j] *= core
            z[r, 64 + j] *= gate


@_inlined
def _through_norm(d: Any, z: Any, inverse: Any, gamma: Any, r: int, sums: Any) -> None:
    """Turn row ``r`` of ``d`` from the gradient after the norm's scale and shift into that before the norm.

    ``sums`` rows 0 to 2 collect the gradients of scale, shift and of the bias before the norm.
    """
    for half in range(2):
        first = 64 * half
        total, along = _ZERO, _ZERO
        for j in range(first, first + 64):
            sums[0, j] += d[r, j] * z[r, j]
            sums[1, j] += d[r, j]
            d[r, j] *= gamma[j]
            total += d[r, j]
            along += d[r, j] * z[r, j]
        total *= _64TH
        along *= _64TH
        for j in range(first, first + 64):
            d[r, j] = inverse[r, half] * (d[r, j] - total - z[r, j] * along)
            sums[2, j] += d[r, j]


@_inlined
def _hidden(pre: Any, n: int) -> None:
    """SiLU of ``n`` rows of 128, in place."""
    for r in range(n):
        for j in range(128):
            pre[r, j] *= _sigmoid(pre[r, j])


@_inlined
def _hidden_and_slope(pre: Any, slope: Any, n: int) -> None:
    """SiLU of ``n`` rows of 128 in place, and its derivative in ``slope``."""
    for r in range(n):
        for j in range(128):
            x = pre[r, j]
            s = _sigmoid(x)
            pre[r, j] = x * s
            slope[r, j] = s * (_ONE + x * (_ONE - s))


@_inlined
def _second(hidden: Any, weight: Any, bias: Any, z: Any, n: int) -> None:
    """Second linear layers of core and gate; ``weight`` is [128, 64]: the two transposed matrices, core above gate."""
    even = n + (n & 1)
    for r in range(even):
        for j in range(128):
            z[r, j] = bias[j]
    _product(hidden, 0, weight, 0, z, 0, even)
    _product(hidden, 64, weight, 64, z, 64, even)


@_inlined
def _gate(z: Any, r: int, j: int, scale: Any, shift: Any) -> Any:
    """Output of a gated MLP from its normalised row ``r``: feature ``j``."""
    x = z[r, j] * scale[j] + shift[j]
    y = z[r, 64 + j] * scale[64 + j] + shift[64 + j]
    return x * _sigmoid(x) * _sigmoid(y)


@_inlined
def _gate_back(z: Any, r: int, j: int, scale: Any, shift: Any) -> Any:
    """Output as of ``_gate``, and its derivatives by the scaled and shifted core and gate."""
    x = z[r, j] * scale[j] + shift[j]
    s = _sigmoid(x)
    gate = _sigmoid(z[r, 64 + j] * scale[64 + j] + shift[64 + j])
    core = x * s
    return core * gate, gate * s * (_ONE + x * (_ONE - s)), core * gate * (_ONE - gate)


@_inlined
def _clear(rows: Any, first: int) -> None:
    """Set the block's rows from ``first`` on to zero."""
    for r in range(first, _ROWS):
        for j in range(128):
            rows[r, j] = _ZERO


@_inlined
def _bond_block(first: int, n: int, graph: Any, inputs: Any, pre: Any) -> None:
    center, neighbor, undirected = graph
    atoms, bonds, _ = inputs
    for r in range(n):
        c, o, u = center[first + r], neighbor[first + r], undirected[first + r]
        for j in range(128):
            pre[r, j] = atoms[c, j] + atoms[o, 128 + j] + bonds[u, j]


@_compiled
def bonds_forward(begin: int, end: int, graph: Any, inputs: Any, gate: Any, out: Any) -> None:
    """Messages of directed bonds ``begin`` to ``end``, added to their centres in ``out`` [A, 64].

    Args:
        begin: first bond.
        end: one after the last.
        graph: centre, neighbour and undirected bond of each directed bond, [D] each.
        inputs: the first layer's share of centre (with its bias) ‖ neighbour [A, 256], that of the bond [U, 128], and
            the bonds' weights [U, 64].
        gate: second layers [128, 64] (transposed, core above gate), their bias, scale and shift of the norms, [128].
        out: is added to.
    """
    center, _, undirected = graph
    second, bias, scale, shift = gate
    weights = inputs[2]
    pre, z = np.zeros((_ROWS, 128), np.float32), np.zeros((_ROWS, 128), np.float32)
    inverse = np.empty((_ROWS, 2), np.float32)
    for first in range(begin, end, _ROWS):
        n = min(_ROWS, end - first)
        _bond_block(first, n, graph, inputs, pre)
        _hidden(pre, n)
        _second(pre, second, bias, z, n)
        _normalise(z, n, inverse)
        for r in range(n):
            c, u = center[first + r], undirected[first + r]
            for j in range(64):
                out[c, j] += _gate(z, r, j, scale, shift) * weights[u, j]


@_compiled
def bonds_backward(
    begin: int, end: int, graph: Any, inputs: Any, gate: Any, second_back: Any, d_out: Any, d_inputs: Any, sums: Any
) -> None:
    """Gradients of ``bonds_forward``.

    Args:
        begin: first bond.
        end: one after the last.
        graph: as there.
        inputs: as there.
        gate: as there.
        second_back: the second layers as they are, [128, 64].
        d_out: gradient by ``out``.
        d_inputs: gradients by ``inputs``, added to.
        sums: for this range alone: gradient by the second layers [128, 64]; by scale, shift and bias [3, 128].
    """
    center, neighbor, undirected = graph
    second, bias, scale, shift = gate
    weights = inputs[2]
    d_atoms, d_bonds, d_weights = d_inputs
    d_second, d_norm = sums
    pre, z = np.zeros((_ROWS, 128), np.float32), np.zeros((_ROWS, 128), np.float32)
    slope, d = np.zeros((_ROWS, 128), np.float32), np.zeros((_ROWS, 128), np.float32)
    inverse = np.empty((_ROWS, 2), np.float32)
    for first in range(begin, end, _ROWS):
        n = min(_ROWS, end - first)
        _bond_block(first, n, graph, inputs, pre)
        _hidden_and_slope(pre, slope, n)
        _second(pre, second, bias, z, n)
        _normalise(z, n, inverse)
        for r in range(n):
            c, u = center[first + r], undirected[first + r]
            for j in range(64):
                message, by_core, by_gate = _gate_back(z, r, j, scale, shift)
                dm = d_out[c, j]
                d_weights[u, j] += dm * message
                dm *= weights[u, j]
                d[r, j] = dm * by_core
                d[r, 64 + j] = dm * by_gate
            _through_norm(d, z, inverse, scale, r, d_norm)
        _clear(d, n)
        _outer(d, 0, pre, 0, d_second, 0)
        _outer(d, 64, pre, 64, d_second, 64)
        _clear(z, 0)
        _product(d, 0, second_back, 0, z, 0, n + (n & 1))
        _product(d, 64, second_back, 64, z, 64, n + (n & 1))
        for r in range(n):
            c, o, u = center[first + r], neighbor[first + r], undirected[first + r]
            for j in range(128):
                g = z[r, j] * slope[r, j]
                d_atoms[c, j] += g
                d_atoms[o, 128 + j] += g
                d_bonds[u, j] += g


@_inlined
def _angle_block(first: int, n: int, graph: Any, inputs: Any, weight: Any, features: Any, pre: Any) -> None:
    """First layer on [bond i ‖ bond j ‖ angle ‖ centre] of ``n`` angles."""
    center, bond_i, bond_j = graph
    atoms, shorts, angles = inputs
    for r in range(n):
        c, i, k = center[first + r], bond_i[first + r], bond_j[first + r]
        for j in range(64):
            features[r, j] = angles[first + r, j]
        for j in range(128):
            pre[r, j] = atoms[c, j] + shorts[i, j] + shorts[k, 128 + j]
    _product(features, 0, weight, 0, pre, 0, n + (n & 1))
    _product(features, 0, weight, 64, pre, 64, n + (n & 1))


@_inlined
def _angle_block_back(
    first: int, n: int, graph: Any, features: Any, g: Any, back: Any, weight_back: Any, d_inputs: Any, d_weight: Any
) -> None:
    """Gradients of ``_angle_block`` from ``g`` [64, 128], whose rows from ``n`` on are zero; ``back`` is scratch."""
    center, bond_i, bond_j = graph
    d_atoms, d_shorts, d_angles = d_inputs
    _outer(g, 0, features, 0, d_weight, 0)
    _outer(g, 64, features, 0, d_weight, 64)
    for r in range(_ROWS):
        for j in range(64):
            back[r, j] = _ZERO
    _product(g, 0, weight_back, 0, back, 0, n + (n & 1))
    _product(g, 64, weight_back, 64, back, 0, n + (n & 1))
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
    """Messages of angles ``begin`` to ``end``, added to their first bonds in ``out`` [S, 64].

    Args:
        begin: first angle.
        end: one after the last.
        graph: centre, first and second short bond of each angle, [T] each.
        inputs: the first layer's share of the centre (with its bias) [A, 128], that of bond i ‖ bond j [S, 256], and
            the angles' features [T, 64].
        weights: the short bonds' weights, [S, 64].
        weight: the first layer's matrix for angles, [128, 64] (transposed, core above gate).
        gate: as in ``bonds_forward``.
        out: is added to.
    """
    _, bond_i, bond_j = graph
    second, bias, scale, shift = gate
    pre, z = np.zeros((_ROWS, 128), np.float32), np.zeros((_ROWS, 128), np.float32)
    features, inverse = np.zeros((_ROWS, 64), np.float32), np.empty((_ROWS, 2), np.float32)
    for first in range(begin, end, _ROWS):
        n = min(_ROWS, end - first)
        _angle_block(first, n, graph, inputs, weight, features, pre)
        _hidden(pre, n)
        _second(pre, second, bias, z, n)
        _normalise(z, n, inverse)
        for r in range(n):
            i, k = bond_i[first + r], bond_j[first + r]
            for j in range(64):
                out[i, j] += _gate(z, r, j, scale, shift) * weights[i, j] * weights[k, j]


@_compiled
def angles_backward(
    begin: int, end: int, graph: Any, inputs: Any, weights: Any, weight: Any, gate: Any, backs: Any, d_out: Any,
    d_inputs: Any, d_weights: Any, sums: Any,
) -> None:  # fmt: skip
    """Gradients of ``angles_forward``.

    Args:
        begin: first angle.
        end: one after the last.
        graph: as there.
        inputs: as there.
        weights: as there.
        weight: as there.
        gate: as there.
        backs: the first layer's matrix for angles, and the second layers, as they are, [128, 64] each.
        d_out: gradient by ``out``.
        d_inputs: gradients by ``inputs``, added to.
        d_weights: that by ``weights``, added to.
        sums: for this range alone: gradients by first and second layers, [128, 64]; by scale, shift, bias [3, 128].
    """
    _, bond_i, bond_j = graph
    second, bias, scale, shift = gate
    first_back, second_back = backs
    d_first, d_second, d_norm = sums
    pre, z = np.zeros((_ROWS, 128), np.float32), np.zeros((_ROWS, 128), np.float32)
    slope, d = np.zeros((_ROWS, 128), np.float32), np.zeros((_ROWS, 128), np.float32)
    features, inverse = np.zeros((_ROWS, 64), np.float32), np.empty((_ROWS, 2), np.float32)
    back = np.zeros((_ROWS, 64), np.float32)
    for first in range(begin, end, _ROWS):
        n = min(_ROWS, end - first)
        _angle_block(first, n, graph, inputs, weight, features, pre)
        _hidden_and_slope(pre, slope, n)
        _second(pre, second, bias, z, n)
        _normalise(z, n, inverse)
        for r in range(n):
            i, k = bond_i[first + r], bond_j[first + r]
            for j in range(64):
                message, by_core, by_gate = _gate_back(z, r, j, scale, shift)
                dm, wi, wk = d_out[i, j], weights[i, j], weights[k, j]
                d_weights[i, j] += dm * message * wk
                d_weights[k, j] += dm * message * wi
                dm *= wi * wk
                d[r, j] = dm * by_core
                d[r, 64 + j] = dm * by_gate
            _through_norm(d, z, inverse, scale, r, d_norm)
        _clear(d, n)
        _outer(d, 0, pre, 0, d_second, 0)
        _outer(d, 64, pre, 64, d_second, 64)
        _clear(z, 0)
        _product(d, 0, second_back, 0, z, 0, n + (n & 1))
        _product(d, 64, second_back, 64, z, 64, n + (n & 1))
        for r in range(n):
            for j in range(128):
                z[r, j] *= slope[r, j]
        _angle_block_back(first, n, graph, features, z, back, first_back, d_inputs, d_first)


@_compiled
def update_forward(
    begin: int, end: int, graph: Any, inputs: Any, weight: Any, scale: Any, shift: Any, out: Any
) -> None:
    """New features of angles ``begin`` to ``end``: the old ones plus a gated layer, into ``out`` [T, 64].

    Args:
        begin: first angle.
        end: one after the last.
        graph: as in ``angles_forward``.
        inputs: as there.
        weight: as there.
        scale: of the norms, [128].
        shift: of the norms, [128].
        out: is written.
    """
    pre, features = np.zeros((_ROWS, 128), np.float32), np.zeros((_ROWS, 64), np.float32)
    inverse = np.empty((_ROWS, 2), np.float32)
    for first in range(begin, end, _ROWS):
        n = min(_ROWS, end - first)
        _angle_block(first, n, graph, inputs, weight, features, pre)
        _normalise(pre, n, inverse)
        for r in range(n):
            for j in range(64):
                out[first + r, j] = features[r, j] + _gate(pre, r, j, scale, shift)


@_compiled
def update_backward(
    begin: int, end: int, graph: Any, inputs: Any, weight: Any, scale: Any, shift: Any, weight_back: Any, d_out: Any,
    d_inputs: Any, sums: Any,
) -> None:  # fmt: skip
    """Gradients of ``update_forward``.

    Args:
        begin: first angle.
        end: one after the last.
        graph: as there.
        inputs: as there.
        weight: as there.
        scale: as there.
        shift: as there.
        weight_back: the first layer's matrix for angles as it is, [128, 64].
        d_out: gradient by ``out``.
        d_inputs: gradients by ``inputs``, added to; that by the angles begins as ``d_out``.
        sums: for this range alone: gradient by the first layer [128, 64]; by scale, shift, bias [3, 128].
    """
    d_first, d_norm = sums
    pre, d = np.zeros((_ROWS, 128), np.float32), np.zeros((_ROWS, 128), np.float32)
    features, inverse = np.zeros((_ROWS, 64), np.float32), np.empty((_ROWS, 2), np.float32)
    back = np.zeros((_ROWS, 64), np.float32)
    for first in range(begin, end, _ROWS):
        n = min(_ROWS, end - first)
        _angle_block(first, n, graph, inputs, weight, features, pre)
        _normalise(pre, n, inverse)
        for r in range(n):
            for j in range(64):
                _, by_core, by_gate = _gate_back(pre, r, j, scale, shift)
                dm = d_out[first + r, j]
                d[r, j] = dm * by_core
                d[r, 64 + j] = dm * by_gate
            _through_norm(d, pre, inverse, scale, r, d_norm)
        _clear(d, n)
        _angle_block_back(first, n, graph, features, d, back, weight_back, d_inputs, d_first)
