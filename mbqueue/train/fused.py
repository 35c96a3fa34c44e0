"""CHGNet's gated messages on the CPU in float32, through the compiled kernels, with their gradients.

Work is cut into a fixed number of ranges of whole crystals, about equal in cost. Threads take range after range; what
each range adds up (gradients of the weights) is summed in the order of ranges, so the number of threads changes
nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbqueue.data.batch import Batch
from mbqueue.train.gated import Gate

Array = NDArray[Any]

_RANGES = 32


class FusedMessages:
    """The three gathers-and-sums of CHGNet's blocks, on one batch; the same functions as `PlainMessages`."""

    def __init__(self, batch: Batch) -> None:
        self.center, self.neighbor, self.undirected = _arrays(
            batch.bond_center, batch.bond_neighbor, batch.bond_undirected
        )
        self.angle_center, self.angle_i, self.angle_j = _arrays(
            batch.angle_center, batch.angle_bond_i, batch.angle_bond_j
        )
        self.n_atoms, self.n_shorts = len(batch.atomic_numbers), len(batch.short_bond)
        atoms = np.concatenate([[0], np.cumsum(batch.n_atoms.numpy())])
        bonds = np.searchsorted(
            self.center, atoms
        )  # first bond of each crystal; its undirected ones begin at half that
        shorts = np.searchsorted(batch.short_bond.numpy(), bonds // 2)
        angles = np.searchsorted(self.angle_i, shorts)
        self.bond_ranges = _ranges(bonds)
        self.angle_ranges = _ranges(angles)

    def of_bonds(self, atoms: Tensor, bonds: Tensor, weights: Tensor, gate: Gate) -> Tensor:
        """See `PlainMessages.of_bonds`."""
        out: Tensor = _Bonds.apply(self, atoms, bonds, weights, gate.second, gate.bias, gate.scale, gate.shift)
        return out

    def of_angles(
        self, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, weights: Tensor, gate: Gate
    ) -> Tensor:
        """See `PlainMessages.of_angles`."""
        parts = (atoms, shorts, angles, first, weights, gate.second, gate.bias, gate.scale, gate.shift)
        out: Tensor = _Angles.apply(self, *parts)
        return out

    def updated_angles(self, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, gate: Gate) -> Tensor:
        """See `PlainMessages.updated_angles`."""
        out: Tensor = _Update.apply(self, atoms, shorts, angles, first, gate.scale, gate.shift)
        return out


def _arrays(*tensors: Tensor) -> list[Array]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _ranges(borders: Array) -> list[tuple[int, int]]:
    """At most 32 ranges of rows of about the same length, cut at the borders of crystals."""
    total = int(borders[-1])
    wanted = np.arange(1, _RANGES) * total / _RANGES
    cuts = np.unique(np.concatenate([[0, total], borders[np.searchsorted(borders, wanted)]]))
    return [(int(a), int(b)) for a, b in itertools.pairwise(cuts)]


def _blocks_transposed(weight: Array) -> Array:
    """The two square matrices of core and gate, each transposed, one below the other."""
    # Row by row, or the kernels would be compiled for strides and run at a third of the speed.
    return np.ascontiguousarray(np.concatenate([weight[:64].T, weight[64:].T]))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=64, thread_name_prefix="mbqueue-kernel")


def _for_each(ranges: list[tuple[int, int]], run: Callable[[int, int, int], None]) -> None:
    """``run(number, begin, end)`` for all ranges, on as many threads as torch uses."""
    helpers = min(torch.get_num_threads(), len(ranges)) - 1
    if helpers <= 0:
        for number, (begin, end) in enumerate(ranges):
            run(number, begin, end)
        return
    numbers = itertools.count()

    def work() -> None:
        while (number := next(numbers)) < len(ranges):
            run(number, *ranges[number])

    others = [_threads().submit(work) for _ in range(helpers)]
    work()
    for other in others:
        other.result()


def _tensors(*arrays: Array) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in arrays)


class _Bonds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: FusedMessages, *inputs: Tensor) -> Tensor:
        from mbqueue.train import kernels  # noqa: PLC0415  compiles at its first use, and only the CPU needs it

        ctx.plan = plan
        ctx.save_for_backward(*inputs)
        atoms, bonds, weights, second, bias, scale, shift = _arrays(*inputs)
        out = np.zeros((plan.n_atoms, 64), np.float32)
        transposed = _blocks_transposed(second)
        _for_each(
            plan.bond_ranges,
            lambda _number, begin, end: kernels.bonds_forward(
                begin,
                end,
                plan.center,
                plan.neighbor,
                plan.undirected,
                atoms,
                bonds,
                weights,
                transposed,
                bias,
                scale,
                shift,
                out,
            ),
        )
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from mbqueue.train import kernels  # noqa: PLC0415

        plan = ctx.plan
        atoms, bonds, weights, second, bias, scale, shift = _arrays(*ctx.saved_tensors)
        [d_out] = _arrays(*gradients)
        d_atoms, d_bonds, d_weights = np.zeros_like(atoms), np.zeros_like(bonds), np.zeros_like(weights)
        d_second, sums = _partial_sums(plan.bond_ranges)
        transposed = _blocks_transposed(second)
        _for_each(
            plan.bond_ranges,
            lambda number, begin, end: kernels.bonds_backward(
                begin,
                end,
                plan.center,
                plan.neighbor,
                plan.undirected,
                atoms,
                bonds,
                weights,
                transposed,
                bias,
                scale,
                shift,
                second,
                d_out,
                d_atoms,
                d_bonds,
                d_weights,
                d_second[number],
                sums[number],
            ),
        )
        d_scale, d_shift, d_bias = sums.sum(axis=0)
        return None, *_tensors(d_atoms, d_bonds, d_weights, d_second.sum(axis=0), d_bias, d_scale, d_shift)


