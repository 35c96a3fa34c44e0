"""Compiled CPU kernels for CHGNet's gated messages in float32; each makes a single pass over bonds or angles.

A kernel computes messages (two linear layers, two layer norms, SiLU, sigmoid, products) for one block of rows at a
time. A kernel's buffers take about 100 KB, so no array of size [bonds, features] is written to memory. The backward
kernels recompute each block instead of reading it from memory.

Each call of a kernel processes the rows of a few whole crystals, so different threads can process different crystals.
The rows are summed in a fixed order, so the result does not depend on the number of threads.

Features have 64 columns. "Core ‖ gate" means the two halves of a gated MLP side by side, in 128 columns.
"""

from mbqueue.train.kernels.angles import angles_backward, angles_forward, update_backward, update_forward
from mbqueue.train.kernels.bonds import bonds_backward, bonds_forward

__all__ = [
    "angles_backward",
    "angles_forward",
    "bonds_backward",
    "bonds_forward",
    "update_backward",
    "update_forward",
]
