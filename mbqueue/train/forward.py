"""CHGNet's energy for a whole batch at once, with a stock model's own parameters.

What is computed is `chgnet.model.CHGNet._compute` for the energy, rearranged without approximation:

* The first linear layer of a gated MLP sees a concatenation [a ‖ b ‖ c]; here it is the sum of three smaller layers,
  applied per atom, per undirected bond and per angle before anything is gathered. Core and gate share one product.
* Lengths and angles come with the batch: with no forces asked, they are constants of the data set.
* The last angle update feeds nothing, so it is left out (its parameters get no gradient in CHGNet either).
* Bond features change only where a bond has angles, so bond convolution works on short bonds only.
"""

from __future__ import annotations

import math

import torch
from chgnet.model import CHGNet
from chgnet.model.basis import RadialBessel
from chgnet.model.functions import MLP, GatedMLP
from torch import Tensor, nn
from torch.nn import functional

from mbqueue.data.batch import Batch
from mbqueue.errors import TrainingError

#: CHGNet computes this constant of its Fourier basis in float32 whatever the dtype of the model.
_HALF_ROOT = float(1 / torch.sqrt(torch.tensor([2.0])))


def formation_energies(model: CHGNet, batch: Batch) -> Tensor:
    """Formation energy of each crystal, eV/atom, [B]: interaction energy plus element references."""
    return energies(model, batch) + reference_energies(model, batch.atomic_numbers, batch.atom_crystal, batch.n_atoms)


def energies(model: CHGNet, batch: Batch) -> Tensor:
    """Interaction energy of each crystal, eV/atom, [B]: CHGNet without its element references."""
    return read_out(model, atom_features(model, batch), batch.atom_crystal, batch.n_atoms)


def reference_energies(model: CHGNet, atomic_numbers: Tensor, atom_crystal: Tensor, n_atoms: Tensor) -> Tensor:
    """Energy of the element references (AtomRef), eV/atom, [B].

    ``atomic_numbers`` and ``atom_crystal`` are [A], ``n_atoms`` is [B].
    """
    weight = model.composition_model.fc.weight  # [1, 94]
    one_hot = functional.one_hot(atomic_numbers - 1, weight.shape[1]).to(weight.dtype)
    counts = one_hot.new_zeros(len(n_atoms), weight.shape[1]).index_add_(0, atom_crystal, one_hot)
    return (counts / n_atoms[:, None]) @ weight[0]


def read_out(model: CHGNet, features: Tensor, atom_crystal: Tensor, n_atoms: Tensor) -> Tensor:
    """Interaction energy, eV/atom, [B], from the atom features of the last convolution, [A, 64]."""
    site_energies = model.mlp(model.readout_norm(features))  # [A, 1]
    total = site_energies.new_zeros(len(n_atoms)).index_add_(0, atom_crystal, site_energies[:, 0])
    return total / n_atoms


def check_architecture(model: CHGNet) -> None:
    """Refuse a model that is not built like the pretrained ones.

    Raises:
        TrainingError: naming each model argument that differs.
    """
    needed = {
        "gMLP_norm": "layer",
        "readout_norm": "layer",
        "non_linearity": "silu",
        "mlp_first": True,
        "is_intensive": True,
        "conv_dropout": 0,
        "mlp_dropout": 0,
        "update_bond": True,
        "update_angle": True,
        "angle_layer_hidden_dim": 0,
        "atom_conv_hidden_dim": 64,
        "bond_conv_hidden_dim": 64,
    }
    wrong = [
        f"{key} = {model.model_args.get(key)!r} instead of {value!r}"
        for key, value in needed.items()
        if model.model_args.get(key) != value
    ]
    if model.model_args.get("conv_norm") is not None:
        wrong.append(f"conv_norm = {model.model_args['conv_norm']!r} instead of None")
    if model.composition_model is None:
        wrong.append("composition_model = None")
    if wrong:
        raise TrainingError(
            f"This CHGNet is built unlike the pretrained ones: {', '.join(wrong)}. Use 0.3.0 or r2scan."
        )


def radial_basis(basis: RadialBessel, length: Tensor) -> Tensor:
    """CHGNet's smooth radial Bessel basis of lengths in Å, [n] to [n, 31] (chgnet/model/basis.py)."""
    scaled = length * basis.inv_cutoff
    envelope = basis.smooth_cutoff(length) * (basis.norm_const / length)
    return envelope[:, None] * torch.sin(scaled[:, None] * basis.frequencies)


def fourier_basis(frequencies: Tensor, angle: Tensor) -> Tensor:
    """CHGNet's Fourier basis of angles in radian, [n] to [n, 1 + 2 · order] (chgnet/model/basis.py)."""
    phase = torch.outer(angle, frequencies)
    constant = phase.new_full((len(angle), 1), _HALF_ROOT)
    return torch.cat([constant, torch.sin(phase), torch.cos(phase)], dim=1) / math.sqrt(math.pi)


