"""Operations of the Triton kernels on a tile of rows: products with matrices, layer norms, gates and their gradients.

A tile is [rows, 64]; core and gate of a gated MLP are two tiles. Sums have the tensors' dtype, which is float32 on a
GPU. Triton's interpreter also accepts float64. Each function has a counterpart in `blocks`.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Layer norm's epsilon, as in torch and CHGNet.
EPSILON = tl.constexpr(1e-5)
WIDTH = tl.constexpr(64)
#: Number of entries in the core's and the gate's [64, 64] matrices together. In the partial sums, the gradients of
#: these matrices come before the gradients of vectors.
MATRICES = tl.constexpr(2 * 64 * 64)


#: The interpreter multiplies in the accumulator's dtype, so the kernels first round the factors as tensor cores do.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _rounded(x, PRECISION: tl.constexpr):  # noqa: N803
    """Round ``x`` to ``PRECISION``; for tf32, truncate as tensor cores do."""
    if PRECISION == "bf16":
        return x.to(tl.bfloat16).to(x.dtype)
    if PRECISION == "fp16":
        return x.to(tl.float16).to(x.dtype)
    if PRECISION == "tf32":
        return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return x


@triton.jit
def product(x, y, PRECISION: tl.constexpr):  # noqa: N803
    """Compute x @ y with factors in ``PRECISION`` and sums in the dtype of ``x``."""
    if _INTERPRETED:
        return tl.dot(_rounded(x, PRECISION), _rounded(y, PRECISION), input_precision="ieee", out_dtype=x.dtype)
    if PRECISION == "bf16":
        return tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16), out_dtype=x.dtype)
    if PRECISION == "fp16":
        return tl.dot(x.to(tl.float16), y.to(tl.float16), out_dtype=x.dtype)
    if PRECISION == "tf32":
        return tl.dot(x, y, input_precision="tf32", out_dtype=x.dtype)
    return tl.dot(x, y, input_precision="ieee", out_dtype=x.dtype)


@triton.jit
def settled(x, PRECISION: tl.constexpr):  # noqa: N803
    """Return ``x``, and make the compiler compute it only once before a product on tensor cores.

    Without this function, each thread would load and compute the elements of ``x`` again for every product that uses
    them.
    """
    if PRECISION == "float32" or _INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)


@triton.jit
def sigmoid(x):
    """Compute 1 / (1 + exp(−x)) without overflow in the exponential."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def silu_slope(x, s):
    """Compute the derivative of x · sigmoid(x), given ``s`` = sigmoid(x)."""
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def _halves(x, WIDE: tl.constexpr):  # noqa: N803
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, WIDE // 2]), (0, 2, 1)))


@triton.jit
def _part_of(matrix, first, down, right, LONG: tl.constexpr):  # noqa: N803
    """Load ``LONG`` rows of a [64, 64] matrix with strides ``down`` and ``right``, starting at row ``first``."""
    row, column = first + tl.arange(0, LONG), tl.arange(0, WIDTH)
    return tl.load(matrix + row[:, None] * down + column[None, :] * right)


@triton.jit
def times(x, matrix, down, right, PRECISION: tl.constexpr):  # noqa: N803
    """Multiply ``x`` by a [64, 64] matrix, which is in memory and has the strides ``down`` and ``right``."""
    if PRECISION != "float32":
        return product(x, _part_of(matrix, 0, down, right, WIDTH), PRECISION)
    # Without tensor cores, each thread holds the whole reduction dimension in registers, so split it into four parts.
    left, right_half = _halves(x, 64)
    x0, x1 = _halves(left, 32)
    x2, x3 = _halves(right_half, 32)
    out = product(x0, _part_of(matrix, 0, down, right, 16), PRECISION)
    out += product(x1, _part_of(matrix, 16, down, right, 16), PRECISION)
    out += product(x2, _part_of(matrix, 32, down, right, 16), PRECISION)
    out += product(x3, _part_of(matrix, 48, down, right, 16), PRECISION)
    return out


@triton.jit
def half_of(vector, half):
    """Load one half of a vector of 128 numbers, as a row."""
    return tl.load(vector + tl.arange(0, WIDTH) + half * WIDTH)[None, :]


