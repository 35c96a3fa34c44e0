"""Crystals stored in flat arrays."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from pymatgen.core import Composition, Lattice, Structure

from mbqueue.data.crystals import Crystals
from mbqueue.errors import CacheError
from tests.data.crystal_making import SALT, gathered


def test_a_structure_comes_back_as_it_went_in(sample):
    structures = [sample.crystals.structure(row) for row in range(0, 700, 70)]
    crystals = gathered(*structures)
    for row, structure in enumerate(structures):
        assert crystals.structure(row) == structure
        np.testing.assert_array_equal(crystals.structure(row).frac_coords, structure.frac_coords)


def test_compositions_are_the_reduced_formulas_of_pymatgen(sample):
    formulas = sample.crystals.compositions()
    for row in range(0, 700, 7):
        assert formulas[row] == sample.crystals.structure(row).composition.reduced_formula
    special = ["O4", "Li2 O2", "Ba2 N4 O12", "He3", "H2"]
    structures = []
    for formula in special:
        symbols = [element.symbol for element, count in Composition(formula).items() for _ in range(round(count))]
        coords = [[number / len(symbols), 0, 0] for number in range(len(symbols))]
        structures.append(Structure(Lattice.cubic(12), symbols, coords))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        formulas = gathered(*structures).compositions()
    assert formulas == [Composition(formula).reduced_formula for formula in special]


def test_chosen_crystals_are_those_of_the_rows_in_their_order(sample):
    rows = [5, 3, 600, 5]
    chosen = sample.crystals.select(rows)
    assert chosen.ids == [sample.crystals.ids[row] for row in rows]
    for place, row in enumerate(rows):
        assert chosen.structure(place) == sample.crystals.structure(row)
    assert len(sample.crystals.select([])) == 0


def test_the_hash_tells_apart_everything_that_is_in_it(sample):
    crystals = sample.crystals
    variants = [
        {"ids": ["other", *crystals.ids[1:]]},
        {"targets": np.nextafter(crystals.targets, 9)},
        {"atomic_numbers": crystals.atomic_numbers[::-1].copy()},
        {"frac_coords": crystals.frac_coords + 1e-15},
        {"lattices": crystals.lattices.transpose(0, 2, 1).copy()},
    ]
    fields = ("ids", "targets", "atom_offsets", "atomic_numbers", "frac_coords", "lattices")
    content = {name: getattr(crystals, name) for name in fields}
    hashes = {Crystals(**(content | variant)).hash for variant in variants}
    assert len(hashes | {crystals.hash}) == len(variants) + 1
    assert Crystals(**content).hash == crystals.hash
    assert crystals.select(np.arange(700)[::-1]).hash != crystals.hash


def test_the_binary_form_gives_the_same_crystals_and_meta_data(sample, tmp_path):
    path = tmp_path / "crystals.bin"
    sample.crystals.save(path, {"source": "Å"})
    opened, meta = Crystals.open(path)
    assert opened.hash == sample.crystals.hash
    assert opened.ids == sample.crystals.ids
    assert Crystals(**{name: getattr(opened, name) for name in Crystals.__dataclass_fields__}).hash == opened.hash
    assert meta["source"] == "Å"
    assert not opened.frac_coords.flags.writeable


def test_ids_of_any_script_survive_the_binary_form(tmp_path):
    crystals = gathered(SALT, SALT)
    named = Crystals(**{**{n: getattr(crystals, n) for n in Crystals.__dataclass_fields__}, "ids": ["Å–φ", "mp 1/2"]})
    named.save(tmp_path / "c.bin")
    assert Crystals.open(tmp_path / "c.bin")[0].ids == named.ids


@pytest.mark.parametrize("place", [3, 60, 500, 4000, -2000])
def test_a_flipped_bit_in_the_binary_form_is_noticed(sample, tmp_path, place):
    path = tmp_path / "crystals.bin"
    sample.crystals.save(path)
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(CacheError, match=r"crystals\.bin is"):
        Crystals.open(path)


@pytest.mark.parametrize("length", [0, 30, 47, 300, -1])
def test_a_binary_form_that_is_cut_short_is_noticed(sample, tmp_path, length):
    path = tmp_path / "crystals.bin"
    sample.crystals.save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CacheError, match=r"crystals\.bin (is|has)"):
        Crystals.open(path)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(CacheError, match="There is no file"):
        Crystals.open(tmp_path / "none.bin")


def test_a_full_disk_is_reported_with_the_file(some_crystals, tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mbqueue.data.crystals.write_arrays", full)
    with pytest.raises(CacheError, match=r"crystals\.bin cannot be written: .*No space left.*Free some space"):
        some_crystals.save(tmp_path / "crystals.bin")
