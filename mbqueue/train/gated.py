"""Compute CHGNet's gated messages in plain torch operations, on any device and in any dtype.

This module is the reference for the kernels. A gated MLP is silu(norm(core(x))) · sigmoid(norm(gate(x))). The code
stores core and gate side by side in 128 columns, written "core ‖ gate". The first linear layer takes a concatenated
input; its output is a sum of one contribution per part of this input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from chgnet.model.functions import GatedMLP
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mbqueue.data.batch import Batch
from mbqueue.train.segments import Index

#: The dtype of the matrix products in the model's message-passing layers; None means the weights' dtype. All other
#: values, including the results of these products, have the weights' dtype.
PRODUCTS: ContextVar[torch.dtype | None] = ContextVar("PRODUCTS", default=None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, products: torch.dtype | None = None) -> Tensor:
    """Compute x · weightᵀ + bias, with the product in precision ``products``, by default that of `PRODUCTS`."""
    dtype = products or PRODUCTS.get()
    if dtype is None:
        return functional.linear(x, weight, bias)
    if dtype == torch.float16:
        product: Tensor = _HalfProduct.apply(x, weight)  # type: ignore[no-untyped-call]
    else:
        product = functional.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)
    return product if bias is None else product + bias


def gradient_scale(structures: int) -> float:
    """Return the factor by which a step of ``structures`` crystals multiplies its loss and divides its gradient.

    The factor is a power of two, so scaling is exact. float16 has no numbers below 6e-8, and a bond's gradient is often
    smaller, so each crystal's loss is multiplied by 4096. With a larger factor, an error of several eV in a crystal's
    energy could produce numbers above 65504, the largest float16.
    """
    return 2.0 ** (12 + math.ceil(math.log2(structures))) if PRODUCTS.get() == torch.float16 else 1.0


class _HalfProduct(torch.autograd.Function):
    """Compute x · weightᵀ and its gradients as tensor cores do, with inputs rounded to float16 and sums in float32.

    A product of two float16 numbers is exact in float32, so the code multiplies the rounded numbers in float32. This
    class is a reference and a fallback for the kernels, and is not meant to be fast.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(_rounded(x), _rounded(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        gradient = _rounded(gradients[0])
        return gradient @ _rounded(weight), gradient.T @ _rounded(x)


def _rounded(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)


@dataclass(frozen=True)
class Gate:
    """The parameters of a gated MLP after its first linear layer; core's parameters precede gate's.

    Attributes:
        second: second linear layers, [128, 64]; None if there is only one layer.
        bias: biases of the second layers, [128].
        scale: scale of the layer norms, [128].
        shift: shift of the layer norms, [128].
        products: value of `PRODUCTS` at construction, stored because torch computes GPU gradients in its own threads,
            where `PRODUCTS` has its default value.
    """

    second: Tensor | None
    bias: Tensor | None
    scale: Tensor
    shift: Tensor
    products: torch.dtype | None

    @classmethod
    def of(cls, gated: GatedMLP) -> Gate:
        """Make a gate with the parameters of CHGNet's own layer."""
        core, gate = gated.mlp_core.layers, gated.mlp_gate.layers
        has_second = len(core) == 4
        return cls(
            second=torch.cat([core[3].weight, gate[3].weight]) if has_second else None,
            bias=torch.cat([core[3].bias, gate[3].bias]) if has_second else None,
            scale=torch.cat([gated.bn1.weight, gated.bn2.weight]),
            shift=torch.cat([gated.bn1.bias, gated.bn2.bias]),
            products=PRODUCTS.get(),
        )

    def open(self, pre: Tensor) -> Tensor:
        """Compute the gated MLP's output, [n, 64], from the output of its first linear layer, [n, 128]."""
        if self.second is not None and self.bias is not None:
            # Use chunk(), because the backward pass of two slices would add two full-size arrays padded with zeros.
            core, gate = functional.silu(pre).chunk(2, dim=1)
            core = linear(core, self.second[:64], self.bias[:64], products=self.products)
            gate = linear(gate, self.second[64:], self.bias[64:], products=self.products)
        else:
            core, gate = pre.chunk(2, dim=1)
        core = functional.layer_norm(core, (64,), self.scale[:64], self.shift[:64])
        gate = functional.layer_norm(gate, (64,), self.scale[64:], self.shift[64:])
        return functional.silu(core) * torch.sigmoid(gate)


class PlainMessages:
    """CHGNet's message passing on one batch, in plain torch."""

    def __init__(self, batch: Batch) -> None:
        # A batch on a GPU already contains the sorted orders; for other batches, the host computes them here.
        batch = batch.ordered()
        by_undirected = torch.stack([batch.bond_first, batch.bond_reverse.index_select(0, batch.bond_first)], dim=1)
        pairs = torch.arange(0, 2 * len(batch.bond_length) + 1, 2, dtype=torch.int32, device=by_undirected.device)
        self._center = Index(batch.bond_center, None, batch.bond_offsets)
        # The bonds that end at an atom are the reverses of the bonds that start at that atom.
        self._neighbor = Index(batch.bond_neighbor, batch.bond_reverse, batch.bond_offsets)
        self._undirected = Index(batch.bond_undirected, by_undirected.flatten(), pairs)
        self._angle_center = Index(batch.angle_center, batch.angle_by_center, batch.by_center_offsets)
        self._first = Index(batch.angle_bond_i, None, batch.angle_offsets)
        self._second = Index(batch.angle_bond_j, batch.angle_by_j, batch.by_j_offsets)
        self._short = Index(batch.short_bond, None, batch.short_offsets)

    def shorts_of(self, bonds: Tensor) -> Tensor:
        """Select the rows of the short bonds, [S, …], from the rows of all undirected bonds, [U, …]."""
        return self._short.gather(bonds)

    def add_to_shorts(self, bonds: Tensor, x: Tensor) -> Tensor:
        """Return a copy of ``bonds``, [U, …], with ``x``, [S, …], added to the rows of the short bonds."""
        # Each bond gets at most one row of ``x``. Do not use index_add, which would sort and check every index on CUDA.
        return bonds + self._short.sum(x)

    def of_bonds(self, atoms: Tensor, bonds: Tensor, weights: Tensor, gate: Gate) -> Tensor:
        """Sum each atom's messages from its bonds; return [A, 64].

        Args:
            atoms: contributions of centre (with the bias) ‖ neighbour to the first layer, [A, 256].
            bonds: contributions of the bond to the first layer, [U, 128].
            weights: the bonds' weights, [U, 64].
            gate: the layers after the first.
        """
        of_center, of_neighbor = atoms.chunk(2, dim=1)
        pre = self._center.gather(of_center) + self._neighbor.gather(of_neighbor)
        pre = pre + self._undirected.gather(bonds)

        def total(pre: Tensor, weights: Tensor) -> Tensor:
            return self._center.sum(gate.open(pre) * self._undirected.gather(weights))

        return _recomputed(total, pre, weights)

    def of_angles(
        self, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, weights: Tensor, gate: Gate
    ) -> Tensor:
        """Sum each short bond's messages from the angles in which it is the first bond; return [S, 64].

        Args:
            atoms: contributions of the centre (with the bias) to the first layer, [A, 128].
            shorts: contributions of bond i ‖ bond j to the first layer, [S, 256].
            angles: angle features, [T, 64].
            first: the first layer's matrix for the angle features, [128, 64].
            weights: the short bonds' weights, [S, 64].
            gate: the layers after the first.
        """

        def total(pre: Tensor, weights: Tensor) -> Tensor:
            both = self._first.gather(weights) * self._second.gather(weights)
            return self._first.sum(gate.open(pre) * both)

        return _recomputed(total, self._first_layer(atoms, shorts, angles, first), weights)

    def updated_angles(self, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor, gate: Gate) -> Tensor:
        """Compute new angle features, [T, 64]; `of_angles` explains the arguments."""
        return angles + _recomputed(gate.open, self._first_layer(atoms, shorts, angles, first))

    def _first_layer(self, atoms: Tensor, shorts: Tensor, angles: Tensor, first: Tensor) -> Tensor:
        pre = linear(angles, first) + self._first.gather(shorts[:, :128])
        return pre + self._second.gather(shorts[:, 128:]) + self._angle_center.gather(atoms)


def _recomputed(work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return ``work(*inputs)``, and save only the inputs for the backward pass, which recomputes everything else.

    As a result, each message stores 128 numbers instead of about 700, and larger batches fit on a GPU.
    """
    if not torch.is_grad_enabled():
        return work(*inputs)
    # Do not save the state of the random number generators, because ``work`` draws no numbers and saving would wait for
    # the device.
    out: Tensor = checkpoint(work, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out
