"""Compute CHGNet's energies on a GPU with fused kernels and a hand-written gradient, to save launches and memory.

This module computes the same energies as `mbqueue.train.forward`, in a different order:

* One vector contains all parameters, with related parameters side by side (`_Layout`). A second vector contains the
  parameters' gradients.
* Only the features of short bonds change. Long bonds keep their initial features, so their contributions to the four
  atom convolutions are computed directly from the basis, without intermediate bond features [U, 64].
* One product computes the contributions of atoms or short bonds to several layers. The product that computes the last
  part of a gradient also adds all earlier parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from chgnet.model import CHGNet
from torch import Tensor

from mbqueue.data.batch import OrderedBatch
from mbqueue.train.gated import Gate
from mbqueue.train.kernels import triton_angles, triton_bonds
from mbqueue.train.kernels.triton_bases import Basis
from mbqueue.train.kernels.triton_later import Later
from mbqueue.train.kernels.triton_readout import energies_backward, energies_forward
from mbqueue.train.kernels.triton_sums import by_number
from mbqueue.train.triton_plan import Plan


def formation_energies(model: CHGNet, batch: OrderedBatch) -> Tensor:
    """Compute the formation energy of each crystal, eV/atom, [B], as in `mbqueue.train.forward.formation_energies`."""
    features = atom_features(model, batch)
    parameters = [*model.readout_norm.parameters(), *model.mlp.parameters(), *model.composition_model.parameters()]
    energy: Tensor = _ReadOut.apply(batch, _precision(), features, *parameters)  # type: ignore[no-untyped-call]
    return energy


def atom_features(model: CHGNet, batch: OrderedBatch) -> Tensor:
    """Compute atom features after the last convolution, [A, 64], as `mbqueue.train.forward.atom_features` does."""
    layout = _layouts.get(model)
    device = batch.bond_length.device
    if layout is None or layout.index.device != device:
        layout = _layouts[model] = _Layout(model, device)
    features: Tensor = _Backbone.apply(model, batch, layout, *layout.parameters)  # type: ignore[no-untyped-call]
    return features


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


class _ReadOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, batch: OrderedBatch, precision: str, features: Tensor, *parameters: Tensor) -> Tensor:
        weights = torch.cat([parameter.flatten() for parameter in parameters])
        ctx.batch, ctx.precision, ctx.shapes = batch, precision, [parameter.shape for parameter in parameters]
        ctx.save_for_backward(features, weights)
        return energies_forward(features, weights, batch.n_atoms, batch.atomic_numbers, precision)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        features, weights = ctx.saved_tensors
        batch = ctx.batch
        d_features, parts = energies_backward(
            features,
            weights,
            batch.n_atoms,
            gradients[0].contiguous(),
            batch.atom_by_number,
            batch.by_number_offsets,
            ctx.precision,
        )
        shaped = [part.reshape(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
        return None, None, d_features, *shaped


# -- the weights -----------------------------------------------------------------------------------------------------


class _Layout:
    """Copies the backbone's parameters into one vector, and the vector's gradient back to the parameters.

    Attributes:
        parameters: all parameters that the energy depends on, except those of the read-out.
        index: for each position in the vector, the position in the concatenated parameters, which end with a zero for
            padding.
        back: for each position in the concatenated parameters, the position in the vector.
        shapes: shapes of the vector's pieces by name, in order.
    """

    def __init__(self, model: CHGNet, device: torch.device) -> None:
        dead = ("site_wise.", "readout_norm.", "mlp.", "composition_model.", f"angle_layers.{model.n_conv - 2}.")
        named = {name: p for name, p in model.named_parameters() if not name.startswith(dead)}
        self.parameters = list(named.values())
        total, positions = 0, {}
        for name, parameter in named.items():
            positions[name] = torch.arange(total, total + parameter.numel()).view(parameter.shape)
            total += parameter.numel()
        pieces = _pieces(positions, model.n_conv, zero=torch.tensor([total]))
        self.shapes = {name: piece.shape for name, piece in pieces.items()}
        index = torch.cat([piece.flatten() for piece in pieces.values()])
        back, start = torch.empty(total + 1, dtype=torch.long), 0
        for name, piece in pieces.items():
            # Skip "waves", because "frequencies" contains the sum of the gradients of sines and cosines.
            if name != "waves":
                back[piece.flatten()] = torch.arange(start, start + piece.numel())
            start += piece.numel()
        self.back, self.index = back[:total].to(device), index.to(device)
        self._zero = torch.zeros(1, device=device)

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        parts = torch.split(vector, [shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}

    def arranged(self, parameters: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Arrange the flattened parameters in one vector, and return the vector's pieces by name."""
        flat = torch.cat([*(parameter.flatten() for parameter in parameters), self._zero.to(parameters[0].dtype)])
        return self.views(flat.index_select(0, self.index))

    def of_parameters(self, vector: Tensor) -> list[Tensor]:
        """Convert the gradient of the vector to the gradients of the parameters."""
        flat = vector.index_select(0, self.back)
        parts = torch.split(flat, [parameter.numel() for parameter in self.parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters, strict=True)]


