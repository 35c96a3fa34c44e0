"""Set a device's precision and determinism, and record in a fingerprint what affects the bytes of results."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbqueue.experiment import NEEDED_CAPABILITY
from mbqueue.train.gated import PRODUCTS


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called ``name``; ``auto`` selects CUDA if it is available, otherwise the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor if the device is the CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


_PRODUCTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def usable_precision(device: torch.device, wanted: str) -> str:
    """Return ``wanted``, or float32 if the device cannot compute matrix products in that precision."""
    if device.type != "cuda" or wanted == "float32":
        return "float32"
    return wanted if torch.cuda.get_device_capability(device)[0] >= NEEDED_CAPABILITY[wanted] else "float32"


@contextmanager
def calculating(device: torch.device, precision: str) -> Iterator[None]:
    """Use deterministic CUDA algorithms and ``precision`` for matrix products within a ``with`` block.

    On the CPU, this function changes nothing. In nested ``with`` blocks, the innermost precision applies.
    """
    if device.type != "cuda":
        yield
        return
    # cuBLAS reads CUBLAS_WORKSPACE_CONFIG when it creates its first handle. PyTorch refuses to use deterministic
    # algorithms unless CUBLAS_WORKSPACE_CONFIG is set.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.backends.cuda.matmul
    put_tf32_back = _keep_tf32(settings)
    deterministic: Any = torch.utils.deterministic  # the type stubs lack fill_uninitialized_memory
    before = (
        settings.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )
    settings.allow_tf32 = precision == "tf32"
    # Matrix products in bf16 must accumulate in float32.
    settings.allow_bf16_reduced_precision_reduction = False
    # Only warn if this version of torch has no deterministic variant of an op. Results that differ in the last bits are
    # better than a session that cannot train.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # The code writes all memory before reading it, so filling newly allocated memory would waste time.
    deterministic.fill_uninitialized_memory = False
    products = PRODUCTS.set(_PRODUCTS.get(precision))
    try:
        yield
    finally:
        PRODUCTS.reset(products)
        put_tf32_back()
        settings.allow_bf16_reduced_precision_reduction = before[0]
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
        deterministic.fill_uninitialized_memory = before[3]


def _keep_tf32(settings: Any) -> Callable[[], None]:
    """Remember which of PyTorch's settings allow tf32, and return a function that restores them.

    PyTorch 2.9 and later have two settings for tf32. Setting ``allow_tf32`` also sets ``fp32_precision``. If only
    ``fp32_precision`` was set, reading ``allow_tf32`` raises an error.
    """
    newer = getattr(settings, "fp32_precision", None)
    try:
        allowed = settings.allow_tf32
    except RuntimeError:
        allowed = newer != "tf32"
    is_medium = False
    with suppress(RuntimeError):
        is_medium = torch.get_float32_matmul_precision() == "medium"

    def put_back() -> None:
        if is_medium:  # the setting "medium" also allows tf32
            torch.set_float32_matmul_precision("medium")
        else:
            settings.allow_tf32 = allowed
        if newer is not None:
            settings.fp32_precision = newer

    return put_back


def fingerprint(device: torch.device, precision: str) -> dict[str, Any]:
    """Collect a fingerprint: everything about a device and its software that affects the bytes of a result.

    Args:
        precision: the precision of training, from `usable_precision`.
    """
    on_gpu = device.type == "cuda"
    return {
        "device_type": device.type,
        "device_name": device_name(device),
        "precision": precision if on_gpu else "float32",
        "validated_in": "float32",
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "instructions": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else "",
        "subnormals": "zero in kernels" if device.type == "cpu" else "",
        "cuda": torch.version.cuda or "" if on_gpu else "",
        # cuBLAS is a separate package, so its version can change while PyTorch's version stays the same.
        "cublas": _cublas_version() if on_gpu else "",
        # NVIDIA_TF32_OVERRIDE overrides PyTorch's tf32 setting.
        "tf32_override": os.environ.get("NVIDIA_TF32_OVERRIDE", "") if on_gpu else "",
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
        **_library_versions(),
    }


@cache
def _library_versions() -> dict[str, str]:
    # Cached, because every commit has a fingerprint, and each look-up of a version parses the package's metadata.
    return {name: version(name) for name in ("chgnet", "numba", "mbqueue")}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the differences between two fingerprints as {key: [old, new]}; keys missing from either are ignored."""
    if "precision" in old:
        old = {"validated_in": old["precision"], **old}  # earlier versions validated in the training precision
    return {key: [old[key], new[key]] for key in sorted(old.keys() & new.keys()) if old[key] != new[key]}


def _cublas_version() -> str:
    # The package is nvidia-cublas-cu11 or -cu12 for CUDA 11 and 12, and nvidia-cublas for later versions.
    for name in (f"nvidia-cublas-cu{(torch.version.cuda or '').partition('.')[0]}", "nvidia-cublas"):
        with suppress(PackageNotFoundError):
            return version(name)
    return ""
