"""Store many crystals as a few flat arrays."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mbqueue.data.arrayfile import read_arrays, write_arrays
from mbqueue.data.elements import symbol_of
from mbqueue.errors import CacheError, remedy

if TYPE_CHECKING:
    from pymatgen.core import Structure

FORMAT = "mbqueue crystals 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class Crystals:
    """N crystals with A atoms in total. Objects with the same ``hash`` contain the same data.

    Attributes:
        ids: unique name of each crystal.
        targets: target of each crystal, in its unit, float64 [N]; nan only for crystals without a target (for
            prediction).
        atom_offsets: index of each crystal's first atom, followed by A, int64 [N + 1].
        atomic_numbers: Z of each atom, 1–94, uint8 [A].
        frac_coords: fractional coordinates as given (not wrapped into the cell), float64 [A, 3].
        lattices: rows are lattice vectors, Å, float64 [N, 3, 3].
    """

    ids: list[str]
    targets: NDArray[np.float64]
    atom_offsets: NDArray[np.int64]
    atomic_numbers: NDArray[np.uint8]
    frac_coords: NDArray[np.float64]
    lattices: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_atoms(self) -> NDArray[np.int64]:
        """Atoms per crystal, int64 [N]."""
        return np.diff(self.atom_offsets)

    @cached_property
    def hash(self) -> str:
        """Hex SHA-256 of all attributes, including ids and targets; it depends on the order of the crystals."""
        digest = hashlib.sha256(f"{FORMAT}\n{len(self)}\n".encode())
        digest.update(json.dumps(self.ids, ensure_ascii=False, separators=(",", ":")).encode())
        for array in (self.targets, self.atom_offsets, self.atomic_numbers, self.frac_coords, self.lattices):
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
        return digest.hexdigest()

    @cached_property
    def structures_hash(self) -> str:
        """Hex SHA-256 of cells and atoms, independent of ids and targets."""
        digest = hashlib.sha256(f"{FORMAT} structures\n{len(self)}\n".encode())
        for array in (self.atom_offsets, self.atomic_numbers, self.frac_coords, self.lattices):
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
        return digest.hexdigest()

    def select(self, rows: NDArray[np.int64] | Sequence[int]) -> Crystals:
        """The crystals of ``rows``, in the order of ``rows``."""
        chosen = np.asarray(rows, np.int64)
        sizes = self.n_atoms[chosen]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        atoms = np.arange(offsets[-1]) + np.repeat(self.atom_offsets[chosen] - offsets[:-1], sizes)
        return Crystals(
            ids=[self.ids[row] for row in chosen],
            targets=self.targets[chosen],
            atom_offsets=offsets,
            atomic_numbers=self.atomic_numbers[atoms],
            frac_coords=self.frac_coords[atoms],
            lattices=self.lattices[chosen],
        )

    def structure(self, row: int) -> Structure:
        """One crystal as a pymatgen ``Structure``."""
        from pymatgen.core import Lattice, Structure  # noqa: PLC0415  it takes a second, and training does not need it

        atoms = slice(self.atom_offsets[row], self.atom_offsets[row + 1])
        symbols = [symbol_of(int(number)) for number in self.atomic_numbers[atoms]]
        return Structure(Lattice(np.array(self.lattices[row])), symbols, np.array(self.frac_coords[atoms]))

    def compositions(self) -> list[str]:
        """Reduced formula of each crystal, as pymatgen writes it (``Fe2O3``)."""
        from pymatgen.core import Composition  # noqa: PLC0415  as above

        crystal = np.repeat(np.arange(len(self)), self.n_atoms)
        keys, counts = np.unique(crystal * 256 + self.atomic_numbers, return_counts=True)
        amounts: list[dict[str, int]] = [{} for _ in range(len(self))]
        for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
            amounts[key >> 8][symbol_of(key & 255)] = count
        with warnings.catch_warnings():
            # pymatgen sorts by electronegativity, and warns that noble gases have none.
            warnings.simplefilter("ignore")
            return [Composition(amount).reduced_formula for amount in amounts]

    def save(self, path: Path, meta: dict[str, Any] | None = None) -> None:
        """Durably write the crystals and ``meta`` to a file. Matbench's 132,752 crystals take about 100 MB.

        Raises:
            CacheError: if the file cannot be written; the previous file is kept.
        """
        joined = "".join(self.ids).encode()
        lengths = np.array([len(name.encode()) for name in self.ids], np.int32)
        arrays: dict[str, NDArray[Any]] = {
            "id_lengths": lengths,
            "ids": np.frombuffer(joined, np.uint8),
            "targets": self.targets,
            "atom_offsets": self.atom_offsets,
            "atomic_numbers": self.atomic_numbers,
            "frac_coords": self.frac_coords,
            "lattices": self.lattices,
        }
        try:
            write_arrays(path, {"format": FORMAT, "hash": self.hash, "n": len(self), **(meta or {})}, arrays)
        except OSError as error:
            raise CacheError(f"{path} cannot be written: {error}. {remedy(error)}".rstrip()) from error

    @classmethod
    def open(cls, path: Path) -> tuple[Crystals, dict[str, Any]]:
        """Open a file that ``save`` wrote, and compare every checksum; return memory-mapped crystals and metadata.

        Raises:
            CacheError: if the file is missing, damaged or in a different format.
        """
        meta, arrays = read_arrays(path)
        if meta.get("format") != FORMAT:
            raise CacheError(f"{path} does not have the format {FORMAT!r}. Remove it.")
        joined, lengths = arrays["ids"].tobytes(), arrays["id_lengths"]
        ends = np.cumsum(lengths, dtype=np.int64)
        starts = (ends - lengths).tolist()
        crystals = cls(
            ids=[joined[begin:end].decode() for begin, end in zip(starts, ends.tolist(), strict=True)],
            targets=arrays["targets"],
            atom_offsets=arrays["atom_offsets"],
            atomic_numbers=arrays["atomic_numbers"],
            frac_coords=arrays["frac_coords"],
            lattices=arrays["lattices"],
        )
        # The stored hash is still correct, because `read_arrays` has just verified the arrays.
        crystals.__dict__["hash"] = meta["hash"]
        return crystals, meta