_layouts: WeakKeyDictionary[CHGNet, _Layout] = WeakKeyDictionary()


def _pieces(p: dict[str, Tensor], n_conv: int, zero: Tensor) -> dict[str, Tensor]:
    """Arrange the model's parameters ``p`` as the tensors that `_forward` and `_Gradient` use, by name.

    ``p`` contains each parameter's positions in the concatenation of all parameters. In every piece, core's parameters
    precede gate's. Pieces that are adjacent in a kernel's partial sums are also adjacent in the result.
    """

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, zero.expand(*x.shape[:-1], 1)], dim=-1)

    def both(layer: str, part: str) -> Tensor:
        return torch.cat([p[f"{layer}.mlp_core.layers.{part}"], p[f"{layer}.mlp_gate.layers.{part}"]])

    def norms(layer: str) -> Tensor:
        return torch.cat([p[f"{layer}.{name}"] for name in ("bn1.weight", "bn2.weight", "bn1.bias", "bn2.bias")])

    def behind(layer: str) -> Tensor:
        """Concatenate the second layers, their biases, and the norms' scales and shifts."""
        return torch.cat([both(layer, "3.weight").flatten(), both(layer, "3.bias"), norms(layer)])

    def wide(x: Tensor) -> Tensor:
        """Pad a vector to 64 numbers, the size of its gradient."""
        return torch.cat([x, zero.expand(64 - len(x))])

    bases = "bond_basis_expansion.rbf_expansion"
    waves = p["angle_basis_expansion.fourier_expansion.frequencies"]
    pieces = {
        "embedding": torch.cat([zero.expand(1, 64), p["atom_embedding.embedding.weight"]]),  # by atomic number
        "ag": wide(p[f"{bases}_ag.frequencies"]),
        "bonds": padded(p["bond_embedding.weight"]),
        "weights": padded(p["bond_weights_ag.weight"]),
        "short weights": padded(p["bond_weights_bg.weight"]),
        "bg": wide(p[f"{bases}_bg.frequencies"]),
        "angles": padded(p["angle_embedding.weight"]),
        "waves": wide(torch.cat([zero, waves, waves])),  # one frequency per basis function: constant, sines, cosines
    }
    of_bonds, shares = [], {}
    for block in range(n_conv):
        layer = f"atom_conv_layers.{block}.twoBody_atom"
        weight = both(layer, "0.weight")  # [128, 192], columns centre ‖ bond ‖ neighbour
        of_bonds.append(weight[:, 64:128])
        bias = both(layer, "0.bias")
        shares[block] = torch.cat([weight[:, :64], weight[:, 128:]]), torch.cat([bias, zero.expand(128)])
        pieces[f"atom layer {block}"] = behind(layer)
        pieces[f"atom out {block}"] = p[f"atom_conv_layers.{block}.mlp_out.layers.1.weight"]
    pieces["atoms 0"], pieces["atoms 0 bias"] = shares[0]
    for block in range(n_conv - 1):
        layer = f"bond_conv_layers.{block}.twoBody_bond"
        of_atoms, of_shorts = [], []
        for each, number in ((layer, 0), (f"angle_layers.{block}.twoBody_bond", 1)):
            if number == 1 and block == n_conv - 2:
                continue
            weight = both(each, f"{number}.weight")  # [128, 256], columns bond i ‖ bond j ‖ angle ‖ centre
            of_atoms.append((weight[:, 192:], both(each, f"{number}.bias")))
            of_shorts.append(torch.cat([weight[:, :64], weight[:, 64:128]]))
            rest = behind(each) if number == 0 else norms(each)
            name = f"{'bond' if number == 0 else 'angle'} layer {block}"
            pieces[name] = torch.cat([weight[:, 128:192].flatten(), rest])
        pieces[f"bond out {block}"] = p[f"bond_conv_layers.{block}.mlp_out.layers.1.weight"]
        pieces[f"bond shorts {block}"] = of_shorts[0]
        if len(of_shorts) > 1:
            pieces[f"angle shorts {block}"] = of_shorts[1]
        of_atoms.append(shares[block + 1])
        pieces[f"atoms {block + 1}"] = torch.cat([weight for weight, _ in of_atoms])
        pieces[f"atoms {block + 1} bias"] = torch.cat([bias for _, bias in of_atoms])
    for block in range(1, n_conv - 1):
        together = [pieces.pop(f"angle shorts {block - 1}"), pieces.pop(f"bond shorts {block}"), of_bonds[block]]
        pieces[f"shorts {block}"] = torch.cat(together)  # [256 + 256 + 128, 64]

    # Add the piece "bond shares", [4 · 128, 64], after the pieces that contain copies of it. `_Layout.back` takes each
    # parameter's gradient from the last piece that contains the parameter.
    pieces["bond shares"] = torch.cat(of_bonds)
    # The 15 frequencies come last, because they would misalign any piece after them.
    pieces["frequencies"] = waves
    return pieces


