"""Stock CHGNet against mbqueue on the same crystals: training step, inference, and an epoch of the head.

    python -m benchmarks.training --data FOLDER --crystals 512 --device auto

Both sides run in one process, in turn, on the same batches; medians are printed. The stock side does what
`chgnet.trainer.Trainer` does in a step, from graphs that were converted beforehand: `model(graphs, task="e")`, the
loss, backward, Adam. The mbqueue side does what a fold does, with making the batch from the cache counted in.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from chgnet.graph import CrystalGraphConverter
from torch.nn import functional

from mbqueue.data.crystals import Crystals
from mbqueue.data.datasets import load
from mbqueue.data.graph_cache import GraphCache
from mbqueue.experiment import Spec, parse_spec
from mbqueue.train.arithmetic import calculating, device_name, pick_device
from mbqueue.train.backbone import open_frozen, prepare_frozen
from mbqueue.train.feeds import FeatureFeed, Feed, GraphFeed
from mbqueue.train.optim import make_optimizer, open_for_training, trained_parameters
from mbqueue.train.pretrained import load_pretrained
from mbqueue.train.step import optimizer_step

JOINED = "matbench_mp_e_form_joined_31073.jsonl.gz"


def crystals_to_measure(folder: Path | None, n: int) -> Crystals:
    """``n`` crystals drawn from the joined file in ``folder``, or from the shipped sample."""
    return load(str(folder / JOINED) if folder else "sample", limit=n, seed=0).crystals


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long ``work`` takes, the device's share included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most memory that ``work`` holds on a GPU."""
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device)


def compare(
    name: str, stock: list[Callable[[], object]], ours: list[Callable[[], object]], device: torch.device, repeats: int
) -> None:
    """Run both sides in turn on every batch and print medians."""
    for work in (*stock[:1], *ours):
        work()
    times: dict[str, list[float]] = {"stock": [], "mbqueue": []}
    for _ in range(repeats):
        for theirs, mine in zip(stock, ours, strict=True):
            times["stock"].append(seconds_of(theirs, device))
            times["mbqueue"].append(seconds_of(mine, device))
    old, new = (statistics.median(times[side]) for side in ("stock", "mbqueue"))
    memory = ""
    if device.type == "cuda":
        old_peak, new_peak = peak_bytes(stock[0], device), peak_bytes(ours[0], device)
        memory = f", peak memory {old_peak / 2**20:.0f} against {new_peak / 2**20:.0f} MiB"
    print(
        f"{name:14} stock {1e3 * old:8.1f} ms   mbqueue {1e3 * new:8.1f} ms   {old / new:5.2f} times{memory}",
        flush=True,
    )


class Stock:
    """CHGNet as its own trainer and `predict_graph` use it, from graphs that were converted beforehand."""

    def __init__(self, crystals: Crystals, device: torch.device) -> None:
        converter = CrystalGraphConverter(
            atom_graph_cutoff=6, bond_graph_cutoff=3, algorithm="fast", on_isolated_atoms="ignore"
        )
        self.graphs = [converter(crystals.structure(row)) for row in range(len(crystals))]
        self.targets = torch.tensor(crystals.targets, dtype=torch.float32)
        self.device = device
        self.model = load_pretrained("0.3.0").to(device)
        self.adam = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)

    def step(self, rows: np.ndarray) -> None:
        """One training step, as `chgnet.trainer.Trainer` does it for energies."""
        self.model.train()
        predicted = self.model([self.graphs[row].to(self.device) for row in rows], task="e")["e"]
        loss = functional.huber_loss(predicted, self.targets[rows].to(self.device), delta=0.1)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        loss.item()

    def inference(self, rows: np.ndarray) -> None:
        """Energies, with autograd on, as `predict_graph` leaves it."""
        self.model.predict_graph([self.graphs[row] for row in rows], task="e", batch_size=len(rows))

    def freeze(self, trained: Iterable[str]) -> None:
        """Train only these parameters from now on."""
        names = set(trained)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)


class Ours:
    """mbqueue's step as a fold does it, with making the batch counted in."""

    def __init__(self, spec: Spec, feed: Feed, ids: list[str], device: torch.device) -> None:
        self.spec, self.feed, self.ids, self.device = spec, feed, ids, device
        self.model = load_pretrained("0.3.0").to(device)
        self.trained = trained_parameters(self.model, spec.model.trainable)
        open_for_training(self.model, self.trained, head_only=False)
        self.optimizer = make_optimizer(self.model, self.trained, spec.train)

    def step(self, rows: np.ndarray) -> None:
        """One optimizer step."""
        optimizer_step(
            self.model,
            self.feed,
            [self.feed.load(rows)],
            spec=self.spec.train,
            optimizer=self.optimizer,
            parameters=list(self.trained.values()),
            rate=1e-5,
            device=self.device,
            ids=self.ids,
        )

    def inference(self, rows: np.ndarray) -> None:
        """Energies."""
        with torch.inference_mode():
            self.feed.predict(self.model, self.feed.load(rows).to(self.device)).cpu()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("MBQUEUE_SHARED_DATA")
    parser.add_argument("--data", type=Path, default=Path(shared) if shared else None, help=f"folder with {JOINED}")
    parser.add_argument("--crystals", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bf16"])
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0 leaves its choice")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    crystals = crystals_to_measure(options.data, options.crystals)
    print(
        f"{device_name(device)} ({device.type}), torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{options.precision}; {len(crystals)} crystals of {np.diff(crystals.atom_offsets).mean():.1f} atoms on "
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

    with tempfile.TemporaryDirectory() as folder, calculating(device, options.precision):
        cache = GraphCache.build(crystals, Path(folder) / "graphs")
        assert cache is not None
        full = Ours(
            parse_spec({"name": "full", "train": train}, source=__file__), GraphFeed(cache), crystals.ids, device
        )
        compare("inference", over_batches(stock.inference), over_batches(full.inference), device, options.repeats)
        compare("training step", over_batches(stock.step), over_batches(full.step), device, options.repeats)

        spec = parse_spec({"name": "head", "model": {"trainable": "head"}, "train": train}, source=__file__)
        frozen = open_frozen(spec, crystals, Path(folder))
        seconds = seconds_of(lambda: prepare_frozen(spec, cache, frozen, device=device), device)
        print(f"features of the frozen backbone, once for all folds and epochs: {seconds:.2f} s", flush=True)
        head = Ours(spec, FeatureFeed(frozen, crystals.atomic_numbers, crystals.targets), crystals.ids, device)
        stock.freeze(head.trained)
        compare("head epoch", epoch(stock.step), epoch(head.step), device, options.repeats)


if __name__ == "__main__":
    main()
