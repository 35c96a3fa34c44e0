"""Write files so that a crash at any instant leaves the old content or the new, never a mixture.

A durable write creates a temp file in the same folder, syncs it, renames it, and syncs the folder. A file under its
final name is therefore always complete. The names of temp files start with ``.tmp-``, so that later writes can remove
abandoned temp files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

TEMP_PREFIX = ".tmp-"
#: Seconds after which an unchanged temp file is considered abandoned by a dead process.
LEFT_OVER_SECONDS = 600.0
_CHUNK = 1 << 20
#: Error codes that a file system without hard links returns.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def fsync_dir(folder: Path) -> None:
    """Sync ``folder`` itself, which makes new and renamed files in it durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Durably create ``folder`` and its missing parent folders; do nothing if ``folder`` exists."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    # Without this sync, a power loss could remove the new folder even if the files in it are synced.
    fsync_dir(folder.parent)


def temp_beside(path: Path) -> Path:
    """Choose an unused temporary path in the same folder as ``path``, so that a rename to ``path`` is atomic."""
    return path.parent / f"{TEMP_PREFIX}{secrets.token_hex(6)}-{path.name}"


def unused(path: Path) -> Path:
    """Return ``path`` if nothing has this name yet, otherwise the first unused of ``path-2``, ``path-3`` and so on."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(one for one in chain([path], numbered) if not one.exists())


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary temp file, which replaces ``path`` when the ``with`` block ends without an error.

    After an error, ``path`` is unchanged. A missing folder is created, and abandoned temp files of ``path`` are
    removed.
    """
    make_folder(path.parent)
    temp = temp_beside(path)
    try:
        with temp.open("wb") as stream:
            _sweep(temp, f"{TEMP_PREFIX}*-{path.name}")
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temp.replace(path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def sweep(folder: Path) -> None:
    """Remove abandoned temp files from a folder in which other processes may be writing."""
    if any(folder.glob(f"{TEMP_PREFIX}*")):
        with tempfile.NamedTemporaryFile(prefix=TEMP_PREFIX, dir=folder) as probe:
            _sweep(Path(probe.name), f"{TEMP_PREFIX}*")


def _sweep(temp: Path, pattern: str) -> None:
    """Remove abandoned temp files whose names match ``pattern`` from the folder that contains ``temp``.

    ``temp`` has just been created, so its modification time is the file system's current time.
    """
    now = temp.stat().st_mtime
    for left_over in temp.parent.glob(pattern):
        with suppress(FileNotFoundError):  # another process may remove the same file
            if now - left_over.stat().st_mtime > LEFT_OVER_SECONDS:
                left_over.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Durably replace ``path`` with ``content``."""
    with replacing(path) as stream:
        stream.write(content)


def create_bytes(path: Path, content: bytes) -> bool:
    """Durably create ``path`` and return True, or return False if the file already exists."""
    make_folder(path.parent)
    temp = temp_beside(path)
    try:
        with temp.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temp, path)  # if two processes create the same file, the first wins
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                return False
            temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    fsync_dir(path.parent)
    return True


def write_text(path: Path, content: str) -> None:
    """Durably replace ``path`` with ``content`` in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Durably replace ``path`` with ``content`` as indented JSON with a final newline; nan and inf are rejected."""
    write_bytes(path, json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """``content`` as indented JSON in UTF-8 with a final newline.

    Raises:
        ValueError: if a number is nan or inf.
    """
    return (json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def read_small_text(path: Path, *, at_most: int = 1 << 20) -> str:
    """Read a small text file that a user wrote.

    Args:
        at_most: maximum size, in bytes.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is too large, is not a regular file (a pipe would block), or is not UTF-8.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError("it is not a regular file")
    with os.fdopen(fd, "rb") as stream:
        content = stream.read(at_most + 1)
    if len(content) > at_most:
        raise ValueError(f"it is larger than {at_most} bytes")
    return content.decode("utf-8-sig")  # editors on Windows may write a byte-order mark


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_json(content: Any) -> str:
    """Hex SHA-256 of ``content`` as canonical JSON: sorted keys, no spaces."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
