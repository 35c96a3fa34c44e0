"""Compare how fast mbqueue and CHGNet read, convert, cache and batch crystals.

    python -m benchmarks.data --data DIR

mbqueue and CHGNet take turns in one process on one core, with one torch thread. Times are medians of CPU seconds, so
other work on the machine hardly affects them. equality.py checks that mbqueue and CHGNet give the same results. The
parts are:

conversion   CHGNet's ``CrystalGraphConverter(algorithm="fast")`` converts a pymatgen ``Structure`` to a
             ``CrystalGraph``. mbqueue's ``graphs.convert`` converts arrays to packed records. The same random crystals
             are used for both.
neighbours   Each installed library lists the neighbours within 6 Å in the same crystals, without making graphs.
disk         The size of CHGNet's graphs (``torch.save``) and of the cache's shards, in bytes per crystal.
batches      CHGNet and mbqueue make batches of 64 random crystals from stored graphs. In "from files", CHGNet reads
             ``GraphData`` items (one ``torch.load`` each), then runs ``collate_graphs`` and
             ``BatchedGraph.from_graphs``. In "from RAM", CHGNet has already loaded the items. mbqueue runs
             ``make_batch`` on the memory-mapped cache, and checks the records. CHGNet's batching also expands lengths
             and angles in their bases, which mbqueue's model does on the device, so "from_graphs without bases" leaves
             out this step. The table shows ratios of CPU time and of wall time. The last line shows the wall time of
             batches that a background thread makes in advance, as in training.
full scale   A separate process reads, converts and writes a synthetic file of the official format, with 132,752 rows
             (see make_official_file.py), and reports its wall time and peak memory. Then another process opens the
             cache and makes a first batch.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib
import io
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

JOINED = "matbench_mp_e_form_joined_31073.jsonl.gz"


def seconds(call: Callable[[], object]) -> float:
    """Measure the CPU time of a call, in seconds."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def say(what: str, ours: str, theirs: str, ratio: str) -> None:
    """Print one line of the table."""
    print(f"{what:<44}{ours:>18}{theirs:>18}{ratio:>10}", flush=True)


def small_scale(data: Path, count: int, work: Path) -> None:
    """Measure all parts except the full scale, on ``count`` crystals."""
    import torch
    from chgnet.graph import CrystalGraphConverter

    from mbqueue.data.batches import make_batch
    from mbqueue.data.entries import Gatherer
    from mbqueue.data.graph_cache import GraphCache
    from mbqueue.data.graphs import convert

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with gzip.open(data / JOINED, "rt") as stream:
        lines = stream.readlines()
    gatherer = Gatherer()
    for line in np.random.default_rng(0).permutation(len(lines))[:count]:
        entry = json.loads(lines[line])
        gatherer.add(entry["id"], entry["structure"], entry["e_form"])
    crystals = gatherer.crystals()
    structures = [crystals.structure(row) for row in range(count)]
    converter = CrystalGraphConverter(atom_graph_cutoff=6, bond_graph_cutoff=3, algorithm="fast")

    convert(crystals, 0, 2), converter(structures[0])  # compile and load before measuring
    graphs, ours, theirs = [], [], []
    for begin in range(0, count, 100):
        part = range(begin, min(begin + 100, count))
        ours.append(median(seconds(lambda p=part: convert(crystals, p.start, p.stop)) for _ in range(3)) / len(part))
        theirs.append(seconds(lambda p=part: graphs.extend(converter(structures[row]) for row in p)) / len(part))
    ratio = median(b / a for a, b in zip(ours, theirs, strict=True))
    say("conversion, ms per crystal", f"{1e3 * median(ours):.3f}", f"{1e3 * median(theirs):.2f}", f"{ratio:.0f} x")
    neighbours(structures)

    cache = GraphCache.build(crystals, work / "cache")
    assert cache is not None
    size = sum(path.stat().st_size for path in (work / "cache").glob("*.bin")) / count
    torch.save(graphs, work / "graphs.pt")
    stock = (work / "graphs.pt").stat().st_size / count
    say("disk, bytes per crystal", f"{size:,.0f}", f"{stock:,.0f}", f"1/{stock / size:.1f}")
    bonds, angles = cache.bond_counts().mean(), cache.angle_counts().mean()
    print(f"  ({crystals.n_atoms.mean():.1f} atoms, {bonds:.0f} directed bonds, {angles:.0f} angles on average)")
    batches(graphs, lambda rows: make_batch(cache, rows), work)


