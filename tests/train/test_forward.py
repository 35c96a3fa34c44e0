"""mbqueue's forward pass, which computes a whole batch at once, gives stock CHGNet's energies and gradients."""

from __future__ import annotations

import copy
import io
import threading
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import pytest
import torch
from chgnet.model import CHGNet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from long_runs import LONG
from torch.utils._python_dispatch import TorchDispatchMode

from mbqueue.data.batches import make_batch
from mbqueue.data.datasets import load
from mbqueue.data.graph_cache import GraphCache
from mbqueue.errors import TrainingError
from mbqueue.train.chgnet import load_pretrained
from mbqueue.train.forward import atom_features, check_architecture, energies, formation_energies
from mbqueue.train.fused import FusedMessages
from mbqueue.train.gated import PRODUCTS, Gate, PlainMessages, gradient_scale, linear

# CHGNet turns a tensor of volumes into a list of numbers, which torch ≥ 2.13 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")


#: MBQUEUE_LONG=1 compares 256 crystals, and the gradients of 128. By default, compare 64 and 32.
BATCH = 64 if LONG else 16


def gradients(model: CHGNet, energy: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    # Give the crystals different weights, so that errors of opposite sign cannot cancel out.
    weights = torch.linspace(0.5, 1.5, len(energy), dtype=energy.dtype, device=energy.device)
    (energy * weights).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        error = float((ours[name] - expected).norm() / expected.norm().clamp_min(1e-12))
        assert error < tolerance, f"{name}: {error}"


def behind_the_first_layer(gated: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in gated.named_parameters() if "layers.0." not in name]


@pytest.mark.parametrize("version", ["0.3.0", "r2scan"])
def test_energies_and_gradients_are_stock_chgnets(helpers: Any, version: str, device: torch.device) -> None:
    graphs = helpers.convert(helpers.crystals_of_many_kinds(seed=1, copies=2))
    batch = helpers.batch_from_chgnet_graphs(graphs).to(device)
    graphs, model = [graph.to(device) for graph in graphs], load_pretrained(version).to(device)
    ours, stock = formation_energies(model, batch), model(graphs)["e"]
    assert float((ours - stock).abs().max()) < 1e-5
    assert_same_gradients(gradients(model, ours), gradients(model, stock), 1e-4)


def test_energies_of_many_real_crystals_are_stock_chgnets(helpers: Any, tmp_path: Any, device: torch.device) -> None:
    crystals = load("sample", limit=4 * BATCH, seed=5).crystals
    cache = GraphCache.build(crystals, tmp_path / "graphs", workers=1)
    model = load_pretrained("0.3.0").to(device)
    for first in range(0, len(crystals), BATCH):
        rows = np.arange(first, first + BATCH)
        graphs = [graph.to(device) for graph in helpers.convert([crystals.structure(row) for row in rows])]
        ours, stock = formation_energies(model, make_batch(cache, rows).to(device)), model(graphs)["e"]
        assert float((ours - stock).abs().max()) < 1e-5
        if first < 2 * BATCH:
            assert_same_gradients(gradients(model, ours), gradients(model, stock), 1e-4)


def test_float64_is_much_closer(helpers: Any) -> None:
    graphs = [copy.copy(graph) for graph in helpers.convert(helpers.crystals_of_many_kinds(seed=2))]
    for graph in graphs:
        graph.atom_frac_coord = graph.atom_frac_coord.double()
        graph.lattice, graph.neighbor_image = graph.lattice.double(), graph.neighbor_image.double()
    model = load_pretrained("0.3.0").double()
    model.composition_model = None  # CHGNet's composition model is always float32
    ours = energies(model, helpers.batch_from_chgnet_graphs(graphs, dtype=torch.float64))
    stock = model(graphs)["e"]
    assert float((ours - stock).abs().max()) < 1e-12
    assert_same_gradients(gradients(model, ours), gradients(model, stock), 1e-10)


@pytest.mark.parametrize("kind", [6, 7])
def test_a_single_atom_and_an_empty_bond_graph_are_no_special_case(helpers: Any, kind: int) -> None:
    graphs = helpers.convert([helpers.crystals_of_many_kinds(seed=4)[kind]])
    batch = helpers.batch_from_chgnet_graphs(graphs)
    assert len(batch.atomic_numbers) == 1 if kind == 6 else len(batch.angle) == 0
    model = load_pretrained("0.3.0")
    ours, stock = formation_energies(model, batch), model(graphs)["e"]
    assert float((ours - stock).abs().max()) < 1e-5
    reached = gradients(model, ours)
    assert_same_gradients(reached, gradients(model, stock), 1e-4)
    assert ("bond_weights_bg.weight" in reached) == (kind == 6)


def test_a_bias_in_bond_convolution_also_changes_bonds_without_angles(helpers: Any) -> None:
    with redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        model = CHGNet(mlp_out_bias=True, num_radial=31, num_angular=31)
    graphs = helpers.convert(helpers.crystals_of_many_kinds(seed=5))
    ours = formation_energies(model, helpers.batch_from_chgnet_graphs(graphs))
    assert float((ours - model(graphs)["e"]).abs().max()) < 1e-5


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(0, 31), min_size=1, max_size=12))
def test_a_crystals_energy_does_not_depend_on_its_batch(bench: Any, rows: list[int]) -> None:
    model = load_pretrained("0.3.0")
    with torch.inference_mode():
        together = energies(model, make_batch(bench.cache, np.array(rows)))
        alone = torch.cat([energies(model, make_batch(bench.cache, np.array([row]))) for row in rows])
    assert float((together - alone).abs().max()) < 1e-5


