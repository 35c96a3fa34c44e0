"""Compiled kernels of CHGNet's gated messages for the CPU, float32: one pass over bonds or angles, all in cache.

What a message needs between its gathers and its sum (two linear layers, two layer norms, SiLU, sigmoid, products) is
done for a block of rows at a time in buffers of some 100 KB, so that nothing of the size [bonds, features] is ever
written to memory. The backward kernels compute a block again instead of reading it back.

Every kernel works on a range of rows that belong to whole crystals. Crystals share nothing, so ranges can run in
different threads, each adds up in its own order, and the result does not depend on the number of threads.

Shapes: 64 features; "core ‖ gate" are the two halves of a gated MLP, 128 wide.
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
