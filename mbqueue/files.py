"""Write files so that a crash at any instant leaves the old content or the new, never a mixture.

Order of a durable write: temp file in the same folder, fsync, rename, fsync of the folder. So a reader that finds the
final name finds all of its bytes. Names of temp files start with ``.tmp-``, so a sweep recognises them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

TEMP_PREFIX = ".tmp-"
#: A temp file unchanged for this long was left by a dead process.
LEFT_OVER_SECONDS = 600.0
_CHUNK = 1 << 20
#: Error codes of a file system without hard links.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def fsync_dir(folder: Path) -> None:
    """Make the names in ``folder`` durable: a rename is durable only after this call."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Create ``folder`` and missing folders above it, durably; do nothing if it exists."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    # Without this sync, a power loss could remove the folder together with files that were synced inside.
    fsync_dir(folder.parent)


def temp_beside(path: Path) -> Path:
    """An unused temporary name in the folder of ``path``, so that a rename onto it stays on one file system."""
    return path.parent / f"{TEMP_PREFIX}{secrets.token_hex(6)}-{path.name}"


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces ``path`` when the block ends without an error.

    The folder is created if it is missing. On an error the temp file is removed and ``path`` stays unchanged. Temp
    files of ``path`` that dead processes left are removed.
    """
    make_folder(path.parent)
    temp = temp_beside(path)
    try:
        with temp.open("wb") as stream:
            _sweep(temp, path.name)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temp.replace(path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def _sweep(temp: Path, name: str) -> None:
    """Remove abandoned temp files of the same file beside ``temp``, judged by the file system's clock."""
    now = temp.stat().st_mtime
    for left_over in temp.parent.glob(f"{TEMP_PREFIX}*-{name}"):
        with suppress(FileNotFoundError):  # another process may be sweeping, too
            if now - left_over.stat().st_mtime > LEFT_OVER_SECONDS:
                left_over.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Durably replace ``path`` with ``content``."""
    with replacing(path) as stream:
        stream.write(content)


def create_bytes(path: Path, content: bytes) -> bool:
    """Durably create ``path``; False if the file exists already."""
    make_folder(path.parent)
    temp = temp_beside(path)
    try:
        with temp.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temp, path)  # if two processes write, the first wins
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
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_small_text(path: Path, *, at_most: int = 1 << 20) -> str:
    """Read the text of a plain, hand-written file.

    Raises:
        FileNotFoundError, OSError: if the file cannot be read.
        ValueError: if the file is larger, not a plain file (a pipe would block), or not UTF-8.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError("it is not a plain file")
    with os.fdopen(fd, "rb") as stream:
        content = stream.read(at_most + 1)
    if len(content) > at_most:
        raise ValueError(f"it has more than {at_most} bytes")
    return content.decode("utf-8-sig")  # editors on Windows may write a byte-order mark


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_json(content: Any) -> str:
    """Hex SHA-256 of ``content`` as canonical JSON: sorted keys, no spaces."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
