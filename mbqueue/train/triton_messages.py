"""Compute CHGNet's gated messages on a GPU with Triton kernels, storing only their inputs for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbqueue.data.batch import Batch, OrderedBatch
from mbqueue.errors import TrainingError
from mbqueue.train.gated import PRODUCTS, Gate, PlainMessages
from mbqueue.train.kernels.tiles import PARTIALS, TILES, Tiles, tiles_of

#: Number of columns of the widest array that has a row per atom or short bond, and of the widest array that has a row
#: per directed bond or angle.
_WIDEST, _WIDE = 640, 128


def fits(batch: Batch) -> bool:
    """Whether the kernels, which compute array positions in int32, can address the whole batch."""
    many = max(len(batch.bond_center), len(batch.angle))
    few = max(len(batch.atomic_numbers), len(batch.short_bond))
    return max(many * _WIDE, few * _WIDEST) < 2**31


@dataclass(frozen=True)
class Plan:
    """The batch that the kernels process, with their tile sizes and precision.

    Attributes:
        batch: the batch with its sorted orders, on the device.
        tiles: the kernels' tile sizes.
        precision: precision of matrix products: float32, tf32, bf16 or fp16; their sums are float32.
    """

    batch: OrderedBatch
    tiles: Tiles
    precision: str

    @classmethod
    def of(cls, batch: Batch, tiles: Tiles | None = None, precision: str | None = None) -> Plan:
        """Make the plan for ``batch``, by default with the device's tiles and the precision of `products_in_use`.

        Raises:
            TrainingError: if the kernels cannot address the batch; see `fits`.
        """
        if not fits(batch):
            raise TrainingError(
                f"A batch of {len(batch.rows):,} crystals with {len(batch.bond_center):,} bonds and "
                f"{len(batch.angle):,} angles is larger than the GPU kernels can address (2^31 numbers in an array). "
                "Set train.batch_size to a smaller number."
            )
        device = batch.bond_center.device
        if tiles is None and device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            tiles = tiles_of(10 * major + minor)
        # Triton's interpreter on the CPU works with all tiles.
        return cls(batch.ordered(), tiles or TILES[min(TILES)], precision or products_in_use())

    def shares(self, n_rows: int, rows: int) -> tuple[int, int]:
        """Divide ``n_rows`` among programs; return the number of programs and of tiles of ``rows`` rows in each.

        The result depends only on ``n_rows`` and ``rows``.
        """
        tiles = -(-n_rows // rows)
        per_program = max(1, -(-tiles // PARTIALS))
        return -(-tiles // per_program), per_program


def products_in_use() -> str:
    """Return the precision of matrix products on a GPU, according to `PRODUCTS` and torch's setting."""
    named = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    dtype = PRODUCTS.get()
    if dtype is not None:
        return named[dtype]
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "float32"


class TritonMessages(PlainMessages):
    """CHGNet's message passing on one batch with Triton kernels; the methods are those of `PlainMessages`."""

    def __init__(self, batch: Batch, tiles: Tiles | None = None, precision: str | None = None) -> None:
        super().__init__(batch)
        self.plan = Plan.of(batch, tiles, precision)

    def of_bonds(self, atoms: Tensor, bonds: Tensor, weights: Tensor, gate: Gate) -> Tensor:
        """See `PlainMessages.of_bonds`."""
        out: Tensor = _Bonds.apply(  # type: ignore[no-untyped-call]
            self.plan, atoms, bonds, weights, gate.second, gate.bias, gate.scale, gate.shift
        )
        return out

    def of_angles(
        self, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, weights: Tensor, gate: Gate
    ) -> Tensor:
        """See `PlainMessages.of_angles`."""
        parts = (atoms, shorts, angles, first, weights, gate.second, gate.bias, gate.scale, gate.shift)
        out: Tensor = _Angles.apply(self.plan, *parts)  # type: ignore[no-untyped-call]
        return out

    def updated_angles(self, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, gate: Gate) -> Tensor:
        """See `PlainMessages.updated_angles`."""
        out: Tensor = _Update.apply(self.plan, atoms, shorts, angles, first, gate.scale, gate.shift)  # type: ignore[no-untyped-call]
        return out


def _parameters(partials: Tensor, matrices: int) -> list[Tensor]:
    """Add up partial sums, and split the result into gradients of matrices [128, 64] and vectors [128]."""
    from mbqueue.train.kernels.triton_sums import add_partials  # noqa: PLC0415  needs Triton

    sums = add_partials(partials)
    border = matrices * 128 * 64
    return [*sums[:border].view(-1, 128, 64), *sums[border:].view(-1, 128)]


class _Bonds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *inputs: Tensor) -> Tensor:
        from mbqueue.train.kernels import triton_bonds as kernels  # noqa: PLC0415

        ctx.plan = plan
        ctx.save_for_backward(*inputs)
        atoms, bonds, weights, *gate = inputs
        return kernels.bonds_forward(plan, atoms, bonds, weights, _gate(gate))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from mbqueue.train.kernels import triton_bonds as kernels  # noqa: PLC0415

        atoms, bonds, weights, *gate = ctx.saved_tensors
        found = kernels.bonds_backward(ctx.plan, atoms, bonds, weights, _gate(gate), gradients[0].contiguous())
        return None, found.atoms, found.bonds, found.weights, *_parameters(found.partials, 1)


class _Angles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *inputs: Tensor) -> Tensor:
        from mbqueue.train.kernels import triton_angles as kernels  # noqa: PLC0415

        atoms, shorts, angles, first, weights, *gate = inputs
        angles, first, ctx.plan = angles.contiguous(), first.contiguous(), plan
        ctx.save_for_backward(atoms, shorts, angles, first, weights, *gate)
        return kernels.angles_forward(plan, atoms, shorts, angles, first, weights, _gate(gate))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from mbqueue.train.kernels import triton_angles as kernels  # noqa: PLC0415

        atoms, shorts, angles, first, weights, *gate = ctx.saved_tensors
        found = kernels.angles_backward(
            ctx.plan, atoms, shorts, angles, first, weights, _gate(gate), gradients[0].contiguous()
        )
        d_first, *others = _parameters(found.partials, 2)
        return None, found.atoms, found.shorts, found.angles, d_first, found.weights, *others


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *inputs: Tensor) -> Tensor:
        from mbqueue.train.kernels import triton_angles as kernels  # noqa: PLC0415

        atoms, shorts, angles, first, *norms = inputs
        angles, first, ctx.plan = angles.contiguous(), first.contiguous(), plan
        ctx.save_for_backward(atoms, shorts, angles, first, *norms)
        return kernels.update_forward(plan, atoms, shorts, angles, first, _gate([None, None, *norms]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from mbqueue.train.kernels import triton_angles as kernels  # noqa: PLC0415

        atoms, shorts, angles, first, *norms = ctx.saved_tensors
        gate = _gate([None, None, *norms])
        found = kernels.update_backward(ctx.plan, atoms, shorts, angles, first, gate, gradients[0].contiguous())
        return None, found.atoms, found.shorts, found.angles, *_parameters(found.partials, 1)


def _gate(parts: Any) -> Gate:
    """Make a `Gate` from second layers, bias, scale and shift, without a precision, which is part of the plan."""
    second, bias, scale, shift = parts
    return Gate(second, bias, scale, shift, products=None)
