"""Augment crystals with random strain and shifts, which do not depend on a crystal's batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mbqueue.data.machine_code import compiled


@compiled
def _mixed(state: Any) -> Any:
    """Mix the 64 bits of ``state`` with the finalizer of SplitMix64 (Steele, Lea & Flood 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@compiled
def _normal(key: Any, number: int) -> float:
    """Standard normal variate ``number`` (from 0) of the random stream ``key``, by the Box-Muller method."""
    step = np.uint64(0x9E3779B97F4A7C15)
    first = _mixed(key + step * np.uint64(2 * number + 1))
    second = _mixed(key + step * np.uint64(2 * number + 2))
    radius = (np.float64(first >> np.uint64(11)) + 1.0) * 2.0**-53
    turn = np.float64(second >> np.uint64(11)) * 2.0**-53
    return math.sqrt(-2.0 * math.log(radius)) * math.cos(2.0 * math.pi * turn)


@compiled
def distort(cart: Any, lattices: Any, n_atoms: Any, rows: Any, strain: float, jitter: float, seed: int) -> Any:
    """Return strained copies of B crystals with randomly shifted atoms.

    Args:
        cart: Cartesian coordinates, Å, float64 [A, 3].
        lattices: rows are lattice vectors, Å, float64 [B, 3, 3].
        n_atoms: atoms per crystal, int64 [B].
        rows: row of each crystal in the dataset, int64 [B].
        strain: standard deviation of the components of the symmetric strain ε; vectors v become v (1 + ε).
        jitter: standard deviation of each component of an atom's shift, Å, added after the strain.
        seed: selects the random streams, one per row.

    Returns:
        the new ``cart`` and the new ``lattices``.
    """
    new_cart, new_lattices = np.empty_like(cart), np.empty_like(lattices)
    epsilon = np.empty((3, 3))
    base = 0
    for b in range(len(rows)):
        key = _mixed(_mixed(np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15)) + np.uint64(rows[b]))
        drawn = 0
        for i in range(3):
            for j in range(i, 3):
                epsilon[i, j] = strain * _normal(key, drawn)
                epsilon[j, i] = epsilon[i, j]
                drawn += 1
        for i in range(3):
            for j in range(3):
                new_lattices[b, i, j] = lattices[b, i, j]
                for k in range(3):
                    new_lattices[b, i, j] += lattices[b, i, k] * epsilon[k, j]
        for atom in range(base, base + n_atoms[b]):
            for j in range(3):
                new_cart[atom, j] = cart[atom, j] + jitter * _normal(key, drawn)
                drawn += 1
                for k in range(3):
                    new_cart[atom, j] += cart[atom, k] * epsilon[k, j]
        base += n_atoms[b]
    return new_cart, new_lattices
