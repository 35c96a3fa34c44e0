"""Choose the crystals of the shipped sample from flla_2015.

    python -m benchmarks.make_sample --data DIR --out FILE

The candidates are the entries that mbqueue's reader accepts and that respect matbench's limits: at most 2.5 eV/atom and
no noble gas. Entries with the same composition, cell volume and target (to 1e-3) count once. The candidates are sorted
by the SHA-256 of their ids. The sample has 700 crystals, chosen in three passes:

1. crystals with an isolated atom or without an angle, at most 30 of each;
2. crystals with an element seen fewer than 16 times so far, or with a size seen fewer than 12 times;
3. the first of the remaining crystals.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np

from mbqueue.data.entries import Gatherer
from mbqueue.data.graphs import convert

COUNT = 700
NOBLE = {2, 10, 18, 36, 54, 86}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with matminer_flla.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    gatherer, entries = Gatherer(), {}
    with gzip.open(arguments.data / "matminer_flla.jsonl.gz", "rt") as stream:
        for line in stream:
            entry = json.loads(line)
            gatherer.add(entry["id"], entry["structure"], entry["e_form"])
            entries[entry["id"]] = entry
    print(f"{len(gatherer)} of {len(entries)} entries can be used; these cannot: {gatherer.offenders}")
    crystals = gatherer.crystals()
    packed = convert(crystals)
    formulas, volumes = crystals.compositions(), np.abs(np.linalg.det(crystals.lattices)) / crystals.n_atoms
    seen, usable = set(), []
    for row in sorted(range(len(crystals)), key=lambda row: hashlib.sha256(crystals.ids[row].encode()).digest()):
        atoms = crystals.atomic_numbers[crystals.atom_offsets[row] : crystals.atom_offsets[row + 1]]
        key = (formulas[row], round(volumes[row], 3), round(crystals.targets[row], 3))
        if key not in seen and crystals.targets[row] <= 2.5 and not NOBLE & set(atoms.tolist()):
            seen.add(key)
            usable.append((row, atoms))
    isolated = [row for row, _ in usable if packed.cutoffs[row] > 6][:30]
    angleless = [row for row, _ in usable if packed.index[row, 4] == 0][:30]
    print(f"{len(usable)} are distinct; took {len(isolated)} with an isolated atom, {len(angleless)} without an angle")
    chosen = set(isolated) | set(angleless)
    elements, sizes = Counter(), Counter()
    for row, atoms in usable:
        rare = any(elements[z] < 16 for z in set(atoms.tolist())) or sizes[len(atoms)] < 12
        if row in chosen or (rare and len(chosen) < COUNT):
            chosen.add(row)
            elements.update(set(atoms.tolist()))
            sizes[len(atoms)] += 1
    chosen.update([row for row, _ in usable if row not in chosen][: COUNT - len(chosen)])
    with gzip.GzipFile(arguments.out, "wb", mtime=0) as stream:
        for row in sorted(chosen, key=lambda row: crystals.ids[row]):
            entry = entries[crystals.ids[row]]
            structure = entry["structure"]
            small = {
                "@module": "pymatgen.core.structure",
                "@class": "Structure",
                "lattice": {"matrix": structure["lattice"]["matrix"]},
                "sites": [{"species": site["species"], "abc": site["abc"]} for site in structure["sites"]],
            }
            line = {"id": entry["id"], "structure": small, "e_form": entry["e_form"]}
            stream.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
    print(f"{len(chosen)} crystals of {len(elements)} elements and {min(sizes)}–{max(sizes)} atoms")


if __name__ == "__main__":
    main()
