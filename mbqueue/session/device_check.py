"""Check that a device works: before a session starts, and after a job fails."""

from __future__ import annotations

import torch

from mbqueue.errors import DeviceBusy, UsageError, first_line
from mbqueue.train.arithmetic import calculating, pick_device
from mbqueue.train.memory import is_out_of_memory


def tested_device(name: str | None) -> torch.device:
    """Test the named device and return it; by default, use the first GPU, or the CPU if there is no GPU.

    Raises:
        UsageError: if the device does not work.
    """
    try:
        device = pick_device(name or "auto")
        with calculating(device, "float32"):  # cuBLAS is set up once per process, at the first matrix product
            multiply(device)
    except (RuntimeError, AssertionError) as error:
        why = first_line(error)
        if name is None:
            raise UsageError(
                f"The GPU cannot be used ({why}). This PyTorch may not support the GPU, or the GPU may be full or "
                "broken. mbqueue doctor and nvidia-smi show details. To run without the GPU: --device cpu"
            ) from error
        raise UsageError(
            f"There is no usable device {name!r} here ({why}). Leave out --device to let mbqueue choose a device. To "
            "check the GPU: mbqueue doctor"
        ) from error
    return device


def why_lost(device: torch.device) -> str | None:
    """Why this process can no longer use the GPU, in words; None if the GPU is working.

    After an illegal access, a failed assertion or a memory fault, every later CUDA call in the process fails. A GPU
    that is only out of memory still works.
    """
    if device.type != "cuda":
        return None
    try:
        multiply(device)
    except RuntimeError as error:
        return None if is_out_of_memory(error) else first_line(error)
    return None


def why_full(error: Exception, device: torch.device) -> DeviceBusy | None:
    """The error that ends the session if a job filled the GPU's memory; None for any other error.

    mbqueue splits batches that do not fit, so a remaining out-of-memory error means that not even the model fits.
    """
    if isinstance(error, DeviceBusy):
        return error
    if not is_out_of_memory(error):
        return None
    return DeviceBusy(
        f"{device} has too little memory left for the model itself ({first_line(error)}). End the other processes "
        "(nvidia-smi lists them; a notebook's kernel keeps memory until it is restarted), then: mbqueue work"
    )


def multiply(device: torch.device) -> None:
    """Compute a small matrix product and wait for it, to test memory allocation, kernels and cuBLAS."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # raises the pending error of an earlier CUDA call
    square = torch.ones(16, 16, device=device)
    if float((square @ square)[0, 0]) != 16.0:  # float() waits for the matrix product
        raise RuntimeError(f"{device} computed a wrong matrix product")
