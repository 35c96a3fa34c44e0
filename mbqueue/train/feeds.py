"""The input of a training step: batches of graphs, or of atom features stored from a frozen backbone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mbqueue.data.batch import Batch
from mbqueue.data.batches import Distortion
from mbqueue.data.crystals import Crystals
from mbqueue.data.graph_cache import GraphCache
from mbqueue.experiment import Spec
from mbqueue.train.family import ModelFamily
from mbqueue.train.frozen import FrozenBackbone

Rows = NDArray[np.int64]
T = TypeVar("T")
_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class FeatureBatch:
    """Stored atom features of B crystals, with A atoms in total.

    Attributes:
        rows: dataset row of each crystal, int64 [B].
        targets: float32 [B].
        n_atoms: atoms per crystal, int64 [B].
        atomic_numbers: atomic number of each atom, int64 [A].
        atom_crystal: crystal of each atom, ascending, int64 [A].
        features: atom features after the last convolution, float32 [A, 64].
    """

    rows: Tensor
    targets: Tensor
    n_atoms: Tensor
    atomic_numbers: Tensor
    atom_crystal: Tensor
    features: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> FeatureBatch:
        return FeatureBatch(
            **{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        )

    def pin(self) -> FeatureBatch:
        return FeatureBatch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


class Feed(Protocol):
    """A source of batches, and the function that predicts from a batch."""

    #: Each crystal's cost, [N]: its number of directed bonds, or 0 if predictions do not use bonds. ``max_bonds``
    #: limits a batch's total cost.
    costs: NDArray[np.int64]

    def load(self, rows: Rows, distortion: Distortion | None = None) -> Any:
        """Load the batch of ``rows`` into host memory."""
        ...

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        """Predict each crystal of the batch, in the unit of its targets, [B]."""
        ...


class GraphFeed:
    """Batches of crystal graphs, for running the whole model."""

    def __init__(self, family: ModelFamily, cache: GraphCache) -> None:
        self._family = family
        self._cache = cache
        self.costs = cache.bond_counts()

    def load(self, rows: Rows, distortion: Distortion | None = None) -> Batch:
        return self._family.make_batch(self._cache, rows, distortion)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._family.predict(model, batch)


class FeatureFeed:
    """Batches of stored features, for running only the head."""

    def __init__(
        self,
        family: ModelFamily,
        frozen: FrozenBackbone,
        atomic_numbers: NDArray[np.uint8],
        targets: NDArray[np.float64],
    ) -> None:
        self._family = family
        self._frozen = frozen
        self._numbers = atomic_numbers
        self._targets = targets
        # The head does not use bonds, so max_bonds must not limit its batches.
        self.costs = np.zeros(len(targets), dtype=np.int64)

    def load(self, rows: Rows, distortion: Distortion | None = None) -> FeatureBatch:
        """Load the batch of ``rows`` into host memory.

        ``distortion`` must be None, because the stored features belong to undistorted crystals.
        """
        assert distortion is None, "stored features belong to the undistorted crystals"
        offsets = self._frozen.atom_offsets
        sizes = offsets[rows + 1] - offsets[rows]
        atoms = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
        return FeatureBatch(
            rows=torch.from_numpy(np.ascontiguousarray(rows)),
            targets=torch.from_numpy(self._targets[rows].astype(np.float32)),
            n_atoms=torch.from_numpy(sizes),
            atomic_numbers=torch.from_numpy(self._numbers[atoms].astype(np.int64)),
            atom_crystal=torch.from_numpy(np.repeat(np.arange(len(rows)), sizes)),
            features=torch.from_numpy(self._frozen.features(rows)),
        )

    def predict(self, model: nn.Module, batch: FeatureBatch) -> Tensor:
        return self._family.predict_from_features(model, batch.features, batch)


def feed_of(
    spec: Spec, family: ModelFamily, crystals: Crystals, cache: GraphCache | None, frozen: FrozenBackbone | None
) -> Feed:
    """Choose a source of batches: stored features if the experiment trains only the head, otherwise graphs."""
    if spec.model.trainable == "head":
        assert frozen is not None, "a head experiment has a frozen backbone"
        return FeatureFeed(family, frozen, crystals.atomic_numbers, crystals.targets)
    assert cache is not None, "every experiment needs graphs unless it trains only the head"
    return GraphFeed(family, cache)


def pack(rows: Rows, costs: NDArray[np.int64], *, largest_count: int, largest_cost: int) -> list[Rows]:
    """Split ``rows``, in order, into batches with a limited number of crystals and a limited cost (0 for no limit).

    A crystal that alone exceeds the cost limit gets a batch of its own.
    """
    parts: list[Rows] = []
    start, cost = 0, 0
    for position, row in enumerate(rows):
        more = int(costs[row])
        full = position - start >= largest_count or (largest_cost and cost + more > largest_cost)
        if full and position > start:
            parts.append(rows[start:position])
            start, cost = position, 0
        cost += more
    if len(rows):
        parts.append(rows[start:])
    return parts


def ahead(make: Callable[[int], T], n: int) -> Generator[T, None, None]:
    """Yield ``make(0)`` … ``make(n − 1)``, computed in a background thread that stays at most `_AHEAD` items ahead.

    If ``make`` fails, the iterator raises the same error. Close the iterator, for example with ``contextlib.closing``,
    to end the thread early.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=_AHEAD)
    stopped = threading.Event()

    def offer(item: tuple[T | None, BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for index in range(n):
                if stopped.is_set():
                    return
                offer((make(index), None))
        except BaseException as error:  # noqa: BLE001 - raised again in place of the item
            offer((None, error))

    thread = threading.Thread(target=work, name="mbqueue-batches", daemon=True)
    thread.start()
    try:
        for _ in range(n):
            item, error = ready.get()
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()


def host_batches(
    feed: Feed, parts_of: Sequence[Sequence[Rows]], *, pinned: bool, distortion: Distortion | None = None
) -> Generator[list[Any], None, None]:
    """Yield the batches of each item of ``parts_of``, in host memory; a background thread prepares them in advance."""

    def make(index: int) -> list[Any]:
        batches = [feed.load(rows, distortion) for rows in parts_of[index]]
        return [_pinned(batch) for batch in batches] if pinned else batches

    return ahead(make, len(parts_of))


def _pinned(batch: Any) -> Any:
    """Copy the batch to page-locked memory.

    If no page-locked memory is left, return the batch unchanged, which makes copying it to the device slower.
    """
    try:
        return batch.pin()
    except RuntimeError:  # if the GPU has failed, the copy to the device reports the error
        return batch