class _Angles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: FusedMessages, *inputs: Tensor) -> Tensor:
        from mbqueue.train import kernels  # noqa: PLC0415

        ctx.plan = plan
        ctx.save_for_backward(*inputs)
        atoms, shorts, angles, first, weights, second, bias, scale, shift = _arrays(*inputs)
        out = np.zeros((plan.n_shorts, 64), np.float32)
        first_transposed, transposed = _blocks_transposed(first), _blocks_transposed(second)
        _for_each(
            plan.angle_ranges,
            lambda _number, begin, end: kernels.angles_forward(
                begin,
                end,
                plan.angle_center,
                plan.angle_i,
                plan.angle_j,
                atoms,
                shorts,
                angles,
                first_transposed,
                weights,
                transposed,
                bias,
                scale,
                shift,
                out,
            ),
        )
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from mbqueue.train import kernels  # noqa: PLC0415

        plan = ctx.plan
        atoms, shorts, angles, first, weights, second, bias, scale, shift = _arrays(*ctx.saved_tensors)
        [d_out] = _arrays(*gradients)
        d_atoms, d_shorts, d_angles = np.zeros_like(atoms), np.zeros_like(shorts), np.zeros_like(angles)
        d_weights = np.zeros_like(weights)
        d_second, sums = _partial_sums(plan.angle_ranges)
        d_first = np.zeros_like(d_second)
        first_transposed, transposed = _blocks_transposed(first), _blocks_transposed(second)
        _for_each(
            plan.angle_ranges,
            lambda number, begin, end: kernels.angles_backward(
                begin,
                end,
                plan.angle_center,
                plan.angle_i,
                plan.angle_j,
                atoms,
                shorts,
                angles,
                first_transposed,
                weights,
                transposed,
                bias,
                scale,
                shift,
                first,
                second,
                d_out,
                d_atoms,
                d_shorts,
                d_angles,
                d_weights,
                d_first[number],
                d_second[number],
                sums[number],
            ),
        )
        d_scale, d_shift, d_bias = sums.sum(axis=0)
        return None, *_tensors(
            d_atoms, d_shorts, d_angles, d_first.sum(axis=0), d_weights, d_second.sum(axis=0), d_bias, d_scale, d_shift
        )


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: FusedMessages, *inputs: Tensor) -> Tensor:
        from mbqueue.train import kernels  # noqa: PLC0415

        ctx.plan = plan
        ctx.save_for_backward(*inputs)
        atoms, shorts, angles, first, scale, shift = _arrays(*inputs)
        out = np.empty_like(angles)
        first_transposed = _blocks_transposed(first)
        _for_each(
            plan.angle_ranges,
            lambda _number, begin, end: kernels.update_forward(
                begin,
                end,
                plan.angle_center,
                plan.angle_i,
                plan.angle_j,
                atoms,
                shorts,
                angles,
                first_transposed,
                scale,
                shift,
                out,
            ),
        )
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from mbqueue.train import kernels  # noqa: PLC0415

        plan = ctx.plan
        atoms, shorts, angles, first, scale, shift = _arrays(*ctx.saved_tensors)
        [d_out] = _arrays(*gradients)
        d_atoms, d_shorts, d_angles = np.zeros_like(atoms), np.zeros_like(shorts), d_out.copy()
        d_first, sums = _partial_sums(plan.angle_ranges)
        first_transposed = _blocks_transposed(first)
        _for_each(
            plan.angle_ranges,
            lambda number, begin, end: kernels.update_backward(
                begin,
                end,
                plan.angle_center,
                plan.angle_i,
                plan.angle_j,
                atoms,
                shorts,
                angles,
                first_transposed,
                scale,
                shift,
                first,
                d_out,
                d_atoms,
                d_shorts,
                d_angles,
                d_first[number],
                sums[number],
            ),
        )
        d_scale, d_shift, _ = sums.sum(axis=0)
        return None, *_tensors(d_atoms, d_shorts, d_angles, d_first.sum(axis=0), d_scale, d_shift)


def _partial_sums(ranges: list[tuple[int, int]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """For each range, room for the gradient of a [128, 64] matrix and of norms and bias, [3, 128]."""
    return np.zeros((len(ranges), 128, 64), np.float32), np.zeros((len(ranges), 3, 128), np.float32)
