"""Launch the Triton kernels with fixed compiler options, because the options affect the bytes of results."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

#: How often each kernel has been launched since this counter was last cleared.
launches: Counter[str] = Counter()

#: Compiler options, which tests/support/offline.py uses too. Triton may fuse a multiplication and an addition into one
#: operation. Loops are not pipelined, because they gather rows through indices.
OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}


def launch(kernel: Any, programs: int, *args: Any, warps: int, **constants: Any) -> None:
    """Launch ``kernel`` with ``programs`` programs; do nothing if ``programs`` is 0.

    Args:
        kernel: a function decorated with ``triton.jit``.
        programs: number of programs, which must depend only on the batch.
        args: the kernel's arguments; the first is a tensor on the device that runs the kernel.
        warps: warps per program.
        constants: the kernel's ``constexpr`` arguments.
    """
    if programs == 0:
        return
    launches[kernel.__name__] += 1
    # Triton launches kernels on the current device, so make the tensors' device the current one.
    with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]
        kernel[(programs,)](*args, **constants, num_warps=warps, **OPTIONS)


def room(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Allocate uninitialised memory for a kernel to fill."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)
