"""Stock CHGNet against mbqueue on the same crystals: training step, inference, and an epoch of the head.

    python benchmarks/training.py --data FOLDER --crystals 512 --device auto

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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from chgnet.graph import CrystalGraphConverter
from torch.nn import functional

from mbqueue.data.batches import make_batch
from mbqueue.data.cache import GraphCache
from mbqueue.data.crystals import Crystals
from mbqueue.data.datasets import load
from mbqueue.experiment import parse_spec
from mbqueue.train.arithmetic import calculating, device_name, pick_device
from mbqueue.train.backbone import open_frozen, prepare_frozen
from mbqueue.train.feeds import FeatureFeed, GraphFeed
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("MBQUEUE_SHARED_DATA")
    parser.add_argument("--data", type=Path, default=Path(shared) if shared else None, help=f"folder with {JOINED}")
    parser.add_argument("--crystals", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bf16"])
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0 leaves its choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    crystals = crystals_to_measure(options.data, options.crystals)
    sizes = np.diff(crystals.atom_offsets)
    print(
        f"{device_name(device)} ({device.type}), torch {torch.__version__}, {torch.get_num_threads()} threads, {options.precision}; "
        f"{len(crystals)} crystals of {sizes.mean():.1f} atoms on average, batch {options.batch_size}",
        flush=True,
    )
    converter = CrystalGraphConverter(
        atom_graph_cutoff=6, bond_graph_cutoff=3, algorithm="fast", on_isolated_atoms="ignore"
    )
    graphs = [converter(crystals.structure(row)) for row in range(len(crystals))]
    whole = len(crystals) // options.batch_size * options.batch_size
    batches = np.arange(whole).reshape(-1, options.batch_size)

    spec = parse_spec(
        {"name": "benchmark", "train": {"batch_size": options.batch_size, "precision": options.precision}},
        source="benchmark",
    )
    stock_model = load_pretrained("0.3.0").to(device)
    adam = torch.optim.Adam([p for p in stock_model.parameters() if p.requires_grad], lr=1e-5)
    targets = torch.tensor(crystals.targets, dtype=torch.float32)

    def stock_step(rows: np.ndarray) -> None:
        stock_model.train()
        predicted = stock_model([graphs[row].to(device) for row in rows], task="e")["e"]
        loss = functional.huber_loss(predicted, targets[rows].to(device), delta=0.1)
        adam.zero_grad()
        loss.backward()
        adam.step()
        loss.item()

    def stock_inference(rows: np.ndarray) -> None:
        # CHGNet.predict_graph, the stock way to energies, leaves autograd on.
        stock_model.predict_graph([graphs[row] for row in rows], task="e", batch_size=len(rows))

    with tempfile.TemporaryDirectory() as folder:
        cache = GraphCache.build(crystals, Path(folder) / "graphs")
        assert cache is not None
        model = load_pretrained("0.3.0").to(device)
        trained = trained_parameters(model, "all")
        open_for_training(model, trained, head_only=False)
        optimizer = make_optimizer(model, trained, spec.train)
        feed = GraphFeed(cache)

        def step(rows: np.ndarray) -> None:
            optimizer_step(
                model,
                feed,
                [make_batch(cache, rows)],
                spec=spec.train,
                optimizer=optimizer,
                parameters=list(trained.values()),
                rate=1e-5,
                device=device,
                ids=crystals.ids,
            )

        def inference(rows: np.ndarray) -> None:
            with torch.inference_mode():
                feed.predict(model, make_batch(cache, rows).to(device)).cpu()

        def calls(work: Callable[[np.ndarray], None]) -> list[Callable[[], object]]:
            return [lambda rows=rows: work(rows) for rows in batches]

        with calculating(device, options.precision):
            compare("inference", calls(stock_inference), calls(inference), device, options.repeats)
            compare("training step", calls(stock_step), calls(step), device, options.repeats)

        head = parse_spec(
            {"name": "head", "model": {"trainable": "head"}, "train": {"batch_size": options.batch_size}},
            source="benchmark",
        )
        frozen = open_frozen(head, crystals, Path(folder))
        began = time.perf_counter()
        prepare_frozen(head, cache, frozen, device=device)
        print(
            f"features of the frozen backbone, once: {time.perf_counter() - began:.2f} s for {len(crystals)} crystals"
        )
        head_model = load_pretrained("0.3.0").to(device)
        head_trained = trained_parameters(head_model, "head")
        open_for_training(head_model, head_trained, head_only=True)
        head_optimizer = make_optimizer(head_model, head_trained, head.train)
        head_feed = FeatureFeed(frozen, crystals.atomic_numbers, crystals.targets)
        for name, parameter in stock_model.named_parameters():
            parameter.requires_grad_(name in head_trained)

        def head_epoch() -> None:
            for rows in batches:
                optimizer_step(
                    head_model,
                    head_feed,
                    [head_feed.load(rows)],
                    spec=head.train,
                    optimizer=head_optimizer,
                    parameters=list(head_trained.values()),
                    rate=1e-5,
                    device=device,
                    ids=crystals.ids,
                )

        def stock_epoch() -> None:
            for rows in batches:
                stock_step(rows)

        compare("head epoch", [stock_epoch], [head_epoch], device, options.repeats)


if __name__ == "__main__":
    main()