def neighbours(structures: list) -> None:
    """Measure how long each library takes to list neighbours."""
    from mbqueue.data.neighbors import find_bonds

    numbers = [np.array(structure.atomic_numbers, np.int32) for structure in structures]
    cells = [(np.ascontiguousarray(s.cart_coords), np.ascontiguousarray(s.lattice.matrix)) for s in structures]
    searches: dict[str, Callable[[int], object]] = {"mbqueue.data.neighbors": lambda n: find_bonds(*cells[n], 6.0)}
    with contextlib.suppress(ImportError):
        found = importlib.import_module("pymatgen.optimization.neighbors").find_points_in_spheres
        pbc = np.ones(3, np.int64)
        searches["pymatgen"] = lambda n: found(cells[n][0], cells[n][0], r=6.0, pbc=pbc, lattice=cells[n][1])
    with contextlib.suppress(ImportError):
        vesin = importlib.import_module("vesin").NeighborList(cutoff=6.0, full_list=True)
        searches["vesin"] = lambda n: vesin.compute(*cells[n], periodic=True, quantities="ijSd")
    with contextlib.suppress(ImportError):
        listing = importlib.import_module("matscipy.neighbours").neighbour_list
        searches["matscipy"] = lambda n: listing(
            "ijSd", positions=cells[n][0], cell=cells[n][1], pbc=[True] * 3, numbers=numbers[n], cutoff=6.0
        )
    for name, search in searches.items():
        search(0)
        turns = [
            seconds(lambda b=begin, s=search: [s(n) for n in range(b, min(b + 100, len(cells)))]) / min(100, len(cells))
            for begin in range(0, len(cells), 100)
        ]
        say(f"  neighbours alone, ms: {name}", f"{1e3 * median(turns):.3f}", "", "")


def batches(graphs: list, ours_of: Callable[[np.ndarray], object], work: Path) -> None:
    """Measure how long it takes to make batches of 64 random crystals."""
    import torch
    from chgnet.data.dataset import GraphData, collate_graphs
    from chgnet.model import CHGNet
    from chgnet.model.model import BatchedGraph

    from mbqueue.train.feeds import ahead

    with contextlib.redirect_stdout(io.StringIO()):
        model = CHGNet.load(use_device="cpu", verbose=False)
    folder = work / "graphs"
    folder.mkdir()
    labels = {}
    for number, graph in enumerate(graphs):
        torch.save(graph, folder / f"{number}.pt")
        labels[str(number)] = {str(number): {"energy_per_atom": -1.0}}
    dataset = GraphData(str(folder), labels=labels, targets="e", energy_key="energy_per_atom")
    keys = {graph_id: place for place, (_, graph_id) in enumerate(dataset.keys)}
    # GraphData calls torch.load, which refuses CHGNet's class by default in newer versions of torch.
    load, torch.load = torch.load, lambda file: load(file, weights_only=False)

    class NoBases:
        """A replacement for CHGNet's bases that only gathers lengths, angles and indices."""

        def __call__(self, *arguments, **named):
            if named:
                vectors = named["center"] - (named["neighbor"] + named["image"] @ named["lattice"])
                lengths = vectors.norm(dim=1)
                return lengths[named["undirected2directed"]], lengths, vectors / lengths[:, None]
            return torch.acos((arguments[0] * arguments[1]).sum(dim=1) * (1 - 1e-6))

    plain = NoBases()

    def stock(items: list, *, bases: bool = True) -> object:
        listed, _ = collate_graphs(items)
        bond = model.bond_basis_expansion if bases else plain
        angle = model.angle_basis_expansion if bases else plain
        return BatchedGraph.from_graphs(listed, bond_basis_expansion=bond, angle_basis_expansion=angle)

    energy = {"e": torch.tensor(-1.0)}
    ways = {
        "from files": lambda rows: stock([dataset[keys[str(row)]] for row in rows]),
        "from RAM": lambda rows: stock([(graphs[row], energy) for row in rows]),
        "from RAM, from_graphs without bases": lambda rows: stock([(graphs[row], energy) for row in rows], bases=False),
    }
    ways = {"ours": ours_of, **ways}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    generator = np.random.default_rng(1)
    with torch.no_grad():
        for turn in range(16):
            rows = generator.permutation(len(graphs))[:64]
            for name, way in ways.items():
                begin, begin_cpu = time.perf_counter(), time.process_time()
                way(rows)
                if turn:  # the first round only fills caches
                    spent[name].append((time.process_time() - begin_cpu, time.perf_counter() - begin))
    torch.load = load
    assert not dataset.failed_idx, "GraphData read everything"
    rates = {name: 64 / median(cpu for cpu, _ in turns) for name, turns in spent.items()}
    for name in list(ways)[1:]:
        ratio, ratio_of_wall = (
            median(b[clock] / a[clock] for a, b in zip(spent["ours"], spent[name], strict=True)) for clock in (0, 1)
        )
        what = f"batches of 64, crystals/s; CHGNet {name}"
        say(what, f"{rates['ours']:,.0f}", f"{rates[name]:,.0f}", f"{ratio:.1f} x")
        say("  in wall time", "", "", f"{ratio_of_wall:.1f} x")
    order = [generator.permutation(len(graphs))[:64] for _ in range(50)]
    begin = time.perf_counter()
    for _ in ahead(lambda number: ours_of(order[number]), len(order)):
        pass
    rate = 64 * len(order) / (time.perf_counter() - begin)
    say("  made ahead by a thread, in wall time", f"{rate:,.0f}", "", "")


