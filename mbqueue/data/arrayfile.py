"""Read and write files of named arrays that can be memory-mapped.

A file contains a JSON header and the arrays in their in-memory layout:

    bytes 0–7    MBQARR1\\n
    bytes 8–15   length of the header, little-endian
    bytes 16–47  SHA-256 of the header
    header       {"meta": …, "size": bytes of the file, "arrays": [{name, dtype, shape, offset, sha256 or null}, …]}
    arrays       each at a multiple of 64 bytes

A file contains no pickled objects, so reading one never runs code. A file gets its final name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbqueue.errors import CacheError
from mbqueue.files import replacing

_MAGIC = b"MBQARR1\n"
_ALIGNMENT = 64
_PREFIX = 48


def write_arrays(
    path: Path, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], *, unhashed: tuple[str, ...] = ()
) -> None:
    """Durably write the file ``path``. Arrays in ``unhashed`` get no checksum, so their readers must check them."""
    entries: list[dict[str, Any]] = []
    parts: list[memoryview] = []
    offset = 0
    for name, array in arrays.items():
        part = np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")
        entries.append(
            {
                "name": name,
                "dtype": array.dtype.newbyteorder("<").str,
                "shape": list(array.shape),
                "offset": offset,
                "sha256": None if name in unhashed else hashlib.sha256(part).hexdigest(),
            }
        )
        parts.append(part)
        offset += _padded(len(part))
    header = json.dumps({"meta": dict(meta), "size": offset, "arrays": entries}, ensure_ascii=False).encode()
    with replacing(path) as stream:
        stream.write(_MAGIC + len(header).to_bytes(8, "little") + hashlib.sha256(header).digest() + header)
        stream.write(bytes(_padded(_PREFIX + len(header)) - _PREFIX - len(header)))
        for part in parts:
            stream.write(part)
            stream.write(bytes(_padded(len(part)) - len(part)))


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Open a file and compare every checksum; return its metadata and its memory-mapped arrays.

    Raises:
        CacheError: if the file is missing, truncated, damaged or in a different format.
    """
    header, start = _read_header(path)
    arrays: dict[str, NDArray[Any]] = {}
    whole = np.memmap(path, np.uint8, "r") if header["size"] else np.empty(0, np.uint8)
    for entry in header["arrays"]:
        dtype = np.dtype(entry["dtype"])
        count = int(np.prod(entry["shape"], dtype=np.int64))
        begin = start + entry["offset"]
        raw = np.asarray(whole[begin : begin + count * dtype.itemsize])
        if entry["sha256"] is not None and hashlib.sha256(raw.data).hexdigest() != entry["sha256"]:
            raise CacheError(f"{path} is damaged: the checksum of its {entry['name']} is wrong. Remove it.")
        arrays[entry["name"]] = raw.view(dtype).reshape(entry["shape"])
    return header["meta"], arrays


def _padded(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        with path.open("rb") as stream:
            prefix = stream.read(_PREFIX)
            length = int.from_bytes(prefix[8:16], "little")
            size = path.stat().st_size
            text = stream.read(length) if len(prefix) == _PREFIX and length < size else b""
    except FileNotFoundError as error:
        raise CacheError(f"There is no file {path}.") from error
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error}.") from error
    if prefix[:8] != _MAGIC or hashlib.sha256(text).digest() != prefix[16:]:
        raise CacheError(f"{path} is damaged or was not written by mbqueue: its header is invalid. Remove it.")
    header: dict[str, Any] = json.loads(text)
    start = _padded(_PREFIX + length)
    if size != start + header["size"]:
        raise CacheError(f"{path} has {size} bytes instead of {start + header['size']}. Remove it.")
    return header, start