def atom_features(model: CHGNet, batch: Batch) -> Tensor:
    """Features of each atom after the last convolution and before the read-out's norm, [A, 64]."""
    atoms = model.atom_embedding(batch.atomic_numbers - 1)
    basis = radial_basis(model.bond_basis_expansion.rbf_expansion_ag, batch.bond_length)
    bonds = model.bond_embedding(basis)  # [U, 64]
    bond_weights = model.bond_weights_ag(basis)  # [U, 64]
    has_angles = len(batch.angle) > 0
    if has_angles:
        short_basis = radial_basis(
            model.bond_basis_expansion.rbf_expansion_bg, batch.bond_length.index_select(0, batch.short_bond)
        )
        short_weights = model.bond_weights_bg(short_basis)  # [S, 64]
        angles = model.angle_embedding(
            fourier_basis(model.angle_basis_expansion.fourier_expansion.frequencies, batch.angle)
        )  # [T, 64]
    last = model.n_conv - 2
    for block in range(model.n_conv - 1):
        atoms = _convolve_atoms(model.atom_conv_layers[block], atoms, bonds, bond_weights, batch)
        if has_angles:
            short = bonds.index_select(0, batch.short_bond)
            layer = model.bond_conv_layers[block]
            message = _gated_hidden(
                layer.twoBody_bond,
                _first_of_angles(
                    layer.twoBody_bond.mlp_core.layers[0],
                    layer.twoBody_bond.mlp_gate.layers[0],
                    atoms,
                    short,
                    angles,
                    batch,
                ),
            )
            message = (
                message
                * short_weights.index_select(0, batch.angle_bond_i)
                * short_weights.index_select(0, batch.angle_bond_j)
            )
            update = torch.zeros_like(short).index_add_(0, batch.angle_bond_i, message)
            out = layer.mlp_out.layers[1]
            if out.bias is not None:
                bonds = bonds + out.bias
            bonds = bonds.index_add(0, batch.short_bond, functional.linear(update, out.weight))
            if block < last:
                gated = model.angle_layers[block].twoBody_bond
                short = bonds.index_select(0, batch.short_bond)
                pre = _first_of_angles(gated.mlp_core.layers[1], gated.mlp_gate.layers[1], atoms, short, angles, batch)
                angles = angles + _gate(gated, pre)
    return _convolve_atoms(model.atom_conv_layers[-1], atoms, bonds, bond_weights, batch)


def _convolve_atoms(layer: nn.Module, atoms: Tensor, bonds: Tensor, weights: Tensor, batch: Batch) -> Tensor:
    core, gate = layer.twoBody_atom.mlp_core.layers[0], layer.twoBody_atom.mlp_gate.layers[0]
    weight = torch.cat([core.weight, gate.weight])  # [128, 192]
    bias = torch.cat([core.bias, gate.bias])
    of_center, of_bond, of_neighbor = weight.split(64, dim=1)
    pre = functional.linear(atoms, of_center, bias).index_select(0, batch.bond_center)
    pre = pre + functional.linear(bonds, of_bond).index_select(0, batch.bond_undirected)
    pre = pre + functional.linear(atoms, of_neighbor).index_select(0, batch.bond_neighbor)
    message = _gated_hidden(layer.twoBody_atom, pre) * weights.index_select(0, batch.bond_undirected)
    total = torch.zeros_like(atoms).index_add_(0, batch.bond_center, message)
    return layer.mlp_out(total) + atoms


def _first_of_angles(
    core: nn.Linear, gate: nn.Linear, atoms: Tensor, short: Tensor, angles: Tensor, batch: Batch
) -> Tensor:
    """First layer of core ‖ gate on [bond i ‖ bond j ‖ angle ‖ centre], [T, 128]."""
    weight = torch.cat([core.weight, gate.weight])  # [128, 256]
    bias = torch.cat([core.bias, gate.bias])
    of_i, of_j, of_angle, of_center = weight.split(64, dim=1)
    pre = functional.linear(angles, of_angle, bias)
    pre = pre + functional.linear(short, of_i).index_select(0, batch.angle_bond_i)
    pre = pre + functional.linear(short, of_j).index_select(0, batch.angle_bond_j)
    return pre + functional.linear(atoms, of_center).index_select(0, batch.angle_center)


def _gated_hidden(gated: GatedMLP, pre: Tensor) -> Tensor:
    """The gated MLP from its first linear layer's output, [n, 128] to [n, 64]."""
    hidden = functional.silu(pre)
    core = functional.linear(hidden[:, :64], *_second(gated.mlp_core))
    gate = functional.linear(hidden[:, 64:], *_second(gated.mlp_gate))
    return functional.silu(gated.bn1(core)) * torch.sigmoid(gated.bn2(gate))


def _second(mlp: MLP) -> tuple[Tensor, Tensor]:
    return mlp.layers[3].weight, mlp.layers[3].bias


def _gate(gated: GatedMLP, pre: Tensor) -> Tensor:
    return functional.silu(gated.bn1(pre[:, :64])) * torch.sigmoid(gated.bn2(pre[:, 64:]))
