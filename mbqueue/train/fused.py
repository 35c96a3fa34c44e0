"""Compute CHGNet's gated messages and their gradients on the CPU, in float32, with compiled kernels.

The work is divided into a fixed number of ranges of about equal cost, and each range contains whole crystals. The
ranges' weight gradients are summed in a fixed order, so the result does not depend on the number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbqueue.data.batch import Batch
from mbqueue.train.gated import Gate
from mbqueue.train.segments import take

Array = NDArray[Any]

_RANGES = 32


class FusedMessages:
    """CHGNet's message passing on one batch with the CPU's kernels, with the same methods as `PlainMessages`."""

    def __init__(self, batch: Batch) -> None:
        self._short = batch.short_bond
        # For each directed bond: centre, neighbour and undirected bond. For each angle: centre, bond i and bond j.
        self.bonds = tuple(_arrays(batch.bond_center, batch.bond_neighbor, batch.bond_undirected))
        self.angles = tuple(_arrays(batch.angle_center, batch.angle_bond_i, batch.angle_bond_j))
        self.n_atoms, self.n_shorts = len(batch.atomic_numbers), len(batch.short_bond)
        atoms = np.concatenate([[0], np.cumsum(batch.n_atoms.numpy())])
        # Index of each crystal's first directed bond, which is twice the index of the crystal's first undirected bond.
        bonds = np.searchsorted(self.bonds[0], atoms)
        shorts = np.searchsorted(batch.short_bond.numpy(), bonds // 2)
        angles = np.searchsorted(self.angles[1], shorts)
        self.bond_ranges = _ranges(bonds)
        self.angle_ranges = _ranges(angles)

    def shorts_of(self, bonds: Tensor) -> Tensor:
        return take(bonds, self._short)

    def add_to_shorts(self, bonds: Tensor, x: Tensor) -> Tensor:
        return bonds.index_add(0, self._short, x)

    def of_bonds(self, atoms: Tensor, bonds: Tensor, weights: Tensor, gate: Gate) -> Tensor:
        out: Tensor = _Bonds.apply(  # type: ignore[no-untyped-call]
            self, atoms, bonds, weights, gate.second, gate.bias, gate.scale, gate.shift
        )
        return out

    def of_angles(
        self, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, weights: Tensor, gate: Gate
    ) -> Tensor:
        parts = (atoms, shorts, angles, first, weights, gate.second, gate.bias, gate.scale, gate.shift)
        out: Tensor = _Angles.apply(self, *parts)  # type: ignore[no-untyped-call]
        return out

    def updated_angles(self, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, gate: Gate) -> Tensor:
        out: Tensor = _Update.apply(self, atoms, shorts, angles, first, gate.scale, gate.shift)  # type: ignore[no-untyped-call]
        return out


def _arrays(*tensors: Tensor) -> list[Array]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _ranges(borders: Array) -> list[tuple[int, int]]:
    """Divide rows into at most 32 ranges of about equal length, each of which ends where a crystal ends."""
    total = int(borders[-1])
    wanted = np.arange(1, _RANGES) * total / _RANGES
    cuts = np.unique(np.concatenate([[0, total], borders[np.searchsorted(borders, wanted)]]))
    return [(int(a), int(b)) for a, b in itertools.pairwise(cuts)]


def _blocks_transposed(weight: Array) -> Array:
    """Transpose the square matrices of core and gate one by one, and stack core above gate, [128, 64]."""
    # Make the array contiguous, because kernels compiled for strided arrays run at a third of the speed.
    return np.ascontiguousarray(np.concatenate([weight[:64].T, weight[64:].T]))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=64, thread_name_prefix="mbqueue-kernel")


@contextmanager
def _subnormals_as_zero() -> Iterator[None]:
    """Treat numbers below 1.2e-38 as zero in this thread, within a ``with`` block.

    Closed gates and bonds near the cut-off produce gradients below 1.2e-38, which are too small to change any sum. Some
    processors compute a hundred times slower with numbers below 1.2e-38. To measure the cost, run `python -m
    benchmarks.training --subnormals`. Each task calls this function, because other work in its thread may have
    switched off the processor's flush-to-zero mode.
    """
    was_on = float(np.float32(1e-38) * np.float32(0.1)) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_on)


def _for_each(ranges: list[tuple[int, int]], run: Callable[[int, int, int], None]) -> None:
    """Call ``run(number, begin, end)`` for all ranges, on as many threads as torch uses."""
    numbers = itertools.count()

    def work() -> None:
        with _subnormals_as_zero():
            while (number := next(numbers)) < len(ranges):
                run(number, *ranges[number])

    others = [_threads().submit(work) for _ in range(min(torch.get_num_threads(), len(ranges)) - 1)]
    work()
    for other in others:
        other.result()


def _tensors(*arrays: Array) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in arrays)


class _Bonds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: FusedMessages, *inputs: Tensor) -> Tensor:
        kernels = _kernels()
        ctx.plan = plan
        ctx.save_for_backward(*inputs)
        *arrays, second, bias, scale, shift = _arrays(*inputs)
        out = np.zeros((plan.n_atoms, 64), np.float32)
        gate = (_blocks_transposed(second), bias, scale, shift)
        _for_each(
            plan.bond_ranges,
            lambda _, begin, end: kernels.bonds_forward(begin, end, plan.bonds, tuple(arrays), gate, out),
        )
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kernels, plan = _kernels(), ctx.plan
        *arrays, second, bias, scale, shift = _arrays(*ctx.saved_tensors)
        [d_out] = _arrays(*gradients)
        d_inputs = tuple(np.zeros_like(array) for array in arrays)
        d_second, d_norm = _matrices(plan.bond_ranges), _norms(plan.bond_ranges)
        gate = (_blocks_transposed(second), bias, scale, shift)
        _for_each(
            plan.bond_ranges,
            lambda number, begin, end: kernels.bonds_backward(
                begin, end, plan.bonds, tuple(arrays), gate, second, d_out, d_inputs, (d_second[number], d_norm[number])
            ),
        )
        d_scale, d_shift, d_bias = d_norm.sum(axis=0)
        return None, *_tensors(*d_inputs, d_second.sum(axis=0), d_bias, d_scale, d_shift)


class _Angles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: FusedMessages, *inputs: Tensor) -> Tensor:
        kernels = _kernels()
        ctx.plan = plan
        ctx.save_for_backward(*inputs)
        *arrays, first, weights, second, bias, scale, shift = _arrays(*inputs)
        out = np.zeros((plan.n_shorts, 64), np.float32)
        weight, gate = _blocks_transposed(first), (_blocks_transposed(second), bias, scale, shift)
        _for_each(
            plan.angle_ranges,
            lambda _, begin, end: kernels.angles_forward(
                begin, end, plan.angles, tuple(arrays), weights, weight, gate, out
            ),
        )
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kernels, plan = _kernels(), ctx.plan
        *arrays, first, weights, second, bias, scale, shift = _arrays(*ctx.saved_tensors)
        [d_out] = _arrays(*gradients)
        d_inputs, d_weights = tuple(np.zeros_like(array) for array in arrays), np.zeros_like(weights)
        ranges = plan.angle_ranges
        d_first, d_second, d_norm = _matrices(ranges), _matrices(ranges), _norms(ranges)
        weight, gate = _blocks_transposed(first), (_blocks_transposed(second), bias, scale, shift)

        def run(number: int, begin: int, end: int) -> None:
            sums = (d_first[number], d_second[number], d_norm[number])
            kernels.angles_backward(
                begin, end, plan.angles, tuple(arrays), weights, weight, gate, (first, second), d_out, d_inputs,
                d_weights, sums,
            )  # fmt: skip

        _for_each(ranges, run)
        d_scale, d_shift, d_bias = d_norm.sum(axis=0)
        shared = (d_first.sum(axis=0), d_weights, d_second.sum(axis=0), d_bias, d_scale, d_shift)
        return None, *_tensors(*d_inputs, *shared)


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: FusedMessages, *inputs: Tensor) -> Tensor:
        kernels = _kernels()
        ctx.plan = plan
        ctx.save_for_backward(*inputs)
        *arrays, first, scale, shift = _arrays(*inputs)
        out = np.empty_like(arrays[2])
        weight = _blocks_transposed(first)
        _for_each(
            plan.angle_ranges,
            lambda _, begin, end: kernels.update_forward(
                begin, end, plan.angles, tuple(arrays), weight, scale, shift, out
            ),
        )
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kernels, plan = _kernels(), ctx.plan
        *arrays, first, scale, shift = _arrays(*ctx.saved_tensors)
        [d_out] = _arrays(*gradients)
        d_inputs = (np.zeros_like(arrays[0]), np.zeros_like(arrays[1]), d_out.copy())
        d_first, d_norm = _matrices(plan.angle_ranges), _norms(plan.angle_ranges)
        weight = _blocks_transposed(first)

        def run(number: int, begin: int, end: int) -> None:
            sums = (d_first[number], d_norm[number])
            kernels.update_backward(
                begin, end, plan.angles, tuple(arrays), weight, scale, shift, first, d_out, d_inputs, sums
            )

        _for_each(plan.angle_ranges, run)
        d_scale, d_shift, _ = d_norm.sum(axis=0)
        return None, *_tensors(*d_inputs, d_first.sum(axis=0), d_scale, d_shift)


def _kernels() -> ModuleType:
    from mbqueue.train import kernels  # noqa: PLC0415  only a CPU needs numba

    return kernels


def _matrices(ranges: list[tuple[int, int]]) -> NDArray[np.float32]:
    return np.zeros((len(ranges), 128, 64), np.float32)


def _norms(ranges: list[tuple[int, int]]) -> NDArray[np.float32]:
    return np.zeros((len(ranges), 3, 128), np.float32)
