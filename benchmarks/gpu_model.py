"""Predict the time of a training step on a GPU from each kernel's bytes, operations and launches.

    python -m benchmarks.gpu_model

The times are predicted, not measured, so you need no GPU. The model compares three ways to compute a step:

stock    CHGNet's step. The model runs one step on the CPU and counts every torch operation: the bytes of operands and
         results, the floating-point operations, and one launch.
plain    mbqueue's step in torch operations (`PlainMessages`), counted in the same way.
fused    mbqueue's step with GPU kernels, from formulas for what each kernel reads, writes and computes (`fused`).

A kernel takes the time to move its bytes or the time to compute its operations, whichever is longer. The model assumes
that kernels reach a fixed fraction of the GPU's bandwidth and float32 peak. A step takes the sum of its kernels' times,
or the time of all launches if that is longer. The model leaves out loading, because the cache delivers 17,000
crystals/s on two cores (docs/explanation/performance.md).

The model counts the work for a small batch, and scales each count by the sizes of its tensors to 64 crystals of
matbench_mp_e_form. ``--gpu NAME,GB/S,TFLOP/S,US,MB`` predicts times for your own GPU, from its bandwidth, float32 peak,
launch time and L2 cache.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mbqueue.data.batch import Batch

#: Predict how long this full finetune takes: all crystals of matbench_mp_e_form, five folds, 20 epochs, and validation
#: on 5 % of the training set.
CRYSTALS, FOLDS, EPOCHS, VALIDATION = 132_752, 5, 20, 0.05
SESSION_HOURS = 1 + 50 / 60
#: Operations per message element, excluding matrix products: norms, SiLU, sigmoid, weights, and their gradients.
ELEMENTWISE, ELEMENTWISE_BACKWARD = 30, 60


@dataclass(frozen=True)
class Sizes:
    """The sizes of a batch: crystals, atoms, directed and undirected bonds, short bonds, angles."""

    crystals: int
    atoms: int
    directed: int
    undirected: int
    short: int
    angles: int

    @classmethod
    def of(cls, batch: Batch) -> Sizes:
        """The sizes of ``batch``."""
        rows = (batch.rows, batch.atomic_numbers, batch.bond_center, batch.bond_length, batch.short_bond, batch.angle)
        return cls(*map(len, rows))


#: The average sizes of a batch with 64 crystals from matbench_mp_e_form.
MATBENCH = Sizes(64, 1_860, 121_000, 60_600, 8_000, 110_000)


@dataclass(frozen=True)
class Gpu:
    """A GPU's published figures (GB/s, float32 TFLOP/s, MB of L2), and the time of a launch, µs."""

    name: str
    bandwidth: float
    tflops: float
    launch_us: float
    l2: float


GPUS = (
    Gpu("T4", 320, 8.1, 6, 4),
    Gpu("L4", 300, 30.3, 5, 48),
    Gpu("A100", 1_555, 19.5, 5, 40),
    Gpu("H100", 3_350, 67, 4, 50),
)


@dataclass(frozen=True)
class Work:
    """The work of one kernel, or of all kernels with the same name, in a step."""

    name: str
    launches: float
    bytes: float
    flops: float

    def seconds(self, gpu: Gpu, share: float) -> float:
        """Predict how many seconds this work takes if kernels reach ``share`` of the GPU's bandwidth and peak."""
        return max(self.bytes / (gpu.bandwidth * 1e9), self.flops / (gpu.tflops * 1e12)) / share


def step_seconds(works: Iterable[Work], gpu: Gpu, share: float) -> float:
    """Predict the seconds that a step of these kernels takes."""
    works = list(works)
    launching = sum(work.launches for work in works) * gpu.launch_us * 1e-6
    return max(sum(work.seconds(gpu, share) for work in works), launching)


