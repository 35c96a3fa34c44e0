"""Operations on a block of rows, compiled into each kernel: products with matrices, layer norms, gates.

A block is [64, 64] or [64, 128], float32, and stays in the processor's cache. "Core ‖ gate" means the two halves of a
gated MLP side by side, 64 columns each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from mbqueue.data.machine_code import Function, compiled

ROWS = 64
#: Layer norm's epsilon, as in torch and CHGNet.
_EPS = np.float32(1e-5)
_ONE = np.float32(1)
_ZERO = np.float32(0)
_64TH = np.float32(1 / 64)

#: The fast-math flags leave out nnan and ninf, so that a NaN stays a NaN and the step is rejected.
FAST = {"contract", "reassoc", "nsz", "arcp"}


def inlined(function: Function) -> Function:
    """Compile a function so that its callers inline it.

    If a caller passes constant offsets and sizes, inlining lets the compiler vectorise the function's loops.
    """
    return compiled(function, fastmath=FAST, forceinline=True)


@intrinsic  # type: ignore[untyped-decorator]
def _float_of_bits(_typing_context: Any, _bits: Any) -> Any:
    """Reinterpret the bits of an int32 as a float32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@inlined
def sigmoid(x: Any) -> Any:
    """Compute 1 / (1 + exp(−x)) in float32 with an error of about 2e-7, in a form that vectorises.

    The code uses exp(y) = 2^n · exp(r) with n = round(y / ln 2), and the polynomial for exp(r) from expf in Cephes.
    """
    y = -x
    # NaN passes through the next two lines, because every comparison with NaN is false.
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


@inlined
def add_product(x: Any, x0: int, weight: Any, w0: int, out: Any, o0: int, n: int) -> None:
    """Add x[r, x0 : x0 + 64] @ weight[w0 : w0 + 64, :] to out[r, o0 : o0 + 64] for ``n`` rows; ``n`` must be even."""
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


@inlined
def add_outer(x: Any, x0: int, y: Any, y0: int, out: Any, o0: int) -> None:
    """Add Σ_r x[r, x0 + i] · y[r, y0 : y0 + 64] to out[o0 + i, :], over all 64 rows; unused rows of x must be zero."""
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


@inlined
def normalise(z: Any, n: int, inverse: Any) -> None:
    """Normalise both halves of ``n`` rows in place, without scale or shift; write 1/σ to ``inverse`` [64, 2]."""
    for r in range(n):
        # Each loop handles both core and gate, so that the processor can compute their sums in parallel.
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


@inlined
def through_norm(d: Any, z: Any, inverse: Any, gamma: Any, r: int, sums: Any) -> None:
    """Back-propagate row ``r`` of ``d`` in place through a layer norm with scale and shift.

    Rows 0 to 2 of ``sums`` collect the gradients of scale, shift and the bias before the norm.
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


@inlined
def silu(pre: Any, n: int) -> None:
    """Apply SiLU in place to ``n`` rows of 128 numbers."""
    for r in range(n):
        for j in range(128):
            pre[r, j] *= sigmoid(pre[r, j])


@inlined
def silu_and_slope(pre: Any, slope: Any, n: int) -> None:
    """Apply SiLU in place to ``n`` rows of 128 numbers, and write its derivative to ``slope``."""
    for r in range(n):
        for j in range(128):
            x = pre[r, j]
            s = sigmoid(x)
            pre[r, j] = x * s
            slope[r, j] = s * (_ONE + x * (_ONE - s))


@inlined
def second_layer(hidden: Any, weight: Any, bias: Any, z: Any, n: int) -> None:
    """Apply the second linear layers of core and gate.

    ``weight`` [128, 64] contains the two transposed matrices, core above gate.
    """
    even = n + (n & 1)
    for r in range(even):
        for j in range(128):
            z[r, j] = bias[j]
    add_product(hidden, 0, weight, 0, z, 0, even)
    add_product(hidden, 64, weight, 64, z, 64, even)


@inlined
def gated(z: Any, r: int, j: int, scale: Any, shift: Any) -> Any:
    """Return feature ``j`` of a gated MLP's output for the normalised row ``r``."""
    x = z[r, j] * scale[j] + shift[j]
    y = z[r, 64 + j] * scale[64 + j] + shift[64 + j]
    return x * sigmoid(x) * sigmoid(y)


@inlined
def gated_back(z: Any, r: int, j: int, scale: Any, shift: Any) -> Any:
    """Return the output of ``gated`` and its derivatives with respect to the scaled and shifted core and gate."""
    x = z[r, j] * scale[j] + shift[j]
    s = sigmoid(x)
    gate = sigmoid(z[r, 64 + j] * scale[64 + j] + shift[64 + j])
    core = x * s
    return core * gate, gate * s * (_ONE + x * (_ONE - s)), core * gate * (_ONE - gate)


@inlined
def clear(rows: Any, first: int) -> None:
    """Set the block's rows from ``first`` onwards to zero."""
    for r in range(first, ROWS):
        for j in range(128):
            rows[r, j] = _ZERO
