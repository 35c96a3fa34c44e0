"""Preparing what the frozen backbone gives for every crystal of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mbqueue.data.crystals import Crystals
from mbqueue.data.graph_cache import GraphCache
from mbqueue.experiment import Spec
from mbqueue.train.arithmetic import calculating, device_name
from mbqueue.train.feeds import GraphFeed
from mbqueue.train.forward import atom_features, read_out
from mbqueue.train.frozen import FrozenBackbone, Progress, frozen_folder, prepare
from mbqueue.train.memory import DeviceMemory
from mbqueue.train.pretrained import load_pretrained, weights_hash
from mbqueue.train.step import infer

_BATCH_SIZE = 64


def open_frozen(spec: Spec, crystals: Crystals, cache_dir: Path) -> FrozenBackbone:
    """The store of the experiment's pretrained backbone on its dataset, complete or not."""
    weights = weights_hash(load_pretrained(spec.model.pretrained))
    return FrozenBackbone(
        frozen_folder(cache_dir, crystals.hash, weights),
        atom_offsets=crystals.atom_offsets,
        dataset_hash=crystals.hash,
        weights=weights,
    )


def is_prepared(spec: Spec, frozen: FrozenBackbone) -> bool:
    """Whether all that the experiment needs is stored, byte for byte."""
    return not any(frozen.missing(kind, verify=True) for kind in kinds_needed(spec))


def kinds_needed(spec: Spec) -> tuple[str, ...]:
    """What of the frozen backbone an experiment uses."""
    return ("energies", "features") if spec.model.trainable == "head" else ("energies",)


def prepare_frozen(
    spec: Spec,
    cache: GraphCache,
    frozen: FrozenBackbone,
    *,
    device: torch.device,
    memory_file: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
) -> bool:
    """Compute and store what is missing, always in float32; False when asked to stop before the end.

    Raises:
        DeviceTooSmall: when a single crystal does not fit the device.
    """
    model = load_pretrained(spec.model.pretrained).to(device).eval()
    feed = GraphFeed(cache)
    memory = DeviceMemory(memory_file, f"{device_name(device)}|backbone|infer")

    def compute(rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        def run(batch):  # type: ignore[no-untyped-def]
            features = atom_features(model, batch)
            return [features, read_out(model, features, batch.atom_crystal, batch.n_atoms)]

        found = infer(
            feed,
            rows,
            run,
            batch_size=_BATCH_SIZE,
            max_bonds=spec.train.max_bonds,
            device=device,
            memory=memory,
            ids=cache.crystals.ids,
            should_stop=should_stop,
        )
        return None if found is None else (found[0], found[1])

    with calculating(device, "float32"):
        return prepare(frozen, compute, with_features=spec.model.trainable == "head", on_progress=on_progress)