def test_compiled_messages_equal_plain_ones(bench: Any) -> None:
    batch = make_batch(bench.cache, np.arange(16))
    model = load_pretrained("0.3.0")
    torch.manual_seed(1)
    atoms, bonds = torch.randn(len(batch.atomic_numbers), 256), torch.randn(len(batch.bond_length), 128)
    shorts, angles = torch.randn(len(batch.short_bond), 256), torch.randn(len(batch.angle), 64)
    first, weights = torch.randn(128, 64) / 8, torch.randn(len(batch.bond_length), 64)
    short_weights = torch.randn(len(batch.short_bond), 64)
    bond_gate, update_gate = model.atom_conv_layers[0].twoBody_atom, model.angle_layers[0].twoBody_bond
    inputs = [t.requires_grad_() for t in (atoms, bonds, shorts, angles, first, weights, short_weights)]
    results = []
    for messages in (PlainMessages(batch), FusedMessages(batch)):
        model.zero_grad()
        outs = [
            messages.of_bonds(atoms, bonds, weights, Gate.of(bond_gate)),
            messages.of_angles(atoms[:, :128], shorts, angles, first, short_weights, Gate.of(bond_gate)),
            messages.updated_angles(atoms[:, :128], shorts, angles, first, Gate.of(update_gate)),
        ]
        parameters = [*inputs, *behind_the_first_layer(bond_gate), *update_gate.bn1.parameters()]
        found = torch.autograd.grad(sum((out**2).sum() for out in outs), parameters)
        results.append([*outs, *found])
    for plain, compiled in zip(*results, strict=True):
        assert float((plain - compiled).norm() / plain.norm()) < 2e-6


