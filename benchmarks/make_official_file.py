"""Make a substitute for the official ``matbench_mp_e_form.json.gz``, with the same format and size.

    python -m benchmarks.make_official_file --data DIR --out FILE

The 132,752 rows have the real targets, in the real order. 31,073 rows have their real structures. Each of the remaining
rows gets one of the real structures with about the right number of atoms. As far as possible, the structure's elements
are replaced by those of the row's composition. If heavy elements would make a cell denser than any crystal, the cell is
enlarged.

The file stores numbers as pymatgen does (``as_dict`` with lattice lengths and angles, Cartesian coordinates and
labels), so its size and the cost of reading it are realistic.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from mbqueue.data.density import density_of

TABLE = "matbench_mp_e_form_table.json.bz2"
JOINED = "matbench_mp_e_form_joined_31073.jsonl.gz"
#: The maximum density of a cell, in g/cm³. In these data, plutonium has about this density.
DENSEST = 25.0


def as_pymatgen_stores_it(structure: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Put the elements ``names`` on a structure's sites, and return the structure as ``Structure.as_dict()`` does."""
    matrix = np.array(structure["lattice"]["matrix"])
    numbers = np.array([atomic_numbers[name] for name in names])
    density = density_of(numbers, abs(float(np.linalg.det(matrix))))
    matrix = matrix * max(1.0, density / DENSEST) ** (1 / 3)
    lengths = np.linalg.norm(matrix, axis=1)
    cosines = [matrix[i] @ matrix[j] / lengths[i] / lengths[j] for i, j in ((1, 2), (0, 2), (0, 1))]
    angles = [math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) for cosine in cosines]
    return {
        "@module": "pymatgen.core.structure",
        "@class": "Structure",
        "charge": None,
        "lattice": {
            "matrix": matrix.tolist(),
            **dict(zip(("a", "b", "c"), lengths.tolist(), strict=True)),
            **dict(zip(("alpha", "beta", "gamma"), angles, strict=True)),
            "volume": abs(float(np.linalg.det(matrix))),
        },
        "sites": [
            {
                "species": [{"element": name, "occu": 1}],
                "abc": site["abc"],
                "xyz": (np.array(site["abc"]) @ matrix).tolist(),
                "label": name,
            }
            for site, name in zip(structure["sites"], names, strict=True)
        ],
    }


def elements_of(composition: str) -> list[str]:
    """List the element of each atom of a composition such as ``Fe2 O3``."""
    names = []
    for symbol, amount in re.findall(r"([A-Z][a-z]?)\s*([\d.]*)", composition):
        names += [symbol] * round(float(amount or 1))
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {TABLE} and {JOINED}")
    parser.add_argument("--out", type=Path, required=True, help="the .json.gz to write")
    parser.add_argument("--rows", type=int, default=0, help="number of rows (0: all)")
    arguments = parser.parse_args()
    make(arguments.data, arguments.out, arguments.rows)


def make(data: Path, out: Path, rows: int = 0) -> int:
    """Write ``out`` and return its number of rows."""
    table = json.loads(bz2.decompress((data / TABLE).read_bytes()))
    ids = list(table["mbid"].values())
    column = next(name for name in table if "e_form" in name)
    targets = list(table[column].values())
    compositions = list(table[next(name for name in table if "comp" in name)].values())
    own: dict[str, dict[str, Any]] = {}
    by_size: dict[int, list[str]] = defaultdict(list)
    with gzip.open(data / JOINED, "rt") as stream:
        for line in stream:
            entry = json.loads(line)
            own[entry["id"]] = entry["structure"]
            by_size[len(entry["structure"]["sites"])].append(entry["id"])
    sizes = np.array(sorted(by_size))
    used: dict[int, int] = defaultdict(int)
    count = rows or len(ids)
    with gzip.open(out, "wt", compresslevel=6) as stream:
        stream.write('{"columns": ["structure", "e_form"], "index": ' + json.dumps(list(range(count))) + ', "data": [')
        for row in range(count):
            names = elements_of(compositions[row])
            structure = own.get(ids[row])
            if structure is None:
                size = int(sizes[np.abs(sizes - len(names)).argmin()])
                structure = own[by_size[size][used[size] % len(by_size[size])]]
                used[size] += 1
                names = (names * (1 + len(structure["sites"]) // len(names)))[: len(structure["sites"])]
            else:
                names = [site["species"][0]["element"] for site in structure["sites"]]
            stream.write(", " if row else "")
            stream.write(json.dumps([as_pymatgen_stores_it(structure, names), targets[row]]))
        stream.write("]}")
    return count


if __name__ == "__main__":
    main()
