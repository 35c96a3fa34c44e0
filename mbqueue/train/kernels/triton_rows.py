"""GPU kernels for what surrounds the messages: basis functions with their layers, the read-out, sums by element.

Bases are never written: a program computes them for its rows, and multiplies them by the matrices of all layers that
they feed. Gradients recompute them. A program owns its output rows, or writes partial sums over a fixed range of rows.
"""

# Triton compiles the annotations of a kernel, too, so there are none but of constants.
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
from mbqueue.train.kernels.tiles import (
    BASIS_PARTIALS,
    BASIS_ROWS,
    ELEMENT_ROWS,
    PRODUCT_ROWS,
    READ_OUT_ATOMS,
    SUM_ROWS,
)
from mbqueue.train.kernels.triton_gate import sigmoid, silu_slope

#: A basis has 31 functions; they are padded with one that is zero.
WIDTH = 32

_RADIAL, _FOURIER = 0, 1
_HALF_ROOT = float(1 / torch.sqrt(torch.tensor([2.0])))  # see mbqueue.train.forward
_ROOT_PI = math.sqrt(math.pi)


@triton.jit
def _envelope(x, inv_cutoff, norm):
    # CHGNet's smooth cut-off polynomial with p = 8, over the length (chgnet/model/basis.py).
    r = x * inv_cutoff
    r2 = r * r
    r4 = r2 * r2
    r8 = r4 * r4
    smooth = 1.0 + r8 * (-45.0 + r * (80.0 - 36.0 * r))
    return tl.where(r < 1.0, smooth, 0.0) * norm / x


@triton.jit
def _basis(x, f, k, inv_cutoff, norm, half_root, kind: tl.constexpr):
    """[rows, 32] basis functions of [rows] lengths or angles; f and k are frequency and number of each, [32]."""
    if kind == 0:
        return _envelope(x, inv_cutoff, norm)[:, None] * tl.sin((x * inv_cutoff)[:, None] * f[None, :])
    phase = x[:, None] * f[None, :]
    waves = tl.where(k[None, :] < 16, tl.sin(phase), tl.cos(phase))
    waves = tl.where(k[None, :] == 0, half_root, waves)
    return tl.where(k[None, :] == 31, 0.0, waves) * norm


