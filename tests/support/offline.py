"""The GPU kernels compiled for chips that are not there, and what ``cuobjdump`` says of the code."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
from mbqueue.train.kernels.triton_bonds import bonds_backward_kernel, bonds_forward_kernel
from mbqueue.train.kernels.triton_sums import (
    add_partials_kernel,
    angles_to_atoms_kernel,
    angles_to_shorts_kernel,
    bonds_to_atoms_kernel,
)

INDICES = {
    "center", "neighbor", "undirected", "reverse", "bond_first", "bond_i", "bond_j", "by_j", "order", "offsets",
    "short_offsets", "by_j_offsets",
}  # fmt: skip
#: Shared memory that a block may have at most, bytes (CUDA programming guide, technical specifications).
SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}


def kernels_of(capability: int, precision: str) -> Iterator[tuple[str, Any, int, dict[str, Any]]]:
    """Name, kernel, warps and constants of each launch of a training step on one chip."""
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
    yield "partial sums", add_partials_kernel, 4, {"ROWS": 16}


def compiled(kernel: Any, capability: int, warps: int, constants: dict[str, Any]) -> dict[str, int]:
    """Registers, bytes spilled to a thread's stack, and bytes of shared memory of one kernel on one chip."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("n_") or name == "tiles":
            signature[name] = "i32"
        elif name in INDICES:
            signature[name] = "*i32"
        else:
            # Rows are multiples of 64 numbers, and torch's memory begins at multiples of 512 bytes.
            signature[name] = "i32" if name.endswith("_stride") else "*fp32"
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS | {"num_warps": warps})
    usage = _resource_usage(made.asm["cubin"])
    return {"registers": usage["REG"], "spilled": usage["STACK"] + usage["LOCAL"], "shared": made.metadata.shared}


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
