"""Compile the GPU kernels for absent chips, and read figures of the code with ``cuobjdump``."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Executor
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mbqueue.train.kernels import tiles
from mbqueue.train.kernels.launching import OPTIONS
from mbqueue.train.kernels.tiles import TILES
from mbqueue.train.kernels.triton_angles import (
    COLUMNS,
    UPDATE_COLUMNS,
    angles_backward_kernel,
    angles_forward_kernel,
    first_backward_kernel,
    update_forward_kernel,
)
from mbqueue.train.kernels.triton_bases import basis_backward, basis_forward
from mbqueue.train.kernels.triton_bonds import bonds_backward_kernel, bonds_forward_kernel
from mbqueue.train.kernels.triton_later import add_all_partials_kernel, weight_gradients_kernel
from mbqueue.train.kernels.triton_readout import read_out_backward, read_out_forward
from mbqueue.train.kernels.triton_sums import (
    angles_to_atoms_kernel,
    angles_to_shorts_kernel,
    bonds_to_atoms_kernel,
    sum_by_number,
)

#: Name of an argument → its type. Unlisted arguments are pointers to float32.
TYPES = dict.fromkeys(
    ["center", "neighbor", "undirected", "reverse", "bond_first", "bond_i", "bond_j", "by_j", "order", "offsets",
     "short_offsets", "by_j_offsets", "chosen"], "*i32"
) | dict.fromkeys(
    ["n", "n_atoms", "n_bonds", "n_shorts", "n_angles", "tiles", "rows_each", "atoms_stride",
     "bonds_stride", "shorts_stride", "weights_stride", "d_weights_stride"], "i32"
) | dict.fromkeys(["inv_cutoff", "norm", "half_root"], "fp32") | {"table": "*i64", "numbers": "*i64"}  # fmt: skip
#: Compute capability → the maximum shared memory of a block, in bytes, from the CUDA programming guide.
SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}


class Launch(NamedTuple):
    """A kernel launch in a training step."""

    name: str
    kernel: Any
    warps: int
    constants: dict[str, Any]


def kernels_of(capability: int, precision: str) -> list[Launch]:
    """Return every launch of a training step on one chip, and the launches that run messages alone."""
    return [Launch(*each) for each in (*_of_messages(capability, precision), *_of_rows(precision))]


def _of_messages(capability: int, precision: str) -> Iterator[tuple[str, Any, int, dict[str, Any]]]:
    t = TILES[capability]
    common = {"PRECISION": precision}
    bonds = common | {"HAS_SHORTS": True}
    yield "bonds forward", bonds_forward_kernel, t.bond_warps, bonds | {"ROWS": t.bond_rows, "ATOMS": t.bond_atoms}
    for part, rows, warps in (
        ("inputs", t.bond_back_rows, t.bond_back_warps),
        ("sums", t.bond_sum_rows, t.bond_sum_warps),
    ):
        yield f"bonds backward, {part}", bonds_backward_kernel, warps, bonds | {
            "ADDS": True, "OF_INPUTS": part == "inputs", "ROWS": rows,
        }  # fmt: skip
    angles = common | {"ROWS": t.angle_rows}
    yield "angles forward", angles_forward_kernel, t.angle_warps, angles | {
        "SHORTS": t.angle_shorts, "RESIDENT": t.resident,
    }  # fmt: skip
    yield "update forward", update_forward_kernel, t.angle_warps, angles
    angles = common | {"RESIDENT": t.resident}
    yield "angles backward, inputs", angles_backward_kernel, t.angle_back_warps, angles | {
        "IS_UPDATE": False, "ADDS": True, "OF_INPUTS": True, "ROWS": t.angle_back_rows, "COLUMNS": COLUMNS,
    }  # fmt: skip
    yield "angles backward, sums", angles_backward_kernel, t.angle_sum_warps, angles | {
        "IS_UPDATE": False, "ADDS": True, "OF_INPUTS": False, "ROWS": t.angle_sum_rows, "COLUMNS": COLUMNS,
    }  # fmt: skip
    yield "update backward", angles_backward_kernel, t.angle_back_warps, angles | {
        "IS_UPDATE": True, "ADDS": False, "OF_INPUTS": True, "ROWS": t.angle_back_rows, "COLUMNS": UPDATE_COLUMNS,
    }  # fmt: skip
    yield "first layer backward", first_backward_kernel, t.angle_sum_warps, common | {
        "ROWS": t.angle_sum_rows, "COLUMNS": COLUMNS,
    }  # fmt: skip
    yield "bonds to atoms", bonds_to_atoms_kernel, 4, {"ROWS": 16}
    yield "angles to atoms", angles_to_atoms_kernel, 4, {"ROWS": 16}
    yield "angles to shorts", angles_to_shorts_kernel, 4, {"HAS_WEIGHTS": True, "ADDS": True, "ROWS": 16}


def _of_rows(precision: str) -> Iterator[tuple[str, Any, int, dict[str, Any]]]:
    """Launches of the kernels for bases, read-out and sums, as (name, kernel, number of warps, constants)."""
    common = {"precision": "tf32" if precision == "tf32" else "ieee"}
    for name, kind, is_chosen, pieces in (("bonds", 0, False, 9), ("shorts", 0, True, 1), ("angles", 1, False, 1)):
        basis = common | {"kind": kind, "is_chosen": is_chosen, "pieces": pieces, "rows": tiles.BASIS_ROWS}
        yield f"basis of {name}", basis_forward, 8, basis
        yield f"basis of {name}, backward", basis_backward, 8, basis
    yield "sum by element", sum_by_number, 1, {"ROWS": tiles.ELEMENT_ROWS}
    crystals = common | {"tile": tiles.READ_OUT_ATOMS, "block": 128}
    yield "read-out", read_out_forward, 4, crystals
    yield "read-out, backward", read_out_backward, 8, crystals
    yield "all partial sums", add_all_partials_kernel, 4, {"dtype": tl.float32, "rows": tiles.SUM_ROWS}
    yield (
        "all weight gradients",
        weight_gradients_kernel,
        8,
        common | {"dtype": tl.float32, "rows": tiles.PRODUCT_ROWS},
    )


def table(pool: Executor, capability: int, precision: str, numbers: list[int]) -> dict[str, dict[str, int]]:
    """Compile the kernels with these ``numbers`` in `kernels_of`; return kernel name → figures of `compiled`."""
    launches = kernels_of(capability, precision)
    found = pool.map(_numbered, *zip(*((capability, precision, n) for n in numbers), strict=True))
    return {launches[n].name: figures for n, figures in zip(numbers, found, strict=True)}


def _numbered(capability: int, precision: str, number: int) -> dict[str, int]:
    return compiled(kernels_of(capability, precision)[number], capability)


def compiled(launch: Launch, capability: int) -> dict[str, int]:
    """Registers, bytes spilled to a thread's stack, and bytes of shared memory of one kernel on one chip."""
    kernel, constants, signature, attributes = launch.kernel, launch.constants, {}, {}
    # In the read-out kernel, `n_atoms` is an array with one number for each crystal; elsewhere, it is one integer.
    types = TYPES | ({"n_atoms": "*i64"} if "n_atoms" not in kernel.do_not_specialize else {})
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "*fp32")
        if signature[name].startswith("*") or name.endswith("_stride"):
            # Row lengths are multiples of 64, and buffers are aligned to 16 bytes.
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = OPTIONS | {"num_warps": launch.warps}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _resource_usage(made.asm["cubin"])
    return {"registers": usage["REG"], "spilled": usage["STACK"] + usage["LOCAL"], "shared": made.metadata.shared}


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