def test_the_number_of_threads_changes_no_bit_of_the_compiled_messages(bench: Any) -> None:
    batch = make_batch(bench.cache, np.arange(32))
    gate = load_pretrained("0.3.0").atom_conv_layers[0].twoBody_atom
    torch.manual_seed(2)
    atoms = torch.randn(len(batch.atomic_numbers), 256, requires_grad=True)
    bonds, weights = torch.randn(len(batch.bond_length), 128), torch.randn(len(batch.bond_length), 64)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = FusedMessages(batch).of_bonds(atoms, bonds, weights, Gate.of(gate))
        grads = torch.autograd.grad(out.sum(), [atoms, *behind_the_first_layer(gate)])
        found.append([out.detach(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_too_small_for_float32_are_zero_in_every_thread(bench: Any) -> None:
    batch = make_batch(bench.cache, np.arange(8))
    gate = load_pretrained("0.3.0").atom_conv_layers[0].twoBody_atom
    torch.manual_seed(2)
    atoms = torch.randn(len(batch.atomic_numbers), 256, requires_grad=True)
    bonds = torch.randn(len(batch.bond_length), 128)
    weights = 10 ** (-20 - 18 * torch.rand(len(batch.bond_length), 64))
    found = []
    for flushes in (False, True):
        torch.set_flush_denormal(flushes)
        try:
            out = FusedMessages(batch).of_bonds(atoms, bonds, weights, Gate.of(gate))
            [gradient] = torch.autograd.grad(out, [atoms], torch.full_like(out, 1e-3))
            assert (float(torch.tensor(1e-38) * 0.1) == 0.0) == flushes, "the thread is as it was"
        finally:
            torch.set_flush_denormal(False)
        found.append(gradient)
    assert torch.equal(*found)
    assert found[0].count_nonzero() > 0
    assert not ((found[0] != 0) & (found[0].abs() < torch.finfo(torch.float32).tiny)).any()


def test_nan_weights_give_nan_results(bench: Any) -> None:
    for name in ("mlp_core.layers.3.weight", "mlp_gate.layers.3.weight", "mlp_gate.layers.0.bias", "bn2.weight"):
        model = load_pretrained("0.3.0")
        with torch.no_grad():
            model.get_parameter(f"atom_conv_layers.0.twoBody_atom.{name}").fill_(float("nan"))
            assert energies(model, make_batch(bench.cache, np.arange(4))).isnan().all(), name


def test_the_forward_does_not_change_the_state_dict(bench: Any) -> None:
    model = load_pretrained("0.3.0")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    formation_energies(model, make_batch(bench.cache, np.arange(4))).sum().backward()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_inference_needs_no_gradients(bench: Any) -> None:
    with torch.inference_mode():
        features = atom_features(load_pretrained("0.3.0"), make_batch(bench.cache, np.arange(3)))
    assert not features.requires_grad
    assert features.shape[1] == 64


def test_a_model_of_another_build_is_refused_with_the_differences() -> None:
    with redirect_stdout(io.StringIO()):
        model = CHGNet(gMLP_norm="batch")
    with pytest.raises(TrainingError, match="gMLP_norm = 'batch' instead of 'layer'"):
        check_architecture(model)


def test_products_in_bfloat16_stay_close_and_their_gradients_come_from_any_thread(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Do not use the fused CPU kernels, which a GPU would not use either.
    monkeypatch.setattr("mbqueue.train.forward.FusedMessages", PlainMessages)
    batch = make_batch(bench.cache, np.arange(16))
    model = load_pretrained("0.3.0")
    exact = energies(model, batch)
    token = PRODUCTS.set(torch.bfloat16)
    rough = energies(model, batch)
    PRODUCTS.reset(token)
    assert rough.dtype == torch.float32
    assert 0.0 < float((rough - exact).abs().max()) < 0.1
    exact_gradients = gradients(model, exact)
    found: list[dict[str, torch.Tensor]] = []
    # On a GPU, torch runs the backward pass in its own thread, so use a thread here too.
    thread = threading.Thread(target=lambda: found.append(gradients(model, rough)))
    thread.start()
    thread.join()
    name = "atom_conv_layers.3.twoBody_atom.mlp_core.layers.3.weight"
    difference = float((found[0][name] - exact_gradients[name]).norm() / exact_gradients[name].norm())
    assert 0.0 < difference < 0.3


def test_products_of_float16_sum_in_float32_and_keep_small_gradients(
    bench: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbqueue.train.forward.FusedMessages", PlainMessages)
    batch, model = make_batch(bench.cache, np.arange(16)), load_pretrained("0.3.0")
    ones = torch.ones(4096, 1)
    token = PRODUCTS.set(torch.float16)
    try:
        assert float(linear(40 * ones.T, 40 * ones.T)) == 40 * 40 * 4096, "65,504 is the largest float16"
        found = {}
        for name, products in (("exact", None), ("half", torch.float16)):
            PRODUCTS.set(products)
            model.zero_grad()
            scale = gradient_scale(64)
            assert scale == (2.0**18 if products else 1.0)
            # Make the gradient as small as that of one crystal with an error of 1 meV/atom in a batch of 64.
            (formation_energies(model, batch).sum() * (1e-2 / 64) * scale).backward()
            found[name] = {n: p.grad.double() / scale for n, p in model.named_parameters() if p.grad is not None}
    finally:
        PRODUCTS.reset(token)
    for name, exact in found["exact"].items():
        error = float((found["half"][name] - exact).norm() / exact.norm())
        # Without gradient scaling, many gradients would be smaller than their rounding errors.
        assert error < 0.1, f"{name}: {error}"
    assert any(not torch.equal(found["half"][name], exact) for name, exact in found["exact"].items())


def test_what_a_gpu_would_compute_is_the_same_on_every_run(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbqueue.train.forward.FusedMessages", PlainMessages)
    batch = make_batch(bench.cache, np.arange(16))
    model = load_pretrained("0.3.0")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(model, energies(model, batch)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


class Operations(TorchDispatchMode):
    """Remembers the name of every torch operation, including those of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


#: Torch ops that sort and check all indices on CUDA if deterministic algorithms are on.
SORTED_WHEN_DETERMINISTIC = {"index_add", "index_copy", "index_put", "scatter_add", "scatter", "index_reduce"}
#: Torch ops that wait for the device.
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "equal"}


def test_a_gpu_sorts_nothing_but_the_indices_and_is_not_waited_for(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbqueue.train.forward.FusedMessages", PlainMessages)
    batch, model = make_batch(bench.cache, np.arange(16)), load_pretrained("0.3.0")
    with Operations() as operations:
        formation_energies(model, batch).sum().backward()
    assert "segment_reduce" in operations.seen
    assert not {name.rstrip("_") for name in operations.seen} & SORTED_WHEN_DETERMINISTIC
    assert not operations.seen & WAITING


def test_segment_sums_over_short_bonds_have_the_bits_of_indexed_sums(bench: Any) -> None:
    batch = make_batch(bench.cache, np.arange(16))
    torch.manual_seed(3)
    bonds, message = torch.randn(len(batch.bond_length), 64), torch.randn(len(batch.short_bond), 64)
    found = []
    for messages in (PlainMessages(batch), FusedMessages(batch)):
        x, y = bonds.clone().requires_grad_(), message.clone().requires_grad_()
        taken, added = messages.shorts_of(x), messages.add_to_shorts(x, y)
        found.append([taken, added, *torch.autograd.grad((taken**2).sum() + (added**3).sum(), [x, y])])
    assert all(torch.equal(plain, compiled) for plain, compiled in zip(*found, strict=True))