def _gate(piece: Tensor, *, is_angle: bool = False) -> tuple[Tensor | None, Gate]:
    """Split a layer's piece of the vector into the layer's first matrix (None for an atom layer) and its `Gate`."""
    first = None
    if is_angle:
        first, piece = piece[: 128 * 64].view(128, 64), piece[128 * 64 :]
    second = bias = None
    if len(piece) > 2 * 128:
        second, bias = piece[: 128 * 64].view(128, 64), piece[128 * 64 : 128 * 65]
    return first, Gate(second=second, bias=bias, scale=piece[-256:-128], shift=piece[-128:], products=None)


# -- forward and backward --------------------------------------------------------------------------------------------


@dataclass
class _Kept:
    """The tensors of a forward pass that the backward pass needs, except the weights."""

    plan: Plan
    bases: dict[str, Basis]
    matrices: Tensor  # matrices that map a bond's basis functions to its contributions, [4 · 128, 32]
    weights: Tensor
    bonds: list[Tensor]
    short_weights: Tensor
    atoms: list[Tensor]
    shares: list[Tensor]
    totals: list[Tensor]
    shorts: list[Tensor]
    short_shares: list[Tensor]
    of_shorts: list[dict[str, Tensor]]
    messages: list[Tensor]
    angles: list[Tensor]


class _Backbone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, model: CHGNet, batch: OrderedBatch, layout: _Layout, *parameters: Tensor) -> Tensor:
        w = layout.arranged(parameters)
        out, kept = _forward(model, batch, w)
        if any(ctx.needs_input_grad):
            ctx.batch, ctx.layout, ctx.weights, ctx.kept = batch, layout, w, kept
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        vector = gradients[0].new_zeros(len(layout.index))
        _Gradient(ctx.batch, ctx.weights, ctx.kept, layout.views(vector)).write(gradients[0].contiguous())
        return None, None, None, *layout.of_parameters(vector)


def _bases(model: CHGNet, batch: OrderedBatch) -> dict[str, Basis]:
    expansion, precision = model.bond_basis_expansion, _precision()
    return {
        "bonds": Basis(batch.bond_length, None, expansion.rbf_expansion_ag, precision),
        "shorts": Basis(batch.bond_length, batch.short_bond, expansion.rbf_expansion_ag, precision),
        "short weights": Basis(batch.bond_length, batch.short_bond, expansion.rbf_expansion_bg, precision),
        "angles": Basis(batch.angle, None, None, precision),
    }


