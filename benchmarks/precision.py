"""Measure the errors of energies and gradients in each reduced precision, relative to float64.

    python -m benchmarks.precision --data FOLDER

The CPU computes the plain messages as a GPU would, and rounds in the same places. For tf32, the benchmark rounds away
the last 13 binary digits of a float32 before each product of the messages; a GPU also does so in the read-out. FOLDER
is the same as for `benchmarks.training`; by default, the benchmark uses the shipped sample.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from chgnet.model import CHGNet
from torch import Tensor

from benchmarks.training import JOINED, crystals_to_measure
from mbqueue.data.batch import Batch
from mbqueue.data.batches import make_batch
from mbqueue.data.graph_cache import GraphCache
from mbqueue.train import forward, gated
from mbqueue.train.chgnet import load_pretrained
from mbqueue.train.gated import PRODUCTS, PlainMessages, gradient_scale


def energies_and_gradients(model: CHGNet, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute interaction energies, eV/atom, and the gradient of their mean square with respect to each weight."""
    model.zero_grad()
    energies = forward.energies(model, batch)
    scale = gradient_scale(len(batch))
    (energies.square().mean() * scale).backward()
    return energies.detach(), {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}


def in_float64(batch: Batch) -> Batch:
    """Copy a batch, with lengths and angles in float64."""
    given = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: x.double() for name, x in given.items() if x.is_floating_point()})


def to_tf32(x: Tensor) -> Tensor:
    """Round to the nearest tf32 number, which has ten binary digits after the first."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@contextmanager
def products_in(name: str) -> Iterator[None]:
    """Compute the products of the messages in this precision within a ``with`` block."""
    round_to_half = gated._rounded
    if name == "tf32":
        gated._rounded = to_tf32  # multiply the rounded numbers and accumulate in float32, as for float16
    token = PRODUCTS.set({"float32": None, "bf16": torch.bfloat16}.get(name, torch.float16))
    try:
        yield
    finally:
        PRODUCTS.reset(token)
        gated._rounded = round_to_half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("MBQUEUE_SHARED_DATA")
    parser.add_argument("--data", type=Path, default=Path(shared) if shared else None, help=f"folder with {JOINED}")
    parser.add_argument("--crystals", type=int, default=64)
    options = parser.parse_args()
    forward.FusedMessages = PlainMessages  # type: ignore[misc,assignment]
    crystals = crystals_to_measure(options.data, options.crystals)
    with tempfile.TemporaryDirectory() as folder:
        cache = GraphCache.build(crystals, Path(folder))
        assert cache is not None
        batch = make_batch(cache, np.arange(len(crystals)))
        print(f"{'model':8} {'products':9} {'energy, meV/atom: mean':>23} {'largest':>8} {'gradient, relative':>19}")
        for version in ("0.3.0", "r2scan"):
            model = load_pretrained(version)
            exact, exact_gradients = energies_and_gradients(copy.deepcopy(model).double(), in_float64(batch))
            size = sum(float(gradient.square().sum()) for gradient in exact_gradients.values()) ** 0.5
            for name in ("float32", "tf32", "fp16", "bf16"):
                with products_in(name):
                    found, gradients = energies_and_gradients(model, batch)
                error = 1e3 * (found.double() - exact).abs()
                wrong = sum(float((gradients[key] - exact_gradients[key]).square().sum()) for key in exact_gradients)
                told = f"{float(error.mean()):23.4f} {float(error.max()):8.4f} {wrong**0.5 / size:19.1e}"
                print(f"{version:8} {name:9} {told}", flush=True)


if __name__ == "__main__":
    main()