@triton.jit
def _basis_slope(x, f, k, inv_cutoff, norm, kind: tl.constexpr):
    """The derivatives of `_basis` by the frequencies."""
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
    """``out``: [n, 64] from the matrix ``first`` [64, 32], then [n, 128] for each 128 rows of ``rest``."""
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
            place = out + row.to(tl.int64)[:, None] * 64
        else:
            start = n.to(tl.int64) * (64 + (piece - 1) // 2 * 128) + (piece - 1) % 2 * 64
            place = out + start + row.to(tl.int64)[:, None] * 128
        tl.store(place + column[None, :], result, mask=mask[:, None])


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
    """Partial sums over ``rows_each`` rows: gradients of the pieces' matrices, then of the frequencies."""
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


@triton.jit
def sum_by_number(x, order, offsets, out, rows: tl.constexpr):
    """Sums of the rows of ``x``, [A, 64], over the atoms of each element, [94, 64]."""
    number = tl.program_id(0)
    column = tl.arange(0, 64)
    begin, end = tl.load(offsets + number), tl.load(offsets + number + 1)
    total = tl.zeros([64], out.dtype.element_ty)
    for start in range(begin, end, rows):
        place = start + tl.arange(0, rows)
        mask = place < end
        row = tl.load(order + place, mask=mask, other=0)
        total += tl.sum(tl.load(x + row[:, None] * 64 + column[None, :], mask=mask[:, None], other=0.0), axis=0)
    tl.store(out + number * 64 + column, total)


@triton.jit
def _first_atom(n_atoms, crystal, block: tl.constexpr):
    total = tl.zeros([block], tl.int64)
    for start in range(0, crystal, block):
        place = start + tl.arange(0, block)
        total += tl.load(n_atoms + place, mask=place < crystal, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def _layer(x, weight, bias, column, precision: tl.constexpr):
    matrix = tl.load(weight + column[:, None] + column[None, :] * 64)  # transposed
    return tl.dot(x, matrix, input_precision=precision, out_dtype=x.dtype) + tl.load(bias + column)[None, :]


@triton.jit
def _back(d, weight, column, precision: tl.constexpr):
    matrix = tl.load(weight + column[:, None] * 64 + column[None, :])
    return tl.dot(d, matrix, input_precision=precision, out_dtype=d.dtype)


@triton.jit
def _normed(x):
    centred = x - tl.sum(x, axis=1)[:, None] / 64.0
    root = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / 64.0 + 1e-5)
    return centred * root[:, None], root


@triton.jit
def read_out_forward(
    features,
    weights,
    n_atoms,
    numbers,
    out,
    tile: tl.constexpr,
    block: tl.constexpr,
    precision: tl.constexpr,
):
    """Energy of each crystal, [B]; ``weights`` as `ReadOut` packs them."""
    crystal = tl.program_id(0)
    column = tl.arange(0, 64)
    begin = _first_atom(n_atoms, crystal, block)
    count = tl.load(n_atoms + crystal)
    layers = weights + 128
    total = tl.zeros([tile], out.dtype.element_ty)
    for start in range(0, count, tile):
        atom = start + tl.arange(0, tile)
        mask = atom < count
        x = tl.load(features + (begin + atom)[:, None] * 64 + column[None, :], mask=mask[:, None], other=0.0)
        x, _ = _normed(x)
        x = x * tl.load(weights + column)[None, :] + tl.load(weights + 64 + column)[None, :]
        for layer in tl.static_range(3):
            x = _layer(x, layers + layer * 4160, layers + layer * 4160 + 4096, column, precision)
            x = x * sigmoid(x)
        energy = tl.sum(x * tl.load(layers + 3 * 4160 + column)[None, :], axis=1) + tl.load(layers + 3 * 4160 + 64)
        number = tl.load(numbers + begin + atom, mask=mask, other=1)
        energy += tl.load(layers + 3 * 4160 + 65 + number - 1)
        total += tl.where(mask, energy, 0.0)
    tl.store(out + crystal, tl.sum(total, axis=0) / count.to(total.dtype))


@triton.jit(do_not_specialize=["n"])
def read_out_backward(
    features,
    weights,
    n_atoms,
    d_energies,
    d_features,
    inputs,
    gradients,
    n,
    tile: tl.constexpr,
    block: tl.constexpr,
    precision: tl.constexpr,
):
    """Gradient of the features, and by atom what the weights' gradients are sums of.

    ``inputs``, [3, A, 64], are those of the layers; ``gradients``, [7, A, 64], those of the layers' outputs, of the
    norm's scale and shift, of the last layer's weight, and of the site's energy.
    """
    crystal = tl.program_id(0)
    column = tl.arange(0, 64)
    begin = _first_atom(n_atoms, crystal, block)
    count = tl.load(n_atoms + crystal)
    layers = weights + 128
    one, two, three = layers, layers + 4160, layers + 2 * 4160
    scale = tl.load(weights + column)[None, :]
    last = tl.load(layers + 3 * 4160 + column)[None, :]
    d_site = tl.load(d_energies + crystal) / count.to(d_energies.dtype.element_ty)
    size = n.to(tl.int64) * 64
    for start in range(0, count, tile):
        atom = start + tl.arange(0, tile)
        mask = (atom < count)[:, None]
        place = (begin + atom)[:, None] * 64 + column[None, :]
        normed, root = _normed(tl.load(features + place, mask=mask, other=0.0))
        input_1 = normed * scale + tl.load(weights + 64 + column)[None, :]
        pre_1 = _layer(input_1, one, one + 4096, column, precision)
        gate_1 = sigmoid(pre_1)
        input_2 = pre_1 * gate_1
        pre_2 = _layer(input_2, two, two + 4096, column, precision)
        gate_2 = sigmoid(pre_2)
        input_3 = pre_2 * gate_2
        pre_3 = _layer(input_3, three, three + 4096, column, precision)
        gate_3 = sigmoid(pre_3)
        d_3 = d_site * last * silu_slope(pre_3, gate_3)
        d = tl.dot(
            d_3, tl.load(three + column[:, None] * 64 + column[None, :]), input_precision=precision, out_dtype=d_3.dtype
        )
        d_2 = d * silu_slope(pre_2, gate_2)
        d = tl.dot(
            d_2, tl.load(two + column[:, None] * 64 + column[None, :]), input_precision=precision, out_dtype=d_3.dtype
        )
        d_1 = d * silu_slope(pre_1, gate_1)
        d = tl.dot(
            d_1, tl.load(one + column[:, None] * 64 + column[None, :]), input_precision=precision, out_dtype=d_3.dtype
        )
        scaled = d * scale
        mean = tl.sum(scaled, axis=1)[:, None] / 64.0
        along = tl.sum(scaled * normed, axis=1)[:, None] / 64.0
        tl.store(d_features + place, (scaled - mean - normed * along) * root[:, None], mask=mask)
        tl.store(inputs + place, input_1, mask=mask)
        tl.store(inputs + size + place, input_2, mask=mask)
        tl.store(inputs + 2 * size + place, input_3, mask=mask)
        tl.store(gradients + place, d_1, mask=mask)
        tl.store(gradients + size + place, d_2, mask=mask)
        tl.store(gradients + 2 * size + place, d_3, mask=mask)
        tl.store(gradients + 3 * size + place, d * normed, mask=mask)
        tl.store(gradients + 4 * size + place, d, mask=mask)
        tl.store(gradients + 5 * size + place, d_site * pre_3 * gate_3, mask=mask)
        tl.store(gradients + 6 * size + place, d_site + tl.zeros_like(d), mask=mask)


@triton.jit
def add_partials_kernel(table, dtype: tl.constexpr, rows: tl.constexpr):
    """Each program adds up 64 columns of an array of partial sums, in a fixed order.

    ``table``, int64 [programs, 4]: addresses of the columns and of their sum, rows, columns between two rows.
    """
    job = table + tl.program_id(0) * 4
    partials = tl.load(job).to(tl.pointer_type(dtype))
    out = tl.load(job + 1).to(tl.pointer_type(dtype))
    count, stride = tl.load(job + 2), tl.load(job + 3)
    column = tl.arange(0, 64)
    total = tl.zeros([64], dtype)
    for start in range(0, count, rows):
        row = start + tl.arange(0, rows)
        place = partials + row[:, None] * stride + column[None, :]
        total += tl.sum(tl.load(place, mask=(row < count)[:, None], other=0.0), axis=0)
    tl.store(out + column, total)


@triton.jit
def weight_gradients_kernel(table, dtype: tl.constexpr, rows: tl.constexpr, precision: tl.constexpr):
    """Each program computes 64 rows of the gradient of a layer's matrix, and of its bias.

    ``table``, int64 [programs, 6]: addresses of 64 columns of the gradient of the layer's output, of its input
    [n, 64], of the matrix' and of the bias' gradient (0 for none); n, and columns of the output.
    """
    job = table + tl.program_id(0) * 6
    d_out = tl.load(job).to(tl.pointer_type(dtype))
    x = tl.load(job + 1).to(tl.pointer_type(dtype))
    d_weight = tl.load(job + 2).to(tl.pointer_type(dtype))
    of_bias = tl.load(job + 3)
    count, stride = tl.load(job + 4), tl.load(job + 5)
    column = tl.arange(0, 64)
    total, bias = tl.zeros([64, 64], dtype), tl.zeros([64], dtype)
    for start in range(0, count, rows):
        row = start + tl.arange(0, rows)
        mask = (row < count)[:, None]
        d = tl.load(d_out + row[:, None] * stride + column[None, :], mask=mask, other=0.0)
        of_input = tl.load(x + row[:, None] * 64 + column[None, :], mask=mask, other=0.0)
        total += tl.dot(tl.trans(d), of_input, input_precision=precision, out_dtype=dtype)
        bias += tl.sum(d, axis=0)
    tl.store(d_weight + column[:, None] * 64 + column[None, :], total)
    if of_bias != 0:
        tl.store(of_bias.to(tl.pointer_type(dtype)) + column, bias)


class Later:
    """Sums over rows that nothing waits for: noted while the gradient is computed, and launched together at its end.

    Two launches take the place of about forty. What is noted must stay as it is until `run`.
    """

    def __init__(self) -> None:
        self._sums: list[list[int]] = []
        self._products: list[list[int]] = []
        self._held: list[Tensor] = []

    def add(self, partials: Tensor, out: Tensor) -> None:
        """Note that ``out``, with a multiple of 64 numbers, becomes the sum over the rows of ``partials``, [P, …]."""
        self._held += [partials, out]
        size, columns = partials.element_size(), partials.stride(0)
        for start in range(0, out.numel(), 64):
            addresses = [tensor.data_ptr() + start * size for tensor in (partials, out)]
            self._sums.append([*addresses, len(partials), columns])

    def multiply(self, d_out: Tensor, x: Tensor, d_weight: Tensor, d_bias: Tensor | None = None) -> None:
        """Note that ``d_weight``, [m, 64], becomes ``d_out``ᵀ · ``x``, and ``d_bias`` the sum over rows of ``d_out``.

        ``d_out`` is [n, m] with m a multiple of 64, and ``x`` is [n, 64]; all are contiguous.
        """
        self._held += [d_out, x, d_weight]
        size, columns = d_out.element_size(), d_out.shape[1]
        for start in range(0, columns, 64):
            bias = 0 if d_bias is None else d_bias.data_ptr() + start * size
            addresses = [d_out.data_ptr() + start * size, x.data_ptr(), d_weight.data_ptr() + 64 * start * size, bias]
            self._products.append([*addresses, len(d_out), columns])

    def run(self, precision: str) -> None:
        """Compute all that was noted, products in ``precision``."""
        like = self._held[0]
        dtype = {torch.float32: tl.float32, torch.float64: tl.float64}[like.dtype]
        numbers = [number for job in [*self._sums, *self._products] for number in job]
        table = torch.tensor(numbers, dtype=torch.int64)
        if like.device.type == "cuda":
            table = table.pin_memory().to(like.device, non_blocking=True)
        launch(add_partials_kernel, len(self._sums), table, warps=4, dtype=dtype, rows=SUM_ROWS)
        launch(
            weight_gradients_kernel, len(self._products), table[4 * len(self._sums) :], warps=8, dtype=dtype,
            rows=PRODUCT_ROWS, precision=precision,
        )  # fmt: skip


class Basis:
    """One of CHGNet's bases, multiplied by the matrices of all layers that it feeds.

    Args:
        values: lengths in Å, or angles in radian, [N].
        chosen: rows of ``values`` to take, int32 [n]; None takes all.
        radial: CHGNet's radial basis; None is its Fourier basis.
        precision: of the products, "ieee" or "tf32".
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
        """[n, 64] from the matrix ``first``, [64, 32], and [n, 128] for each 128 rows of ``rest``, [128 · m, 32].

        ``frequencies`` are one for each of the 32 functions, [32].
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
        """Partial sums, [P, m · (64 · 32 + 64)]: gradients of m matrices [64, 32], then m times of the frequencies.

        The matrices are ``first`` and each 64 rows of ``rest``; ``gradients`` are those of what they gave. Each of the
        m parts of the frequencies' gradient is followed by 32 zeros.
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


def by_number(x: Tensor, order: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    """Sums of the rows of ``x``, [A, 64], over the atoms of each element, [94, 64].

    Args:
        x: one row for each atom.
        order: atoms sorted by atomic number, int32 [A].
        offsets: first place in ``order`` of each atomic number from 1, int32 [95].
        out: where to write them; None makes room.
    """
    out = room(x, len(offsets) - 1, 64) if out is None else out
    launch(sum_by_number, len(out), x, order, offsets, out, warps=1, rows=ELEMENT_ROWS)
    return out


#: What `energies_forward` takes as one vector: norm's scale and shift, three layers (matrix, bias), last layer (weight,
#: bias), references of the 94 elements.
READ_OUT_SIZES = (64, 64, *[64 * 64, 64] * 3, 64, 1, 94)


def energies_forward(features: Tensor, weights: Tensor, n_atoms: Tensor, numbers: Tensor, precision: str) -> Tensor:
    """Formation energy of each crystal, eV/atom, [B].

    Args:
        features: of the atoms, [A, 64].
        weights: of the read-out, see `READ_OUT_SIZES`.
        n_atoms: atoms per crystal, int64 [B].
        numbers: atomic numbers, int64 [A].
        precision: of the products, "ieee" or "tf32".
    """
    out = room(features, len(n_atoms))
    launch(
        read_out_forward, len(n_atoms), features, weights, n_atoms, numbers, out, warps=4, tile=READ_OUT_ATOMS,
        block=128, precision=precision,
    )  # fmt: skip
    return out


def energies_backward(
    features: Tensor,
    weights: Tensor,
    n_atoms: Tensor,
    d_energies: Tensor,
    order: Tensor,
    offsets: Tensor,
    precision: str,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the features, and of the parts of ``weights`` in the order of `READ_OUT_SIZES`."""
    n = len(features)
    d_features, inputs, gradients = room(features, n, 64), room(features, 3, n, 64), room(features, 7, n, 64)
    launch(
        read_out_backward, len(n_atoms), features, weights, n_atoms, d_energies, d_features, inputs, gradients, n,
        warps=8, tile=READ_OUT_ATOMS, block=128, precision=precision,
    )  # fmt: skip
    matrices = torch.bmm(gradients[:3].transpose(1, 2), inputs)
    vectors = gradients.sum(dim=1)
    references = by_number(gradients[6], order, offsets)[:, 0]
    layers = [part for layer in range(3) for part in (matrices[layer], vectors[layer])]
    return d_features, [vectors[3], vectors[4], *layers, vectors[5], vectors[6, :1], references]
