"""The one place that launches Triton kernels, with every option that changes their bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

#: Launches by kernel name, since the counter was last cleared.
launches: Counter[str] = Counter()

#: Multiplications and additions may be joined, here as in the offline tests; loops are not pipelined, since rows are
#: gathered through indices.
OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}


def launch(kernel: Any, programs: int, *args: Any, warps: int, **constants: Any) -> None:
    """Run ``programs`` programs of ``kernel``; none where there is nothing to do.

    Args:
        kernel: made by ``triton.jit``.
        programs: how many; a function of the batch alone.
        args: its arguments; the first is a tensor, whose device runs it.
        warps: warps in a program.
        constants: its ``constexpr`` arguments.
    """
    if programs == 0:
        return
    launches[kernel.__name__] += 1
    # Triton launches on the current device, which is the first GPU unless something sets it.
    with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]
        kernel[(programs,)](*args, **constants, num_warps=warps, **OPTIONS)


def room(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Memory that a kernel fills."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)
