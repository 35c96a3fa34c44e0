"""Check and measure mbqueue on a GPU, in one command of at most nine minutes.

    python -m benchmarks.gpu --out FILE.json

The crystals are the 700 of the shipped sample, or 1,000 of your own data file (``--data``). The command compares three
ways to compute: stock CHGNet, mbqueue in plain torch ("plain"), and mbqueue's GPU kernels ("fused"). The command writes
FILE.json after each part. The parts, in this order, measure:

machine      the GPU, the versions, the way that mbqueue uses, and the reason if mbqueue uses "plain".
equality     the differences of plain and fused energies and gradients from stock CHGNet, on all crystals.
determinism  whether the same step gives the same bytes of the weights twice.
resume       whether a small training run that stops after every step ends with the same bytes as an uninterrupted run.
speed        the median times of a training step and of inference, and the peak memory, of each way at each batch size.
             The three ways take turns.
precision    the error of energies and gradient against float64, and the time of a step, in each precision of the GPU.
epoch        the speed of a whole epoch, including loading and validation.
kernels      the kernels that take the most time in a fused step.
prediction   the time of a fused step that `benchmarks.gpu_model` predicts for this GPU, or for an L4 if it does not
             know this GPU.

If a part fails, the other parts still run. At the end, the command exits with an error, and ``failed`` in FILE.json
lists the failed parts with their reasons. If a way does not fit the GPU's memory at a batch size, the file has no times
for that way.

``--device cpu`` runs all parts in Triton's interpreter, on the smallest crystals, to check the code but not its speed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_model import GPUS, Gpu, Sizes, fused, step_seconds
from benchmarks.precision import in_float64
from benchmarks.training import Ours, Stock, peak_bytes, seconds_of
from mbqueue.data.batches import make_batch
from mbqueue.data.crystals import Crystals
from mbqueue.data.datasets import load
from mbqueue.data.graph_cache import GraphCache
from mbqueue.experiment import Spec, parse_spec
from mbqueue.storage.manifest import Identity
from mbqueue.storage.places import in_folder
from mbqueue.train import chgnet, gpu_path
from mbqueue.train.arithmetic import calculating, device_name, pick_device, usable_precision
from mbqueue.train.backbone import open_frozen, prepare_frozen
from mbqueue.train.checkpoint import Checkpoints
from mbqueue.train.feeds import GraphFeed
from mbqueue.train.fold import FoldRun
from mbqueue.train.forward import energies, formation_energies
from mbqueue.train.kernel_check import told
from mbqueue.train.memory import OutOfMemory, is_out_of_memory
from mbqueue.train.outcome import EpochOutcome

WAYS = ("plain", "fused")
SHARE = 0.5  # as in benchmarks.gpu_model, assume that kernels reach this fraction of peak bandwidth and FLOP/s


class Bench:
    """Crystals with their graphs, on one device.

    Args:
        device: where to measure.
        folder: for graphs and checkpoints.
        n: the largest number of crystals to use; on the CPU, some of the smallest.
        data: name or path of a dataset.
    """

    def __init__(self, device: torch.device, folder: Path, n: int, data: str) -> None:
        self.device, self.folder = device, folder
        if device.type == "cpu":
            self.crystals = _smallest(load(data).crystals, n, folder)
        else:
            self.crystals = load(data, limit=n).crystals
        cache = GraphCache.build(self.crystals, folder / "graphs")
        assert cache is not None
        self.cache = cache
        self.feed = GraphFeed(chgnet, cache)
        self.stock = Stock(self.crystals, device)

    def __len__(self) -> int:
        """Number of crystals."""
        return len(self.crystals)

    def way(self, name: str, precision: str = "float32") -> AbstractContextManager[None]:
        """Within a ``with`` block, compute as in a fold: in this precision, with or without the kernels."""
        return _both(calculating(self.device, precision), gpu_path.using(kernels=name == "fused"))

    def batches(self, size: int) -> list[np.ndarray]:
        """The rows of each full batch of this size or, if there are too few crystals, of one batch of all crystals."""
        whole = len(self) // size
        return list(np.arange(whole * size).reshape(whole, size)) or [np.arange(len(self))]

    def ours(self, size: int, precision: str = "float32") -> Ours:
        """Make the object that runs mbqueue's step and inference."""
        return Ours(self.spec(size, precision=precision), self.feed, self.crystals.ids, self.device)

    def spec(self, size: int, **train: Any) -> Spec:
        """Return the spec of an experiment on the sample."""
        settings = {"batch_size": size, "epochs": 1, "validation": 0.1, **train}
        return parse_spec({"name": "gpu", "data": {"dataset": "sample"}, "train": settings}, source=__file__)

    def fold(self, name: str, size: int, **train: Any) -> FoldRun:
        """Make a run of fold 0 of `spec`, with commits in the folder ``name``."""
        spec = self.spec(size, **train)
        frozen = open_frozen(spec, self.crystals, self.folder)
        assert prepare_frozen(spec, self.cache, frozen, device=self.device)
        return FoldRun(
            spec=spec,
            fold=0,
            crystals=self.crystals,
            cache=self.cache,
            frozen=frozen,
            checkpoints=self.commits(name),
            device=self.device,
        )

    def commits(self, name: str) -> Checkpoints:
        """Open the commits of the `fold` with this name."""
        return Checkpoints(in_folder(self.folder / name), Identity(experiment="gpu", fold=0))


