"""How many crystals go through a device at once: learned from running out of memory, and remembered."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mbqueue.errors import DeviceBusy, DeviceTooSmall
from mbqueue.files import write_json
from mbqueue.train.arithmetic import device_name

#: More crystals than any batch has.
UNLIMITED = 1 << 20
#: A GPU is free when no more than this is in use after a failed attempt was cleared away: a process's own context and
#: libraries take up to 0.6 GiB, a screen about as much.
_FREE_BYTES, _FREE_SHARE = 1 << 30, 0.1


@dataclass(frozen=True)
class Shortage:
    """What a device had too little memory for.

    Attributes:
        rows: of the crystals that went through it at once.
        said: what PyTorch said.
    """

    rows: Sequence[int]
    said: str


class OutOfMemory(Exception):
    """A device ran out of memory.

    Make room only after the ``except`` that caught it: its traceback holds the tensors of the failed attempt.
    """

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(f"{len(shortage.rows)} crystals: {shortage.said}")
        self.shortage = shortage


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports too little memory on a GPU, by whichever library that had to allocate."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in text or "_ALLOC_FAILED" in text


def bytes_in_use(device: torch.device) -> tuple[int, int]:
    """How much of a GPU's memory all processes use, and how much it has; (0, 0) for the host's."""
    if device.type != "cuda":
        return 0, 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free, total


class DeviceMemory:
    """The largest number of crystals per micro-batch that is known to fit on a device, for one kind of work.

    What is learned while others hold part of the device's memory is true for that moment only: it is not written down,
    and `begin` forgets it.

    Args:
        path: JSON file that remembers it for all experiments; None remembers nothing.
        key: the device and the kind of work, such as ``NVIDIA L4|train|all|float32``.
        on_note: told, in a sentence, whenever there is to be less.
    """

    def __init__(self, path: Path | None, key: str, *, on_note: Callable[[str], None] = lambda _note: None) -> None:
        self.path = path
        self._key = key
        self._on_note = on_note
        self._learned = self._remembered()
        self.limit = self._learned

    def begin(self) -> None:
        """A piece of work begins: only what the device bears when it is free counts."""
        self.limit = self._learned

    def make_room(self, shortage: Shortage, device: torch.device, ids: Sequence[str]) -> None:
        """Free what the failed attempt left, and take half of its number of crystals as the limit from now on.

        Args:
            ids: of every crystal of the dataset.

        Raises:
            DeviceTooSmall: naming the crystal, when it was alone, also on the device.
            DeviceBusy: when it was alone, but others hold memory of the device.
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
                    f"The crystal {crystal} does not fit what others leave of the GPU's memory: {held} without it. End "
                    "what else runs there (nvidia-smi lists it; a notebook's kernel keeps memory until it is "
                    "restarted), then: mbqueue work"
                )
            raise DeviceTooSmall(
                f"The crystal {crystal} alone does not fit the memory of {device}. Use a device with more memory, or "
                f"leave the crystal out of the dataset. PyTorch said: {shortage.said}"
            )
        self.limit = min(self.limit, max(1, len(shortage.rows) // 2))
        if is_free:
            self._learned = self.limit
            self._remember()
        self._on_note(
            f"{device_name(device)} ran out of memory with {len(shortage.rows)} crystals at once; from now on at most "
            f"{self.limit} go together, which changes nothing but the last digits."
            + ("" if is_free else f" Others hold memory there ({held}), so more is tried again with the next job.")
        )

    def _remembered(self) -> int:
        entry = self._read().get(self._key)
        # Earlier versions wrote a bare number without checking that the device was free: that is learned anew.
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
            # It is only a memory: without it, running out of memory once teaches the limit again.
            return {}
        return content if isinstance(content, dict) else {}
