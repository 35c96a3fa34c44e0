"""GPU kernels for basis functions and the layers that use them, and their gradients.

Bases are never written to memory: a program computes them for its rows and multiplies them by the matrices of all
layers that use them. Gradient kernels recompute the bases. Each program writes its own output rows, or partial sums
over a fixed range of rows.
"""

# Triton also compiles annotations, so only the constants of a kernel are annotated.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from chgnet.model.basis import RadialBessel
from torch import Tensor

from mbqueue.train.kernels.launching import launch, room
from mbqueue.train.kernels.tiles import BASIS_PARTIALS, BASIS_ROWS

#: Number of functions in a basis: 31, plus a zero function as padding.
WIDTH = 32

_RADIAL, _FOURIER = 0, 1
_HALF_ROOT = float(1 / torch.sqrt(torch.tensor([2.0])))  # see mbqueue.train.forward
_ROOT_PI = math.sqrt(math.pi)


@triton.jit
def _envelope(x, inv_cutoff, norm):
    # CHGNet's smooth cut-off polynomial with p = 8, divided by the length (chgnet/model/basis.py).
    r = x * inv_cutoff
    r2 = r * r
    r4 = r2 * r2
    r8 = r4 * r4
    smooth = 1.0 + r8 * (-45.0 + r * (80.0 - 36.0 * r))
    return tl.where(r < 1.0, smooth, 0.0) * norm / x


@triton.jit
def _basis(x, f, k, inv_cutoff, norm, half_root, kind: tl.constexpr):
    """Evaluate the 32 basis functions at the lengths or angles ``x``, [rows]; return [rows, 32].

    ``f`` contains the functions' frequencies and ``k`` their indices, [32] each.
    """
    if kind == 0:
        return _envelope(x, inv_cutoff, norm)[:, None] * tl.sin((x * inv_cutoff)[:, None] * f[None, :])
    phase = x[:, None] * f[None, :]
    waves = tl.where(k[None, :] < 16, tl.sin(phase), tl.cos(phase))
    waves = tl.where(k[None, :] == 0, half_root, waves)
    return tl.where(k[None, :] == 31, 0.0, waves) * norm


@triton.jit
def _basis_slope(x, f, k, inv_cutoff, norm, kind: tl.constexpr):
    """Evaluate the derivatives of `_basis` with respect to the frequencies."""
    if kind == 0:
        scaled = x * inv_cutoff
        return (_envelope(x, inv_cutoff, norm) * scaled)[:, None] * tl.cos(scaled[:, None] * f[None, :])
    phase = x[:, None] * f[None, :]
    slope = tl.where(k[None, :] < 16, tl.cos(phase), -tl.sin(phase)) * x[:, None]
    return tl.where((k[None, :] == 0) | (k[None, :] == 31), 0.0, slope) * norm


