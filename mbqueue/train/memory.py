"""Learn from out-of-memory errors how many crystals fit on a device at once, and remember this limit."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mbqueue.errors import DeviceBusy, DeviceTooSmall, counted
from mbqueue.files import write_json
from mbqueue.train.arithmetic import device_name

#: A limit that is larger than any batch, and so has no effect.
UNLIMITED = 1 << 20
#: After running out of memory, mbqueue first releases the tensors of the failed attempt. If at most this much of the
#: GPU's memory is then in use, mbqueue assumes that no other process is using the GPU. The context and libraries of a
#: process take up to 0.6 GiB, and a display takes about as much.
_FREE_BYTES, _FREE_SHARE = 1 << 30, 0.1


@dataclass(frozen=True)
class Shortage:
    """The rows of a micro-batch that did not fit in a device's memory, and PyTorch's error message."""

    rows: Sequence[int]
    said: str


class OutOfMemory(Exception):
    """Raised when a device has run out of memory.

    Free memory only after the ``except`` block, because the traceback keeps the tensors of the failed attempt alive.
    """

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(f"{counted(len(shortage.rows), 'crystal')}: {shortage.said}")
        self.shortage = shortage


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports that a GPU is out of memory; PyTorch and other libraries raise different errors."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in text or "_ALLOC_FAILED" in text


def bytes_in_use(device: torch.device) -> tuple[int, int]:
    """Return a GPU's memory in use by all processes, and its total memory, in bytes; (0, 0) for the CPU."""
    if device.type != "cuda":
        return 0, 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free, total


class DeviceMemory:
    """The largest micro-batch known to fit on a device, for one kind of work.

    A limit learned while other processes are using the device's memory is temporary: it is not written to the file, and
    `begin` discards it.

    Args:
        path: a JSON file that stores the limit for all experiments; None for no file.
        key: the device and the kind of work, such as ``NVIDIA L4|train|all|float32``.
        on_note: called with a sentence whenever the limit shrinks.
    """

    def __init__(self, path: Path | None, key: str, *, on_note: Callable[[str], None] = lambda _note: None) -> None:
        self.path = path
        self._key = key
        self._on_note = on_note
        self._learned = self._remembered()
        self.limit = self._learned

    def begin(self) -> None:
        """Begin a job with the limit that was learned while no other process was using the device."""
        self.limit = self._learned

    def make_room(self, shortage: Shortage, device: torch.device, ids: Sequence[str]) -> None:
        """Free the memory of a failed attempt, and set the limit to half the number of crystals in that attempt.

        Args:
            ids: id of every crystal of the dataset.

        Raises:
            DeviceTooSmall: if a single crystal does not fit even on a free device; the error names the crystal.
            DeviceBusy: if a single crystal does not fit while other processes are using the device's memory.
        """
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        used, total = bytes_in_use(device)
        is_free = used <= max(_FREE_BYTES, _FREE_SHARE * total)
        held = f"{used / 2**30:.1f} of {total / 2**30:.1f} GiB of {device} are in use"
        if len(shortage.rows) == 1:
            crystal = ids[shortage.rows[0]]
            if not is_free:
                raise DeviceBusy(
                    f"The crystal {crystal} needs more GPU memory than other processes leave free: {held}. "
                    "End the other processes (nvidia-smi lists them; a notebook's kernel keeps memory until it is "
                    "restarted), then run: mbqueue work"
                )
            raise DeviceTooSmall(
                f"The crystal {crystal} alone does not fit in the memory of {device}. Use a device with more memory, "
                f"or leave the crystal out of the dataset. PyTorch said: {shortage.said}"
            )
        self.limit = min(self.limit, max(1, len(shortage.rows) // 2))
        if is_free:
            self._learned = self.limit
            self._remember()
        self._on_note(
            f"{device_name(device)} ran out of memory with {len(shortage.rows)} crystals at once. From now on, "
            f"mbqueue runs at most {counted(self.limit, 'crystal')} at once. This changes only the last digits of "
            "results."
            + (
                ""
                if is_free
                else f" Other processes are using the GPU's memory ({held}). The next job will try larger batches "
                "again, in case these processes have ended."
            )
        )

    def _remembered(self) -> int:
        entry = self._read().get(self._key)
        # Ignore a plain number, which earlier versions wrote without checking that the device was free.
        limit = entry.get("limit") if isinstance(entry, dict) else None
        return max(1, limit) if isinstance(limit, int) else UNLIMITED

    def _remember(self) -> None:
        if self.path is not None:
            write_json(self.path, {**self._read(), self._key: {"limit": self._learned}})

    def _read(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            # Without the file, mbqueue learns the limit again from the next out-of-memory error.
            return {}
        return content if isinstance(content, dict) else {}
