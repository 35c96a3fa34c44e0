"""Crystals for tests, made by hand or by Hypothesis."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from mbqueue.data.crystals import Crystals
from mbqueue.data.entries import Gatherer

SALT = Structure(Lattice.cubic(4.2), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def cubic(edge: float) -> Lattice:
    return Lattice.cubic(edge)


def gathered(*structures: Structure) -> Crystals:
    """Structures as ``Crystals`` with ids c0, c1, …"""
    gatherer = Gatherer()
    for number, structure in enumerate(structures):
        gatherer.add(f"c{number}", structure.as_dict(), -0.5)
    assert not gatherer.offenders, gatherer.offenders
    return gatherer.crystals()


def entry(structure: Any = SALT, name: str = "salt", target: Any = -1.5) -> dict[str, Any]:
    """One line of a JSON-lines file."""
    content = structure.as_dict() if isinstance(structure, Structure) else structure
    return {"id": name, "structure": content, "e_form": target}


@st.composite
def structures(draw: st.DrawFn, max_atoms: int = 6, min_edge: float = 1.5, max_edge: float = 11.0) -> Structure:
    """Draw a random crystal, often with a tiny, flat or skewed cell, or with numbers that are sensitive to rounding."""
    edge = st.one_of(st.sampled_from([2.0, 3.0, 4.0, 6.0, 3 * 2**0.5]), st.floats(min_edge, max_edge))
    skew = st.one_of(st.sampled_from([0.0, 0.5, -0.5]), st.floats(-1.2, 1.2))
    a, b, c = draw(edge), draw(edge), draw(edge)
    matrix = np.array([[a, 0, 0], [draw(skew) * a, b, 0], [draw(skew) * a, draw(skew) * b, c]])
    if draw(st.booleans()):
        # Rotate the lattice by a fixed amount, so that no lattice vector lies along an axis.
        turn = np.array([[2, -2, 1], [2, 1, -2], [1, 2, 2]]) / 3
        matrix = matrix @ turn
    n_atoms = draw(st.integers(1, max_atoms))
    assume(abs(np.linalg.det(matrix)) > 6.0 * n_atoms)
    place = st.one_of(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 2 / 3, 1.0, -0.5]), st.floats(-1.5, 2.5))
    coords = [[draw(place), draw(place), draw(place)] for _ in range(n_atoms)]
    structure = Structure(Lattice(matrix), ["Fe", "O", "Li", "H", "Cs", "U"][:n_atoms], coords)
    if n_atoms > 1:
        assume(structure.distance_matrix[np.triu_indices(n_atoms, 1)].min() > 0.4)
    return structure
