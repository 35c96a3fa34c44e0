"""Batches of random graphs of any shape; their indices are valid, but no real crystal has such a graph."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mbqueue.data.batch import Batch


def graph_of(sizes: list[tuple[int, int, int]], seed: int, angles_per_bond: int = 3) -> Batch:
    """Draw graphs with the given numbers of (atoms, undirected bonds, short bonds), and random bonds and angles."""
    rng = np.random.default_rng(seed)
    ends, short_bond, atoms = [], [], 0
    for n_atoms, n_bonds, n_shorts in sizes:
        first = sum(len(pairs) for pairs in ends)
        ends.append(rng.integers(0, n_atoms, (n_bonds, 2)) + atoms)
        short_bond.append(first + np.sort(rng.permutation(n_bonds)[:n_shorts]))
        atoms += n_atoms
    pairs, shorts = np.concatenate(ends), np.concatenate(short_bond)
    directed = np.concatenate([pairs, pairs[:, ::-1]])
    undirected = np.tile(np.arange(len(pairs)), 2)
    order = np.argsort(directed[:, 0], kind="stable")
    place = np.argsort(order)
    reverse = place[(order + len(pairs)) % max(1, len(directed))]
    center, bond_i, bond_j = _angles(directed[order], undirected[order], shorts, angles_per_bond, rng)
    values = {
        "bond_center": directed[order, 0], "bond_neighbor": directed[order, 1], "bond_undirected": undirected[order],
        "bond_reverse": reverse, "short_bond": shorts, "angle_center": center, "angle_bond_i": bond_i,
        "angle_bond_j": bond_j, "angle_by_j": np.argsort(bond_j, kind="stable"),
    }  # fmt: skip
    counts = np.array([n_atoms for n_atoms, _, _ in sizes])
    return Batch(
        **{name: torch.from_numpy(array.astype(np.int32)) for name, array in values.items()},
        rows=torch.arange(len(sizes)),
        targets=torch.zeros(len(sizes)),
        n_atoms=torch.from_numpy(counts),
        atomic_numbers=torch.from_numpy(rng.integers(1, 95, atoms)),
        atom_crystal=torch.from_numpy(np.repeat(np.arange(len(sizes)), counts)),
        bond_length=torch.from_numpy(rng.uniform(1.5, 6, len(pairs)).astype(np.float32)),
        angle=torch.from_numpy(rng.uniform(0.5, 3, len(center)).astype(np.float32)),
    )


def _angles(
    directed: NDArray[np.int64],
    undirected: NDArray[np.int64],
    shorts: NDArray[np.int64],
    most: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Draw angles: for 2 of 3 directed short bonds, choose up to ``most`` partners among the bonds of the same atom."""
    found = []
    at = np.flatnonzero(np.isin(undirected, shorts))
    for place in at:
        others = at[(directed[at, 0] == directed[place, 0]) & (at != place)]
        if rng.random() > 1 / 3:
            chosen = rng.permutation(others)[:most]
            found += [(undirected[place], directed[place, 0], undirected[other]) for other in chosen]
    table = np.array(sorted(found), np.int64).reshape(-1, 3)
    return table[:, 1], np.searchsorted(shorts, table[:, 0]), np.searchsorted(shorts, table[:, 2])
