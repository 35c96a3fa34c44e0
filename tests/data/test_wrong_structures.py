"""mbqueue rejects a file, with the reason, if a parser would read a different crystal from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.symmetry import groups
from pymatgen.symmetry.groups import SpaceGroup

from mbqueue.data.datasets import load
from mbqueue.data.space_groups import number_of, number_of_hall
from mbqueue.errors import InvalidCrystals
from tests.data.crystal_making import entry
from tests.data.test_structure_files import BY_HAND, read_one

SALT, _ = BY_HAND["halite, symbol only"]
BISMUTH, _ = BY_HAND["bismuth, hexagonal axes by symbol"]
BRUCITE, _ = BY_HAND["brucite with deuterium, labels that are no elements beside types that are"]
SILICON, _ = BY_HAND["silicon, origin choice proved by the density"]
TUNGSTEN, _ = BY_HAND["tungsten, space group by number"]
RHOMBOHEDRAL, _ = BY_HAND["bismuth, rhombohedral axes with operations"]
Z4 = "_cell_formula_units_Z 4\n"
NO_Z = SALT.replace(Z4, "")
SYMBOL = "_symmetry_space_group_name_H-M 'F m -3 m'\n"
PRIMITIVE_CUBIC = SpaceGroup("Pm-3m").symmetry_ops
LISTED = "loop_\n_symmetry_equiv_pos_as_xyz\n"


def without(text: str, *tags: str) -> str:
    return "".join(line + "\n" for line in text.splitlines() if not line.startswith(tags))


def operations(*listed: str) -> str:
    """Return a CIF of rock salt with these symmetry operations instead of the space group's symbol."""
    return NO_Z.replace(SYMBOL, LISTED + "".join(f"'{operation}'\n" for operation in listed))


def one_site(group: str, *, z: int, beta: float) -> str:
    """Return a CIF with one atom and a space group without operations; if ``z`` is not 0, add the formula and Z."""
    lengths = "_cell_length_a 7.0\n_cell_length_b 7.0\n_cell_length_c 9.0\n"
    angles = f"_cell_angle_alpha 90\n_cell_angle_beta {beta}\n_cell_angle_gamma 90\n"
    formula = f"_chemical_formula_sum As\n{Z4.replace('4', str(z))}" if z else ""
    atom = (
        "loop_\n_atom_site_label\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\nAs1 0.123 0.237 0.082\n"
    )
    return f"data_one\n{formula}{lengths}{angles}{group}\n{atom}"


