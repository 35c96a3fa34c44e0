"""Measure the errors of the GPU's message kernels relative to float64, in each precision of their products.

    python -m benchmarks.kernel_precision

Triton's interpreter runs the kernels, so you need no GPU. The inputs are random numbers, about as large as in trained
models, on the graph of the sample's smallest crystal with angles. The error is the norm of the difference from plain
torch in float64, divided by the norm of the result in float64.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor

from benchmarks.triton_messages import TritonMessages
from mbqueue.data.batch import Batch
from mbqueue.data.batches import make_batch
from mbqueue.data.datasets import load
from mbqueue.data.graph_cache import GraphCache
from mbqueue.train.gated import Gate, PlainMessages


def smallest_with_angles() -> Batch:
    crystals = load("sample", limit=40, seed=5).crystals
    with tempfile.TemporaryDirectory() as folder:
        cache = GraphCache.build(crystals, Path(folder) / "graphs", workers=1)
        assert cache is not None
        bonds, angles = cache.index[:, 1], cache.index[:, 4]
        return make_batch(cache, [int(np.argmin(np.where(angles > 0, bonds + angles, bonds.max() + angles.max() + 1)))])


def outcome(batch: Batch, messages: PlainMessages, dtype: torch.dtype) -> dict[str, Tensor]:
    """Compute each function's value, and one vector of its gradients with respect to all inputs and parameters."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = scale * torch.randn(*shape, dtype=torch.float64, generator=generator)
        return drawn.to(dtype).requires_grad_()

    n_shorts = len(batch.short_bond)
    atoms, bonds, weights = (
        draw(len(batch.atomic_numbers), 256),
        draw(len(batch.bond_length), 128),
        draw(len(batch.bond_length), 64),
    )
    shorts, angles, first = draw(n_shorts, 256), draw(len(batch.angle), 64), draw(128, 64, scale=0.2)
    of_shorts = draw(n_shorts, 64)
    gate = Gate(draw(128, 64, scale=0.2), draw(128), draw(128), draw(128), None)
    assert gate.second is not None
    assert gate.bias is not None
    behind = [gate.second, gate.bias, gate.scale, gate.shift]
    norms = Gate(None, None, gate.scale, gate.shift, None)
    values = {
        "of_bonds": (messages.of_bonds(atoms, bonds, weights, gate), [atoms, bonds, weights, *behind]),
        "of_angles": (
            messages.of_angles(atoms[:, :128], shorts, angles, first, of_shorts, gate),
            [atoms, shorts, angles, first, of_shorts, *behind],
        ),
        "updated_angles": (
            messages.updated_angles(atoms[:, :128], shorts, angles, first, norms),
            [atoms, shorts, angles, first, gate.scale, gate.shift],
        ),
    }
    found = {}
    for name, (value, inputs) in values.items():
        gradients = torch.autograd.grad((value**2).sum(), inputs)
        found[name] = value.detach().double()
        found[f"{name}, gradients"] = torch.cat([gradient.flatten() for gradient in gradients]).double()
    return found


def main() -> None:
    batch = smallest_with_angles()
    exact = outcome(batch, PlainMessages(batch), torch.float64)
    print(f"{len(batch.bond_center)} directed bonds, {len(batch.angle)} angles, torch {torch.__version__}\n")
    print("| products |", " | ".join(exact), "|")
    print("|---|" + "---|" * len(exact))
    for precision in ("float32", "tf32", "fp16", "bf16"):
        found = outcome(batch, TritonMessages(batch, precision=precision), torch.float32)
        errors = [float((found[name] - value).norm() / value.norm()) for name, value in exact.items()]
        print(f"| {precision} |", " | ".join(f"{error:.1e}" for error in errors), "|", flush=True)


if __name__ == "__main__":
    main()
