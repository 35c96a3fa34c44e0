"""Gathers and segment sums with deterministic gradients, which use no atomics and add in a fixed order.

On a GPU, the gradient of `index_select` adds with atomics, in an order that depends on the threads. In this module, an
`Index` stores the order that sorts its rows, so that each row of a gradient is always summed in the same order. No
function in this module waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Index:
    """Which rows to gather, and in which order to sum them.

    Attributes:
        rows: source row of each gathered row, int32 or int64 [n].
        order: the stable order that sorts ``rows``; None if ``rows`` is already sorted.
        offsets: start of each source row's segment in the sorted rows, followed by n, int32 or int64 [N + 1].
    """

    rows: Tensor
    order: Tensor | None
    offsets: Tensor

    @classmethod
    def of(cls, rows: Tensor, n: int, order: Tensor | None = None, *, is_sorted: bool = False) -> Index:
        """Make an index that gathers ``rows`` from ``n`` source rows.

        ``order`` sorts ``rows``; by default, the method computes ``order``.
        """
        if is_sorted:
            ascending = rows
        else:
            order = torch.argsort(rows, stable=True) if order is None else order
            ascending = rows.index_select(0, order)
        offsets = torch.searchsorted(ascending, torch.arange(n + 1, device=rows.device, dtype=rows.dtype))
        return cls(rows, order, offsets)

    def gather(self, x: Tensor) -> Tensor:
        """Return ``x[rows]``, [n, …]."""
        out: Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def sum(self, x: Tensor) -> Tensor:
        """Sum the rows of ``x``, [n, …], that belong to each source row; return [N, …]."""
        out: Tensor = _Sum.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def _sum(self, x: Tensor) -> Tensor:
        ascending = x if self.order is None else x.index_select(0, self.order)
        # The option `unsafe` skips checking the offsets, because the check would wait for the device.
        total: Tensor = torch.segment_reduce(
            ascending.contiguous(), "sum", offsets=self.offsets, axis=0, unsafe=True, initial=0
        )
        return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Index) -> Tensor:
        ctx.index = index
        return x.index_select(0, index.rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.index._sum(gradients[0]), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Index) -> Tensor:
        ctx.index = index
        return index._sum(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0].index_select(0, ctx.index.rows), None


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Return ``x[rows]``; no row may occur twice. On the CPU, this function is faster than `Index.gather`."""
    out: Tensor = _Take.apply(x, rows)  # type: ignore[no-untyped-call]
    return out


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.rows, ctx.n = rows, len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = gradients
        whole = gradient.new_zeros(ctx.n, *gradient.shape[1:])
        return whole.index_copy_(0, ctx.rows.long(), gradient), None
