"""In Triton's interpreter, a step with the GPU kernels gives stock CHGNet's energies and gradients in few launches."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import offline
import pytest
import torch
from interpreted import quicken
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mbqueue.data.batch import OrderedBatch
from mbqueue.data.batches import make_batch
from mbqueue.data.graph_cache import GraphCache
from mbqueue.experiment import TrainSpec
from mbqueue.train import chgnet, forward, gpu_path, triton_forward
from mbqueue.train.arrivals import Arrived
from mbqueue.train.gated import PlainMessages
from mbqueue.train.kernels import launching
from mbqueue.train.objective import Objective
from mbqueue.train.optim import make_optimizer, open_for_training
from mbqueue.train.step import Guard, begin_step

CPU = torch.device("cpu")
#: The maximum number of kernel launches in a training step. A GPU needs one more launch to copy a table of addresses.
MOST_LAUNCHES = 150


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> GraphCache:
    """Eight crystals, among them a cell of one atom (row 6) and a cell without bond angles (row 7)."""
    path = Path(__file__).parent.parent / "conftest.py"
    spec = importlib.util.spec_from_file_location("training_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["training_conftest"] = made
    spec.loader.exec_module(made)
    structures = made.crystals_of_many_kinds(seed=3)
    crystals = made.crystals_from_structures(structures, [-1.0] * len(structures))
    built = GraphCache.build(crystals, tmp_path_factory.mktemp("graphs"), workers=1)
    assert built is not None
    return built


@pytest.fixture(autouse=True)
def _measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the kernels with plain torch, also on the CPU."""
    quicken(monkeypatch)
    monkeypatch.setattr(forward, "FusedMessages", PlainMessages)


def in_dtype(batch: OrderedBatch, dtype: torch.dtype) -> OrderedBatch:
    return replace(batch, bond_length=batch.bond_length.to(dtype), angle=batch.angle.to(dtype))


def results(energies: Any, model: Any, batch: OrderedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    found = energies(model, batch)
    # Give the crystals different weights, so that errors of opposite sign cannot cancel out.
    (found * torch.linspace(0.5, 1.5, len(found), dtype=found.dtype)).square().sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("rows", "dtype"), [([3, 6, 7], torch.float64), ([7], torch.float64), ([6], torch.float32)])
def test_energies_and_gradients_are_those_of_plain_torch(
    cache: GraphCache, rows: list[int], dtype: torch.dtype
) -> None:
    model = chgnet.load_pretrained("0.3.0").to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    batch = in_dtype(make_batch(cache, np.array(rows)).ordered(), dtype)
    with gpu_path.using(kernels=False):
        exact, exact_gradients = results(forward.formation_energies, model, batch)
    found, gradients = results(triton_forward.formation_energies, model, batch)
    energy, tolerance = (1e-13, 1e-11) if dtype == torch.float64 else (1e-5, 1e-4)
    assert float((found - exact).abs().max()) < energy
    size = float(torch.stack([gradient.norm() for gradient in exact_gradients.values()]).norm())
    for name, expected in exact_gradients.items():
        # Rounding errors dominate a gradient that is much smaller than the others.
        error = float((gradients[name] - expected).norm()) / max(float(expected.norm()), 1e-2 * size)
        assert error < tolerance, f"{name}: {error}"
    assert all(not gradients[name].any() for name in gradients.keys() - exact_gradients.keys())


def test_every_piece_of_the_weights_begins_at_a_multiple_of_16_bytes() -> None:
    shapes = triton_forward._Layout(chgnet.load_pretrained("0.3.0"), CPU).shapes.values()
    starts = np.cumsum([0, *(shape.numel() for shape in shapes)])[:-1]
    assert not (4 * starts % 16).any()


def test_forward_takes_the_kernels_where_the_device_uses_them(cache: GraphCache) -> None:
    model, batch = chgnet.load_pretrained("0.3.0"), make_batch(cache, np.array([6]))
    launching.launches.clear()
    with torch.inference_mode():
        plain = forward.formation_energies(model, batch)
        assert not launching.launches
        with gpu_path.using(kernels=True):
            fused = forward.formation_energies(model, batch)
            features = forward.atom_features(model, batch)
    assert launching.launches["bonds_forward_kernel"] == 8
    assert features.shape == (1, 64)
    assert float((plain - fused).abs().max()) < 1e-5


#: Torch op → the maximum number of tensors that one kernel launch handles.
AT_ONCE = {"_foreach_add_": 110, "_foreach_sub_": 64, "_foreach_mul_": 110, "_fused_adamw_": 36, "cat": 128}


class Launches(TorchDispatchMode):
    """Counts what torch would launch on a GPU: every operation except views and bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and not name.startswith(("empty", "new_empty", "detach", "_record_function", "_unsafe_view")):
            lists = [len(argument) for argument in args if isinstance(argument, (list, tuple))]
            at_once = AT_ONCE.get(name)
            self.counted[name] += math.ceil(lists[0] / at_once) if at_once and lists else 1
            if name == "_foreach_norm":
                self.counted[name] += 1  # torch launches a second kernel to reduce the partial norms
        return func(*args, **(kwargs or {}))


def test_a_step_takes_few_launches_of_kernels_that_are_compiled_offline(
    cache: GraphCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spec = chgnet.load_pretrained("0.3.0"), TrainSpec()
    trained = chgnet.trained_parameters(model, "all")
    open_for_training(chgnet, model, trained, head_only=False)
    optimizer = make_optimizer(chgnet, model, trained, spec)
    guard = Guard(optimizer, CPU)
    batch = make_batch(cache, np.array([6])).ordered()
    assert len(batch.angle) > 0

    class Feed:
        def predict(self, model: Any, batch: Any) -> Tensor:
            return forward.formation_energies(model, batch)

    def step() -> None:
        begin_step(
            model, Feed(), [Arrived([0], batch)], objective=Objective(spec, "energy"), optimizer=optimizer,
            guard=guard, parameters=list(trained.values()), rate=1e-5,
        )  # fmt: skip

    # Do not count torch operations that the interpreter runs inside a kernel, because a GPU would not launch them.
    for kernel in {k for m in list(sys.modules.values()) for k in vars(m).values() if _is_kernel(k)}:
        monkeypatch.setattr(kernel, "run", _outside(kernel.run))
    step()  # in its first step, the optimizer allocates its moments
    with gpu_path.using(kernels=True):
        with torch.no_grad():
            forward.formation_energies(model, batch)  # the first call with the kernels arranges the weights
        launching.launches.clear()
        with Launches() as launches:
            step()
    compiled_offline = {launch.kernel.__name__ for launch in offline.kernels_of(80, "float32")}
    assert launching.launches.keys() <= compiled_offline
    kernels, operations = sum(launching.launches.values()), sum(launches.counted.values())
    assert kernels > 50
    assert kernels + operations < MOST_LAUNCHES, f"{launching.launches}, {launches.counted}"


def _is_kernel(value: Any) -> bool:
    return type(value).__name__ == "InterpretedFunction"


def _outside(run: Any) -> Any:
    def within(*arguments: Any, **named: Any) -> Any:
        with _disable_current_modes():
            return run(*arguments, **named)

    return within
