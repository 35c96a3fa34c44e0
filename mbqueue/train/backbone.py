"""Compute and store the frozen backbone's outputs for every crystal of a dataset."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbqueue.data.batch import Batch
from mbqueue.data.crystals import Crystals
from mbqueue.data.graph_cache import GraphCache
from mbqueue.errors import counted
from mbqueue.experiment import Spec
from mbqueue.files import make_folder
from mbqueue.train.arithmetic import calculating
from mbqueue.train.equal_shards import EqualShards
from mbqueue.train.family import family_of
from mbqueue.train.feeds import GraphFeed
from mbqueue.train.frozen import FrozenBackbone, Preparing, frozen_folder
from mbqueue.train.gpu_path import using
from mbqueue.train.memory import DeviceMemory
from mbqueue.train.step import infer

#: The maximum number of crystals and of directed bonds in one batch of the backbone. Every experiment and device uses
#: the same limits, because they affect the last digits of the outputs. The largest batch fits in 4 GiB.
BATCH_CRYSTALS, BATCH_BONDS = 64, 65_536
#: The largest fraction of the free disk space to fill with features that no experiment has asked for.
_SHARE_OF_DISK = 0.25


def open_frozen(spec: Spec, crystals: Crystals, cache_dir: Path) -> FrozenBackbone:
    """Open the store of the pretrained backbone's outputs for an experiment's crystals; it may be incomplete.

    For the same crystals, all scalar and class targets use the same store.
    """
    family = family_of(spec.model.pretrained)
    weights = family.weights_hash(family.load_pretrained(spec.model.pretrained))
    # The backbone's outputs do not depend on the target. The folder for energy targets keeps its own name, because
    # machines share the outputs that are stored under this name.
    key = crystals.hash if spec.target.kind == "energy" else crystals.structures_hash
    return FrozenBackbone(
        frozen_folder(cache_dir, key, weights),
        atom_offsets=crystals.atom_offsets,
        dataset_hash=key,
        weights=weights,
    )


def is_prepared(spec: Spec, frozen: FrozenBackbone) -> bool:
    """Whether all backbone outputs that the experiment needs are stored and intact."""
    return not any(frozen.missing(kind, verify=True) for kind in kinds_needed(spec))


def kinds_needed(spec: Spec) -> tuple[str, ...]:
    """Return the kinds of backbone output (energies, features) that an experiment uses."""
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
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    on_note: Callable[[str], None] = lambda _note: None,
) -> bool:
    """Compute and store missing shards of the backbone's outputs in float32; return False if stopped before the end.

    If this machine's cache already contains the same shard for a different dataset, that shard is copied. If the disk
    has room, features are stored together with energies, because one pass computes both.

    Two devices of the same model, with the same library versions and number of CPU threads, write the same bytes for
    the same crystals and weights. If a device runs out of memory, the remaining crystals of the shard are computed in
    smaller batches. Smaller batches may change the last digits, which also changes `FrozenBackbone.digest`.

    Raises:
        DeviceTooSmall: if a single crystal does not fit on the device.
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
            memory=DeviceMemory(None, ""),  # do not store the limit: more of the device's memory may be free next time
            ids=cache.crystals.ids,
            should_stop=should_stop,
        )
        return None if found is None else (found[0], found[1])

    keeps_features, why = _room_for_features(frozen)
    preparing = Preparing(
        frozen=frozen,
        compute=compute,
        kinds=kinds_needed(spec),
        keeps_features=keeps_features,
        find=EqualShards(frozen, cache.crystals).find,
        should_stop=should_stop,
        on_progress=on_progress,
    )
    # Use plain torch, so that the stored bytes do not depend on whether the GPU kernels were checked before.
    with calculating(device, "float32"), using(kernels=False):
        is_whole = preparing.run()
    if preparing.n_found:
        on_note(
            f"The cache already had the backbone's outputs for {counted(preparing.n_found, 'crystal')}. The backbone "
            f"ran on {counted(preparing.n_computed, 'more crystal')}."
        )
    if preparing.n_computed and "features" not in preparing.kinds:
        on_note(why)
    return is_whole


def _room_for_features(frozen: FrozenBackbone) -> tuple[bool, str]:
    """Return whether to store features before an experiment needs them, and a sentence for the user."""
    make_folder(frozen.folder)
    size = frozen.features_size
    free = shutil.disk_usage(frozen.folder.parent).free
    told = f"{size / 1e6:,.0f} MB, of {free / 1e6:,.0f} MB free"
    if size <= free * _SHARE_OF_DISK:
        return (
            True,
            f"Atom features are stored with the energies ({told}), so training the head does not need a second pass.",
        )
    return False, f"The disk has no room to store atom features ({told}), so training the head will need a second pass."