WRONG = {
    # symmetry
    "symbol-in-an-old-spelling": (SALT.replace("F m -3 m", "F m 3 m"), "pymatgen says: .*Defaulting to P1"),
    "old-symbol-and-no-count": (NO_Z.replace("F m -3 m", "F m 3 m"), "pymatgen says: .*Defaulting to P1"),
    "symbol-misspelt": (SALT.replace("F m -3 m", "F m -3 q"), "pymatgen says: .*Defaulting to P1"),
    "symmetry-left-out": (SALT.replace(SYMBOL, ""), "pymatgen says: .*Defaulting to P1"),
    "asymmetric-unit-as-p1": (SALT.replace("F m -3 m", "P 1"), "which is 1 times the _chemical_formula_sum, Cl1 Na1"),
    "asymmetric-unit-with-one-operation": (
        NO_Z.replace(SYMBOL, SYMBOL + LISTED + "'x, y, z'\n"),
        "space group 225 has 48 point-group operations, but the file lists 1",
    ),
    "operations-of-the-primitive-lattice": (
        NO_Z.replace(SYMBOL, SYMBOL + LISTED + "".join(f"'{one.as_xyz_str()}'\n" for one in PRIMITIVE_CUBIC)),
        "space group 'F m -3 m' has 4 lattice points in this cell, but the file's operations give only 1",
    ),
    "hall-symbol-and-one-operation": (
        NO_Z.replace(SYMBOL, "_space_group_name_Hall '-P 4 2 3'\n" + LISTED + "'x, y, z'\n"),
        "space group 221 has 48 point-group operations, but the file lists 1",
    ),
    "unknown-hall-symbol-and-one-operation": (
        NO_Z.replace(SYMBOL, "_space_group_name_Hall '-P 4 2 3 (x,y,z+1/8)'\n" + LISTED + "'x, y, z'\n"),
        r"operations are those of P 1, but the file names '-P 4 2 3 \(x,y,z\+1/8\)'",
    ),
    "hall-symbol-of-another-lattice": (
        operations("x, y, z", "-x, -y, -z").replace(LISTED, "_space_group_name_Hall '-F 2 (x,y,z)'\n" + LISTED),
        r"space group '-F 2 \(x,y,z\)' has 4 lattice points in this cell, but the file's operations give only 1",
    ),
    "operations-cut-short": (
        operations("x, y, z", "-x, -y, z", "z, x, y"),
        r"3 symmetry operations do not form a group \(\d+ products",
    ),
    "operation-misspelt": (operations("x, y, z", "-x, -y, w"), "symmetry operation '-x, -y, w' is not valid"),
    "operation-in-two-parts": (operations("x, y, z", "-x, -y"), "symmetry operation '-x, -y' is not valid"),
    "operation-not-a-rotation": (operations("x, y, z", "x, y, x"), "not a rotation or reflection"),
    "operations-without-quotes": (NO_Z.replace(SYMBOL, LISTED + "x, y, z\n"), "is not valid|row is incomplete"),
    "rhombohedral-axes": (
        without(RHOMBOHEDRAL, "loop_\n_sym", "_symmetry_eq", "x,", "y,", "z,", "-").replace("R -3 m :R'\n", "R -3 m'\n")
        .replace("166\nloop_\nloop_", "166\nloop_"),
        "do not fit the cell",
    ),
    "rhombohedral-axes-by-number": (
        TUNGSTEN.replace("229", "166"), "do not fit the cell",
    ),
    "other-origin": (SILICON.replace("Si 0 0 0", "Si 0.125 0.125 0.125"), "a density of 4.658 g/cm³"),
    "origin-not-said": (without(SILICON, "_exptl"), "settings .* of space group 227 fit"),
    "axes-not-said": (
        TUNGSTEN.replace("_length_b 3.165", "_length_b 5.1").replace("_length_c 3.165", "_length_c 7.2")
        .replace("229", "62").replace("W 0 0 0", "W 0.1 0.25 0.2"),
        "settings .* of space group 62 fit",
    ),
    "axes-not-said-with-z": (
        one_site("_symmetry_Int_Tables_number 14", z=4, beta=106.4), "settings .* of space group 14 fit"
    ),
    "origin-not-said-with-z": (
        one_site("_symmetry_space_group_name_H-M 'P 4/n'", z=8, beta=90), "settings .* of space group 85 fit"
    ),
    "one-symbol-of-two-settings": (
        one_site("_symmetry_space_group_name_H-M 'C m m e'", z=0, beta=90), "settings .* of space group 67 fit"
    ),
    "multiplicity-ignored": (
        one_site("_symmetry_space_group_name_H-M 'P 1'", z=0, beta=90)
        .replace("_atom_site_label\n", "_atom_site_label\n_atom_site_symmetry_multiplicity\n")
        .replace("As1", "As1 4").replace("7.0", "4.0"),
        "has 1 atom, but the values of _atom_site_symmetry_multiplicity add up to 4",
    ),
    "lengths-in-pm": (SALT.replace("5.64", "564.0"), "are its lengths in Å"),
    "number-that-is-none": (TUNGSTEN.replace("229", "231"), "space group number '231' is not between 1 and 230"),
    "magnetic-without-operations": (
        NO_Z + "loop_\n_atom_site_moment_label\n_atom_site_moment_crystalaxis_x\nNa1 1.0\n",
        "No magnetic symmetry detected, using primitive symmetry",
    ),
    # elements
    "label-of-a-group": (
        without(BRUCITE, "_atom_site_type").replace("Mg1 Mg2+", "Mg").replace("OH O2-", "OH").replace("HO D1+", "H"),
        "label 'OH' of atom 'OH' does not clearly begin with an element's symbol",
    ),
    "label-of-water": (SALT.replace("Na1 Na1+", "Wat Wat"), "type 'Wat' of atom 'Wat'"),
    "label-in-capitals": (
        without(SALT, "_atom_site_type").replace("Na1 Na1+", "NA1").replace("Cl1 Cl1-", "CL1"), "label 'NA1'",
    ),
    "hydrogen-missing": (SALT.replace("'Na1 Cl1'", "'Na1 Cl1 H2 O1'"), "contains Cl4 Na4, but the formula is"),
    "other-ratio": (SALT.replace("'Na1 Cl1'", "'Na2 Cl1'"), "contains Cl4 Na4, but the formula is Cl1 Na2"),
    "other-element": (SALT.replace("'Na1 Cl1'", "'K1 Cl1'"), "contains Cl4 Na4, but the formula is Cl1 K1"),
    "other-count": (SALT.replace(Z4, "_cell_formula_units_Z 8\n"), "which is 4 times the _chemical_formula_sum"),
    "implicit-hydrogens": (
        SALT.replace("_atom_site_occupancy\n", "_atom_site_occupancy\n_atom_site_attached_hydrogens\n")
        .replace("1.000(1)", "1 0").replace("0.5 1.\n", "0.5 1 2\n"),
        "pymatgen says: Structure has implicit hydrogens defined",
    ),
    # occupancies and positions
    "occupancy-a-dot": (SALT.replace("1.000(1)", "."), r"occupancy of atom 'Na1' is unknown \('.'\)"),
    "occupancy-a-question": (SALT.replace("1.000(1)", "?"), "occupancy of atom 'Na1' is unknown"),
    "occupancy-nought": (SALT.replace("1.000(1)", "0"), "has an occupancy of 0"),
    "occupancy-with-a-comma": (SALT.replace("1.000(1)", "0,5"), "is '0,5', which is not a number"),
    "occupancy-a-half": (NO_Z.replace("1.000(1)", "0.5").replace("'Na1 Cl1'", "'Na0.5 Cl1'"), "disordered"),
    "occupancy-above-one": (
        SALT.replace("1.000(1)", "1.00002"), r"ValueError: .*; Some occupancies \(\[1.00002\]\) sum to > 1!",
    ),
    "atom-twice": (SALT + "Na2 Na1+ 0 0 0 1\n", r"Some occupancies \(\[2.0\]\) sum to > 1!"),
    "atoms-of-the-whole-cell-and-symmetry": (SALT + "Na2 Na1+ 0.5 0.5 0 1\n", "sum to > 1!"),
    "atom-beside-its-image": (BISMUTH.replace("0 0 0.2339", "0.002 0.001 0.2339"), "overlap"),
    "alternatives": (
        SALT.replace("_atom_site_occupancy\n", "_atom_site_occupancy\n_atom_site_disorder_group\n")
        .replace("1.000(1)", "1 A").replace("0.5 1.\n", "0.5 1 .\n"),
        "is disordered: it belongs to a group",
    ),
    "coordinate-a-dot": (BISMUTH.replace("0 0 0.2339", "0 0 ."), "_atom_site_fract_z of atom 'Bi1' is '.'"),
    "coordinate-with-a-comma": (BISMUTH.replace("0.2339", "0,2339"), "is '0,2339', which is not a number"),
    "coordinate-with-another-minus": (BISMUTH.replace("0 0 0.2339", "0 0 −0.2339"), "which is not a number"),
    "atoms-outside-of-a-loop": (
        BISMUTH.split("loop_")[0] + "_atom_site_label Bi1\n_atom_site_fract_x 0.25\n_atom_site_fract_y 0\n"
        "_atom_site_fract_z 0\n",
        "not in a loop_",
    ),
    "cartesian-atoms": (BISMUTH.replace("_fract_", "_Cartn_"), "lists no atoms with fractional coordinates"),
    # the cell
    "cell-with-a-comma": (SALT.replace("a 5.6402(2)", "a 5,6402"), "_cell_length_a is '5,6402', which is not a number"),
    "angle-left-out": (SALT.replace("_cell_angle_gamma 90.", "_symmetry_cell_setting cubic"), "no _cell_angle_gamma"),
    "angle-a-dot": (SALT.replace("_cell_angle_gamma 90.\n", "_cell_angle_gamma .\n"), "_cell_angle_gamma is '.'"),
    "length-negative": (SALT.replace("a 5.6402(2)", "a -5.6402"), "_cell_length_a is '-5.6402', but must be positive"),
    "length-nought": (SALT.replace("a 5.6402(2)", "a 0"), "_cell_length_a is '0', but must be positive"),
    "angle-of-a-line": (SALT.replace("_alpha 90.", "_alpha 180"), "is '180', but must be between 0 and 180"),
    "other-volume": (SALT + "_cell_volume 358.8\n", "has a volume of 179.43 Å³, but _cell_volume is 358.8"),
    "other-density": (SALT + "_exptl_crystal_density_diffrn 4.33\n", "a density of 2.163 g/cm³"),
    "empty": (
        BISMUTH.replace("4.546", "14.546").replace("11.862", "61.862"), "less dense than any crystal .* Å³ per atom",
    ),
    # the file's layout
    "two-crystals": (SALT + BISMUTH, r"the CIF has 2 crystals \(NaCl, Bi\), and the id does not name exactly one"),
    "two-of-one-name": (SALT.replace("data_NaCl", "data_crystal") * 2, "the CIF has 2 crystals"),
    "cell-twice": (SALT + "_cell_length_a 5\n", "_cell_length_a occurs twice"),
    "loop-cut-short": (SALT.removesuffix("1.\n"), "its last row is incomplete"),
    "value-without-a-tag": (SALT.replace(Z4, "_cell_formula_units_Z 4 5\n"), "'5' has no tag"),
    "not-a-cif": ("Na 0 0 0\nCl 0.5 0.5 0.5\n", "'Na' comes before the first data_ line"),
    "no-break-space": (
        SALT.replace("_cell_length_a 5", "_cell_length_a\u00a05"),
        r"line \d+ has a no-break space \(U\+00A0\) between '_cell_length_a' and '5.6402\(2\)'",
    ),
    "no-break-space-in-a-loop": (
        SALT.replace("0.5 1.\n", "0.5\u00a01.\n"), r"line \d+ has a no-break space .* between '0.5' and '1.'",
    ),
    "em-space-before-a-quotation-mark": (
        SALT.replace("_H-M '", "_H-M\u2003'"), r"has an em space \(U\+2003\)",
    ),
    "nothing": ("", "lists no atoms"),
}  # fmt: skip


