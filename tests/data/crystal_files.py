"""A crystal in the formats of common programs: the text of a CIF or POSCAR, and the cell that it describes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from itertools import pairwise

import ase.io
import numpy as np
from pymatgen.core import Structure
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.io.vasp import Poscar
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

Written = tuple[str, Structure]


def pymatgen_cif(crystal: Structure) -> Written:
    return crystal.to(fmt="cif"), crystal


def pymatgen_cif_with_symmetry(crystal: Structure) -> Written:
    return crystal.to(fmt="cif", symprec=0.01), SpacegroupAnalyzer(crystal, 0.01).get_refined_structure()


def pymatgen_cif_with_charges(crystal: Structure) -> Written:
    charged = crystal.copy()
    charged.add_oxidation_state_by_element({element.symbol: 0 for element in crystal.elements})
    return charged.to(fmt="cif"), crystal


def windows_cif(crystal: Structure) -> Written:
    return "\ufeff" + crystal.to(fmt="cif").replace("\n", "\r\n"), crystal


def _by_ase(crystal: Structure, form: str, **options: object) -> Written:
    stream: io.StringIO | io.BytesIO = io.BytesIO() if form == "cif" else io.StringIO()
    ase.io.write(stream, AseAtomsAdaptor.get_atoms(crystal), format=form, **options)
    content = stream.getvalue()
    return content.decode() if isinstance(content, bytes) else content, crystal


def ase_cif(crystal: Structure) -> Written:
    return _by_ase(crystal, "cif")


def ase_poscar(crystal: Structure) -> Written:
    return _by_ase(crystal, "vasp", direct=True)


def ase_poscar_cartesian_sorted(crystal: Structure) -> Written:
    return _by_ase(crystal, "vasp", sort=True)


def pymatgen_poscar(crystal: Structure) -> Written:
    return Poscar(crystal).get_str(), crystal


def vasp_5_contcar(crystal: Structure) -> Written:
    """A CONTCAR with a scale, selective dynamics and velocities, as a molecular-dynamics run writes it."""
    symbols = [site.specie.symbol for site in crystal]
    borders = [0, *(n for n in range(1, len(symbols)) if symbols[n] != symbols[n - 1]), len(symbols)]
    scale = 0.5
    lines = ["written by VASP", f"   {scale:.14f}     "]
    lines += ["  ".join(f"{value / scale:21.16f}" for value in row) for row in crystal.lattice.matrix]
    lines += ["   ".join(symbols[begin] for begin in borders[:-1])]
    lines += ["   ".join(str(end - begin) for begin, end in pairwise(borders))]
    lines += ["Selective dynamics", "Direct"]
    lines += ["  ".join(f"{value:19.16f}" for value in site.frac_coords) + "   T   T   F" for site in crystal]
    lines += ["", *("  0.00000000E+00  0.10000000E-02  0.00000000E+00" for _ in crystal)]
    return "\n".join(lines) + "\n", crystal


def vasp_6_contcar(crystal: Structure) -> Written:
    """A CONTCAR with the names of potentials and parts of their hashes after the elements."""
    lines = Poscar(crystal).get_str().splitlines()
    names = lines[5].split()
    lines[5] = "   ".join(f"{name}{'_pv' if number else ''}/79d9987ad87" for number, name in enumerate(names))
    lines[7] = "Direct"
    lines[8:] = [" ".join(line.split()[:3]) for line in lines[8:]]
    return "\n".join(lines) + "\n", crystal


def _symmetrized(crystal: Structure) -> tuple[Structure, str, int, list[str], list[tuple[str, np.ndarray, int]]]:
    """Return the conventional cell, its space group's symbol and number, its operations, and its sites.

    Each site is (element, coordinates, multiplicity).
    """
    refined = SpacegroupAnalyzer(crystal, 0.01).get_refined_structure()
    analyzer = SpacegroupAnalyzer(refined, 0.01)
    operations = [operation.as_xyz_str() for operation in analyzer.get_symmetry_operations()]
    orbits = analyzer.get_symmetrized_structure().equivalent_sites
    sites = [(orbit[0].specie.symbol, orbit[0].frac_coords % 1, len(orbit)) for orbit in orbits]
    return refined, analyzer.get_space_group_symbol(), analyzer.get_space_group_number(), operations, sites


def _spaced(symbol: str) -> str:
    return " ".join(symbol.replace("_", "")).replace("- ", "-").replace(" /", "/").replace("/ ", "/")


def _cell(crystal: Structure, form: str) -> list[str]:
    lattice = crystal.lattice
    lengths = [f"_cell_length_{name} {form.format(getattr(lattice, name))}" for name in "abc"]
    return lengths + [
        f"_cell_angle_{name} {form.format(getattr(lattice, name))}" for name in ("alpha", "beta", "gamma")
    ]


def cod_cif(crystal: Structure) -> Written:
    cell, symbol, number, operations, sites = _symmetrized(crystal)
    formula, units = cell.composition.get_reduced_composition_and_factor()
    lines = ["#" + "-" * 78, "#$Date: 2024-01-01 00:00:00 +0200 $", "data_1000041", "loop_", "_publ_author_name"]
    lines += ["'Ångström, A. J.'", "'Müller, U.'", "_publ_section_title", ";", " The structure of # something:"]
    lines += ["  it's 'quoted', and data are given in loop_ form", ";", "_journal_year 2001"]
    lines += [f"_chemical_formula_sum '{formula.formula}'", f"_space_group_IT_number {number}"]
    lines += [f"_symmetry_space_group_name_H-M '{_spaced(symbol)}'", "_symmetry_space_group_name_Hall ?"]
    lines += [line + "(2)" for line in _cell(cell, "{:.7f}")]
    lines += [f"_cell_volume {cell.volume:.2f}(3)", f"_cell_formula_units_Z {units:.0f}"]
    lines += [f"_exptl_crystal_density_diffrn {cell.density:.3f}", "_cod_database_code 1000041"]
    lines += ["loop_", "_symmetry_equiv_pos_as_xyz", *(operation.replace(" ", "") for operation in operations)]
    lines += ["loop_", *(f"_atom_site_{tag}" for tag in ("label", "type_symbol", "fract_x", "fract_y", "fract_z"))]
    lines += ["_atom_site_occupancy", "_atom_site_calc_flag", "_atom_site_disorder_group"]
    for row, (element, coords, _) in enumerate(sites, 1):
        lines += [f"{element}{row} {element} " + " ".join(f"{value:.8f}(1)" for value in coords) + " 1. d ."]
    lines += ["loop_", "_atom_site_aniso_label", "_atom_site_aniso_U_11"]
    lines += [f"{element}{row} 0.01" for row, (element, _, _) in enumerate(sites, 1)]
    return "\n".join(lines) + "\n", cell


def icsd_cif(crystal: Structure) -> Written:
    cell, symbol, number, operations, sites = _symmetrized(crystal)
    formula, units = cell.composition.get_reduced_composition_and_factor()
    lines = ["#(C) 2024 by an institute. All rights reserved.", "data_181148-ICSD", "_database_code_ICSD 181148"]
    lines += [f"_chemical_name_common '{formula.reduced_formula}'", f"_chemical_formula_structural '{formula.formula}'"]
    lines += [f"_chemical_formula_sum '{formula.formula}'", *_cell(cell, "{:.8f}")]
    lines += [f"_cell_volume {cell.volume:.3f}", f"_cell_formula_units_Z {units:.0f}"]
    lines += [f"_space_group_name_H-M_alt '{_spaced(symbol)}'", f"_space_group_IT_number {number}", "loop_"]
    lines += ["_space_group_symop_id", "_space_group_symop_operation_xyz"]
    lines += [f"{row} '{operation}'" for row, operation in enumerate(operations, 1)]
    lines += ["loop_", "_atom_type_symbol", "_atom_type_oxidation_number"]
    lines += [f"{element}0+ 0" for element in dict.fromkeys(element for element, _, _ in sites)]
    tags = ("label", "type_symbol", "symmetry_multiplicity", "Wyckoff_symbol", "fract_x", "fract_y", "fract_z")
    lines += ["loop_", *(f"_atom_site_{tag}" for tag in (*tags, "B_iso_or_equiv", "occupancy", "attached_hydrogens"))]
    for row, (element, coords, multiplicity) in enumerate(sites, 1):
        place = " ".join(f"{value:.8f}" for value in coords)
        lines += [f"{element}{row} {element}0+ {multiplicity} a {place} . 1. 0"]
    lines += ["#End of TTdata_181148-ICSD"]
    return "\n".join(lines) + "\n", cell


def vesta_cif(crystal: Structure) -> Written:
    cell, symbol, number, operations, sites = _symmetrized(crystal)
    lines = ["#" + "=" * 70, "# CRYSTAL DATA", "#" + "-" * 70, "data_VESTA_phase_1", ""]
    lines += [f"_chemical_name_common                  '{cell.composition.reduced_formula}'", *_cell(cell, "{:.6f}")]
    lines += [f"_cell_volume                           {cell.volume:.6f}"]
    lines += [f"_space_group_name_H-M_alt              '{_spaced(symbol)}'", f"_space_group_IT_number   {number}", ""]
    lines += ["loop_", "_space_group_symop_operation_xyz", *(f"   '{operation}'" for operation in operations), ""]
    tags = ("label", "occupancy", "fract_x", "fract_y", "fract_z", "adp_type", "U_iso_or_equiv", "type_symbol")
    lines += ["loop_", *(f"   _atom_site_{tag}" for tag in tags)]
    for row, (element, coords, _) in enumerate(sites, 1):
        place = "     ".join(f"{value:.6f}" for value in coords)
        lines += [f"   {element}{row}        1.0     {place}    Uiso  ? {element}"]
    return "\n".join(lines) + "\n", cell


def labels_only_cif(crystal: Structure) -> Written:
    """A CIF as written by hand: labels give the elements, and everything optional is missing."""
    lines = ["data_hand", *_cell(crystal, "{:.10f}"), "loop_", "_symmetry_equiv_pos_as_xyz", "x,y,z"]
    lines += ["loop_", "_atom_site_label", "_atom_site_fract_x", "_atom_site_fract_y", "_atom_site_fract_z"]
    for row, site in enumerate(crystal):
        lines += [f"{site.specie.symbol}{row + 1} " + " ".join(f"{value:.10f}" for value in site.frac_coords)]
    return "\n".join(lines) + "\n", crystal


CIF_STYLES: tuple[Callable[[Structure], Written], ...] = (
    *(pymatgen_cif, pymatgen_cif_with_symmetry, pymatgen_cif_with_charges, windows_cif, ase_cif),
    *(cod_cif, icsd_cif, vesta_cif, labels_only_cif),
)
POSCAR_STYLES: tuple[Callable[[Structure], Written], ...] = (
    *(ase_poscar, ase_poscar_cartesian_sorted, pymatgen_poscar, vasp_5_contcar, vasp_6_contcar),
)


def written(style: Callable[[Structure], Written], crystal: Structure) -> Written:
    """``style(crystal)``, without the writers' warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return style(crystal)
