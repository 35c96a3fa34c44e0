"""Locate and download the files of matbench's tasks. A download resumes after a broken connection."""

from __future__ import annotations

import importlib.util
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path

from mbqueue.clock import Clock, SystemClock
from mbqueue.data.source import Progress
from mbqueue.errors import DataError, SourceAway
from mbqueue.files import fsync_dir, sha256_of_file

#: A download fails after this many consecutive attempts without a new byte.
_ATTEMPTS = 5
_TIMEOUT_SECONDS = 60.0
_CHUNK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class OfficialFile:
    """Matminer's metadata about a dataset's file.

    Attributes:
        path: where matminer looks for the file: in ``$MATMINER_DATA``, else in its own folder.
        url: the address from which the file can be downloaded.
        sha256: hex digest of the file.
        n: number of entries.
    """

    path: Path
    url: str
    sha256: str
    n: int


def official_file(name: str) -> OfficialFile:
    """Locate a task's file without importing matminer; the file may not exist yet.

    Raises:
        DataError: if matminer is not installed.
    """
    spec = importlib.util.find_spec("matminer")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("matminer, which locates the dataset, is not installed. Run: pip install matminer")
    folder = Path(spec.submodule_search_locations[0]) / "datasets"
    metadata = json.loads((folder / "dataset_metadata.json").read_text(encoding="utf-8"))[name]
    home = Path(os.environ.get("MATMINER_DATA") or folder).expanduser()
    return OfficialFile(
        path=home / f"{name}.{metadata['file_type']}",
        url=metadata["url"],
        sha256=metadata["hash"],
        n=metadata["num_entries"],
    )


def is_whole(file: OfficialFile) -> bool:
    """Whether an existing file has the SHA-256 that matminer lists. Hashing the file takes a fraction of a second."""
    return sha256_of_file(file.path) == file.sha256


def fetch(file: OfficialFile, *, progress: Progress | None = None, clock: Clock | None = None) -> Path:
    """Download the file if it is missing; otherwise check its SHA-256. Return its path.

    The download is written to ``NAME.part``. After a broken connection, the download resumes (HTTP Range), in this call
    or a later one. Only a complete file with the right SHA-256 gets the final name. If two processes call this function
    at the same time, one waits for the other.

    Args:
        progress: called with (bytes present, total bytes; 0 if unknown).
        clock: the clock for waiting between attempts.

    Raises:
        DataError: if the existing file has the wrong SHA-256.
        SourceAway: if the file cannot be downloaded or written, or the downloaded file has the wrong SHA-256.
    """
    from filelock import FileLock  # noqa: PLC0415  `mbqueue doctor` and `enqueue` only need the path

    if file.path.exists():
        if not is_whole(file):
            raise DataError(
                f"{file.path} is not matbench's file: its SHA-256 is different. Move your file away. mbqueue "
                "then downloads matbench's file. To use your own file, give its new path as the dataset."
            )
        return file.path
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.path.with_name(file.path.name + ".lock")):
            if not file.path.exists():
                _fetch(file, progress, clock or SystemClock())
    except OSError as error:
        raise SourceAway(
            f"{file.path} cannot be written: {error}. Set MATMINER_DATA to a folder with room for the dataset."
        ) from error
    return file.path


def _fetch(file: OfficialFile, progress: Progress | None, clock: Clock) -> None:
    part = file.path.with_name(file.path.name + ".part")
    began_anew = not part.exists()
    while True:
        _complete(file, part, progress, clock)
        if sha256_of_file(part) == file.sha256:
            break
        part.unlink()
        if began_anew:
            raise SourceAway(
                f"The download from {file.url} is not {file.path.name}: its SHA-256 is different. Try again later, or "
                f"put the file at {file.path} yourself."
            )
        # The partial file from an earlier attempt may be part of a different file, so download everything again before
        # blaming the server.
        began_anew = True
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.replace(file.path)
    fsync_dir(file.path.parent)


def _complete(file: OfficialFile, part: Path, progress: Progress | None, clock: Clock) -> None:
    fruitless = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _receive(file.url, part, progress):
                return
            problem: Exception | str = "the connection ended early"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < HTTPStatus.INTERNAL_SERVER_ERROR and error.code != HTTPStatus.TOO_MANY_REQUESTS:
                raise SourceAway(
                    f"{file.url} cannot be downloaded: {error}. Put the file at {file.path} yourself."
                ) from error
            problem = error
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            problem = error
        there = part.stat().st_size if part.exists() else 0
        fruitless = 0 if there > before else fruitless + 1
        if fruitless >= _ATTEMPTS:
            raise SourceAway(
                f"{file.url} cannot be downloaded: {problem}. mbqueue keeps the first {there} bytes, and the next "
                "attempt continues from there."
            )
        clock.sleep(2.0**fruitless)


def _receive(url: str, part: Path, progress: Progress | None) -> bool:
    """Append the bytes from one connection to ``part``; return whether the file is complete."""
    begin = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})  # noqa: S310  matminer's
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and begin:
            # The server has no more bytes of the file. The caller verifies the file's SHA-256.
            error.close()
            return True
        raise
    with response, part.open("ab") as stream:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            begin = 0
            stream.truncate(0)
        length = response.headers.get("Content-Length")
        total = begin + int(length) if length is not None else 0
        there = begin
        while chunk := response.read(_CHUNK):
            stream.write(chunk)
            there += len(chunk)
            if progress is not None:
                progress(there, total)
    return there >= total if total else True
