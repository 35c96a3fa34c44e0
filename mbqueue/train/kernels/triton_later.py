"""Defer sums and products over rows to the end of a backward pass, and compute them together on a GPU."""

# Triton also compiles annotations, so only the constants of a kernel are annotated.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbqueue.train.kernels.launching import launch
from mbqueue.train.kernels.tiles import PRODUCT_ROWS, SUM_ROWS


@triton.jit
def add_all_partials_kernel(table, dtype: tl.constexpr, rows: tl.constexpr):
    """Add up partial sums in a fixed order; each program adds up 64 columns.

    A row of ``table``, int64 [programs, 4], describes the work of one program: the addresses of the columns and of
    their sum, the number of rows, and the stride between rows.
    """
    job = table + tl.program_id(0) * 4
    partials = tl.load(job).to(tl.pointer_type(dtype))
    out = tl.load(job + 1).to(tl.pointer_type(dtype))
    count, stride = tl.load(job + 2), tl.load(job + 3)
    column = tl.arange(0, 64)
    total = tl.zeros([64], dtype)
    for start in range(0, count, rows):
        row = start + tl.arange(0, rows)
        pointer = partials + row[:, None] * stride + column[None, :]
        total += tl.sum(tl.load(pointer, mask=(row < count)[:, None], other=0.0), axis=0)
    tl.store(out + column, total)


@triton.jit
def weight_gradients_kernel(table, dtype: tl.constexpr, rows: tl.constexpr, precision: tl.constexpr):
    """Compute the gradients of the layers' matrices and biases; each program computes 64 rows.

    A row of ``table``, int64 [programs, 6], describes the work of one program: the addresses of 64 columns of the
    output's gradient, of the input [n, 64], of the matrix's gradient and of the bias's gradient (0 for none); n; the
    number of output columns.
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
    """Deferred sums over rows, recorded during the backward pass and computed together at its end.

    Deferring the sums replaces about forty launches with two. Until you call `run`, do not change the tensors to sum.
    """

    def __init__(self) -> None:
        self._sums: list[list[int]] = []
        self._products: list[list[int]] = []
        self._held: list[Tensor] = []

    def add(self, partials: Tensor, out: Tensor) -> None:
        """Defer summing ``partials``, [P, …], over rows into ``out``, whose size is a multiple of 64."""
        self._held += [partials, out]
        size, columns = partials.element_size(), partials.stride(0)
        for start in range(0, out.numel(), 64):
            addresses = [tensor.data_ptr() + start * size for tensor in (partials, out)]
            self._sums.append([*addresses, len(partials), columns])

    def multiply(self, d_out: Tensor, x: Tensor, d_weight: Tensor, d_bias: Tensor | None = None) -> None:
        """Defer computing ``d_weight`` = ``d_out``ᵀ · ``x``, [m, 64], and ``d_bias``, the sum over rows of ``d_out``.

        ``d_out`` is [n, m] with m a multiple of 64, and ``x`` is [n, 64]; all are contiguous.
        """
        self._held += [d_out, x, d_weight]
        size, columns = d_out.element_size(), d_out.shape[1]
        for start in range(0, columns, 64):
            bias = 0 if d_bias is None else d_bias.data_ptr() + start * size
            addresses = [d_out.data_ptr() + start * size, x.data_ptr(), d_weight.data_ptr() + 64 * start * size, bias]
            self._products.append([*addresses, len(d_out), columns])

    def run(self, precision: str) -> None:
        """Compute all deferred sums, and all deferred products in ``precision``."""
        like = self._held[0]
        dtype = {torch.float32: tl.float32, torch.float64: tl.float64}[like.dtype]
        numbers = [number for job in [*self._sums, *self._products] for number in job]
        table = torch.tensor(numbers, dtype=torch.int64)
        if like.device.type == "cuda":
            table = table.pin_memory().to(like.device, non_blocking=True)
        launch(add_all_partials_kernel, len(self._sums), table, warps=4, dtype=dtype, rows=SUM_ROWS)
        launch(
            weight_gradients_kernel, len(self._products), table[4 * len(self._sums) :], warps=8, dtype=dtype,
            rows=PRODUCT_ROWS, precision=precision,
        )  # fmt: skip
