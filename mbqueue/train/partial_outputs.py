"""Save the outputs of a long prediction to disk, so that an interrupted prediction resumes where it stopped."""

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

#: Seconds between writes of the outputs. An interruption loses only the work since the last write.
WRITE_SECONDS = 10.0
#: Seconds after which the outputs of an unfinished prediction are removed.
FORGET_SECONDS = 7 * 86400.0


class PartialOutputs:
    """The outputs computed so far in one pass over the crystals, in order.

    The outputs always end where a batch ends, so a resumed pass has the same batches as an uninterrupted pass.

    Args:
        path: the file that stores the outputs.
        key: hash of everything that the outputs depend on; a file with a different key is replaced.
        clock: measures the time between two writes.
    """

    def __init__(self, path: Path, key: str, *, clock: Clock | None = None) -> None:
        self._path, self._key, self._clock = path, key, clock or SystemClock()
        self._parts = [self._read()]
        self._written_at = self._clock.monotonic()

    @property
    def outputs(self) -> NDArray[np.float32]:
        """The outputs computed so far, float32 [n]."""
        return np.concatenate(self._parts)

    def add(self, part: NDArray[np.float32]) -> None:
        """Add a batch's outputs, and write all outputs if the last write was at least ten seconds ago."""
        self._parts.append(part)
        if self._clock.monotonic() - self._written_at >= WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the outputs computed so far. Write errors are ignored, because the file only saves time on a resume."""
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
    """Remove files in ``folder`` that were last written over a week ago."""
    for path in folder.glob("*.bin"):
        with suppress(OSError):  # a file that cannot be removed only wastes space
            if now - path.stat().st_mtime > FORGET_SECONDS:
                path.unlink()


def infer_resumably(
    infer: Callable[[Rows, Callable[[list[Tensor]], None]], Sequence[NDArray[np.float32]] | None],
    rows: Rows,
    kept: PartialOutputs | None,
    *,
    on_done: Callable[[int], None],
) -> NDArray[np.float32] | None:
    """Return the outputs for all ``rows``, computing only those that are not on disk; return None if stopped.

    Args:
        infer: a function, usually `step.infer`, that computes the model's outputs for the given rows, passes each
            batch's outputs to a callback, and returns None if stopped.
        on_done: called with the number of crystals finished since the last call.
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
    finally:  # also write the outputs on Ctrl-C
        if kept is not None:
            kept.write()
    return None if found is None else np.concatenate([there, found[0]])
