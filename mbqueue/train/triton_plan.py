"""Plan how the Triton kernels for CHGNet's gated messages divide a batch, and in which precision they multiply."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mbqueue.data.batch import Batch, OrderedBatch
from mbqueue.errors import TrainingError, counted
from mbqueue.train.gated import PRODUCTS
from mbqueue.train.kernels.tiles import PARTIALS, TILES, Tiles, tiles_of

#: The largest number of columns in an array with one row per atom or short bond, and in an array with one row per
#: directed bond or angle.
_WIDEST, _WIDE = 640, 128


def fits(batch: Batch) -> bool:
    """Whether int32 can represent every array position that the kernels compute for this batch."""
    many = max(len(batch.bond_center), len(batch.angle))
    few = max(len(batch.atomic_numbers), len(batch.short_bond))
    return max(many * _WIDE, few * _WIDEST) < 2**31


@dataclass(frozen=True)
class Plan:
    """The batch that the kernels process, and the kernels' tile sizes and precision.

    Attributes:
        batch: the batch with its sorted orders, on the device.
        tiles: the kernels' tile sizes.
        precision: precision of matrix products: float32, tf32, bf16 or fp16; their sums are float32.
    """

    batch: OrderedBatch
    tiles: Tiles
    precision: str

    @classmethod
    def of(cls, batch: Batch, tiles: Tiles | None = None, precision: str | None = None) -> Plan:
        """Make the plan for ``batch``, by default with the device's tiles and the precision of `products_in_use`.

        Raises:
            TrainingError: if the kernels cannot address the batch; see `fits`.
        """
        if not fits(batch):
            raise TrainingError(
                f"A batch of {counted(len(batch.rows), 'crystal')} with {len(batch.bond_center):,} bonds and "
                f"{len(batch.angle):,} angles is larger than the GPU kernels can address (2^31 numbers in an array). "
                "Run mbqueue retry, then mbqueue work --device cpu. Or enqueue the experiment under a new name "
                "(--name) with a smaller train.batch_size."
            )
        device = batch.bond_center.device
        if tiles is None and device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            tiles = tiles_of(10 * major + minor)
        # On the CPU, Triton's interpreter accepts tiles of any size.
        return cls(batch.ordered(), tiles or TILES[min(TILES)], precision or products_in_use())

    def shares(self, n_rows: int, rows: int) -> tuple[int, int]:
        """Divide ``n_rows`` rows among programs, in tiles of ``rows`` rows.

        Return the number of programs and the number of tiles per program, which depend only on the arguments.
        """
        tiles = -(-n_rows // rows)
        per_program = max(1, -(-tiles // PARTIALS))
        return -(-tiles // per_program), per_program


def products_in_use() -> str:
    """Return the precision of matrix products on a GPU, according to `PRODUCTS` and torch's setting."""
    named = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    dtype = PRODUCTS.get()
    if dtype is not None:
        return named[dtype]
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "float32"
