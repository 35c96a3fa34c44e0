"""Compute CHGNet's energies for a whole batch at once, with the parameters of an ordinary CHGNet model.

The code rearranges the computation in `chgnet.model.CHGNet._compute` without approximation:

* In CHGNet, the first linear layer of a gated MLP takes a concatenation [a ‖ b ‖ c]. This module adds up three smaller
  layers, which it applies to atoms, undirected bonds and angles before gathering. One product computes core and gate.
* The batch contains lengths and angles, which are constants of the dataset because no forces are computed.
* No later layer uses the last angle update, so the code omits the update, whose parameters get no gradient in CHGNet
  either.
* Only bonds with angles change their features, so the bond convolution covers only the short bonds.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, cast

import torch
from chgnet.model import CHGNet
from chgnet.model.basis import RadialBessel
from chgnet.model.functions import GatedMLP
from torch import Tensor

from mbqueue.data.batch import Batch
from mbqueue.errors import TrainingError
from mbqueue.train.fused import FusedMessages
from mbqueue.train.gated import Gate, PlainMessages, linear
from mbqueue.train.gpu_path import uses_kernels
from mbqueue.train.segments import Index

#: CHGNet computes this constant of its Fourier basis in float32 for models of any dtype.
_HALF_ROOT = float(1 / torch.sqrt(torch.tensor([2.0])))


def formation_energies(model: CHGNet, batch: Batch) -> Tensor:
    """Compute the formation energy (interaction energy plus element references) of each crystal, eV/atom, [B]."""
    fused = _gpu_forward(model, batch)
    if fused is not None:
        return cast(Tensor, fused.formation_energies(model, batch.ordered()))
    return energies(model, batch) + reference_energies(model, batch.atomic_numbers, batch.atom_crystal, batch.n_atoms)


def energies(model: CHGNet, batch: Batch) -> Tensor:
    """Compute the interaction energy (without element references) of each crystal, eV/atom, [B]."""
    return read_out(model, atom_features(model, batch), batch.atom_crystal, batch.n_atoms)


def reference_energies(model: CHGNet, atomic_numbers: Tensor, atom_crystal: Tensor, n_atoms: Tensor) -> Tensor:
    """Compute each crystal's energy from the element references (AtomRef), eV/atom, [B].

    ``atomic_numbers`` and ``atom_crystal`` are [A], and ``n_atoms`` is [B].
    """
    weight = model.composition_model.fc.weight  # [1, 94]
    elements = torch.arange(1, weight.shape[1] + 1, device=weight.device)
    one_hot = (atomic_numbers[:, None] == elements).to(weight.dtype)
    counts = Index.of(atom_crystal, len(n_atoms), is_sorted=True).sum(one_hot)
    return cast(Tensor, (counts / n_atoms[:, None]) @ weight[0])


def read_out(model: CHGNet, features: Tensor, atom_crystal: Tensor, n_atoms: Tensor) -> Tensor:
    """Compute interaction energies, eV/atom, [B], from atom features after the last convolution, [A, 64]."""
    site_energies = model.mlp(model.readout_norm(features))  # [A, 1]
    total = Index.of(atom_crystal, len(n_atoms), is_sorted=True).sum(site_energies)
    return total[:, 0] / n_atoms


def check_architecture(model: CHGNet) -> None:
    """Check that a model has the architecture of the pretrained models.

    Raises:
        TrainingError: if the architecture differs; the error names each model argument that differs.
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
            f"This CHGNet's architecture differs from that of the pretrained models: {', '.join(wrong)}. "
            "Use 0.3.0 or r2scan."
        )


def radial_basis(basis: RadialBessel, length: Tensor) -> Tensor:
    """Evaluate CHGNet's smooth radial Bessel basis (chgnet/model/basis.py) at lengths in Å, [n]; return [n, 31]."""
    scaled = length * basis.inv_cutoff
    envelope = basis.smooth_cutoff(length) * (basis.norm_const / length)
    return cast(Tensor, envelope[:, None] * torch.sin(scaled[:, None] * basis.frequencies))


def fourier_basis(frequencies: Tensor, angle: Tensor) -> Tensor:
    """Evaluate CHGNet's Fourier basis (chgnet/model/basis.py) at angles in radians, [n]; return [n, 1 + 2 · order]."""
    phase = torch.outer(angle, frequencies)
    constant = phase.new_full((len(angle), 1), _HALF_ROOT)
    return torch.cat([constant, torch.sin(phase), torch.cos(phase)], dim=1) / math.sqrt(math.pi)


