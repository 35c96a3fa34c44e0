"""Small crystals, stock CHGNet's graphs of them, and folds to train on, for the training tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache as cache_results
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chgnet.graph import CrystalGraph, CrystalGraphConverter
from kept_commits import small_commits
from pymatgen.core import Lattice, Structure
from torch import Tensor

from mbqueue.data.batch import Batch
from mbqueue.data.crystals import Crystals
from mbqueue.data.datasets import load
from mbqueue.data.graph_cache import GraphCache
from mbqueue.experiment import Spec, parse_spec
from mbqueue.storage.own_commits import Staged
from mbqueue.train.backbone import open_frozen, prepare_frozen
from mbqueue.train.fold import FoldRun
from mbqueue.train.outcome import EpochOutcome, StepReport
from mbqueue.train.references import compositions

CPU = torch.device("cpu")
#: The devices on which tests compute: the CPU, and the GPU if there is one.
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES, ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU and, if there is one, the GPU."""
    found: torch.device = request.param
    return found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: small batches gain nothing from more, and concurrent tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def convert(structures: list[Structure]) -> list[CrystalGraph]:
    """Convert structures to stock CHGNet's graphs."""
    converter = CrystalGraphConverter(
        atom_graph_cutoff=6, bond_graph_cutoff=3, algorithm="fast", on_isolated_atoms="ignore"
    )
    return [converter(structure) for structure in structures]


