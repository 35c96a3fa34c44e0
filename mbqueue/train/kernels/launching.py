"""Launch all Triton kernels, with every option that affects their result bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

#: Number of launches by kernel name, since the counter was last cleared.
launches: Counter[str] = Counter()

#: Multiplications and additions may be fused, as in the offline tests. Loops are not pipelined, because rows are
#: gathered through indices.
OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}


def launch(kernel: Any, programs: int, *args: Any, warps: int, **constants: Any) -> None:
    """Run ``programs`` programs of ``kernel``; 0 launches nothing.

    Args:
        kernel: made by ``triton.jit``.
        programs: number of programs; must depend on the batch alone.
        args: the kernel's arguments; the first is a tensor on the device that runs the kernel.
        warps: warps per program.
        constants: the kernel's ``constexpr`` arguments.
    """
    if programs == 0:
        return
    launches[kernel.__name__] += 1
    # Triton launches on the current device, which is the first GPU unless something sets it.
    with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]
        kernel[(programs,)](*args, **constants, num_warps=warps, **OPTIONS)


def room(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised memory for a kernel to fill."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)
