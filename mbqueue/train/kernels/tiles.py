"""Tile sizes of the GPU kernels for each chip.

Tile sizes are fixed, not auto-tuned, so that results are bit-identical on every GPU of one model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

#: The version of the kernels. Increase this number whenever the bytes of the kernels' results change.
VERSION = 2

#: Each weight gradient is the total of at most this many partial sums. Each program adds up a fixed range of rows, so
#: the sums do not depend on the number of multiprocessors.
PARTIALS = 512

#: Constants that are the same for all GPU models. Each program computes BASIS_ROWS rows of a basis. A basis's gradient
#: is the total of at most BASIS_PARTIALS partial sums. The last four constants are numbers of rows or atoms per tile.
BASIS_ROWS, BASIS_PARTIALS, READ_OUT_ATOMS, SUM_ROWS, PRODUCT_ROWS, ELEMENT_ROWS = 32, 256, 16, 16, 32, 32


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of the message kernels: rows per tile, warps per program, and output rows per program.

    Attributes:
        bond_rows: bonds in a tile of the forward kernel.
        bond_atoms: atoms whose bonds a program sums, at most 16.
        bond_warps: warps of the forward kernel.
        bond_back_rows: directed bonds in a tile of the kernel for the input gradients, an even number.
        bond_back_warps: warps of the kernel for the input gradients.
        bond_sum_rows: directed bonds in a tile of the kernel for the parameter gradients, an even number.
        bond_sum_warps: warps of the kernel for the parameter gradients.
        angle_rows: angles in a tile of the forward kernels.
        angle_shorts: short bonds whose angles a program sums, at most 16.
        angle_warps: warps of the forward kernels.
        angle_back_rows: angles in a tile of the kernels for the input gradients.
        angle_back_warps: warps of the kernels for the input gradients.
        angle_sum_rows: angles in a tile of the kernels for the parameter gradients; divides ``angle_back_rows``.
        angle_sum_warps: warps of the kernels for the parameter gradients.
        resident: whether the angle kernels keep all matrices in shared memory between tiles, or only half of them.
    """

    bond_rows: int
    bond_atoms: int
    bond_warps: int
    bond_back_rows: int
    bond_back_warps: int
    bond_sum_rows: int
    bond_sum_warps: int
    angle_rows: int
    angle_shorts: int
    angle_warps: int
    angle_back_rows: int
    angle_back_warps: int
    angle_sum_rows: int
    angle_sum_warps: int
    resident: bool

    def described(self) -> dict[str, int]:
        """The tile sizes of all kernels, by name, for the fingerprint."""
        return {
            **asdict(self),
            "partials": PARTIALS,
            "basis_rows": BASIS_ROWS,
            "basis_partials": BASIS_PARTIALS,
            "read_out_atoms": READ_OUT_ATOMS,
            "sum_rows": SUM_ROWS,
            "product_rows": PRODUCT_ROWS,
            "element_rows": ELEMENT_ROWS,
        }


#: Tile sizes by compute capability: 75 for T4, 80 for A100, 86 for A10 and RTX 30, 89 for L4, 90 for H100.
TILES = {
    capability: Tiles(
        bond_rows=32, bond_atoms=4, bond_warps=8, bond_back_rows=16, bond_back_warps=8, bond_sum_rows=16,
        bond_sum_warps=8, angle_rows=16, angle_shorts=16, angle_warps=8, angle_back_rows=16, angle_back_warps=8,
        angle_sum_rows=16, angle_sum_warps=8, resident=capability > 75,
    )
    for capability in (75, 80, 86, 89, 90)
}  # fmt: skip


def tiles_of(capability: int) -> Tiles:
    """Return the tiles for a chip with this ``capability`` (10 · major + minor).

    For an unknown chip, return the tiles of the most recent known chip that predates it.

    Raises:
        KeyError: if the chip is older than all known chips.
    """
    known = [each for each in TILES if each <= capability]
    if not known:
        raise KeyError(f"compute capability {capability / 10} is below {min(TILES) / 10}")
    return TILES[max(known)]
