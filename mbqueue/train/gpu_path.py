"""Decide whether a GPU uses the fused message-passing kernels: only if they agree with plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from mbqueue.data.batch import Batch
from mbqueue.data.machine_code import keep_gpu_code
from mbqueue.train.arithmetic import calculating, device_name
from mbqueue.train.kernel_check import check

#: The largest allowed relative difference between the kernels and plain torch, in energies and gradients, by precision.
#: In reduced precision, the kernels and plain torch round in different places.
TOLERANCES = {"float32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 5e-2}

#: The number of crystals in the kernel check: few enough to fit any GPU, but enough to contain all kinds of bonds and
#: angles.
CHECKED_CRYSTALS = 16


@dataclass(frozen=True)
class _Verdict:
    """The precisions in which the kernels agree with plain torch, and the reason not to use them, if any."""

    precisions: frozenset[str]
    reason: str


_verdicts: dict[str, _Verdict] = {}
#: Whether this thread uses the kernels, as set by `using`; None outside `using`.
_chosen: ContextVar[bool | None] = ContextVar("_chosen", default=None)


def uses_kernels(device: torch.device) -> bool:
    """Whether the device uses the fused kernels, as set by `using` or, outside `using`, by `check_once`."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    found = _verdicts.get(str(device))
    return found is not None and not found.reason


@contextmanager
def using(*, kernels: bool) -> Iterator[None]:
    """Make this thread use the GPU kernels, or plain torch, within a ``with`` block, without checking the kernels."""
    token = _chosen.set(kernels)
    try:
        yield
    finally:
        _chosen.reset(token)


def check_once(
    device: torch.device,
    precision: str,
    model: Any,
    predict: Callable[[Any, Batch], Tensor],
    batch: Batch,
    note: Callable[[str], None],
) -> None:
    """Check the GPU kernels, and use them only if they agree with plain torch in float32 and in ``precision``.

    Each precision is checked once per process. If a check fails, the device uses plain torch from then on.

    Args:
        model: a pretrained model on the device; the check discards its gradients.
        predict: the predictions of ``model`` for a batch, [B].
        batch: a few crystals, on the device.
        note: called with a sentence if the kernels are not used.
    """
    before = _verdicts.get(str(device), _Verdict(frozenset(), ""))
    missing = [each for each in dict.fromkeys(("float32", precision)) if each not in before.precisions]
    if device.type != "cuda" or before.reason or not missing:
        return
    reason = next(
        (why for each in missing if (why := _difference(device, each, model, predict, batch)) is not None), ""
    )
    if reason:
        leave_out(device, reason, note)
    else:
        _verdicts[str(device)] = _Verdict(before.precisions | set(missing), "")


def leave_out(device: torch.device, reason: str, note: Callable[[str], None]) -> None:
    """Make the device use plain torch from now on, in every precision, and report the reason once."""
    if _verdicts.get(str(device), _Verdict(frozenset(), "")).reason:
        return
    _verdicts[str(device)] = _Verdict(frozenset(), reason)
    note(
        f"mbqueue does not use the fused GPU kernels on {device_name(device)}: {reason}. Training uses plain torch "
        "operations instead, which are slower but just as exact. README.md lists the versions of Triton that work."
    )


def _difference(
    device: torch.device, precision: str, model: Any, predict: Callable[[Any, Batch], Tensor], batch: Batch
) -> str | None:
    """Return why the device cannot use the kernels in this precision; None if it can."""
    from mbqueue.train.kernels.tiles import TILES  # noqa: PLC0415  also imports the CPU's kernels

    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < min(TILES):
        return f"its compute capability is {major}.{minor}, but the kernels need {min(TILES) / 10} or higher"
    keep_gpu_code()
    try:
        import triton  # noqa: F401, PLC0415  must follow `keep_gpu_code`
    except Exception as error:  # noqa: BLE001  a broken installation raises many types
        return f"Triton cannot be imported ({error})"

    def plain(model: Any, batch: Batch) -> Tensor:
        with using(kernels=False):
            return predict(model, batch)

    def fused(model: Any, batch: Batch) -> Tensor:
        with using(kernels=True):
            return predict(model, batch)

    with calculating(device, precision):
        return check(model, batch, plain, fused, tolerance=TOLERANCES[precision])


def described(device: torch.device) -> dict[str, str]:
    """Return the fingerprint entry for the GPU kernels: whether they are used, their version and tile sizes."""
    if device.type != "cuda":
        return {}
    if not uses_kernels(device):
        return {"messages": "plain"}
    from mbqueue.train.kernels.tiles import VERSION, tiles_of  # noqa: PLC0415  also imports the CPU's kernels

    major, minor = torch.cuda.get_device_capability(device)
    tiles = " ".join(f"{name}={value}" for name, value in tiles_of(10 * major + minor).described().items())
    return {"messages": f"fused {VERSION}, triton {_triton_version()}, {tiles}"}


def _triton_version() -> str:
    for name in ("triton", "pytorch-triton"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