#: CIF tags that contradict rock salt's space group (F m -3 m) or each other → the name of the test case.
CONTRADICTIONS = {
    "_symmetry_Int_Tables_number 1": "symbol-and-number",
    "_symmetry_Int_Tables_number 221": "another lattice",
    "_symmetry_Int_Tables_number 226": "the same rotations and lattice",
    "_space_group_IT_number 1": "newer tag",
    "_space_group.IT_number 1": "dictionary with dots",
    "_SPACE_GROUP_IT_NUMBER 1": "capitals",
    "_SYMMETRY_INT_TABLES_NUMBER '1'": "capitals and quotes",
    "loop_\n_symmetry_Int_Tables_number\n1": "loop",
    "loop_\n_space_group.id\n_space_group.IT_number\n1 226": "loop with dots",
    "loop_\n_space_group_IT_number\n225\n226": "loop of two",
    "_symmetry_Int_Tables_number 225\n_space_group_IT_number 226": "two numbers",
    "_space_group_name_H-M_alt 'P 1'": "two symbols",
    "_space_group_name_h-m_full 'F 4/m -3 2/c'": "full symbol",
    "_space_group.name_H-M_full 'F 4/m -3 2/c'": "full symbol with dots",
    "_SPACE_GROUP.NAME_H-M_REF P-1": "reference symbol",
    "loop_\n_space_group_name_H-M_full\n'P 1'": "full symbol in a loop",
    "_space_group_name_H-M_alt 'P 21/n'": "monoclinic short",
    "_space_group_name_H-M_alt 'P2(1)/c'": "SHELX",
    "_space_group_name_H-M_alt 'R -3 m H'": "ICSD",
    "_space_group_name_H-M_alt 'Fm3c'": "old cubic",
    "_space_group_name_H-M_alt 'C m c a'": "old orthorhombic",
    "_space_group_name_Hall '-F 4a 2 3'": "Hall",
    "_symmetry.space_group_name_Hall 'P 1'": "Hall with dots",
    "_space_group_name_Hall 'P 32'": "Hall that differs by a blank",
}