def batch_from_chgnet_graphs(
    graphs: list[CrystalGraph],
    targets: list[float] | None = None,
    rows: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """A batch from stock graphs by plain torch operations, slow but simple."""
    parts: dict[str, list[Tensor]] = {name: [] for name in Batch.__dataclass_fields__}
    atoms = bonds = undirected = shorts = angles = 0
    for crystal, graph in enumerate(graphs):
        n_atoms = len(graph.atomic_number)
        edges = graph.atom_graph.reshape(-1, 2).long()
        lattice = graph.lattice.to(dtype)
        position = graph.atom_frac_coord.to(dtype) @ lattice
        vector = position[edges[:, 0]] - (
            position[edges[:, 1]] + graph.neighbor_image.to(dtype).reshape(-1, 3) @ lattice
        )
        length = vector.norm(dim=1)
        unit = vector / length[:, None]
        order = torch.argsort(edges[:, 0], stable=True)
        d2u = graph.directed2undirected.long()
        u2d = graph.undirected2directed.long()
        both = torch.argsort(d2u[order], stable=True).reshape(-1, 2)
        reverse = torch.empty(len(order), dtype=torch.long)
        reverse[both[:, 0]], reverse[both[:, 1]] = both[:, 1], both[:, 0]
        parts["bond_center"].append(edges[order, 0] + atoms)
        parts["bond_neighbor"].append(edges[order, 1] + atoms)
        parts["bond_undirected"].append(d2u[order] + undirected)
        parts["bond_reverse"].append(reverse + bonds)
        parts["bond_length"].append(length[u2d])
        graph_angles = graph.bond_graph.reshape(-1, 5).long()
        short = torch.unique(torch.cat([graph_angles[:, 1], graph_angles[:, 3]]))
        place = torch.full((len(u2d),), -1, dtype=torch.long)
        place[short] = torch.arange(len(short))
        by_i = torch.argsort(graph_angles[:, 1], stable=True)
        graph_angles = graph_angles[by_i]
        parts["short_bond"].append(short + undirected)
        parts["angle_center"].append(graph_angles[:, 0] + atoms)
        parts["angle_bond_i"].append(place[graph_angles[:, 1]] + shorts)
        parts["angle_bond_j"].append(place[graph_angles[:, 3]] + shorts)
        cosine = (unit[graph_angles[:, 2]] * unit[graph_angles[:, 4]]).sum(dim=1) * (1 - 1e-6)
        parts["angle"].append(torch.acos(cosine))
        parts["atomic_numbers"].append(graph.atomic_number.long())
        parts["atom_crystal"].append(torch.full((n_atoms,), crystal))
        parts["n_atoms"].append(torch.tensor([n_atoms]))
        atoms, bonds, undirected = atoms + n_atoms, bonds + len(edges), undirected + len(u2d)
        shorts, angles = shorts + len(short), angles + len(graph_angles)
    parts["rows"] = [torch.tensor(rows if rows is not None else list(range(len(graphs))))]
    parts["targets"] = [torch.tensor(targets if targets is not None else [0.0] * len(graphs), dtype=dtype)]
    del parts["angle_by_j"]
    joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
    return Batch(**joined, angle_by_j=torch.argsort(joined["angle_bond_j"], stable=True))


def crystals_of_many_kinds(seed: int = 0, copies: int = 1) -> list[Structure]:
    """Perturbed simple crystals, a single atom in a cell, and cells whose bond graph is empty."""
    rng = np.random.default_rng(seed)
    kinds = [
        Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        Structure.from_spacegroup("Pm-3m", Lattice.cubic(3.9), ["Sr", "Ti", "O"], [[0.5] * 3, [0] * 3, [0.5, 0, 0]]),
        Structure.from_spacegroup("Fd-3m", Lattice.cubic(5.43), ["Si"], [[0, 0, 0]]),
        Structure.from_spacegroup("P6_3/mmc", Lattice.hexagonal(3.21, 5.21), ["Mg"], [[1 / 3, 2 / 3, 0.25]]),
        Structure.from_spacegroup("F-43m", Lattice.cubic(5.41), ["Zn", "S"], [[0, 0, 0], [0.25] * 3]),
        Structure.from_spacegroup("P4_2/mnm", Lattice.tetragonal(4.6, 2.96), ["Ti", "O"], [[0] * 3, [0.305, 0.305, 0]]),
    ]
    out = []
    for _ in range(copies):
        for kind in kinds:
            structure = kind.copy()
            shift = rng.normal(0, 0.06, (len(structure), 3))
            strain = np.eye(3) + rng.normal(0, 0.02, (3, 3))
            out.append(
                Structure(structure.lattice.matrix @ strain, structure.species, structure.frac_coords + shift / 5.0)
            )
        out.append(
            Structure(Lattice.cubic(float(rng.uniform(2.4, 2.9))), ["Fe"], [[0, 0, 0]])
        )  # one atom, whose neighbours are its own periodic images
        out.append(
            Structure(Lattice.cubic(float(rng.uniform(4.5, 5.5))), ["Cs", "Xe"], [[0, 0, 0], [0.5] * 3])
        )  # no angles
    return out


def crystals_from_structures(structures: list[Structure], targets: list[float]) -> Crystals:
    """Structures as ``Crystals``."""
    sizes = [len(structure) for structure in structures]
    return Crystals(
        ids=[f"crystal-{number}" for number in range(len(structures))],
        targets=np.array(targets, np.float64),
        atom_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        atomic_numbers=np.concatenate([s.atomic_numbers for s in structures]).astype(np.uint8),
        frac_coords=np.concatenate([s.frac_coords for s in structures]),
        lattices=np.stack([s.lattice.matrix for s in structures]),
    )


@dataclass(frozen=True, repr=False)
class Bench:
    """A small converted dataset with its backbone's features, and a folder for checkpoints."""

    crystals: Crystals
    cache: GraphCache
    folder: Path
    kind: str = "energy"

    def run(
        self,
        checkpoints: Path,
        fold: int = 0,
        *,
        device: torch.device = CPU,
        memory_file: Path | None = None,
        on_note: Any = None,
        **options: Any,
    ) -> FoldRun:
        """A fold of an experiment; ``options`` are keys of its [train] section, ``trainable`` and ``seed``."""
        spec = small_spec(**{"kind": self.kind, **options})
        frozen = open_frozen(spec, self.crystals, self.folder)
        assert prepare_frozen(spec, self.cache, frozen, device=CPU)
        return FoldRun(
            spec=spec,
            fold=fold,
            crystals=self.crystals,
            cache=self.cache,
            frozen=frozen,
            checkpoints=small_commits(checkpoints, fold, spec_hash=spec.hash, dataset_hash=self.crystals.hash),
            device=device,
            memory_file=memory_file,
            on_note=on_note or (lambda _note: None),
        )


def small_spec(
    *, kind: str = "energy", trainable: str = "all", seed: int = 0, pretrained: str = "0.3.0", **train: Any
) -> Spec:
    """A spec of two short epochs."""
    unit = {"energy": "eV/atom", "scalar": "GPa", "class": ""}[kind]
    target = {"target": {"name": "made up", "unit": unit, "kind": kind}} if kind != "energy" else {}
    settings = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "validation": 0.2, **train}
    return parse_spec(
        {
            "name": "small",
            "seed": seed,
            "data": {"dataset": "sample"},
            "model": {"trainable": trainable, "pretrained": pretrained},
            "train": settings,
            **target,
        },
        source="test",
    )


