"""Predict crystals with one model or an ensemble, optionally averaging over small strains."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mbqueue.data.batches import Distortion
from mbqueue.data.graph_cache import GraphCache
from mbqueue.files import sha256_of_json
from mbqueue.train.arithmetic import calculating, device_name, fingerprint
from mbqueue.train.family import ModelFamily
from mbqueue.train.feeds import GraphFeed, Rows
from mbqueue.train.gpu_path import described
from mbqueue.train.memory import DeviceMemory
from mbqueue.train.partial_outputs import PartialOutputs, infer_resumably
from mbqueue.train.step import infer


@dataclass(frozen=True, kw_only=True)
class EnsemblePredictions:
    """Predictions of M models for N crystals.

    Attributes:
        each: each model's predictions, in the unit of its target, float64 [M, N].
    """

    each: NDArray[np.float64]

    @property
    def mean(self) -> NDArray[np.float64]:
        """The ensemble's predictions, [N]: the mean over the models."""
        return np.asarray(self.each.mean(axis=0))

    @property
    def spread(self) -> NDArray[np.float64]:
        """Standard deviation over the models, [N]; 0 for a single model."""
        return np.asarray(self.each.std(axis=0))


#: Standard deviation of the components of the small random strains over which predictions are averaged.
STRAIN_SIZE = 0.005
_BATCH_SIZE = 64


def opposite_strains(pairs: int, size: float = STRAIN_SIZE) -> list[Distortion | None]:
    """Return None (no distortion) and ``pairs`` pairs of opposite random strains, over which predictions are averaged.

    Averaging over a pair of opposite strains cancels the first-order change of the energy.
    """
    distortions: list[Distortion | None] = [None]
    for pair in range(pairs):
        distortions += [Distortion(strain=size, seed=pair), Distortion(strain=-size, seed=pair)]
    return distortions


def predict_crystals(
    family: ModelFamily,
    models: Sequence[nn.Module],
    cache: GraphCache,
    *,
    device: torch.device,
    strains: int = 0,
    strain_size: float = STRAIN_SIZE,
    memory_file: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    keep_in: Path | None = None,
) -> EnsemblePredictions:
    """Predict the target of every crystal in ``cache`` with each model, in the cache's order.

    Args:
        models: models that include their element references; see `ModelFamily.load_model`.
        strains: number of pairs of opposite strains; each prediction is a mean over the crystal and its strained forms.
        strain_size: standard deviation of the strains' components.
        on_progress: called with the number of crystals done and in total; each crystal counts once per model and
            strain.
        keep_in: folder for partial predictions, so that an interrupted prediction resumes where it stopped.

    Raises:
        DeviceTooSmall: if a single crystal does not fit on the device.
    """
    rows = np.arange(len(cache))
    distortions = opposite_strains(strains, strain_size)
    done, total = 0, len(models) * len(distortions) * len(rows)

    def count(more: int) -> None:
        nonlocal done
        done += more
        on_progress(done, total)

    count(0)
    each = np.zeros((len(models), len(rows)))
    feed = GraphFeed(family, cache)
    memory = DeviceMemory(memory_file, f"{device_name(device)}|predict|infer")
    conditions = {**fingerprint(device, "float32"), **described(device), "batch": min(memory.limit, _BATCH_SIZE)}

    def outputs(
        model: nn.Module,
        distortion: Distortion | None,
        rows: Rows,
        on_part: Callable[[list[Tensor]], None],
    ) -> list[NDArray[np.float32]] | None:
        return infer(
            feed,
            rows,
            lambda batch: [feed.predict(model, batch)],
            batch_size=_BATCH_SIZE,
            max_bonds=0,
            device=device,
            memory=memory,
            ids=cache.crystals.ids,
            distortion=distortion,
            on_part=on_part,
        )

    with calculating(device, "float32"):
        for number, model in enumerate(models):
            weights = _digest(model)
            on_device = model.to(device).eval()
            for distortion in distortions:
                kept = None
                if keep_in is not None:
                    key = sha256_of_json([weights, cache.crystals.hash, str(distortion), conditions])
                    kept = PartialOutputs(keep_in / f"{key[:32]}.bin", key)
                found = infer_resumably(partial(outputs, on_device, distortion), rows, kept, on_done=count)
                assert found is not None, "`predict_crystals` cannot be stopped"
                each[number] += found.astype(np.float64) / len(distortions)
    return EnsemblePredictions(each=each)


def _digest(model: nn.Module) -> str:
    """Hash all learned values of a model, including references and scale."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