@pytest.mark.parametrize("statement", CONTRADICTIONS)
def test_a_space_group_that_contradicts_itself_is_refused_even_if_the_atoms_are_proved(tmp_path, statement):
    with pytest.raises(InvalidCrystals, match=r"the space group is contradictory: \S+ is .*, but \S+ is "):
        read_one(tmp_path, "salt", SALT.replace(SYMBOL, SYMBOL + statement + "\n"), ".cif")


AGREEMENTS = (
    *("_symmetry_Int_Tables_number 225", "_space_group.IT_number 225", "loop_\n_space_group_IT_number\n225"),
    *("_space_group_name_H-M_alt Fm-3m", "_space_group_name_H-M_full 'F 4/m -3 2/m'", "_space_group_name_H-M_alt Fm3m"),
    *("_space_group_name_Hall '-F 4 2 3'", "_space_group_name_H-M_alt 'F m -3 m (origin at -1)'"),
    *("_space_group_IT_number ?", "_space_group_name_H-M_full .", "_space_group_name_H-M_full 'unknown to us'"),
    *("_parent_space_group.IT_number 1", "_space_group_crystal_system cubic", "_space_group_name_H-M_alt FM-3M"),
)


@pytest.mark.parametrize("statement", AGREEMENTS)
def test_statements_about_a_space_group_that_agree_or_say_nothing_are_accepted(tmp_path, statement):
    text = SALT.replace(SYMBOL, SYMBOL + statement + "\n")
    assert read_one(tmp_path, "salt", text, ".cif").structure(0).formula == "Na4 Cl4"