def publish(staged: Staged) -> None:
    """Publish a staged commit as a worker does within its fence."""
    staged.publish()


def train_epoch(
    run: FoldRun,
    epoch: int,
    *,
    stop_after: int | None = None,
    fence: int = 1,
    session: str = "s1",
    save: Callable[[Staged], None] = publish,
    on_step: Callable[[StepReport], None] = lambda _report: None,
    checkpoint_seconds: float = 1e9,
) -> EpochOutcome:
    """Call `run_epoch` once, and ask it to stop after this many steps."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return stop_after is not None and asked > stop_after

    return run.run_epoch(
        epoch,
        fence=fence,
        session=session,
        should_stop=should_stop,
        on_step=on_step,
        save=save,
        checkpoint_seconds=checkpoint_seconds,
    )


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """32 converted crystals with the frozen backbone's energies and features."""
    folder = tmp_path_factory.mktemp("bench")
    structures = crystals_of_many_kinds(seed=3, copies=4)
    targets = np.random.default_rng(3).normal(-1.0, 0.5, len(structures)).tolist()
    crystals = crystals_from_structures(structures, targets)
    cache = GraphCache.build(crystals, folder / "graphs", workers=1)
    assert cache is not None
    spec = small_spec(trainable="head")
    assert prepare_frozen(spec, cache, open_frozen(spec, crystals, folder), device=CPU)
    return Bench(crystals, cache, folder)


@pytest.fixture(scope="session")
def sample_bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """60 real crystals of the sample."""
    folder = tmp_path_factory.mktemp("sample")
    crystals = load("sample", limit=60).crystals
    cache = GraphCache.build(crystals, folder / "graphs", workers=1)
    assert cache is not None
    return Bench(crystals, cache, folder)


@pytest.fixture(scope="session")
def bench_of(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    """A function that returns the crystals of `bench` with targets of a given kind."""

    @cache_results
    def make(kind: str) -> Bench:
        if kind == "energy":
            return bench
        folder = tmp_path_factory.mktemp(kind)
        shares = compositions(bench.crystals.atomic_numbers, bench.crystals.atom_offsets)
        density = bench.crystals.n_atoms / np.abs(np.linalg.det(bench.crystals.lattices))
        targets = 300.0 + shares @ np.arange(94.0) + 4000.0 * density
        if kind == "class":
            targets = (targets > np.median(targets)).astype(float)
        crystals = replace(bench.crystals, targets=targets)
        cache = GraphCache.build(crystals, folder / "graphs", workers=1)
        assert cache is not None
        return Bench(crystals, cache, folder, kind)

    return make


@pytest.fixture(scope="session")
def helpers() -> Any:
    """The functions of this module, for test modules, which cannot import a conftest.py."""
    return Helpers


class Helpers:
    """Plain functions shared by the test modules."""

    convert = staticmethod(convert)
    batch_from_chgnet_graphs = staticmethod(batch_from_chgnet_graphs)
    crystals_of_many_kinds = staticmethod(crystals_of_many_kinds)
    crystals_from_structures = staticmethod(crystals_from_structures)
    small_spec = staticmethod(small_spec)
    train_epoch = staticmethod(train_epoch)
    publish = staticmethod(publish)
