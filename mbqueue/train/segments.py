"""Gathers and segment sums."""

from __future__ import annotations

import torch
from torch import Tensor


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x[index]."""
    return x.index_select(0, index)


def gather_sorted(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for an ascending index."""
    return x.index_select(0, index)


def sum_sorted(x: Tensor, owner: Tensor, n: int) -> Tensor:
    """Sum of the rows of each of ``n`` owners, for ascending owners, [n, 64]."""
    return torch.zeros((n, *x.shape[1:]), dtype=x.dtype, device=x.device).index_add(0, owner, x)
