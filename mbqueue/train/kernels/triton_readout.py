"""GPU kernels for the read-out, which computes a crystal's energy from its atoms' features, and for its gradients."""

# Triton also compiles annotations, so only the constants of a kernel are annotated.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbqueue.train.kernels.launching import launch, room
from mbqueue.train.kernels.tiles import READ_OUT_ATOMS
from mbqueue.train.kernels.triton_gate import normalised, sigmoid, silu_slope
from mbqueue.train.kernels.triton_sums import by_number


@triton.jit
def _first_atom(n_atoms, crystal, block: tl.constexpr):
    total = tl.zeros([block], tl.int64)
    for start in range(0, crystal, block):
        position = start + tl.arange(0, block)
        total += tl.load(n_atoms + position, mask=position < crystal, other=0)
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
    """Compute the energy of each crystal, [B]; `READ_OUT_SIZES` explains ``weights``."""
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
        x, _ = normalised(x)
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
    """Compute the gradient of the features, and each atom's contribution to the weights' gradients.

    ``inputs``, [3, A, 64], are the inputs of the layers. ``gradients``, [7, A, 64], are the gradients of the layers'
    outputs, the norm's scale and shift, the last layer's weight, and the site's energy.
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
        position = (begin + atom)[:, None] * 64 + column[None, :]
        normed, root = normalised(tl.load(features + position, mask=mask, other=0.0))
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
        d = _back(d_3, three, column, precision)
        d_2 = d * silu_slope(pre_2, gate_2)
        d = _back(d_2, two, column, precision)
        d_1 = d * silu_slope(pre_1, gate_1)
        d = _back(d_1, one, column, precision)
        scaled = d * scale
        mean = tl.sum(scaled, axis=1)[:, None] / 64.0
        along = tl.sum(scaled * normed, axis=1)[:, None] / 64.0
        tl.store(d_features + position, (scaled - mean - normed * along) * root, mask=mask)
        tl.store(inputs + position, input_1, mask=mask)
        tl.store(inputs + size + position, input_2, mask=mask)
        tl.store(inputs + 2 * size + position, input_3, mask=mask)
        tl.store(gradients + position, d_1, mask=mask)
        tl.store(gradients + size + position, d_2, mask=mask)
        tl.store(gradients + 2 * size + position, d_3, mask=mask)
        tl.store(gradients + 3 * size + position, d * normed, mask=mask)
        tl.store(gradients + 4 * size + position, d, mask=mask)
        tl.store(gradients + 5 * size + position, d_site * pre_3 * gate_3, mask=mask)
        tl.store(gradients + 6 * size + position, d_site + tl.zeros_like(d), mask=mask)


#: Sizes of the parts of the weight vector for `energies_forward`. The parts are the norm's scale and shift, a matrix
#: and a bias for each of three layers, the last layer's weight and bias, and the references of the 94 elements.
READ_OUT_SIZES = (64, 64, *[64 * 64, 64] * 3, 64, 1, 94)


def energies_forward(features: Tensor, weights: Tensor, n_atoms: Tensor, numbers: Tensor, precision: str) -> Tensor:
    """Compute the formation energy of each crystal, eV/atom, [B].

    Args:
        features: atom features, [A, 64].
        weights: the read-out's weights, see `READ_OUT_SIZES`.
        n_atoms: atoms per crystal, int64 [B].
        numbers: atomic numbers, int64 [A].
        precision: precision of the products, "ieee" or "tf32".
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
    """Compute the gradients of the features, and of the parts of ``weights`` in the order of `READ_OUT_SIZES`."""
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
