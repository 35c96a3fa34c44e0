"""Preparing what the frozen backbone gives for every crystal of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbqueue.data.batch import Batch
from mbqueue.data.crystals import Crystals
from mbqueue.data.graph_cache import GraphCache
from mbqueue.experiment import Spec
from mbqueue.train.arithmetic import calculating
from mbqueue.train.family import family_of
from mbqueue.train.feeds import GraphFeed
from mbqueue.train.frozen import FrozenBackbone, Progress, frozen_folder, prepare
from mbqueue.train.memory import DeviceMemory
from mbqueue.train.step import infer

#: What goes through the backbone at once: a shard's crystals in their order, so many of them and so many directed bonds
#: at most. The last digits depend on it, so neither the experiment nor the device has a say: it fits 4 GiB.
BATCH_CRYSTALS, BATCH_BONDS = 64, 65_536


def open_frozen(spec: Spec, crystals: Crystals, cache_dir: Path) -> FrozenBackbone:
    """The store of the experiment's pretrained backbone on its dataset, complete or not."""
    family = family_of(spec.model.pretrained)
    weights = family.weights_hash(family.load_pretrained(spec.model.pretrained))
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
    if spec.model.trainable == "head":
        return ("energies", "features")
    return ("energies",) if spec.target.kind == "energy" else ()


def prepare_frozen(
    spec: Spec,
    cache: GraphCache,
    frozen: FrozenBackbone,
    *,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
) -> bool:
    """Compute and store what is missing, always in float32; False when asked to stop before the end.

    On a device of one kind the bytes are a function of crystals and weights alone. Only where memory runs out are
    batches cut further, for the rest of that shard; the digest of what is stored (`FrozenBackbone.digest`) tells.

    Raises:
        DeviceTooSmall: when a single crystal does not fit the device.
    """
    if not kinds_needed(spec):
        return True
    family = family_of(spec.model.pretrained)
    model = family.load_pretrained(spec.model.pretrained).to(device).eval()
    feed = GraphFeed(family, cache)

    def compute(
        rows: NDArray[np.int64], tell: Callable[[int], None]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        done = 0

        def run(batch: Batch) -> list[Tensor]:
            nonlocal done
            features, energies = family.frozen(model, batch)
            done += len(batch)
            tell(done)
            return [features, energies]

        found = infer(
            feed,
            rows,
            run,
            batch_size=BATCH_CRYSTALS,
            max_bonds=BATCH_BONDS,
            device=device,
            memory=DeviceMemory(None, ""),  # what was too much once, on a device that was full, may fit the next time
            ids=cache.crystals.ids,
            should_stop=should_stop,
        )
        return None if found is None else (found[0], found[1])

    with calculating(device, "float32"):
        return prepare(
            frozen,
            compute,
            with_features="features" in kinds_needed(spec),
            should_stop=should_stop,
            on_progress=on_progress,
        )