def _smallest(crystals: Crystals, n: int, folder: Path) -> Crystals:
    """Select the crystals with the fewest bonds and angles among the smallest cells; at least one has angles."""
    atoms = np.diff(crystals.atom_offsets)
    few = crystals.select(np.sort(np.argsort(atoms, kind="stable")[:40]))
    cache = GraphCache.build(few, folder / "few", workers=1)
    assert cache is not None
    angles = cache.angle_counts()
    order = np.argsort(cache.bond_counts() + angles, kind="stable")
    with_angles = next(row for row in order if angles[row])
    order = np.unique([with_angles, *order[: n - 1]])
    return few.select(order)


@contextmanager
def _both(first: AbstractContextManager[None], second: AbstractContextManager[None]) -> Iterator[None]:
    with first, second:
        yield


# -- parts -----------------------------------------------------------------------------------------------------------


def machine(bench: Bench, _options: argparse.Namespace) -> dict[str, Any]:
    """Describe the GPU, the versions, and the way that mbqueue computes."""
    told: list[str] = []
    device = bench.device
    model = chgnet.load_pretrained("0.3.0").to(device)
    batch = bench.feed.load(np.arange(min(len(bench), gpu_path.CHECKED_CRYSTALS))).to(device)
    seconds = seconds_of(
        lambda: gpu_path.check_once(device, "float32", model, chgnet.predict, batch, told.append), device
    )
    found: dict[str, Any] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "crystals": len(bench),
        "atoms_per_crystal": float(np.diff(bench.crystals.atom_offsets).mean()),
        "check_seconds": seconds,
        **gpu_path.described(device),
    }
    if told:
        found["why_plain"] = told[0]
    if device.type == "cuda":
        found["capability"] = list(torch.cuda.get_device_capability(device))
        found["memory_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
    return found


def equality(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the largest differences from stock CHGNet in energies (eV/atom) and gradients of their mean square."""
    stock, model = bench.stock.model, chgnet.load_pretrained("0.3.0").to(bench.device)
    for parameter in stock.parameters():
        parameter.requires_grad_(True)
    worst = {way: {"energy_ev_per_atom": 0.0, "gradient_relative": 0.0} for way in WAYS}
    size = options.batch_sizes[0]
    for first in range(0, len(bench), size):
        rows = np.arange(first, min(first + size, len(bench)))
        graphs = [bench.stock.graphs[row].to(bench.device) for row in rows]
        expected = stock(graphs, task="e")["e"]
        exact = _gradient(stock, expected)
        batch = bench.feed.load(rows).to(bench.device)
        for way in WAYS:
            with bench.way(way):
                found = formation_energies(model, batch)
                gradient = _gradient(model, found)
            worst[way]["energy_ev_per_atom"] = max(
                worst[way]["energy_ev_per_atom"], float((found - expected).abs().max())
            )
            worst[way]["gradient_relative"] = max(worst[way]["gradient_relative"], _distance(gradient, exact))
    return worst


def _gradient(model: torch.nn.Module, predicted: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    predicted.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    wrong = sum(float((found[name] - exact[name]).double().square().sum()) for name in exact if name in found)
    return float((wrong / sum(float(value.double().square().sum()) for value in exact.values())) ** 0.5)


def determinism(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Check whether the same step from the same weights gives the same bytes twice."""
    rows = bench.batches(options.batch_sizes[0])[0]
    found = {}
    for way in WAYS:
        results = []
        for _ in range(2):
            ours = bench.ours(len(rows))
            with bench.way(way):
                ours.step(rows)
            results.append([p.detach().cpu().clone() for p in ours.model.parameters()])
        found[way] = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return found


def resume(bench: Bench, _options: argparse.Namespace) -> dict[str, Any]:
    """Check whether a training run that stops after every step ends with the same bytes as an uninterrupted run."""
    size = max(2, len(bench) // 4)
    ways = {}
    for way in WAYS:
        with bench.way(way):
            straight = bench.fold(f"{way}-straight", size)
            assert _epoch(straight, fence=1).finished
            fence, finished = 0, False
            while not finished:
                fence += 1
                finished = _epoch(bench.fold(f"{way}-stopped", size), fence=fence, steps=1).finished
        ways[way] = {
            "same_bytes": _newest(bench, f"{way}-straight") == _newest(bench, f"{way}-stopped"),
            "stops": fence - 1,
        }
    return ways


def _epoch(run: FoldRun, *, fence: int, steps: int | None = None) -> EpochOutcome:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return steps is not None and asked > steps

    return run.run_epoch(
        1,
        fence=fence,
        session="gpu",
        should_stop=should_stop,
        on_step=lambda _report: None,
        save=lambda staged: staged.publish(),
        checkpoint_seconds=1e9,
    )


def _newest(bench: Bench, name: str) -> bytes:
    commits = bench.commits(name)
    newest = commits.newest()
    assert newest is not None
    return commits.checkpoint(newest)


def speed(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a training step and inference (median, ms) and peak memory (MiB) for each batch size and way."""
    found: dict[str, Any] = {}
    for size in options.batch_sizes:
        batches = bench.batches(size)[: options.batches]
        ours = bench.ours(size)
        works: dict[str, dict[str, Callable[[np.ndarray], object]]] = {
            "training": {"stock": bench.stock.step, "plain": ours.step, "fused": ours.step},
            "inference": {"stock": bench.stock.inference, "plain": ours.inference, "fused": ours.inference},
        }
        found[str(size)] = {kind: _in_turn(bench, ways, batches, options.repeats) for kind, ways in works.items()}
    return found


def _in_turn(
    bench: Bench, ways: dict[str, Callable[[np.ndarray], object]], batches: list[np.ndarray], repeats: int
) -> dict[str, dict[str, float]]:
    """Measure each way in turn; a way that does not fit the device's memory gets an empty entry."""

    def within(way: str) -> AbstractContextManager[None]:
        return _torchs_own() if way == "stock" else bench.way(way)

    measured: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
    warming = bench.device.type != "cpu"  # a GPU compiles kernels in the first round
    for turn in range(repeats + warming):
        for rows in batches:
            for way in list(measured):
                with within(way):
                    figures = _measured_if_it_fits(partial(ways[way], rows), bench.device)
                if figures is None:
                    del measured[way]
                elif turn >= warming:
                    measured[way].append(figures)
    found: dict[str, dict[str, float]] = {way: {} for way in ways}
    for way, all_figures in measured.items():
        seconds, peaks = zip(*all_figures, strict=True)
        found[way]["ms"] = 1e3 * statistics.median(seconds)
        found[way]["crystals_per_second"] = 1e3 * len(batches[0]) / found[way]["ms"]
        found[way]["peak_mib"] = max(peaks) / 2**20
    return found


def _measured_if_it_fits(work: Callable[[], object], device: torch.device) -> tuple[float, int] | None:
    """Run ``work``; return its seconds and peak memory, or None if it does not fit the device's memory."""
    times: list[float] = []
    try:
        peak = peak_bytes(lambda: times.append(seconds_of(work, device)), device)
        return times[0], peak
    except (OutOfMemory, RuntimeError) as error:
        if not (isinstance(error, OutOfMemory) or is_out_of_memory(error)):
            raise
    torch.cuda.empty_cache()  # inside the except block, the error would keep the tensors alive
    return None


@contextmanager
def _torchs_own() -> Iterator[None]:
    yield


def precision(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the errors relative to float64, and the time of a step, in each precision of the device."""
    rows = bench.batches(options.batch_sizes[0])[0]
    host = make_batch(bench.cache, rows)
    model = chgnet.load_pretrained("0.3.0").to(bench.device)
    with bench.way("plain"):
        double = copy.deepcopy(model).double()
        exact = energies(double, in_float64(host).to(bench.device))
        exact_gradient = _gradient(double, exact)
    found = {}
    for name in ("float32", "tf32", "bf16", "fp16"):
        if usable_precision(bench.device, name) != name:
            continue
        with bench.way("fused", name):
            ours = energies(model, host.to(bench.device))
            gradient = _gradient(model, ours)
            stepping = bench.ours(len(rows), name)
            if bench.device.type != "cpu":
                stepping.step(rows)  # a GPU compiles kernels in the first step
            times = [seconds_of(partial(stepping.step, rows), bench.device) for _ in range(options.repeats)]
        error = 1e3 * (ours.double() - exact).abs()
        found[name] = {
            "energy_mev_per_atom_mean": float(error.mean()),
            "energy_mev_per_atom_largest": float(error.max()),
            "gradient_relative": _distance(gradient, exact_gradient),
            "step_ms": 1e3 * statistics.median(times),
        }
    return found


def epoch(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Measure crystals per second over an epoch, including loading, validation and the commit."""
    found = {}
    for way in WAYS:
        with bench.way(way):
            run = bench.fold(f"{way}-epoch", options.batch_sizes[0])
            began = time.perf_counter()
            outcome = _epoch(run, fence=1)
            seconds = time.perf_counter() - began
        assert outcome.finished
        found[way] = {"seconds": seconds, "crystals_per_second": len(run.rows.train) / seconds}
    return found


def kernels(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """List the slowest kernels of a fused step, with ms and calls per step."""
    rows = bench.batches(options.batch_sizes[0])[0]
    ours, on_gpu = bench.ours(len(rows)), bench.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with bench.way("fused"):
        if on_gpu:
            ours.step(rows)  # a GPU compiles kernels in the first step
        with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
            for _ in range(options.repeats):
                ours.step(rows)
    rows_of = [
        {
            "kernel": event.key,
            "ms": (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / options.repeats,
            "calls": event.count / options.repeats,
        }
        for event in profile.key_averages()
    ]
    return sorted(rows_of, key=lambda row: -row["ms"])[:30]


def prediction(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Predict the ms of a fused step at each batch size, for this GPU, or for an L4 if this GPU is unknown."""
    name = device_name(bench.device)
    gpu = _known_gpu(name)
    is_known = gpu is not None
    gpu = gpu or _known_gpu("L4")
    assert gpu is not None
    sizes = {size: Sizes.of(make_batch(bench.cache, bench.batches(size)[0])) for size in options.batch_sizes}
    ms = {str(size): 1e3 * step_seconds(fused(of, gpu), gpu, SHARE) for size, of in sizes.items()}
    return {"gpu": gpu.name, "is_measured_gpu": is_known, "share": SHARE, "step_ms": ms}


def _known_gpu(name: str) -> Gpu | None:
    return next((gpu for gpu in GPUS if gpu.name in name.split() or f"{gpu.name}-" in name), None)


PARTS: dict[str, Callable[[Bench, argparse.Namespace], Any]] = {
    part.__name__: part
    for part in (machine, equality, determinism, resume, speed, precision, epoch, kernels, prediction)
}


# -- the command -----------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> list[str]:
    """Format the table for docs/explanation/performance.md, with measured and predicted times."""
    lines = [
        f"{found['machine']['device']}, torch {found['machine']['torch']}, measured:",
        "",
        f"| batch | | stock | plain | fused | fused, predicted for {found['prediction']['gpu']} |",
        "|---|---|---|---|---|---|",
    ]
    for size, kinds in found["speed"].items():
        for kind, ways in kinds.items():
            cells = [f"{of['ms']:.1f} ms" if (of := ways[way]) else "does not fit" for way in ("stock", *WAYS)]
            predicted = f"{found['prediction']['step_ms'][size]:.2g} ms" if kind == "training" else "–"
            lines.append(f"| {size} | {kind} | {' | '.join(cells)} | {predicted} |")
    return lines


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; options have smaller defaults on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no more parts after this many minutes")
    parser.add_argument("--data", default="sample", help="a data file or folder, as in an experiment's data.dataset")
    parser.add_argument(
        "--crystals", type=int, default=None, help="maximum number of crystals; by default 1,000, or 5 on the CPU"
    )
    options = parser.parse_args(arguments)
    is_tiny = pick_device(options.device).type == "cpu"
    options.crystals = options.crystals or (5 if is_tiny else 1000)
    options.batch_sizes = [2, 3] if is_tiny else [64, 128, 256]
    options.batches, options.repeats = (1, 1) if is_tiny else (3, 3)
    return options


def _interpret() -> None:
    """Let Triton interpret its kernels in this process, as the tests do."""
    os.environ["TRITON_INTERPRET"] = "1"  # set this variable before anything imports triton
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
    import pytest
    from interpreted import quicken

    quicken(pytest.MonkeyPatch())


def main(arguments: list[str] | None = None) -> None:
    """Run all parts, write their results, and print the table."""
    options = parse_arguments(arguments)
    device = pick_device(options.device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device.type == "cpu":
        _interpret()
    began = time.monotonic()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, Path(folder), options.crystals, options.data)
        for name, part in PARTS.items():
            seconds = time.monotonic() - began
            if seconds > 60 * options.minutes:
                found.setdefault("left_out", []).append(name)
                continue
            try:
                found[name] = part(bench, options)
            except Exception as error:  # noqa: BLE001 - run the other parts as well
                found.setdefault("failed", {})[name] = told(error)
                traceback.print_exc()
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: {time.monotonic() - began - seconds:.1f} s", flush=True)
    found["seconds"] = time.monotonic() - began
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if {"machine", "speed", "prediction"} <= found.keys():
        print("\n".join(table(found)))
    if "failed" in found:
        sys.exit(f"Failed: {', '.join(found['failed'])}. {options.out} contains their errors and all other results.")


if __name__ == "__main__":
    main()
