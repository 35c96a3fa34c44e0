"""CHGNet's gated messages in plain torch operations: every device, every dtype, and the measure of the fast ones.

A gated MLP is silu(norm(core(x))) · sigmoid(norm(gate(x))). Its two halves are kept side by side, "core ‖ gate", 128
wide, and its first linear layer comes in as the sum of what each part of the concatenated input contributes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from chgnet.model.functions import GatedMLP
from torch import Tensor
from torch.nn import functional

from mbqueue.data.batch import Batch
from mbqueue.train.segments import gather, gather_sorted, sum_sorted


@dataclass(frozen=True)
class Gate:
    """The parameters of a gated MLP after its first linear layer, core above gate.

    Attributes:
        second: second linear layers, [128, 64]; None where there is only one layer.
        bias: theirs, [128].
        scale: of the layer norms, [128].
        shift: of the layer norms, [128].
    """

    second: Tensor | None
    bias: Tensor | None
    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, gated: GatedMLP) -> Gate:
        """Those of a stock layer."""
        core, gate = gated.mlp_core.layers, gated.mlp_gate.layers
        has_second = len(core) == 4
        return cls(
            second=torch.cat([core[3].weight, gate[3].weight]) if has_second else None,
            bias=torch.cat([core[3].bias, gate[3].bias]) if has_second else None,
            scale=torch.cat([gated.bn1.weight, gated.bn2.weight]),
            shift=torch.cat([gated.bn1.bias, gated.bn2.bias]),
        )

    def open(self, pre: Tensor) -> Tensor:
        """The gated MLP's output, [n, 64], from that of its first linear layer, [n, 128]."""
        if self.second is not None and self.bias is not None:
            hidden = functional.silu(pre)
            core = functional.linear(hidden[:, :64], self.second[:64]).to(pre.dtype) + self.bias[:64]
            gate = functional.linear(hidden[:, 64:], self.second[64:]).to(pre.dtype) + self.bias[64:]
        else:
            core, gate = pre[:, :64], pre[:, 64:]
        core = functional.layer_norm(core, (64,), self.scale[:64], self.shift[:64])
        gate = functional.layer_norm(gate, (64,), self.scale[64:], self.shift[64:])
        return functional.silu(core) * torch.sigmoid(gate)


class PlainMessages:
    """The three gathers-and-sums of CHGNet's blocks, on one batch."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._atoms, self._shorts = len(batch.atomic_numbers), len(batch.short_bond)

    def of_bonds(self, atoms: Tensor, bonds: Tensor, weights: Tensor, gate: Gate) -> Tensor:
        """Sum of each atom's messages from its bonds, [A, 64].

        Args:
            atoms: the first layer's share of centre (with its bias) ‖ neighbour, [A, 256].
            bonds: its share of the bond, [U, 128].
            weights: the bonds' weights, [U, 64].
            gate: what comes after the first layer.
        """
        batch = self._batch
        pre = gather_sorted(atoms[:, :128], batch.bond_center)
        pre = pre + gather(atoms[:, 128:], batch.bond_neighbor)
        pre = pre + gather(bonds, batch.bond_undirected)
        return sum_sorted(gate.open(pre) * gather(weights, batch.bond_undirected), batch.bond_center, self._atoms)

    def of_angles(
        self, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, weights: Tensor, gate: Gate
    ) -> Tensor:
        """Sum of each short bond's messages from the angles that it is the first bond of, [S, 64].

        Args:
            atoms: the first layer's share of the centre (with its bias), [A, 128].
            shorts: its share of bond i ‖ bond j, [S, 256].
            angles: angle features, [T, 64].
            first: the first layer's matrix for them, [128, 64].
            weights: the short bonds' weights, [S, 64].
            gate: what comes after the first layer.
        """
        batch = self._batch
        weight = gather_sorted(weights, batch.angle_bond_i) * gather(weights, batch.angle_bond_j)
        message = gate.open(self._first(atoms, shorts, angles, first)) * weight
        return sum_sorted(message, batch.angle_bond_i, self._shorts)

    def updated_angles(self, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, gate: Gate) -> Tensor:
        """New angle features, [T, 64]; arguments as in `of_angles`."""
        return angles + gate.open(self._first(atoms, shorts, angles, first))

    def _first(self, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor) -> Tensor:
        batch = self._batch
        pre = functional.linear(angles, first).to(angles.dtype)
        pre = pre + gather_sorted(shorts[:, :128], batch.angle_bond_i)
        pre = pre + gather(shorts[:, 128:], batch.angle_bond_j)
        return pre + gather(atoms, batch.angle_center)