def _forward(model: CHGNet, batch: OrderedBatch, w: dict[str, Tensor]) -> tuple[Tensor, _Kept]:
    plan, bases, n_conv = Plan.of(batch), _bases(model, batch), model.n_conv
    matrices = w["bond shares"] @ w["bonds"]
    weights, *bonds = bases["bonds"].forward(w["ag"], w["weights"], matrices)
    [short_weights] = bases["short weights"].forward(w["bg"], w["short weights"])
    [short] = bases["shorts"].forward(w["ag"], w["bonds"])
    [angle] = bases["angles"].forward(w["waves"], w["angles"])
    atom = w["embedding"].index_select(0, batch.atomic_numbers)
    share = torch.addmm(w["atoms 0 bias"], atom, w["atoms 0"].T)
    kept = _Kept(
        plan, bases, matrices, weights, bonds, short_weights, [atom], [share], [], [short], [], [], [], [angle]
    )
    of_short = {"bond": short @ w["bond shorts 0"].T}
    share_of_short: Tensor | None = None
    for block in range(n_conv):
        _, gate = _gate(w[f"atom layer {block}"])
        total = triton_bonds.bonds_forward(plan, share[:, -256:], bonds[block], weights, gate, shorts=share_of_short)
        atom = torch.addmm(atom, total, w[f"atom out {block}"].T)
        kept.totals.append(total)
        if block == n_conv - 1:
            break
        share = torch.addmm(w[f"atoms {block + 1} bias"], atom, w[f"atoms {block + 1}"].T)
        first, gate = _gate(w[f"bond layer {block}"], is_angle=True)
        message = triton_angles.angles_forward(
            plan, share[:, :128], of_short["bond"], angle, cast(Tensor, first), short_weights, gate
        )
        short = torch.addmm(short, message, w[f"bond out {block}"].T)
        kept.of_shorts.append(of_short)
        if block < n_conv - 2:
            all_of_short = short @ w[f"shorts {block + 1}"].T
            of_short = {"angle": all_of_short[:, :256], "bond": all_of_short[:, 256:512]}
            share_of_short = all_of_short[:, 512:]
            first, gate = _gate(w[f"angle layer {block}"], is_angle=True)
            angle = triton_angles.update_forward(
                plan, share[:, 128:256], of_short["angle"], angle, cast(Tensor, first), gate
            )
            kept.angles.append(angle)
        else:
            share_of_short = short @ w["bond shares"][-128:].T
        kept.atoms.append(atom)
        kept.shares.append(share)
        kept.messages.append(message)
        kept.shorts.append(short)
        kept.short_shares.append(share_of_short)
    return atom, kept


class _Gradient:
    """Runs the backward pass, from the last layer to the first, and writes the gradients of the weights ``w`` to ``d``.

    Attributes:
        short: gradient of the short bonds at the current layer.
        angle: gradient of the angles.
        weights: gradient of the bonds' weights.
        short_weights: gradient of the short bonds' weights.
    """

    def __init__(self, batch: OrderedBatch, w: dict[str, Tensor], kept: _Kept, d: dict[str, Tensor]) -> None:
        self._batch, self._w, self._kept, self._d, self._plan = batch, w, kept, d, kept.plan
        self._n_conv = len(kept.totals)
        self._bonds: list[Tensor] = []
        self._later = Later()
        self.short = self.angle = self.weights = self.short_weights = cast(Tensor, None)

    def write(self, atom: Tensor) -> None:
        """Compute all gradients from the gradient ``atom`` of the atom features, [A, 64]."""
        w, d, kept = self._w, self._d, self._kept
        for block in reversed(range(self._n_conv)):
            shares = [self._atom_layer(block, atom)]
            if block:
                if block < self._n_conv - 1:
                    shares.insert(0, self._angle_layer(block - 1))
                shares.insert(0, self._bond_layer(block - 1))
            share = torch.cat(shares, dim=1) if block else shares[0]
            self._later.multiply(share, kept.atoms[block], d[f"atoms {block}"], d[f"atoms {block} bias"])
            atom = torch.addmm(atom, share, w[f"atoms {block}"])
        by_number(atom, self._batch.atom_by_number, self._batch.by_number_offsets, out=d["embedding"][1:])
        self._bases()

    def _atom_layer(self, block: int, atom: Tensor) -> Tensor:
        """Back-propagate through an atom convolution; return the gradient of the atoms' contributions."""
        w, kept = self._w, self._kept
        self._later.multiply(atom, kept.totals[block], self._d[f"atom out {block}"])
        _, gate = _gate(w[f"atom layer {block}"])
        found = triton_bonds.bonds_backward(
            self._plan, kept.shares[block][:, -256:], kept.bonds[block], kept.weights, gate,
            atom @ w[f"atom out {block}"], shorts=kept.short_shares[block - 1] if block else None,
            d_weights=self.weights,
        )  # fmt: skip
        self._later.add(found.partials, self._d[f"atom layer {block}"])
        self._bonds.insert(0, found.bonds)
        self.weights = found.weights
        if found.shorts is not None:
            rows = slice(128 * block, 128 * block + 128)
            self._short_layer(found.shorts, w["bond shares"][rows], self._d["bond shares"][rows], block)
        return found.atoms

    def _angle_layer(self, block: int) -> Tensor:
        """Back-propagate through an angle update; return the gradient of the atoms' contributions."""
        w, kept = self._w, self._kept
        first, gate = _gate(w[f"angle layer {block}"], is_angle=True)
        found = triton_angles.update_backward(
            self._plan, kept.shares[block + 1][:, 128:256], kept.of_shorts[block + 1]["angle"], kept.angles[block],
            cast(Tensor, first), gate, self.angle,
        )  # fmt: skip
        self._later.add(found.partials, self._d[f"angle layer {block}"])
        self.angle = found.angles
        name = f"shorts {block + 1}"
        self._short_layer(found.shorts, w[name][:256], self._d[name][:256], block + 1)
        return found.atoms

    def _bond_layer(self, block: int) -> Tensor:
        """Back-propagate through a bond convolution; return the gradient of the atoms' contributions."""
        w, kept, out = self._w, self._kept, f"bond out {block}"
        self._later.multiply(self.short, kept.messages[block], self._d[out])
        first, gate = _gate(w[f"bond layer {block}"], is_angle=True)
        found = triton_angles.angles_backward(
            self._plan, kept.shares[block + 1][:, :128], kept.of_shorts[block]["bond"], kept.angles[block],
            cast(Tensor, first), kept.short_weights, gate, self.short @ w[out], d_weights=self.short_weights,
            d_angles=self.angle,
        )  # fmt: skip
        self._later.add(found.partials, self._d[f"bond layer {block}"])
        self.angle, self.short_weights = found.angles, cast(Tensor, found.weights)
        name, rows = (f"shorts {block}", slice(256, 512)) if block else ("bond shorts 0", slice(256))
        self._short_layer(found.shorts, w[name][rows], self._d[name][rows], block)
        return found.atoms

    def _short_layer(self, share: Tensor, weight: Tensor, out: Tensor, block: int) -> None:
        """Back-propagate ``share``, the gradient of a layer's output, to the features of the short bonds."""
        self._later.multiply(share, self._kept.shorts[block], out)
        self.short = share @ weight if self.short is None else torch.addmm(self.short, share, weight)

    def _bases(self) -> None:
        """Compute the gradients of frequencies and embeddings, and the long bonds' contribution to the others."""
        w, d, bases, later = self._w, self._d, self._kept.bases, self._later
        matrices, size = self._kept.matrices, self._w["bonds"].numel()
        of_bonds, of_matrices = torch.empty_like(w["bonds"]), torch.empty_like(matrices)
        of_ag = w["ag"].new_empty(10, 64)
        found = bases["bonds"].backward(w["ag"], w["weights"], matrices, [self.weights, *self._bonds])
        later.add(found[:, :size], d["weights"])
        later.add(found[:, size : 9 * size], of_matrices)
        later.add(found[:, 9 * size :], of_ag[:9])
        found = bases["shorts"].backward(w["ag"], w["bonds"], None, [self.short])
        later.add(found[:, :size], of_bonds)
        later.add(found[:, size:], of_ag[9])
        found = bases["short weights"].backward(w["bg"], w["short weights"], None, [self.short_weights])
        later.add(found[:, :size], d["short weights"])
        later.add(found[:, size:], d["bg"])
        found = bases["angles"].backward(w["waves"], w["angles"], None, [self.angle])
        later.add(found[:, :size], d["angles"])
        later.add(found[:, size:], d["waves"])
        later.run(_precision())
        d["bond shares"].addmm_(of_matrices, w["bonds"].T)
        torch.addmm(of_bonds, w["bond shares"].T, of_matrices, out=d["bonds"])
        torch.sum(of_ag, dim=0, out=d["ag"])
        torch.add(d["waves"][1:16], d["waves"][16:31], out=d["frequencies"])