@pytest.mark.parametrize("kind", ["hermann_mauguin", "universal_h_m", "short_h_m", "hermann_mauguin_u", "hall"])
def test_symbols_of_the_settings_that_pymatgen_knows_have_their_number_or_none(kind):
    settings = json.loads((Path(groups.__file__).parent / "symm_ops.json").read_text())
    find = number_of_hall if kind == "hall" else number_of
    found = {(setting[kind], setting["number"]): find(setting[kind].strip()) for setting in settings}
    assert {key: number for key, number in found.items() if number not in (None, key[1])} == {}
    standard = [number for (symbol, _), number in found.items() if "(" not in symbol]
    assert sum(number is None for number in standard) < len(standard) / 25


@pytest.mark.parametrize("name", WRONG)
def test_a_cif_that_leaves_a_guess_or_contradicts_itself_is_refused(tmp_path, name):
    text, reason = WRONG[name]
    with pytest.raises(InvalidCrystals, match=reason) as caught:
        read_one(tmp_path, "crystal", text, ".cif")
    assert [offender for offender, _ in caught.value.offenders] == ["crystal.cif"]


POSCAR = """Na Cl
5.64
0.0 0.5 0.5
0.5 0.0 0.5
0.5 0.5 0.0
Na Cl
1 1
Direct
0.0 0.0 0.0
0.5 0.5 0.5
"""
WRONG_POSCARS = {
    "vasp-4": (POSCAR.replace("Na Cl\n1 1", "1 1"), "the file names no elements"),
    "vasp-4-with-flags": (
        POSCAR.replace("Na Cl\n1 1", "1 1").replace("0.0 0.0 0.0\n", "0.0 0.0 0.0 F F F\n"),
        "the file names no elements",
    ),
    "not-an-element": (POSCAR.replace("Na Cl\n1", "A B\n1"), "'A' in line 6 is not an element"),
    "element-in-capitals": (POSCAR.replace("Na Cl\n1", "NA CL\n1"), "'NA' in line 6 is not an element"),
    "element-without-count": (POSCAR.replace("1 1\n", "2\n"), "the file lists 2 elements, but 1 atom count"),
    "count-without-element": (POSCAR.replace("Na Cl\n1", "Na\n1"), "the file lists 1 element, but 2 atom counts"),
    "more-atoms-than-counted": (POSCAR + "0.25 0.25 0.25\n", "add up to 2 atoms, but another line follows: '0.25"),
    "fewer-atoms-than-counted": (POSCAR.replace("1 1\n", "1 2\n"), "the position of atom 3 is ''"),
    "no-mode": (POSCAR.replace("Direct\n", ""), "instead of Direct or Cartesian"),
    "numbers-run-together": (POSCAR.replace("0.5 0.5 0.5\n", "0.5-0.5-0.5\n"), "the position of atom 2"),
    "decimal-commas": (POSCAR.replace("0.5 0.5 0.5\n", "0,5 0,5 0,5\n"), "the position of atom 2 is '0,5 0,5 0,5'"),
    "volume-and-cartesian": (
        POSCAR.replace("5.64\n", "-45\n").replace("Direct", "Cartesian"), "negative scale",
    ),
    "other-element-beside-the-atom": (
        POSCAR.replace("0.5 0.5 0.5\n", "0.5 0.5 0.5 Na\n"), "is Cl according to the element line, but Na on its own",
    ),
    "flags-that-are-none": (
        POSCAR.replace("Direct\n", "Selective dynamics\nDirect\n"), "instead of three flags, each T or F",
    ),
    "cut-short": (POSCAR[:40], "the file ends before the coordinates"),
    "three-scales": (
        POSCAR.replace("5.64\n", "5.64 5.64 5.64\n"), "line 2 has several scales; apply .* and write 1.0 in line 2",
    ),
    "two-scales": (POSCAR.replace("5.64\n", "5.64 5.64 cubic\n"), "line 2 has several scales"),
    "scale-that-is-no-number": (POSCAR.replace("5.64\n", "a scale\n"), "the scale in line 2 is 'a', not 1 number"),
    "no-scale": (POSCAR.replace("5.64\n", "! 5.64\n"), "the scale in line 2 is '', not 1 number"),
    "two-numbers-in-a-vector": (POSCAR.replace("0.5 0.5 0.0\n", "0.5 0.5\n"), "a lattice vector is '0.5 0.5'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_POSCARS)
def test_a_poscar_that_leaves_a_guess_or_contradicts_itself_is_refused(tmp_path, name):
    text, reason = WRONG_POSCARS[name]
    with pytest.raises(InvalidCrystals, match=reason):
        read_one(tmp_path, "POSCAR-1", text, ".vasp")


def test_the_poscar_that_the_wrong_ones_are_made_from_is_right(tmp_path):
    crystals = read_one(tmp_path, "POSCAR-1", POSCAR, ".vasp")
    assert crystals.structure(0).formula == "Na1 Cl1"
    assert crystals.structure(0).density == pytest.approx(2.164, abs=0.001)


@pytest.mark.parametrize("remark", [" ! Å", " # 3 4", " scale", "\tlattice constant 1 2", " cubic ! 5 5"])
def test_text_after_the_numbers_of_a_poscars_cell_is_ignored_as_by_vasp(tmp_path, remark):
    crystals = read_one(tmp_path, "POSCAR-1", POSCAR.replace("5.64\n", f"5.64{remark}\n"), ".vasp")
    assert crystals.structure(0).density == pytest.approx(2.164, abs=0.001)
    vector = POSCAR.replace("0.5 0.5 0.0\n", "0.5 0.5 0.0 ! c\n")
    assert read_one(tmp_path, "POSCAR-2", vector, ".vasp").structure(0).density == pytest.approx(2.164, abs=0.001)


def test_a_no_break_space_inside_a_text_or_a_remark_of_a_cif_is_accepted(tmp_path):
    text = SALT + "# a\u00a0b\n_publ_section_title\n;\nNa\u00a0Cl\n;\n_publ_author_name 'A.\u00a0B'\u00a0\n"
    assert read_one(tmp_path, "salt", text, ".cif").structure(0).formula == "Na4 Cl4"


DENSE = {
    "12.2 Å³ per atom, 26.2 g/cm³": Structure(Lattice.cubic(2.3), ["Ir"], [[0, 0, 0]]),
    "2.2 Å³ per atom, 0.762 g/cm³": Structure(Lattice.cubic(1.3), ["H"], [[0, 0, 0]]),
    "9.26 Å³ per atom, 34.5 g/cm³": Structure(Lattice.cubic(2.1), ["Ir"], [[0, 0, 0]]),
}


def test_a_cell_denser_than_any_crystal_is_refused_whatever_it_is_read_from(tmp_path):
    lines = [json.dumps(entry(crystal, reason)) for reason, crystal in DENSE.items()]
    (tmp_path / "dense.jsonl").write_text("\n".join(lines))
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path / "dense.jsonl"))
    assert [name for name, _ in caught.value.offenders] == list(DENSE)[1:]
    assert all(f"the cell is denser than any crystal ({name})" in reason for name, reason in caught.value.offenders)
