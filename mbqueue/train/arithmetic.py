"""How a device is made to calculate: precision, determinism, and what byte-equality depends on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbqueue.train.gated import PRODUCTS


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; ``auto`` is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Name of the GPU or of the processor."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@contextmanager
def calculating(device: torch.device, precision: str) -> Iterator[None]:
    """Within the block, matrix products have this precision (GPU only) and CUDA algorithms are deterministic ones."""
    if device.type != "cuda":
        yield
        return
    # cuBLAS reads this when its first handle is made; without it, deterministic algorithms are refused.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings = torch.backends.cuda.matmul
    deterministic: Any = torch.utils.deterministic  # a module with a property that its stubs do not have
    before = (
        settings.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )
    settings.allow_tf32 = precision == "tf32"
    # With warnings only: an operation that some version of torch cannot do deterministically costs the last bits of
    # an exact resume, which is no reason to refuse to train.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Everything that is allocated is written before it is read, so filling it first is only a cost.
    deterministic.fill_uninitialized_memory = False
    products = PRODUCTS.set(torch.bfloat16 if precision == "bf16" else None)
    try:
        yield
    finally:
        PRODUCTS.reset(products)
        settings.allow_tf32 = before[0]
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
        deterministic.fill_uninitialized_memory = before[3]


def fingerprint(device: torch.device, precision: str) -> dict[str, Any]:
    """What byte-equality of two runs of the same work depends on, apart from the work."""
    return {
        "device_type": device.type,
        "device_name": device_name(device),
        "precision": precision if device.type == "cuda" else "float32",
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "instructions": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else "",
        "cuda": torch.version.cuda or "" if device.type == "cuda" else "",
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
        "chgnet": version("chgnet"),
        "numba": version("numba"),
        "mbqueue": version("mbqueue"),
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """What is not the same in two fingerprints: key to [old, new]."""
    return {
        key: [old.get(key), new.get(key)] for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }
