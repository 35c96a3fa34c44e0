"""In Triton's interpreter, the GPU kernels of bases and read-out give plain torch's values and gradients."""

from __future__ import annotations

import pytest
import torch
from interpreted import backwards, quicken
from torch import Tensor

from mbqueue.train.chgnet import load_pretrained
from mbqueue.train.forward import fourier_basis, radial_basis, read_out, reference_energies
from mbqueue.train.kernels.triton_bases import Basis
from mbqueue.train.kernels.triton_later import Later
from mbqueue.train.kernels.triton_readout import READ_OUT_SIZES, energies_backward, energies_forward
from mbqueue.train.kernels.triton_sums import by_number

#: Row counts to test: none, one, two tiles, two tiles plus one, and more than one tile for each of `PARTIALS` sums.
COUNTS = (0, 1, 64, 65, 64 * 3 + 7)
PARTIALS = 4
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def close(found: Tensor, expected: Tensor) -> None:
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    assert error < TOLERANCE[expected.dtype], error


def padded(matrix: Tensor) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["all bonds", "short bonds", "angles"])
@pytest.mark.parametrize("n", COUNTS)
def test_bases_and_their_layers(kind: str, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbqueue.train.kernels.triton_bases.BASIS_PARTIALS", PARTIALS)
    torch.manual_seed(n)
    radial = load_pretrained("0.3.0").bond_basis_expansion.rbf_expansion_ag
    more = {"all bonds": 4, "short bonds": 0, "angles": 0}[kind]
    matrices = [torch.randn(64 + 128 * more, 31, dtype=dtype).requires_grad_()]
    values = 0.5 + 6 * torch.rand(n + 3, dtype=dtype)  # some bonds are longer than the cut-off
    chosen = torch.randperm(n + 3)[:n].int() if kind == "short bonds" else None
    taken = values[:n] if chosen is None else values[chosen.long()]
    values = values[:n] if chosen is None else values
    if kind == "angles":
        frequencies = torch.arange(1, 16, dtype=dtype).add(0.01).requires_grad_()
        basis = fourier_basis(frequencies, taken)
        zero = torch.zeros(1, dtype=dtype)
        wide = torch.cat([zero, frequencies, frequencies, zero])
    else:
        frequencies = radial.frequencies.detach().to(dtype).requires_grad_()
        scaled = taken * radial.inv_cutoff
        envelope = radial.smooth_cutoff(taken) * (radial.norm_const / taken)
        basis = envelope[:, None] * torch.sin(scaled[:, None] * frequencies)
        if dtype == torch.float32:
            radial.frequencies.data = frequencies.data
            assert torch.equal(radial_basis(radial, taken), basis)
        wide = torch.nn.functional.pad(frequencies, (0, 1))
    expected = (basis @ matrices[0].T).split([64, *[128] * more], dim=1)
    d_out = [torch.randn(n, part.shape[1], dtype=dtype) for part in expected]
    d_matrix, d_frequencies = torch.autograd.grad(expected, [matrices[0], frequencies], d_out)
    first, rest = padded(matrices[0].detach()).split([64, 128 * more])
    kernel = Basis(values, chosen, None if kind == "angles" else radial, "ieee")
    rest_or_none = rest.contiguous() if more else None
    found = kernel.forward(wide.detach(), first.contiguous(), rest_or_none)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs.detach()) if n else None
        assert ours.shape == theirs.shape
    pieces = 1 + 2 * more
    total = kernel.backward(wide.detach(), first.contiguous(), rest_or_none, d_out).sum(dim=0)
    of_matrix, of_wide = total[: pieces * 64 * 32].view(-1, 32), total[pieces * 64 * 32 :].view(pieces, 64).sum(dim=0)
    close(of_matrix[:, :31], d_matrix)
    assert not of_matrix[:, 31].any()
    assert not of_wide[32:].any()
    close(of_wide[1:16] + of_wide[16:31] if kind == "angles" else of_wide[:31], d_frequencies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[1], [400, 1], [16, 17, 3, 1, 33]])
def test_read_out(sizes: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(len(sizes))
    model = load_pretrained("0.3.0").to(dtype)
    n_atoms, n = torch.tensor(sizes), sum(sizes)
    numbers = torch.randint(1, 95, (n,))
    of_crystal = torch.repeat_interleave(torch.arange(len(sizes)), n_atoms)
    features = torch.randn(n, 64, dtype=dtype).requires_grad_()
    layers = [model.mlp.layers[index] for index in (0, 2, 4, 7)]
    parameters = [model.readout_norm.weight, model.readout_norm.bias]
    parameters += [each for layer in layers for each in (layer.weight, layer.bias)]
    parameters.append(model.composition_model.fc.weight)
    parameters[-1].requires_grad_()
    expected = read_out(model, features, of_crystal, n_atoms) + reference_energies(model, numbers, of_crystal, n_atoms)
    d_energies = torch.randn(len(sizes), dtype=dtype)
    d_features, *d_parameters = torch.autograd.grad(expected, [features, *parameters], d_energies)
    packed = torch.cat([each.detach().flatten() for each in parameters])
    assert len(packed) == sum(READ_OUT_SIZES)
    close(energies_forward(features.detach(), packed, n_atoms, numbers, "ieee"), expected.detach())
    order = torch.argsort(numbers, stable=True).int()
    offsets = torch.searchsorted(numbers[order.long()], torch.arange(1, 96)).int()
    found, parts = energies_backward(features.detach(), packed, n_atoms, d_energies, order, offsets, "ieee")
    close(found, d_features)
    assert [part.numel() for part in parts] == list(READ_OUT_SIZES)
    for ours, theirs in zip(parts, d_parameters, strict=True):
        close(ours.flatten(), theirs.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_and_products_that_are_noted_and_computed_together(dtype: torch.dtype) -> None:
    torch.manual_seed(9)
    later = Later()
    wide = torch.randn(70, 320, dtype=dtype)
    sums = [
        (torch.randn(33, 192, dtype=dtype), torch.empty(192, dtype=dtype)),
        (wide[:, 64:192], torch.empty(128, dtype=dtype)),
    ]
    sums.append((torch.randn(0, 64, dtype=dtype), torch.ones(64, dtype=dtype)))
    for partials, out in sums:
        later.add(partials, out)
    products = []
    for rows, columns, has_bias in ((100, 256, True), (31, 64, False), (0, 128, True)):
        d_out, x = torch.randn(rows, columns, dtype=dtype), torch.randn(rows, 64, dtype=dtype)
        bias = torch.ones(columns, dtype=dtype) if has_bias else None
        products.append((d_out, x, torch.ones(columns, 64, dtype=dtype), bias))
        later.multiply(*products[-1])
    later.run("ieee")
    for partials, out in sums:
        close(out, partials.sum(dim=0))
    for d_out, x, d_weight, bias in products:
        close(d_weight, d_out.T @ x)
        if bias is not None:
            close(bias, d_out.sum(dim=0))


def test_sums_by_element_with_elements_that_are_not_there() -> None:
    numbers = torch.tensor([8, 1, 8, 94, *[3] * 70])
    x = torch.randn(len(numbers), 64, dtype=torch.float64)
    order = torch.argsort(numbers, stable=True).int()
    offsets = torch.searchsorted(numbers[order.long()], torch.arange(1, 96)).int()
    found = by_number(x, order, offsets)
    close(found, torch.zeros(94, 64, dtype=torch.float64).index_add(0, numbers - 1, x))


def test_the_order_of_programs_changes_no_bit() -> None:
    torch.manual_seed(5)
    radial = load_pretrained("0.3.0").bond_basis_expansion.rbf_expansion_ag
    values, matrix = 1 + 4 * torch.rand(300), torch.randn(64, 32)
    kernel = Basis(values, None, radial, "ieee")
    frequencies = torch.nn.functional.pad(radial.frequencies.detach(), (0, 1))
    sizes = torch.tensor([5, 20, 1])
    packed, features = torch.randn(sum(READ_OUT_SIZES)) / 8, torch.randn(26, 64)
    numbers = torch.randint(1, 95, (26,))
    order = torch.argsort(numbers, stable=True).int()
    offsets = torch.searchsorted(numbers[order.long()], torch.arange(1, 96)).int()

    def everything() -> list[Tensor]:
        torch.manual_seed(6)
        out = kernel.forward(frequencies, matrix)
        d_features, parts = energies_backward(features, packed, sizes, torch.randn(3), order, offsets, "ieee")
        energies = energies_forward(features, packed, sizes, numbers, "ieee")
        partials = kernel.backward(frequencies, matrix, None, [torch.randn(300, 64)])
        later, summed, weight = Later(), torch.empty(66 * 32), torch.empty(64, 64)
        later.add(partials, summed)
        later.multiply(features, features, weight)
        later.run("ieee")
        return [*out, partials, summed, weight, d_features, *parts, energies]

    forwards = everything()
    with backwards():
        assert all(torch.equal(a, b) for a, b in zip(forwards, everything(), strict=True))