def atom_features(model: CHGNet, batch: Batch) -> Tensor:
    """Compute each atom's features after the last convolution and before the read-out's norm, [A, 64]."""
    fused = _gpu_forward(model, batch)
    if fused is not None:
        return cast(Tensor, fused.atom_features(model, batch.ordered()))
    atoms = Index.of(batch.atomic_numbers - 1, model.atom_embedding.embedding.num_embeddings).gather(
        model.atom_embedding.embedding.weight
    )
    basis = radial_basis(model.bond_basis_expansion.rbf_expansion_ag, batch.bond_length)
    # Features and weights of the undirected bonds, each [U, 64].
    bonds = model.bond_embedding(basis)
    weights = model.bond_weights_ag(basis)
    is_fused = atoms.device.type == "cpu" and atoms.dtype == torch.float32
    messages = FusedMessages(batch) if is_fused else PlainMessages(batch)
    has_angles = len(batch.angle) > 0
    if has_angles:
        lengths = batch.bond_length.index_select(0, batch.short_bond)
        short_basis = radial_basis(model.bond_basis_expansion.rbf_expansion_bg, lengths)
        short_weights = model.bond_weights_bg(short_basis)  # [S, 64]
        frequencies = model.angle_basis_expansion.fourier_expansion.frequencies
        angles = model.angle_embedding(fourier_basis(frequencies, batch.angle))  # [T, 64]
    for block in range(model.n_conv - 1):
        atoms = _convolve_atoms(model.atom_conv_layers[block], messages, atoms, bonds, weights)
        if not has_angles:
            continue
        short = messages.shorts_of(bonds)
        layer = model.bond_conv_layers[block]
        shares = _first_of_angles(layer.twoBody_bond, 0, atoms, short)
        message = messages.of_angles(*shares[:2], angles, shares[2], short_weights, Gate.of(layer.twoBody_bond))
        out = layer.mlp_out.layers[1]
        if out.bias is not None:
            # The bias changes all bonds, even bonds that belong to no angle.
            bonds = bonds + out.bias
        bonds = messages.add_to_shorts(bonds, linear(message, out.weight))
        if block < model.n_conv - 2:
            gated = model.angle_layers[block].twoBody_bond
            shares = _first_of_angles(gated, 1, atoms, messages.shorts_of(bonds))
            angles = messages.updated_angles(*shares[:2], angles, shares[2], Gate.of(gated))
    return _convolve_atoms(model.atom_conv_layers[-1], messages, atoms, bonds, weights)


def _gpu_forward(model: CHGNet, batch: Batch) -> ModuleType | None:
    args = model.model_args
    has_kernels = args["n_conv"] == 4 and not args.get("mlp_out_bias") and batch.bond_length.dtype == torch.float32
    if not (has_kernels and uses_kernels(batch.bond_length.device)):
        return None
    from mbqueue.train import triton_forward  # noqa: PLC0415  needs Triton

    return triton_forward


def _convolve_atoms(
    layer: Any, messages: PlainMessages | FusedMessages, atoms: Tensor, bonds: Tensor, weights: Tensor
) -> Tensor:
    weight, bias = _first(layer.twoBody_atom, 0)  # [128, 192], columns centre ‖ bond ‖ neighbour
    of_atoms = linear(atoms, torch.cat([weight[:, :64], weight[:, 128:]]), torch.cat([bias, torch.zeros_like(bias)]))
    of_bonds = linear(bonds, weight[:, 64:128])
    total = messages.of_bonds(of_atoms, of_bonds, weights, Gate.of(layer.twoBody_atom))
    return cast(Tensor, layer.mlp_out(total) + atoms)


def _first_of_angles(gated: GatedMLP, index: int, atoms: Tensor, short: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the contributions of centres and bonds to the first layer for angles, before gathering.

    Returns:
        contributions of the centres, [A, 128], and of bond i ‖ bond j, [S, 256]; the layer's matrix for angles.
    """
    weight, bias = _first(gated, index)  # [128, 256]
    of_atoms = linear(atoms, weight[:, 192:], bias)
    of_shorts = linear(short, torch.cat([weight[:, :64], weight[:, 64:128]]))
    return of_atoms, of_shorts, weight[:, 128:192]


def _first(gated: GatedMLP, index: int) -> tuple[Tensor, Tensor]:
    """Stack the first linear layers of core and gate: weight [128, in], bias [128]."""
    core, gate = gated.mlp_core.layers[index], gated.mlp_gate.layers[index]
    return torch.cat([core.weight, gate.weight]), torch.cat([core.bias, gate.bias])