# -- counted ---------------------------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Counts the bytes, operations and launches of torch, and scales them from one batch's sizes to another's.

    The work of an operation grows with its largest tensor, whose rows can be crystals, atoms, bonds or angles. Any
    other tensor, such as one for a single crystal in stock CHGNet, is assumed to grow like the directed bonds.
    """

    def __init__(self, counted: Sizes, wanted: Sizes) -> None:
        super().__init__()
        self._growth: dict[int, float] = {}
        for field in fields(Sizes):
            here = getattr(counted, field.name)
            self._growth[here] = getattr(wanted, field.name) / here if here else 0.0
        self._otherwise = self._growth[counted.directed]
        self.works: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not _is_kernel(func):
            return out
        inputs, outputs = list(_tensors((args, kwargs or {}))), list(_tensors(out))
        name = func.overloadpacket.__name__
        largest = max([*inputs, *outputs], key=lambda t: t.numel(), default=None)
        growth = 1.0
        if largest is not None and largest.numel() > 20_000:
            growth = next((self._growth[n] for n in largest.shape if n in self._growth), self._otherwise)
        if name in ("index_select", "gather", "index", "embedding"):  # these ops read only the selected rows
            moved = 2 * sum(map(_bytes, outputs)) + sum(map(_bytes, inputs[1:]))
        else:
            moved = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
        work = self.works[name]
        work[0] += 1
        work[1] += growth * moved
        work[2] += growth * _flops(name, inputs, outputs)
        return out

    def found(self) -> list[Work]:
        """Return the counted work of each operation, in descending order of bytes."""
        return sorted((Work(name, *numbers) for name, numbers in self.works.items()), key=lambda work: -work.bytes)


def _is_kernel(func: Any) -> bool:
    """Whether an operation launches a kernel; views and bare allocations do not."""
    name = func.overloadpacket.__name__
    is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
    return not (is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view", "_local_scalar", "lift")))


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flops(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    matrices = inputs[1:] if name == "addmm" else inputs
    if name in ("mm", "addmm"):
        return 2.0 * matrices[0].shape[0] * matrices[0].shape[1] * matrices[1].shape[1]
    return float(max([t.numel() for t in [*inputs, *outputs]], default=0))


def counted_steps(folder: Path | None, n: int, wanted: Sizes) -> dict[str, list[Work]]:
    """Count the work of a stock step and a plain step on ``n`` crystals, and scale it to ``wanted``."""
    from benchmarks.training import Ours, Stock, crystals_to_measure
    from mbqueue.data.batches import make_batch
    from mbqueue.data.graph_cache import GraphCache
    from mbqueue.experiment import parse_spec
    from mbqueue.train import chgnet, forward
    from mbqueue.train.feeds import GraphFeed
    from mbqueue.train.gated import PlainMessages

    crystals, device, rows = crystals_to_measure(folder, n), torch.device("cpu"), np.arange(n)
    fused_of_the_cpu, forward.FusedMessages = forward.FusedMessages, PlainMessages  # type: ignore[misc,assignment]
    try:
        with tempfile.TemporaryDirectory() as place:
            cache = GraphCache.build(crystals, Path(place))
            assert cache is not None
            spec = parse_spec({"name": "counted", "train": {"batch_size": n}}, source=__file__)
            steps: dict[str, Callable[[np.ndarray], None]] = {
                "stock": Stock(crystals, device).step,
                "plain": Ours(spec, GraphFeed(chgnet, cache), crystals.ids, device).step,
            }
            sizes = Sizes.of(make_batch(cache, rows))
            found = {}
            for name, step in steps.items():
                step(rows)  # the first step allocates the optimizer's moments
                with Counting(sizes, wanted) as counting:
                    step(rows)
                found[name] = counting.found()
    finally:
        forward.FusedMessages = fused_of_the_cpu  # type: ignore[misc]
    return found


# -- from formulas ---------------------------------------------------------------------------------------------------


def gathered(rows: int, table: int, width: int, l2: float) -> float:
    """Predict the bytes read to gather rows from a float32 table; a table that fits half the L2 cache is read once."""
    fits = 4.0 * table * width <= l2 * 1e6 / 2
    return 4.0 * width * (min(rows, table) if fits else rows)


def product(rows: int, inner: int, outer: int) -> float:
    """Count the operations of multiplying a matrix [rows, inner] by a matrix [inner, outer]."""
    return 2.0 * rows * inner * outer


def fused(s: Sizes, gpu: Gpu, *, training: bool = True) -> list[Work]:
    """Calculate the work of a step with the GPU kernels, or of a forward pass if not ``training``."""
    l2 = gpu.l2

    def of_bonds() -> tuple[float, float]:
        """Return bytes and operations of a forward pass of bond messages; the backward pass reads the same bytes."""
        reads = gathered(s.directed, s.atoms, 128, l2) + 4 * 128 * s.atoms
        reads += gathered(s.directed, s.undirected, 128, l2) + gathered(s.directed, s.undirected, 64, l2)
        return reads + 3 * 4 * s.directed, s.directed * (2 * product(1, 64, 64) + 128 * ELEMENTWISE)

    # The kernels compute sums over an atom's bonds, or over a short bond's angles, as products with a 16-row matrix of
    # zeros and ones.
    of_sum = product(1, 16, 64)

    def of_angles(with_second: bool) -> tuple[float, float]:
        reads = 2 * gathered(s.angles, s.short, 128, l2) + gathered(s.angles, s.atoms, 128, l2) + 4 * 64 * s.angles
        reads += (2 * gathered(s.angles, s.short, 64, l2) if with_second else 0) + 3 * 4 * s.angles
        products = product(1, 64, 128) + (2 * product(1, 64, 64) if with_second else 0)
        return reads, s.angles * (products + 128 * ELEMENTWISE)

    bonds, angles, update = of_bonds(), of_angles(True), of_angles(False)
    rows = [
        Work("bases", 4, 4 * (s.undirected * (64 + 4 * 128) + s.short * 128 + s.angles * 64), 0.0),
        Work("bond messages", 4, 4 * (bonds[0] + 4 * 64 * s.atoms), 4 * (bonds[1] + of_sum * s.directed)),
        Work("angle messages", 3, 3 * (angles[0] + 4 * 64 * s.short), 3 * (angles[1] + of_sum * s.angles)),
        Work("angle updates", 2, 2 * (update[0] + 4 * 64 * s.angles), 2 * update[1]),
        _products(s, backward=False),
        Work("read-out", 2, 4.0 * s.atoms * 64, s.atoms * (3 * product(1, 64, 64) + 200)),
    ]
    basis_flops = product(s.undirected, 32, 576) + product(s.short, 32, 128) + product(s.angles, 32, 64)
    rows[0] = replace(rows[0], flops=basis_flops + 31 * 20.0 * (s.undirected + s.short + s.angles))
    if not training:
        return rows
    # The backward pass reads the forward pass's inputs and the output's gradient twice: first for the gradients of the
    # inputs, then for the gradients of the weights. The backward pass also writes one gradient per bond or angle, and
    # reads this gradient again for each sum. A bond's gradient contributes to two sums (by centre and by neighbour). An
    # angle's gradient contributes to four sums (by first bond, by second bond, by centre, and for the first layer's
    # weights).
    per_bond = 4.0 * 128 * s.directed
    own_bonds = 4.0 * (256 * s.atoms + (128 + 2 * 64) * s.undirected + 128 * s.short)
    d_bonds = 2 * (bonds[0] + gathered(s.directed, s.atoms, 64, l2)) + 3 * per_bond + own_bonds
    per_angle, features = 4.0 * 128 * s.angles, 4.0 * 64 * s.angles
    own_angles = 4.0 * (128 * s.atoms + 256 * s.short) + 2 * features
    at_shorts = gathered(s.angles, s.short, 64, l2)
    d_angles = 2 * (angles[0] + at_shorts) + 5 * per_angle + features + own_angles
    # For each angle, the kernels write the product of the message and its gradient, and read it twice: once per bond.
    d_angles += 3 * features + 2 * at_shorts + 4.0 * 2 * 64 * s.short
    d_update = update[0] + 5 * per_angle + 2 * features + own_angles
    more, products = 128 * ELEMENTWISE_BACKWARD, product(1, 64, 64)
    rows += [
        Work("bases, backward", 4, rows[0].bytes, 2 * rows[0].flops),
        Work("bond messages, backward", 4 * 3, 4 * d_bonds, 4 * s.directed * (8 * products + 2 * more)),
        Work(
            "angle messages, backward",
            3 * 5,
            3 * d_angles,
            3 * s.angles * (4 * product(1, 64, 128) + 8 * products + 2 * more),
        ),
        Work("angle updates, backward", 2 * 4, 2 * d_update, 2 * s.angles * (3 * product(1, 64, 128) + more)),
        _partial_sums(s),
        _products(s, backward=True),
        Work("read-out, backward", 6, 4.0 * s.atoms * 64 * 8, s.atoms * 9 * product(1, 64, 64)),
        # AdamW reads four numbers per weight and writes three, and clipping reads one and writes one.
        Work("loss, clipping, optimizer", 43, 4.0 * 9 * WEIGHTS, 20.0 * WEIGHTS),
    ]
    return rows


#: How many of CHGNet's parameters a full finetune trains.
WEIGHTS = 380_000


def _partial_sums(s: Sizes) -> Work:
    """Calculate the work of writing the partial sums of the weight gradients, and of adding up the partial sums."""
    of_bonds, of_angles = (math.ceil(rows / TILE) for rows in (s.directed, s.angles))
    written = 4 * _programs(of_bonds) * 8_576 + _programs(of_angles) * (3 * 16_768 + 2 * 8_448)
    return Work("partial sums of weights", 0, 4.0 * 2 * written, written)


#: Rows per tile in the weight-gradient kernels (`mbqueue.train.kernels.tiles`).
TILE = 16


def _programs(tiles: int) -> int:
    """Return the number of programs that share this many tiles."""
    return math.ceil(tiles / max(1, math.ceil(tiles / 512))) if tiles else 0


def _products(s: Sizes, *, backward: bool) -> Work:
    """Calculate the work of the layers per atom or short bond: contributions to first layers, and outputs."""
    widths = [(s.atoms, 256), *[(s.atoms, 512)] * 2, (s.atoms, 384), *[(s.atoms, 64)] * 4]
    widths += [(s.short, 256), *[(s.short, 640)] * 2, (s.short, 128), *[(s.short, 64)] * 3]
    moved = sum(4.0 * rows * (64 + outer) for rows, outer in widths)
    flops = sum(product(rows, 64, outer) for rows, outer in widths)
    if not backward:
        return Work("products of atoms and short bonds", len(widths), moved, flops)
    return Work("products of atoms and short bonds, backward", 2 * len(widths), 2 * moved, 2 * flops)


# -- predicted -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """The training speed in crystals per second, and how many hours and sessions a full finetune takes."""

    rate: float
    hours: float

    @property
    def sessions(self) -> int:
        """The number of sessions of 1 h 50 min that a full finetune takes."""
        return math.ceil(self.hours / SESSION_HOURS)


def predicted(step: float, forward: float, sizes: Sizes) -> Prediction:
    """Predict a full finetune from the seconds of a training step and of a forward pass over a batch.

    Each epoch trains on the training set without the validation set, then predicts the validation set. Each fold
    ends by predicting its test set.
    """
    train = CRYSTALS * (1 - 1 / FOLDS)
    trained = FOLDS * EPOCHS * train * (1 - VALIDATION)
    inferred = FOLDS * EPOCHS * train * VALIDATION + CRYSTALS
    seconds = (trained * step + inferred * forward) / sizes.crystals
    return Prediction(sizes.crystals / step, seconds / 3600)


def prediction_of_fused(gpu: Gpu, share: float, sizes: Sizes = MATBENCH) -> Prediction:
    """Predict a full finetune with the GPU kernels in float32."""
    step = step_seconds(fused(sizes, gpu), gpu, share)
    return predicted(step, step_seconds(fused(sizes, gpu, training=False), gpu, share), sizes)


def table(gpus: Iterable[Gpu], counted: dict[str, list[Work]], sizes: Sizes, share: float) -> list[str]:
    """Format the table for the documentation, with the work of a step and predicted times for each GPU and way."""
    lines = [
        "| GPU | way | GB a step | GFLOP | launches | step, ms | crystals/s | hours | sessions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for gpu in gpus:
        for way, works in {**counted, "fused": fused(sizes, gpu)}.items():
            step = step_seconds(works, gpu, share)
            # For `stock` and `plain`, the cost model counts only whole steps, so assume a third of a step for a forward
            # pass.
            forward = step_seconds(fused(sizes, gpu, training=False), gpu, share) if way == "fused" else step / 3
            found = predicted(step, forward, sizes)
            total = Work("", *(sum(values) for values in zip(*(astuple(work)[1:] for work in works), strict=True)))
            lines.append(
                f"| {gpu.name} | {way} | {total.bytes / 1e9:.1f} | {total.flops / 1e9:.0f} | {total.launches:,.0f} | "
                f"{1e3 * step:.1f} | {found.rate:,.0f} | {found.hours:.1f} | {found.sessions} |"
            )
    return lines


def by_kernel(works: Iterable[Work], gpu: Gpu, share: float) -> list[str]:
    """Format a table of kernels for one GPU."""
    lines = [f"| kernel ({gpu.name}) | launches | MB | GFLOP | ms |", "|---|---|---|---|---|"]
    lines += [
        f"| {work.name} | {work.launches:.0f} | {work.bytes / 1e6:,.0f} | {work.flops / 1e9:.2f} | "
        f"{1e3 * work.seconds(gpu, share):.2f} |"
        for work in works
    ]
    return lines


def parse_gpu(text: str) -> Gpu:
    """Parse ``NAME,GB/S,TFLOP/S,US,MB``."""
    name, *figures = text.split(",")
    return Gpu(name, *map(float, figures))


def main(arguments: list[str] | None = None) -> None:
    """Count the work, predict the times, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="the same folder as for benchmarks.training; by default, the shipped sample"
    )
    parser.add_argument("--crystals", type=int, default=64, help="crystals in the batch to count")
    parser.add_argument("--share", type=float, default=0.5, help="share of bandwidth and peak that kernels reach")
    parser.add_argument(
        "--gpu", type=parse_gpu, action="append", help="NAME,GB/S,TFLOP/S,US,MB, instead of the four known GPUs"
    )
    parser.add_argument("--kernels", action="store_true", help="also list the kernels of each way")
    options = parser.parse_args(arguments)
    gpus = options.gpu or GPUS
    counted = counted_steps(options.data, options.crystals, MATBENCH)
    print(f"Predicted, not measured: {MATBENCH}, {options.share:.0%} of bandwidth and peak, float32")
    for gpu in gpus:
        print(gpu)
    print("\n".join(table(gpus, counted, MATBENCH, options.share)))
    if options.kernels:
        for way, works in counted.items():
            print(f"\n{way}\n" + "\n".join(by_kernel(works[:20], gpus[0], options.share)))
        for gpu in gpus:
            print("\nfused\n" + "\n".join(by_kernel(fused(MATBENCH, gpu), gpu, options.share)))


if __name__ == "__main__":
    main()
