"""Correct files from any program are read unchanged."""

from __future__ import annotations

import gc
import re

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure, SymmOp

from mbqueue.data import cif
from mbqueue.data.datasets import load
from tests.data.crystal_files import CIF_STYLES, POSCAR_STYLES, written

#: Rows of the sample with 1 to 24 atoms: elements, salts, oxides, hydrides and a noble gas in all crystal systems.
ROWS = (0, 101, 202, 303, 404, 505, 606, 698)


def read_one(folder, name: str, text: str, suffix: str):
    """Write a folder with one structure file, and read its crystal."""
    (folder / f"{name}{suffix}").write_bytes(text.encode())
    (folder / "id_prop.csv").write_text(f"{name}{suffix},-1.5\n")
    return load(str(folder)).crystals


def assert_is(crystals, expected: Structure) -> None:
    ours = crystals.structure(0)
    assert ours.composition.element_composition == expected.composition.element_composition
    assert ours.density == pytest.approx(expected.density, rel=1e-4)
    assert sorted(ours.lattice.abc) == pytest.approx(sorted(expected.lattice.abc), rel=1e-5)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("style", CIF_STYLES + POSCAR_STYLES, ids=lambda style: style.__name__)
def test_cifs_of_common_programs_are_read_with_their_composition_and_density(sample, tmp_path, style, row):
    text, expected = written(style, sample.crystals.structure(row))
    suffix = ".vasp" if style in POSCAR_STYLES else ".cif"
    assert_is(read_one(tmp_path, "crystal", text, suffix), expected)


@pytest.mark.parametrize("row", ROWS)
def test_a_cif_without_symmetry_gives_the_sites_that_were_written(sample, tmp_path, row):
    crystal = sample.crystals.structure(row)
    text, _ = written(CIF_STYLES[0], crystal)
    ours = read_one(tmp_path, "crystal", text, ".cif").structure(0)
    matched = [
        min(site.distance(other) for other in ours if other.specie == site.specie)
        for site in crystal.get_sorted_structure()
    ]
    assert np.max(matched) < 1e-3


