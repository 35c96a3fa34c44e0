"""Compare stock CHGNet and mbqueue on the same crystals: a training step, inference, and an epoch of the head.

    python -m benchmarks.training --data FOLDER --crystals 512 --device auto

The two sides take turns in one process on the same batches, after a first pass over every batch. The benchmark prints
median times. Stock CHGNet does a step of `chgnet.trainer.Trainer` on converted graphs (`model(graphs, task="e")`, loss,
backward and Adam), with PyTorch's default settings. mbqueue does a step of a fold, including making the batch from the
cache. On a GPU, a fold uses deterministic algorithms, which slow down stock CHGNet more than mbqueue. The table
therefore has a second row for stock CHGNet with deterministic algorithms.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from chgnet.graph import CrystalGraphConverter
from chgnet.trainer.trainer import CombinedLoss

from mbqueue.data.crystals import Crystals
from mbqueue.data.datasets import load
from mbqueue.data.graph_cache import GraphCache
from mbqueue.experiment import Spec, parse_spec
from mbqueue.train import chgnet, fused
from mbqueue.train.arithmetic import calculating, device_name, pick_device, usable_precision
from mbqueue.train.arrivals import arriving
from mbqueue.train.backbone import open_frozen, prepare_frozen
from mbqueue.train.chgnet import load_pretrained, trained_parameters
from mbqueue.train.feeds import FeatureFeed, Feed, GraphFeed
from mbqueue.train.objective import Objective
from mbqueue.train.optim import make_optimizer, open_for_training
from mbqueue.train.step import Guard, begin_step

JOINED = "matbench_mp_e_form_joined_31073.jsonl.gz"


def crystals_to_measure(folder: Path | None, n: int) -> Crystals:
    """Draw ``n`` crystals from the file `JOINED` in ``folder``, or from the shipped sample."""
    return load(str(folder / JOINED) if folder else "sample", limit=n, seed=0).crystals


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Measure the seconds that ``work`` takes, including its work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Measure the peak memory of tensors during ``work``, in bytes; on a GPU, earlier tensors are included."""
    if device.type == "cpu":
        return _peak_on_cpu(work)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device)


