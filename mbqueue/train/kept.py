"""What a long prediction has computed so far, on disk, so that one that is cut off resumes where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mbqueue.clock import Clock, SystemClock
from mbqueue.data.arrayfile import read_arrays, write_arrays
from mbqueue.errors import CacheError
from mbqueue.files import make_folder
from mbqueue.train.feeds import Rows

#: How much of a prediction may be computed again.
WRITE_SECONDS = 10.0
#: How long a prediction that is not resumed is kept.
FORGET_SECONDS = 7 * 86400.0


class Kept:
    """Outputs of the first crystals of one pass, in their order. They end at the end of a batch, so the pass continues
    with the batches that it would have had.

    Args:
        path: its file.
        key: of everything that the outputs depend on; what is there under another is begun anew.
        clock: says when to write.
    """

    def __init__(self, path: Path, key: str, *, clock: Clock | None = None) -> None:
        self._path, self._key, self._clock = path, key, clock or SystemClock()
        self._parts = [self._read()]
        self._written_at = self._clock.monotonic()

    @property
    def outputs(self) -> NDArray[np.float32]:
        """What there is, float32 [n]."""
        return np.concatenate(self._parts)

    def add(self, part: NDArray[np.float32]) -> None:
        """One more batch; written with those before it every ten seconds."""
        self._parts.append(part)
        if self._clock.monotonic() - self._written_at >= WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what there is. A disk that does not take it costs time only if this is cut off, and nothing else."""
        self._written_at = self._clock.monotonic()
        with suppress(OSError):
            make_folder(self._path.parent)
            write_arrays(self._path, {"key": self._key}, {"outputs": self.outputs})

    def _read(self) -> NDArray[np.float32]:
        with suppress(CacheError):
            meta, arrays = read_arrays(self._path)
            if meta == {"key": self._key}:
                return np.array(arrays["outputs"], np.float32)
        return np.empty(0, np.float32)


def forget_old(folder: Path, *, now: float) -> None:
    """Remove what was kept in ``folder`` and not written for a week."""
    for path in folder.glob("*.bin"):
        with suppress(OSError):  # another process removes it too, or it cannot be removed: it is only in the way
            if now - path.stat().st_mtime > FORGET_SECONDS:
                path.unlink()


def infer_kept(
    infer: Callable[[Rows, Callable[[list[Tensor]], None]], Sequence[NDArray[np.float32]] | None],
    rows: Rows,
    kept: Kept | None,
    *,
    on_done: Callable[[int], None],
) -> NDArray[np.float32] | None:
    """The outputs for all ``rows``, of which only those that are not kept are computed; None when stopped.

    Args:
        infer: for rows, and what is told each batch: their outputs; None when stopped. Usually `step.infer`.
        on_done: told how many crystals more are done.
    """
    there = kept.outputs if kept is not None else np.empty(0, np.float32)
    if len(there):
        on_done(len(there))
    if len(there) == len(rows):
        return there

    def part_is_done(part: list[Tensor]) -> None:
        if kept is not None:
            kept.add(part[0].numpy())
        on_done(len(part[0]))

    try:
        found = infer(rows[len(there) :], part_is_done)
    finally:  # also when the person at the keyboard ends it
        if kept is not None:
            kept.write()
    return None if found is None else np.concatenate([there, found[0]])