@triton.jit(do_not_specialize=["n"])
def basis_forward(
    values,
    chosen,
    frequencies,
    first,
    rest,
    out,
    n,
    inv_cutoff,
    norm,
    half_root,
    kind: tl.constexpr,
    is_chosen: tl.constexpr,
    pieces: tl.constexpr,
    rows: tl.constexpr,
    precision: tl.constexpr,
):
    """Multiply the basis by matrices, and write the products to ``out``.

    ``basis @ first.T`` has shape [n, 64]; ``first`` is [64, 32]. Each block of 128 rows in ``rest`` gives another
    product, with shape [n, 128].
    """
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    k, column = tl.arange(0, 32), tl.arange(0, 64)
    mask = row < n
    at = tl.load(chosen + row, mask=mask, other=0) if is_chosen else row
    x = tl.load(values + at, mask=mask, other=1.0)
    f = tl.load(frequencies + k)
    basis = _basis(x, f, k, inv_cutoff, norm, half_root, kind)
    for piece in tl.static_range(pieces):
        matrix = first if piece == 0 else rest + (piece - 1) * 64 * 32
        weight = tl.load(matrix + k[:, None] + column[None, :] * 32)
        result = tl.dot(basis, weight, input_precision=precision, out_dtype=x.dtype)
        if piece == 0:
            pointer = out + row.to(tl.int64)[:, None] * 64
        else:
            start = n.to(tl.int64) * (64 + (piece - 1) // 2 * 128) + (piece - 1) % 2 * 64
            pointer = out + start + row.to(tl.int64)[:, None] * 128
        tl.store(pointer + column[None, :], result, mask=mask[:, None])


@triton.jit(do_not_specialize=["n", "rows_each"])
def basis_backward(
    values,
    chosen,
    frequencies,
    first,
    rest,
    d0,
    d1,
    d2,
    d3,
    d4,
    partials,
    n,
    rows_each,
    inv_cutoff,
    norm,
    half_root,
    kind: tl.constexpr,
    is_chosen: tl.constexpr,
    pieces: tl.constexpr,
    rows: tl.constexpr,
    precision: tl.constexpr,
):
    """Write partial sums over ``rows_each`` rows: the gradients of the pieces' matrices, then of the frequencies."""
    piece = tl.program_id(0) % pieces
    part = tl.program_id(0) // pieces
    k, column = tl.arange(0, 32), tl.arange(0, 64)
    f = tl.load(frequencies + k)
    matrix, gradient, stride = first, d0, 64
    if piece > 0:
        matrix, stride = rest + (piece - 1) * 64 * 32, 128
        gradient = d1 + (piece - 1) % 2 * 64
    if piece > 2:
        gradient = d2 + (piece - 1) % 2 * 64
    if piece > 4:
        gradient = d3 + (piece - 1) % 2 * 64
    if piece > 6:
        gradient = d4 + (piece - 1) % 2 * 64
    weight = tl.load(matrix + column[:, None] * 32 + k[None, :])
    of_matrix = tl.zeros([64, 32], weight.dtype)
    of_frequencies = tl.zeros([32], weight.dtype)
    begin = part * rows_each
    end = tl.minimum(begin + rows_each, n)
    for start in range(begin, end, rows):
        row = start + tl.arange(0, rows)
        mask = row < end
        at = tl.load(chosen + row, mask=mask, other=0) if is_chosen else row
        x = tl.load(values + at, mask=mask, other=1.0)
        d = tl.load(gradient + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask[:, None], other=0.0)
        basis = _basis(x, f, k, inv_cutoff, norm, half_root, kind)
        of_matrix += tl.dot(tl.trans(d), basis, input_precision=precision, out_dtype=x.dtype)
        of_basis = tl.dot(d, weight, input_precision=precision, out_dtype=x.dtype)
        of_frequencies += tl.sum(of_basis * _basis_slope(x, f, k, inv_cutoff, norm, kind), axis=0)
    row = partials + part.to(tl.int64) * pieces * 66 * 32
    tl.store(row + piece * 64 * 32 + column[:, None] * 32 + k[None, :], of_matrix)
    tl.store(row + pieces * 64 * 32 + piece * 64 + k, of_frequencies)
    tl.store(row + pieces * 64 * 32 + piece * 64 + 32 + k, of_frequencies * 0)


class Basis:
    """One of CHGNet's bases, multiplied by the matrices of all layers that use it.

    Args:
        values: lengths in Å, or angles in radians, [N].
        chosen: rows of ``values`` to take, int32 [n]; None to take all.
        radial: the radial basis of CHGNet's model; None for the Fourier basis.
        precision: precision of the products, "ieee" or "tf32".
    """

    def __init__(self, values: Tensor, chosen: Tensor | None, radial: RadialBessel | None, precision: str) -> None:
        self._values, self._chosen = values, values if chosen is None else chosen
        self._n = len(self._chosen)
        self._numbers = (radial.inv_cutoff, radial.norm_const, 0.0) if radial else (1.0, 1 / _ROOT_PI, _HALF_ROOT)
        self._constants: dict[str, Any] = {
            "kind": _RADIAL if radial else _FOURIER,
            "is_chosen": chosen is not None,
            "rows": BASIS_ROWS,
            "precision": precision,
        }

    def forward(self, frequencies: Tensor, first: Tensor, rest: Tensor | None = None) -> list[Tensor]:
        """Multiply the basis by ``first``, [64, 32], and by ``rest``, [128 · m, 32].

        Return m + 1 products: the first has shape [n, 64], and the others have shape [n, 128]. ``frequencies`` has one
        value for each of the 32 functions, [32].
        """
        more = 0 if rest is None else len(rest) // 128
        out = room(first, self._n * (64 + 128 * more))
        launch(
            basis_forward, triton.cdiv(self._n, BASIS_ROWS), self._values, self._chosen, frequencies, first,
            first if rest is None else rest, out, self._n, *self._numbers, warps=8, pieces=1 + 2 * more,
            **self._constants,
        )  # fmt: skip
        parts = torch.split(out, [self._n * 64, *[self._n * 128] * more])
        return [part.view(self._n, 128 if number else 64) for number, part in enumerate(parts)]

    def backward(self, frequencies: Tensor, first: Tensor, rest: Tensor | None, gradients: list[Tensor]) -> Tensor:
        """Compute partial sums of the gradients of m matrices [64, 32] and of the frequencies, [P, m · (64 · 32 + 64)].

        The matrices are ``first`` and each block of 64 rows in ``rest``; ``gradients`` are the gradients of the
        products. Each row of the result contains the matrices' gradients, then 32 numbers for the frequencies and 32
        zeros per matrix.
        """
        pieces = 2 * len(gradients) - 1
        rows_each = BASIS_ROWS * triton.cdiv(self._n, BASIS_ROWS * BASIS_PARTIALS)
        parts = triton.cdiv(self._n, rows_each) if self._n else 0
        partials = room(first, parts, pieces * 66 * WIDTH)
        launch(
            basis_backward, parts * pieces, self._values, self._chosen, frequencies, first,
            first if rest is None else rest, *gradients, *[first] * (5 - len(gradients)), partials, self._n,
            rows_each, *self._numbers, warps=8, pieces=pieces, **self._constants,
        )  # fmt: skip
        return partials