def _peak_on_cpu(work: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results = profile.profiler.kineto_results if profile.profiler else None  # Kineto's results list every memory change
    changes = [event for event in results.events() if event.name() == "[memory]"] if results else []
    changes.sort(key=lambda event: event.start_ns())
    held = [*accumulate((event.nbytes() for event in changes), initial=0)]
    # Freeing tensors left over from earlier work lowers the baseline, so subtract the lowest memory use so far.
    return max(now - least for now, least in zip(held, accumulate(held, min), strict=True))


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a function for each batch, called within the context manager ``within``."""

    name: str
    work: list[Callable[[], object]]
    within: Callable[[], AbstractContextManager[None]] = nullcontext


def sides(
    stock: list[Callable[[], object]], ours: list[Callable[[], object]], device: torch.device, precision: str
) -> list[Side]:
    """Return the sides to compare: stock CHGNet, mbqueue and, on a GPU, stock CHGNet with deterministic algorithms."""
    found = [Side("stock", stock)]
    if device.type == "cuda":
        found.append(Side("stock, deterministic", stock, partial(calculating, device, "float32")))
    return [*found, Side("mbqueue", ours, partial(calculating, device, precision))]


def compare(name: str, sides: list[Side], device: torch.device, repeats: int) -> None:
    """Run all sides in turn on every batch, and print each median and its ratio to that of the last side."""
    for side in sides:
        with side.within():
            for work in side.work:
                work()
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(repeats):
        for number in range(len(sides[0].work)):
            for side in sides:
                with side.within():
                    times[side.name].append(seconds_of(side.work[number], device))
    ours = statistics.median(times[sides[-1].name])
    for side in sides:
        median, memory = statistics.median(times[side.name]), ""
        if device.type == "cuda":
            with side.within():
                memory = f", peak memory {peak_bytes(side.work[0], device) / 2**20:.0f} MiB"
        print(f"{name:14} {side.name:20} {1e3 * median:9.1f} ms   {median / ours:6.2f} times{memory}", flush=True)


class Stock:
    """CHGNet as used by its trainer and by `predict_graph`, on graphs converted in advance."""

    def __init__(self, crystals: Crystals, device: torch.device) -> None:
        converter = CrystalGraphConverter(
            atom_graph_cutoff=6, bond_graph_cutoff=3, algorithm="fast", on_isolated_atoms="ignore"
        )
        self.graphs = [converter(crystals.structure(row)) for row in range(len(crystals))]
        self.targets = torch.tensor(crystals.targets, dtype=torch.float32)
        self.device = device
        self.model = load_pretrained("0.3.0").to(device)
        for parameter in self.model.composition_model.parameters():
            parameter.requires_grad_(False)  # CHGNet's trainer freezes these weights by default
        self.loss = CombinedLoss(target_str="e", criterion="Huber", delta=0.1)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=1e-5)

    def step(self, rows: np.ndarray) -> None:
        """Do one training step on energies as `chgnet.trainer.Trainer` does."""
        self.model.train()
        graphs = [self.graphs[row].to(self.device) for row in rows]
        combined = self.loss({"e": self.targets[rows].to(self.device)}, self.model(graphs, task="e"))
        combined["loss"].item()
        combined["e_MAE"].item()
        self.adam.zero_grad()
        combined["loss"].backward()
        self.adam.step()

    def inference(self, rows: np.ndarray) -> None:
        """Compute energies with `predict_graph`, which leaves autograd on."""
        self.model.predict_graph([self.graphs[row] for row in rows], task="e", batch_size=len(rows))

    def freeze(self, trained: Iterable[str]) -> None:
        """Train only these parameters from now on."""
        names = set(trained)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)


class Ours:
    """mbqueue's training step and inference, as in a fold; both include making the batch."""

    def __init__(self, spec: Spec, feed: Feed, ids: list[str], device: torch.device) -> None:
        self.spec, self.feed, self.ids, self.device = spec, feed, ids, device
        self.model = load_pretrained("0.3.0").to(device)
        self.trained = trained_parameters(self.model, spec.model.trainable)
        open_for_training(chgnet, self.model, self.trained, head_only=False)
        self.optimizer = make_optimizer(chgnet, self.model, self.trained, spec.train)
        self.guard = Guard(self.optimizer, device)

    def step(self, rows: np.ndarray) -> None:
        """Do one optimizer step."""
        step = begin_step(
            self.model,
            self.feed,
            next(arriving([[self.feed.load(rows)]], self.device)),
            objective=Objective(self.spec.train, "energy"),
            optimizer=self.optimizer,
            guard=self.guard,
            parameters=list(self.trained.values()),
            rate=1e-5,
        )
        step.result(self.ids)

    def inference(self, rows: np.ndarray) -> None:
        """Compute energies."""
        with torch.inference_mode():
            self.feed.predict(self.model, self.feed.load(rows).to(self.device)).cpu()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("MBQUEUE_SHARED_DATA")
    parser.add_argument("--data", type=Path, default=Path(shared) if shared else None, help=f"folder with {JOINED}")
    parser.add_argument("--crystals", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bf16", "fp16"])
    parser.add_argument(
        "--subnormals", action="store_true", help="let mbqueue's kernels compute with subnormal numbers, as stock does"
    )
    parser.add_argument("--threads", type=int, default=0, help="torch's threads on the CPU; 0 for torch's default")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.subnormals:
        fused._subnormals_as_zero = nullcontext
    device = pick_device(options.device)
    precision = usable_precision(device, options.precision)
    # cuBLAS reads this variable only once, at the first matrix product, so set it before either implementation runs.
    # CUBLAS_WORKSPACE_CONFIG affects only the scratch memory of cuBLAS.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    crystals = crystals_to_measure(options.data, options.crystals)
    print(
        f"{device_name(device)} ({device.type}), torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"mbqueue in {precision}; {len(crystals)} crystals of {np.diff(crystals.atom_offsets).mean():.1f} atoms on "
        f"average, batch {options.batch_size}",
        flush=True,
    )
    batches = np.arange(len(crystals) // options.batch_size * options.batch_size).reshape(-1, options.batch_size)
    train = {"batch_size": options.batch_size, "precision": options.precision}
    stock = Stock(crystals, device)

    def over_batches(work: Callable[[np.ndarray], None]) -> list[Callable[[], object]]:
        return [partial(work, rows) for rows in batches]

    def epoch(work: Callable[[np.ndarray], None]) -> list[Callable[[], object]]:
        return [lambda: [work(rows) for rows in batches]]

    with tempfile.TemporaryDirectory() as folder:
        cache = GraphCache.build(crystals, Path(folder) / "graphs")
        assert cache is not None
        full = Ours(
            parse_spec({"name": "full", "train": train}, source=__file__),
            GraphFeed(chgnet, cache),
            crystals.ids,
            device,
        )
        inference = sides(over_batches(stock.inference), over_batches(full.inference), device, "float32")
        compare("inference", inference, device, options.repeats)
        steps = sides(over_batches(stock.step), over_batches(full.step), device, precision)
        compare("training step", steps, device, options.repeats)

        spec = parse_spec({"name": "head", "model": {"trainable": "head"}, "train": train}, source=__file__)
        frozen = open_frozen(spec, crystals, Path(folder))
        seconds = seconds_of(lambda: prepare_frozen(spec, cache, frozen, device=device), device)
        print(f"features of the frozen backbone, once for all folds and epochs: {seconds:.2f} s", flush=True)
        head = Ours(spec, FeatureFeed(chgnet, frozen, crystals.atomic_numbers, crystals.targets), crystals.ids, device)
        stock.freeze(head.trained)
        compare("head epoch", sides(epoch(stock.step), epoch(head.step), device, precision), device, options.repeats)


if __name__ == "__main__":
    main()
