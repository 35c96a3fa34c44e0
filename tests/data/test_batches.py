"""Batches contain what CHGNet would compute for the same crystals."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from chgnet.graph import CrystalGraphConverter
from chgnet.model import CHGNet
from hypothesis import HealthCheck, given, settings
from pymatgen.core import Lattice, Structure
from torch.utils._python_dispatch import TorchDispatchMode

from mbqueue.data.batch import Batch, OrderedBatch
from mbqueue.data.batches import Distortion, make_batch
from mbqueue.data.graph_cache import GraphCache
from mbqueue.data.graphs import convert, graph
from mbqueue.errors import CacheError
from mbqueue.train.forward import formation_energies
from tests.data.crystal_making import SALT, gathered, structures


def assert_equal(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


def chgnet_lengths_and_angles(structure: Structure):
    """Bond lengths and angles from CHGNet's own graph by its formulas (BondEncoder, AngleEncoder), in float64."""
    theirs = CrystalGraphConverter(atom_graph_cutoff=6, bond_graph_cutoff=3, algorithm="fast")(structure)
    lattice = torch.tensor(structure.lattice.matrix)
    cart = torch.tensor(structure.frac_coords) @ lattice
    center, neighbor = theirs.atom_graph.long().T
    vectors = cart[center] - (cart[neighbor] + theirs.neighbor_image.double() @ lattice)
    lengths = vectors.norm(dim=1)
    units = vectors / lengths[:, None]
    pairs = theirs.bond_graph.long().reshape(-1, 5)
    angles = torch.acos((units[pairs[:, 2]] * units[pairs[:, 4]]).sum(dim=1) * (1 - 1e-6))
    return theirs, lengths[theirs.undirected2directed.long()], pairs, angles


def test_bonds_lengths_and_angles_are_those_of_chgnet(some_crystals, some_graphs):
    for row in range(len(some_crystals)):
        batch = make_batch(some_graphs, [row])
        theirs, lengths, pairs, angles = chgnet_lengths_and_angles(some_crystals.structure(row))
        assert torch.equal(batch.bond_center, theirs.atom_graph[:, 0].long())
        assert torch.equal(batch.bond_neighbor, theirs.atom_graph[:, 1].long())
        assert torch.equal(batch.bond_undirected, theirs.directed2undirected.long())
        torch.testing.assert_close(batch.bond_length, lengths.float(), rtol=2e-7, atol=0)
        # CHGNet lists angles in a different order, so compare angles by their two directed bonds.
        ours = graph(convert(some_crystals, row, row + 1), 0, int(batch.n_atoms[0])).bond_graph
        assert torch.equal(batch.angle_center, torch.tensor(ours[:, 0]))
        assert torch.equal(batch.short_bond[batch.angle_bond_i], torch.tensor(ours[:, 1]))
        assert torch.equal(batch.short_bond[batch.angle_bond_j], torch.tensor(ours[:, 3]))
        place = {(i, j): angle for i, j, angle in zip(*pairs[:, [2, 4]].T.tolist(), angles.tolist(), strict=True)}
        expected = torch.tensor([place[i, j] for i, j in ours[:, [2, 4]].tolist()], dtype=torch.float64)
        torch.testing.assert_close(batch.angle, expected.float(), rtol=3e-7, atol=1e-7)