BY_HAND = {
    "halite, symbol only": (
        """data_NaCl
_chemical_formula_sum 'Na1 Cl1'
_cell_length_a 5.6402(2)
_cell_length_b 5.6402(2)
_cell_length_c 5.6402(2)
_cell_angle_alpha 90.
_cell_angle_beta 90.
_cell_angle_gamma 90.
_cell_formula_units_Z 4
_symmetry_space_group_name_H-M 'F m -3 m'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Na1 Na1+ 0 0 0 1.000(1)
Cl1 Cl1- 0.5 0.5 0.5 1.
""",
        Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6402), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    ),
    "bismuth, hexagonal axes by symbol": (
        """data_Bi
_cell_length_a 4.546
_cell_length_b 4.546
_cell_length_c 11.862
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 120
_symmetry_space_group_name_H-M 'R -3 m'
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Bi1 0 0 0.2339
""",
        Structure.from_spacegroup("R-3m", Lattice.hexagonal(4.546, 11.862), ["Bi"], [[0, 0, 0.2339]]),
    ),
    "bismuth, rhombohedral axes with operations": (
        """data_Bi
_chemical_formula_sum Bi
_cell_length_a 4.746
_cell_length_b 4.746
_cell_length_c 4.746
_cell_angle_alpha 57.23
_cell_angle_beta 57.23
_cell_angle_gamma 57.23
_symmetry_space_group_name_H-M 'R -3 m :R'
_symmetry_Int_Tables_number 166
loop_
_symmetry_equiv_pos_as_xyz
x,y,z
z,x,y
y,z,x
-y,-x,-z
-z,-y,-x
-x,-z,-y
-x,-y,-z
-z,-x,-y
-y,-z,-x
y,x,z
z,y,x
x,z,y
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Bi1 0.2339 0.2339 0.2339
""",
        Structure(Lattice.rhombohedral(4.746, 57.23), ["Bi", "Bi"], [[0.2339] * 3, [0.7661] * 3]),
    ),
    "brucite with deuterium, labels that are no elements beside types that are": (
        """data_brucite
_chemical_formula_sum 'D2 Mg O2'
_cell_length_a 3.142
_cell_length_b 3.142
_cell_length_c 4.766
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 120
_cell_formula_units_Z 1
_symmetry_space_group_name_H-M 'P -3 m 1'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Mg1 Mg2+ 0 0 0
OH O2- 0.3333 0.6667 0.2203
HO D1+ 0.3333 0.6667 0.4203
""",
        Structure.from_spacegroup(
            "P-3m1",
            Lattice.hexagonal(3.142, 4.766),
            ["Mg", "O", "H"],
            [[0, 0, 0], [1 / 3, 2 / 3, 0.2203], [1 / 3, 2 / 3, 0.4203]],
        ),
    ),
    "silicon, origin choice proved by the density": (
        """data_Si
_chemical_formula_sum Si
_exptl_crystal_density_diffrn 2.33
_cell_length_a 5.431
_cell_length_b 5.431
_cell_length_c 5.431
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'F d -3 m'
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Si 0 0 0
""",
        Structure.from_spacegroup("Fd-3m", Lattice.cubic(5.431), ["Si"], [[0, 0, 0]]),
    ),
    "tungsten, space group by number": (
        """data_W
_cell_length_a 3.165
_cell_length_b 3.165
_cell_length_c 3.165
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_Int_Tables_number 229
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
W 0 0 0
""",
        Structure(Lattice.cubic(3.165), ["W", "W"], [[0, 0, 0], [0.5] * 3]),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_cif_written_by_hand_is_read(tmp_path, name):
    text, expected = BY_HAND[name]
    assert_is(read_one(tmp_path, "crystal", text, ".cif"), expected)
    in_capitals = re.sub(r"(?m)^(_[^\s']+|data_|loop_)", lambda found: found[0].upper(), text)
    assert_is(read_one(tmp_path, "capitals", in_capitals, ".cif"), expected)


def test_the_operations_of_a_space_group_are_created_for_the_first_file_only(tmp_path, monkeypatch):
    """Pymatgen creates those of rock salt in 0.7 seconds."""
    text, _ = BY_HAND["halite, symbol only"]
    created, create = [], SymmOp.from_xyz_str
    monkeypatch.setattr(SymmOp, "from_xyz_str", lambda text: created.append(text) or create(text))
    cif._created_group.cache_clear()
    gc.collect()  # pymatgen reuses a group that is still in memory
    read_one(tmp_path, "first", text, ".cif")
    n_created = len(created)
    assert n_created > 0
    read_one(tmp_path, "second", text, ".cif")
    assert len(created) == n_created


@pytest.mark.parametrize("n_cells", [1, 2, 3, 5])
def test_pymatgens_count_of_half_peroxides_is_understood(tmp_path, n_cells):
    cell = Structure(Lattice.cubic(3.0), ["Li", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    crystal = cell.make_supercell([1, 1, n_cells], in_place=False)
    assert_is(read_one(tmp_path, "crystal", crystal.to(fmt="cif"), ".cif"), crystal)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends_of_any_system_are_no_error(tmp_path, encoding, ends):
    text, expected = BY_HAND["halite, symbol only"]
    (tmp_path / "salt.cif").write_bytes(text.replace("\n", ends).encode(encoding))
    (tmp_path / "id_prop.csv").write_bytes("salt,-1.5\n".encode("utf-8-sig"))
    assert_is(load(str(tmp_path)).crystals, expected)


def test_the_data_block_with_the_entrys_id_is_read(tmp_path):
    salt, expected = BY_HAND["halite, symbol only"]
    bismuth, other = BY_HAND["bismuth, hexagonal axes by symbol"]
    for name, crystal in (("NaCl", expected), ("Bi", other)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.cif").write_text("data_global\n_journal_year 2001\n" + salt + bismuth)
        (folder / "id_prop.csv").write_text(f"{name},-1.5\n")
        assert_is(load(str(folder)).crystals, crystal)