def full_scale(data: Path, work: Path, rows: int) -> None:
    """Measure how long it takes to read, convert and write a file of the official size."""
    here = Path(__file__).parent
    file = work / "matbench_like.json.gz"
    if not file.exists():
        print(f"  making {file} takes some minutes", flush=True)
        making = ["--data", str(data), "--out", str(file), "--rows", str(rows)]
        subprocess.run([sys.executable, "-P", str(here / "make_official_file.py"), *making], check=True)
    shutil.rmtree(work / "full", ignore_errors=True)
    for child in ("build", "open"):
        subprocess.run([sys.executable, "-P", __file__, "--child", child, str(file), str(work / "full")], check=True)


def child(task: str, file: Path, folder: Path) -> None:
    """Run one task of the full scale in this process."""
    begin = time.perf_counter()
    import torch

    from mbqueue.data.batches import make_batch
    from mbqueue.data.crystals import Crystals
    from mbqueue.data.datasets import load
    from mbqueue.data.graph_cache import GraphCache

    torch.set_num_threads(1)
    imported = time.perf_counter()
    if task == "build":
        dataset = load(str(file))
        read = time.perf_counter()
        dataset.crystals.save(folder / "crystals.bin")
        saved = time.perf_counter()
        cache = GraphCache.build(dataset.crystals, folder)
        built = time.perf_counter()
        assert cache is not None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        size = sum(path.stat().st_size for path in folder.glob("shard-*.bin"))
        given, stored = file.stat().st_size / 1e6, (folder / "crystals.bin").stat().st_size / 1e6
        print(f"full scale: {len(cache):,} crystals of {cache.n_atoms.mean():.1f} atoms, from {given:.0f} MB")
        print(f"  read {read - imported:.1f} s, save in binary {saved - read:.1f} s ({stored:.0f} MB)", end="")
        print(
            f", convert and write {built - saved:.1f} s ({size / 1e6:,.0f} MB, {size / len(cache):,.0f} B per crystal)"
        )
        print(f"  together {built - imported:.1f} s, peak memory {peak:.2f} GB (imports took {imported - begin:.1f} s)")
    else:
        crystals, _ = Crystals.open(folder / "crystals.bin")
        cache = GraphCache.open(crystals, folder)
        opened = time.perf_counter()
        make_batch(cache, np.random.default_rng(0).permutation(len(cache))[:64])
        first = time.perf_counter()
        print(f"  open {opened - imported:.2f} s, first batch of 64 {first - opened:.2f} s", end="")
        print(f", together {first - imported:.2f} s (imports took {imported - begin:.1f} s)")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {JOINED} and matbench's table")
    parser.add_argument("--work", type=Path, help="folder in which to keep the files (default: a temporary one)")
    parser.add_argument("--crystals", type=int, default=1000, help="number of crystals for the comparisons")
    parser.add_argument("--rows", type=int, default=0, help="rows of the synthetic file (default: all 132,752)")
    parser.add_argument("--skip", choices=["small", "full"], action="append", default=[], help="leave out a part")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if "small" not in arguments.skip:
            say("", "mbqueue", "CHGNet", "ratio")
            small_scale(arguments.data, arguments.crystals, Path(temporary))
        if "full" not in arguments.skip:
            full_scale(arguments.data, work, arguments.rows)


if __name__ == "__main__":
    main()