@triton.jit
def second_layer(pre, second, bias, half, PRECISION: tl.constexpr, IS_BACKWARD: tl.constexpr = True):  # noqa: N803
    """Apply SiLU and the second linear layer to core or gate."""
    hidden = pre * sigmoid(pre)
    if IS_BACKWARD or PRECISION != "fp16":  # the T4 uses fp16, and has too few registers for `settled`
        hidden = settled(hidden, PRECISION)
    return times(hidden, second + half * (WIDTH * WIDTH), 1, WIDTH, PRECISION) + half_of(bias, half)


@triton.jit
def normalised(z):
    """Normalise each row, without applying scale or shift; also return 1/σ, [rows, 1]."""
    z = z - tl.sum(z, axis=1)[:, None] / WIDTH
    inverse = tl.rsqrt(tl.sum(z * z, axis=1)[:, None] / WIDTH + EPSILON)
    return z * inverse, inverse


@triton.jit
def gated(core, gate, scale, shift):
    """Compute a gated MLP's output from the outputs of its last linear layers."""
    x, _ = normalised(core)
    y, _ = normalised(gate)
    x = x * half_of(scale, 0) + half_of(shift, 0)
    y = y * half_of(scale, 1) + half_of(shift, 1)
    return x * sigmoid(x) * sigmoid(y)


@triton.jit
def gated_back(core, gate, scale, shift):
    """Compute the output of ``gated`` and the values that its gradient needs.

    Returns:
        the output; its derivatives with respect to the scaled and shifted core and gate; the normalised core and gate;
        their 1/σ.
    """
    core, core_inverse = normalised(core)
    gate, gate_inverse = normalised(gate)
    x = core * half_of(scale, 0) + half_of(shift, 0)
    y = sigmoid(gate * half_of(scale, 1) + half_of(shift, 1))
    s = sigmoid(x)
    return x * s * y, y * silu_slope(x, s), x * s * y * (1.0 - y), core, gate, core_inverse, gate_inverse


@triton.jit
def through_norm(d, z, inverse, scale, half):
    """Back-propagate ``d`` through a layer norm with scale and shift; ``z`` is the normalised input."""
    d = d * half_of(scale, half)
    return inverse * (d - tl.sum(d, axis=1)[:, None] / WIDTH - z * (tl.sum(d * z, axis=1)[:, None] / WIDTH))


@triton.jit
def power_below(x):
    """Round each positive float32 down to a power of two; return 1 for zero and subnormal numbers."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power > 0, power, 1.0)


@triton.jit
def gradient_times(d, matrix, down, right, PRECISION: tl.constexpr):  # noqa: N803
    """Multiply a gradient ``d`` by a matrix as `times` does; in float16, scale each row to prevent underflow."""
    if PRECISION == "fp16":
        size = power_below(tl.max(tl.abs(d), axis=1))[:, None]
        return times(d / size, matrix, down, right, PRECISION) * size
    return times(d, matrix, down, right, PRECISION)


@triton.jit
def outer(d, x, PRECISION: tl.constexpr):  # noqa: N803
    """Sum d ⊗ x over rows, [64, 64], for a gradient ``d``; in float16, ``d`` is scaled by its largest entry.

    Do not use this function in the same block of code as products of [rows, 64]. Triton gives all dependent products in
    a block of code the same layout on tensor cores. With the layout for [64, 64], every warp would hold all rows of a
    [rows, 64] product.
    """
    x = settled(x, PRECISION)
    if PRECISION == "fp16":
        size = power_below(tl.max(tl.max(tl.abs(d), axis=1), axis=0))
        return product(tl.trans(d / size), x, PRECISION) * size
    return product(tl.trans(d), x, PRECISION)


@triton.jit
def by_segment(segment, x, SEGMENTS: tl.constexpr):  # noqa: N803
    """Sum the rows of ``x`` in each segment, [SEGMENTS, 64], by a full-precision product with zeros and ones."""
    member = tl.arange(0, SEGMENTS)[:, None] == segment[None, :]
    return tl.dot(member.to(x.dtype), x, input_precision="ieee", out_dtype=x.dtype)


@triton.jit
def store_matrices(at, core, gate):
    """Store the gradients of two [64, 64] matrices, stacked vertically."""
    row, column = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    tl.store(at + row * WIDTH + column, core)
    tl.store(at + WIDTH * WIDTH + row * WIDTH + column, gate)


@triton.jit
def store_vectors(at, core, gate):
    """Store the gradients of two vectors of 64 numbers, concatenated."""
    column = tl.arange(0, WIDTH)
    tl.store(at + column, core)
    tl.store(at + WIDTH + column, gate)
