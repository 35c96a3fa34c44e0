"""CHGNet's gated messages with the Triton kernels, one function at a time, each with its gradient.

Training runs the whole model at once (`mbqueue.train.triton_forward`). Tests and `benchmarks.kernel_precision` compare
each kernel with plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbqueue.data.batch import Batch
from mbqueue.train.gated import Gate, PlainMessages
from mbqueue.train.kernels.tiles import Tiles
from mbqueue.train.triton_plan import Plan


class TritonMessages(PlainMessages):
    """CHGNet's message passing on one batch with Triton kernels; the methods are those of `PlainMessages`."""

    def __init__(self, batch: Batch, tiles: Tiles | None = None, precision: str | None = None) -> None:
        super().__init__(batch)
        self.plan = Plan.of(batch, tiles, precision)

    def of_bonds(self, atoms: Tensor, bonds: Tensor, weights: Tensor, gate: Gate) -> Tensor:
        """See `PlainMessages.of_bonds`."""
        out: Tensor = _Bonds.apply(self.plan, atoms, bonds, weights, gate.second, gate.bias, gate.scale, gate.shift)
        return out

    def of_angles(
        self, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, weights: Tensor, gate: Gate
    ) -> Tensor:
        """See `PlainMessages.of_angles`."""
        parts = (atoms, shorts, angles, first, weights, gate.second, gate.bias, gate.scale, gate.shift)
        out: Tensor = _Angles.apply(self.plan, *parts)
        return out

    def updated_angles(self, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, gate: Gate) -> Tensor:
        """See `PlainMessages.updated_angles`."""
        out: Tensor = _Update.apply(self.plan, atoms, shorts, angles, first, gate.scale, gate.shift)
        return out


def _parameters(partials: Tensor, matrices: int) -> list[Tensor]:
    """Add up partial sums, and split the result into gradients of matrices [128, 64] and vectors [128]."""
    from mbqueue.train.kernels.triton_later import Later

    sums, later = partials.new_empty(partials.shape[1:]), Later()
    later.add(partials, sums)
    later.run("ieee")
    border = matrices * 128 * 64
    return [*sums[:border].view(-1, 128, 64), *sums[border:].view(-1, 128)]


class _Bonds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *inputs: Tensor) -> Tensor:
        from mbqueue.train.kernels import triton_bonds as kernels

        ctx.plan = plan
        ctx.save_for_backward(*inputs)
        atoms, bonds, weights, *gate = inputs
        return kernels.bonds_forward(plan, atoms, bonds, weights, _gate(gate))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from mbqueue.train.kernels import triton_bonds as kernels

        atoms, bonds, weights, *gate = ctx.saved_tensors
        found = kernels.bonds_backward(ctx.plan, atoms, bonds, weights, _gate(gate), gradients[0].contiguous())
        return None, found.atoms, found.bonds, found.weights, *_parameters(found.partials, 1)


class _Angles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *inputs: Tensor) -> Tensor:
        from mbqueue.train.kernels import triton_angles as kernels

        atoms, shorts, angles, first, weights, *gate = inputs
        angles, first, ctx.plan = angles.contiguous(), first.contiguous(), plan
        ctx.save_for_backward(atoms, shorts, angles, first, weights, *gate)
        return kernels.angles_forward(plan, atoms, shorts, angles, first, weights, _gate(gate))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from mbqueue.train.kernels import triton_angles as kernels

        atoms, shorts, angles, first, weights, *gate = ctx.saved_tensors
        found = kernels.angles_backward(
            ctx.plan, atoms, shorts, angles, first, weights, _gate(gate), gradients[0].contiguous()
        )
        d_first, *others = _parameters(found.partials, 2)
        return None, found.atoms, found.shorts, found.angles, d_first, found.weights, *others


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *inputs: Tensor) -> Tensor:
        from mbqueue.train.kernels import triton_angles as kernels

        atoms, shorts, angles, first, *norms = inputs
        angles, first, ctx.plan = angles.contiguous(), first.contiguous(), plan
        ctx.save_for_backward(atoms, shorts, angles, first, *norms)
        return kernels.update_forward(plan, atoms, shorts, angles, first, _gate([None, None, *norms]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from mbqueue.train.kernels import triton_angles as kernels

        atoms, shorts, angles, first, *norms = ctx.saved_tensors
        gate = _gate([None, None, *norms])
        found = kernels.update_backward(ctx.plan, atoms, shorts, angles, first, gate, gradients[0].contiguous())
        return None, found.atoms, found.shorts, found.angles, *_parameters(found.partials, 1)


def _gate(parts: Any) -> Gate:
    """Make a `Gate` from second layers, bias, scale and shift, without a precision, which is part of the plan."""
    second, bias, scale, shift = parts
    return Gate(second, bias, scale, shift, products=None)
