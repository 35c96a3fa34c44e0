"""Compare the results of mbqueue's reader and converter with those of pymatgen, matminer and CHGNet.

    python -m benchmarks.equality --data DIR

The benchmark counts the crystals of a folder for which the results are equal, and prints the ids of the others. The
benchmark does not measure times.

reader   mbqueue and pymatgen's ``Structure.from_dict`` read each line of the folder's JSON-lines files. mbqueue and
         matminer's ``load_dataframe_from_json`` read a synthetic file of the official format (see
         make_official_file.py). Elements, lattice, fractional coordinates and target must be equal to the last bit.
graphs   ``graphs.convert`` and ``CrystalGraphConverter(algorithm="fast")`` convert the same crystals. The indices of
         atom graph, image, directed2undirected and undirected2directed must be equal in the same order, but the rows of
         the bond graph may be in any order. If an atom would be isolated, CHGNet gets mbqueue's widened cut-off, and
         the crystal is counted as widened.

Several processes compare the crystals in parts. ``--state FILE`` records each finished part, so that a later run
compares only the remaining parts.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import itertools
import json
import os
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.make_official_file import make

FILES = ("matbench_mp_e_form_joined_31073.jsonl.gz", "matminer_flla.jsonl.gz")
PART = 250
WHAT = ("refused", "read otherwise", "converted otherwise", "widened")
_INDICES = ("atom_graph", "image", "directed2undirected", "undirected2directed")


def same_crystal(crystals: Any, row: int, structure: Any, target: float) -> bool:
    """Whether a row of mbqueue's crystals equals pymatgen's structure, to the last bit."""
    atoms = slice(crystals.atom_offsets[row], crystals.atom_offsets[row + 1])
    return bool(
        np.array_equal(crystals.lattices[row], structure.lattice.matrix)
        and np.array_equal(crystals.frac_coords[atoms], structure.frac_coords)
        and crystals.atomic_numbers[atoms].tolist() == [site.specie.Z for site in structure]
        and crystals.targets[row] == target
    )


def same_graph(packed: Any, row: int, structure: Any) -> bool:
    """Whether mbqueue's graph of a row equals CHGNet's graph of ``structure``."""
    from chgnet.graph import CrystalGraphConverter

    from mbqueue.data.graphs import graph

    ours = graph(packed, row, len(structure))
    theirs = CrystalGraphConverter(
        atom_graph_cutoff=ours.cutoff, bond_graph_cutoff=3, algorithm="fast", on_isolated_atoms="error"
    )(structure)
    given = (theirs.atom_graph, theirs.neighbor_image, theirs.directed2undirected, theirs.undirected2directed)
    if not all(np.array_equal(getattr(ours, n), t.numpy()) for n, t in zip(_INDICES, given, strict=True)):
        return False
    angles = theirs.bond_graph.numpy().reshape(-1, 5)
    return np.array_equal(*(rows[np.lexsort(rows.T)] for rows in (ours.bond_graph, angles)))


def compare(file: Path, part: tuple[int, int]) -> dict[str, Any]:
    """Compare both readers and converters on lines ``part[0]`` to ``part[1]`` of a JSON-lines file."""
    import torch
    from pymatgen.core import Structure

    from mbqueue.data.datasets import load
    from mbqueue.data.graphs import ATOM_CUTOFF, convert

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with gzip.open(file, "rb") as stream:
        lines = list(itertools.islice(stream, *part))
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "part.jsonl"
        alone.write_bytes(b"".join(lines))
        dataset = load(str(alone), drop_invalid=True)
    crystals = dataset.crystals
    packed = convert(crystals)
    rows = {name: row for row, name in enumerate(crystals.ids)}
    refused, read_otherwise, converted_otherwise = dict(dataset.dropped), [], []
    for line in lines:
        entry = json.loads(line)
        name = str(entry["id"])
        if name in refused:
            continue
        structure = Structure.from_dict(entry["structure"])
        if not same_crystal(crystals, rows[name], structure, entry["e_form"]):
            read_otherwise.append(name)
        if not same_graph(packed, rows[name], structure):
            converted_otherwise.append(name)
    return {
        "crystals": len(crystals),
        "refused": refused,
        "read otherwise": read_otherwise,
        "converted otherwise": converted_otherwise,
        "widened": [crystals.ids[row] for row in np.flatnonzero(packed.cutoffs > ATOM_CUTOFF)],
    }


def versions() -> dict[str, Any]:
    """Return the versions of the packages on which the results depend."""
    from mbqueue.data.graphs import CONVERTER_VERSION

    packages = {name: importlib.metadata.version(name) for name in ("chgnet", "pymatgen", "numpy", "numba")}
    return {"converter": CONVERTER_VERSION, **packages}


def compare_all(file: Path, limit: int, processes: int, state: Path | None) -> bool:
    """Compare the crystals of a file in parallel; return whether all results are equal."""
    with gzip.open(file, "rb") as stream:
        count = sum(1 for _ in itertools.islice(stream, limit or None))
    key = {"file": file.name, "versions": versions()}
    results: dict[tuple[int, int], dict[str, Any]] = {}
    if state is not None and state.exists():
        kept = map(json.loads, state.read_text().splitlines())
        results = {tuple(part["lines"]): part for part in kept if part.items() >= key.items()}
    parts = [(begin, min(begin + PART, count)) for begin in range(0, count, PART)]
    missing = [part for part in parts if part not in results]
    # Spawn processes, because threads do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for part, result in zip(missing, pool.map(partial(compare, file), missing), strict=True):
            results[part] = result
            if state is not None:
                with state.open("a") as stream:
                    stream.write(json.dumps({**key, "lines": part, **result}) + "\n")
            print(f"\r  {file.name}: {part[1]:,} of {count:,} lines", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    chosen = [results[part] for part in parts]
    print(f"{file.name}: {sum(result['crystals'] for result in chosen):,} crystals of {count:,} lines")
    listed = {what: [name for result in chosen for name in result[what]] for what in WHAT}
    for what, names in listed.items():
        print(f"  {what}: {len(names):,}{' ' if names else ''}{', '.join(names[:20])}{' …' * (len(names) > 20)}")
    return not listed["read otherwise"] and not listed["converted otherwise"]


def compare_with_matminer(data: Path, rows: int) -> bool:
    """Compare the readers on a file of the official format; return whether all rows are equal."""
    from matminer.utils.io import load_dataframe_from_json

    from mbqueue.data.datasets import load

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "official.json.gz"
        make(data, file, rows)
        frame = load_dataframe_from_json(str(file), pbar=False)
        crystals = load(str(file)).crystals
    pairs = enumerate(zip(frame["structure"], frame["e_form"], strict=True))
    differ = [row for row, (structure, target) in pairs if not same_crystal(crystals, row, structure, target)]
    print(f"the official format: {len(crystals):,} crystals of {len(frame):,} rows that matminer loads")
    print(f"  read otherwise: {len(differ):,} {differ[:20] or ''}")
    return len(crystals) == len(frame) and not differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {' and '.join(FILES)}")
    parser.add_argument("--limit", type=int, default=0, help="compare only this many lines of each file (0: all)")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the synthetic file (0: all 132,752)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--state", type=Path, help="file that records each finished part")
    arguments = parser.parse_args()
    equal = compare_with_matminer(arguments.data, min(arguments.rows, arguments.limit or arguments.rows))
    for name in FILES:
        equal &= compare_all(arguments.data / name, arguments.limit, arguments.processes, arguments.state)
    print("all equal" if equal else "NOT all equal")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