def assert_sound(batch: Batch) -> None:
    """Check everything that `batch.py` guarantees about a batch."""
    n_atoms, n_bonds, n_short = len(batch.atomic_numbers), len(batch.bond_center), len(batch.short_bond)
    assert batch.n_atoms.sum() == n_atoms
    assert torch.equal(batch.atom_crystal, torch.repeat_interleave(torch.arange(len(batch)), batch.n_atoms))
    assert (batch.bond_center.diff() >= 0).all()
    assert torch.equal(batch.bond_reverse[batch.bond_reverse], torch.arange(n_bonds))
    assert (batch.bond_reverse != torch.arange(n_bonds)).all()
    assert torch.equal(batch.bond_center[batch.bond_reverse], batch.bond_neighbor)
    assert torch.equal(batch.bond_undirected[batch.bond_reverse], batch.bond_undirected)
    assert torch.equal(torch.bincount(batch.bond_undirected), torch.full((n_bonds // 2,), 2))
    assert torch.equal(batch.atom_crystal[batch.bond_center], batch.atom_crystal[batch.bond_neighbor])
    assert len(batch.bond_length) == n_bonds // 2
    assert (batch.short_bond.diff() > 0).all()
    assert (batch.angle_bond_i.diff() >= 0).all()
    assert torch.equal(batch.angle_by_j, torch.argsort(batch.angle_bond_j, stable=True))
    assert torch.equal(torch.unique(torch.cat([batch.angle_bond_i, batch.angle_bond_j])), torch.arange(n_short))
    assert (batch.bond_length[batch.short_bond] <= 3.0 + 1e-6).all()
    assert batch.angle.isfinite().all()
    for field in fields(Batch):
        tensor = getattr(batch, field.name)
        expected = torch.int32 if field.name.startswith(("bond_", "short_", "angle_")) else torch.int64
        if field.name in ("targets", "bond_length", "angle"):
            expected = torch.float32
        assert tensor.dtype == expected, field.name


def test_a_batch_is_its_crystals_one_after_the_other(some_crystals, some_graphs):
    rows = np.array([9, 2, 33, 2])
    batch = make_batch(some_graphs, rows)
    assert_sound(batch)
    assert batch.rows.tolist() == rows.tolist()
    np.testing.assert_array_equal(batch.targets, some_crystals.targets[rows].astype(np.float32))
    parts = [make_batch(some_graphs, [row]) for row in rows]
    atoms = np.cumsum([0] + [len(part.atomic_numbers) for part in parts])
    bonds = np.cumsum([0] + [len(part.bond_center) for part in parts])
    short = np.cumsum([0] + [len(part.short_bond) for part in parts])
    angles = np.cumsum([0] + [len(part.angle) for part in parts])
    shifts = {
        "bond_center": atoms, "bond_neighbor": atoms, "angle_center": atoms, "bond_undirected": bonds // 2,
        "short_bond": bonds // 2, "bond_reverse": bonds, "angle_bond_i": short, "angle_bond_j": short,
        "angle_by_j": angles,
    }  # fmt: skip
    for name in ("atomic_numbers", "bond_length", "angle", *shifts):
        together = torch.cat(
            [getattr(p, name) + (int(shifts[name][n]) if name in shifts else 0) for n, p in enumerate(parts)]
        )
        assert torch.equal(getattr(batch, name), together), name


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(structure=structures())
def test_any_cell_gives_a_sound_batch(structure, tmp_path_factory):
    crystals = gathered(structure, SALT, structure)
    cache = GraphCache.build(crystals, tmp_path_factory.mktemp("any"), workers=1)
    assert cache is not None
    assert_sound(make_batch(cache, [0, 1, 2]))


def test_crystals_without_any_angle_make_a_batch(tmp_path):
    lonely = Structure(Lattice.cubic(9.3), ["Cs"], [[0, 0, 0]])
    cache = GraphCache.build(gathered(lonely, SALT, lonely), tmp_path)
    assert cache is not None
    alone = make_batch(cache, [0])
    assert len(alone.angle) == len(alone.short_bond) == 0
    assert len(alone.bond_center) == 6
    assert_sound(alone)
    assert_sound(make_batch(cache, [0, 1, 2]))


def test_a_cell_of_2000_atoms_makes_a_batch(tmp_path):
    dense = Structure(Lattice.cubic(3.2), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    cache = GraphCache.build(gathered(dense, dense.make_supercell([10, 10, 10], in_place=False)), tmp_path)
    assert cache is not None
    batch = make_batch(cache, [1])
    assert_sound(batch)
    assert len(batch.bond_center) == 1000 * len(make_batch(cache, [0]).bond_center)


def test_a_distorted_crystal_has_the_lengths_and_angles_of_its_distorted_cell(some_crystals, some_graphs):
    row = 20
    plain = make_batch(some_graphs, [row])
    batch = make_batch(some_graphs, [row], Distortion(strain=0.02, jitter=0.05, seed=7))
    for name in ("bond_center", "bond_neighbor", "bond_undirected", "angle_bond_i", "angle_by_j", "short_bond"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    assert 0.001 < (batch.bond_length - plain.bond_length).abs().mean() < 0.3
    assert 0.001 < (batch.angle - plain.angle).abs().mean() < 0.3
    assert batch.angle.isfinite().all()


def test_pure_strain_changes_all_images_of_a_bond_alike(tmp_path):
    cache = GraphCache.build(gathered(Structure(Lattice.cubic(3.0), ["Po"], [[0.3, 0.1, 0.7]])), tmp_path)
    assert cache is not None
    batch = make_batch(cache, [0], Distortion(strain=0.03, seed=1))
    plain = make_batch(cache, [0])
    # Strain scales parallel bonds by the same factor.
    share = (batch.bond_length / plain.bond_length).tolist()
    theirs = graph(convert(cache.crystals), 0, 1)
    image = theirs.image[theirs.undirected2directed]
    far, near = (np.flatnonzero((np.abs(image) == [0, 0, n]).all(axis=1))[0] for n in (2, 1))
    assert share[far] == pytest.approx(share[near], abs=1e-6)
    assert share[near] != pytest.approx(1, abs=1e-4)


def test_a_distortion_depends_on_seed_and_row_only(some_graphs):
    shaken = Distortion(strain=0.01, jitter=0.02, seed=3)
    alone = make_batch(some_graphs, [11], shaken)
    together = make_batch(some_graphs, [4, 11, 30], shaken)
    begin = len(make_batch(some_graphs, [4]).bond_length)
    assert torch.equal(together.bond_length[begin : begin + len(alone.bond_length)], alone.bond_length)
    assert_equal(alone, make_batch(some_graphs, [11], shaken))
    other_seed = make_batch(some_graphs, [11], Distortion(strain=0.01, jitter=0.02, seed=4))
    assert not torch.equal(alone.bond_length, other_seed.bond_length)


def test_a_distortion_of_nothing_changes_nothing(some_graphs):
    assert_equal(make_batch(some_graphs, [1, 2]), make_batch(some_graphs, [1, 2], Distortion(seed=5)))


def test_strain_and_jitter_have_the_deviations_asked_for():
    from mbqueue.data.distortion import distort

    n = 4000
    cart, lattices = np.zeros((n, 3)), np.repeat(np.eye(3)[None], n, axis=0)
    ones, rows = np.ones(n, np.int64), np.arange(n)
    moved, strained = distort(cart, lattices, ones, rows, 0.05, 0.1, 1)
    assert moved.std() == pytest.approx(0.1, rel=0.03)
    assert abs(moved.mean()) < 0.005
    epsilon = strained - np.eye(3)
    assert epsilon.std() == pytest.approx(0.05, rel=0.03)
    np.testing.assert_array_equal(epsilon, epsilon.transpose(0, 2, 1))
    assert abs(np.corrcoef(moved[:, 0], moved[:, 1])[0, 1]) < 0.05
    assert abs(np.corrcoef(moved[:-1, 0], moved[1:, 0])[0, 1]) < 0.05


def test_a_record_that_makes_no_sense_is_an_error_and_no_crash(some_crystals, tmp_path):
    cache = GraphCache.build(some_crystals, tmp_path)
    assert cache is not None
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        row = int(generator.integers(len(some_crystals)))
        noise, ends = cache.records(np.array([row]))
        noise[generator.integers(len(noise), size=3)] = generator.integers(256, size=3)
        cache.records = lambda _rows, given=(noise, ends): given  # type: ignore[method-assign]
        try:
            make_batch(cache, [row])
        except CacheError:
            refused += 1
        del cache.records
    assert refused > 100


def test_indices_of_32_bits_change_no_bit_of_energies_and_gradients(some_graphs):
    model = CHGNet.load(use_device="cpu", verbose=False)
    batch = make_batch(some_graphs, [3, 40, 11])
    outcomes = []
    for indices in (torch.int32, torch.int64):
        tensors = {field.name: getattr(batch, field.name) for field in fields(Batch)}
        same = {name: t.to(indices) if t.dtype == torch.int32 else t for name, t in tensors.items()}
        model.zero_grad()
        energies = formation_energies(model, Batch(**same))
        energies.sum().backward()
        outcomes.append([energies.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(outcomes[0]) > 100
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_an_ordered_batch_knows_the_rows_of_each_sum(some_graphs):
    batch = make_batch(some_graphs, [3, 40, 11, 3]).ordered()
    assert batch.ordered() is batch
    for rows, order, offsets in (
        (batch.bond_center, None, batch.bond_offsets),
        (batch.short_bond, None, batch.short_offsets),
        (batch.angle_bond_i, None, batch.angle_offsets),
        (batch.angle_bond_j, batch.angle_by_j, batch.by_j_offsets),
        (batch.angle_center, batch.angle_by_center, batch.by_center_offsets),
        (batch.atomic_numbers - 1, batch.atom_by_number, batch.by_number_offsets),
    ):
        expected = torch.argsort(rows, stable=True)
        assert torch.equal(expected if order is None else order.long(), expected)
        counts = torch.bincount(rows, minlength=len(offsets) - 1)
        assert torch.equal(offsets, torch.cat([torch.zeros(1), counts.cumsum(0)]).int())
        assert offsets.dtype == torch.int32
        assert order is None or order.dtype == torch.int32
    first = batch.bond_first.long()
    assert torch.equal(batch.bond_undirected[first], torch.arange(len(batch.bond_length), dtype=torch.int32))
    assert (batch.bond_reverse[first] > first).all()


def test_a_batch_goes_to_a_gpu_with_its_orders_and_in_int32(some_graphs):
    there = make_batch(some_graphs, [3, 40]).to(torch.device("meta"))
    assert isinstance(there, OrderedBatch)
    for field in fields(there):
        if field.name.startswith(("bond_", "short_", "angle_", "by_")) and field.name != "bond_length":
            assert getattr(there, field.name).dtype == torch.int32, field.name


def test_a_packed_batch_is_the_same_and_one_copy_brings_it_to_a_gpu(some_graphs):
    batch = make_batch(some_graphs, np.arange(len(some_graphs))).ordered()
    packed = batch.packed(pinned=False)
    for field in fields(OrderedBatch):
        tensor, before = getattr(packed, field.name), getattr(batch, field.name)
        assert torch.equal(tensor, before), field.name
        assert tensor.dtype == before.dtype
        assert tensor.data_ptr() % 16 == 0, "kernels are compiled for such"

    class Copies(TorchDispatchMode):
        """Counts copies to another device."""

        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += "copy" in func.overloadpacket.__name__
            return func(*args, **(kwargs or {}))

    for brought, copies in ((packed, 1), (batch, len(fields(OrderedBatch)))):
        with Copies() as counting:
            there = brought.to(torch.device("meta"))
        assert counting.count == copies
        for field in fields(OrderedBatch):
            tensor, before = getattr(there, field.name), getattr(batch, field.name)
            assert (tensor.shape, tensor.dtype, tensor.device.type) == (before.shape, before.dtype, "meta")
    empty = make_batch(some_graphs, np.arange(1)).ordered()
    assert torch.equal(empty.packed(pinned=False).to(torch.device("cpu")).angle, empty.angle)
