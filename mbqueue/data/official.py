"""The files of matbench's tasks: where matminer keeps them, and getting one over a connection that breaks."""

from __future__ import annotations

import importlib.util
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path

from mbqueue.clock import Clock, SystemClock
from mbqueue.errors import DataError, SourceAway
from mbqueue.files import fsync_dir, sha256_of_file

Progress = Callable[[int, int], None]

#: Attempts in a row that may bring not one new byte.
_ATTEMPTS = 5
_TIMEOUT_SECONDS = 60.0
_CHUNK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class OfficialFile:
    """matminer's metadata of a data set.

    Attributes:
        path: where matminer looks for it: ``$MATMINER_DATA``, else matminer's own folder.
        url: where to download it.
        sha256: hex digest of the file.
        n: number of entries.
    """

    path: Path
    url: str
    sha256: str
    n: int


def official_file(name: str) -> OfficialFile:
    """Where the file of a task is or will be; imports nothing of matminer.

    Raises:
        DataError: if matminer is not installed.
    """
    spec = importlib.util.find_spec("matminer")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("matminer is not installed, which knows where the data set is. Run: pip install matminer")
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
    """Whether the file that is there has the digest that matminer knows; takes part of a second."""
    return sha256_of_file(file.path) == file.sha256


def fetch(file: OfficialFile, *, progress: Progress | None = None, clock: Clock | None = None) -> Path:
    """The file, downloaded if it is not there yet; one that is there is compared with its digest.

    A partial file is ``NAME.part`` beside it; a broken connection resumes where it broke (HTTP
    Range), in this call or in a later one. Only a whole file whose digest is right gets the final name. Two processes
    take turns.

    Args:
        file: what to get.
        progress: called with (bytes there, all bytes; 0 if not known).
        clock: waits between attempts.

    Raises:
        DataError: if the file that is there is another one.
        SourceAway: if it cannot be had, what comes is another one, or it cannot be written.
    """
    from filelock import FileLock  # noqa: PLC0415  `mbqueue doctor` and `enqueue` only ask for the path

    if file.path.exists():
        if not is_whole(file):
            raise DataError(
                f"{file.path} is not the file that matbench means: its SHA-256 is another. Move it away, and it is "
                "downloaded; to use it as data of your own, give its new path as the data set."
            )
        return file.path
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.path.with_name(file.path.name + ".lock")):
            if not file.path.exists():
                _fetch(file, progress, clock or SystemClock())
    except OSError as error:
        raise SourceAway(
            f"{file.path} cannot be written: {error}. Point MATMINER_DATA at a folder with room for the data set."
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
                f"What {file.url} gives is not {file.path.name} (its SHA-256 is another). Try later, or put the file "
                f"at {file.path} yourself."
            )
        began_anew = True  # the old part may have been of another file; only a fresh one convicts the server
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
                raise SourceAway(f"{file.url} cannot be had: {error}. Put the file at {file.path} yourself.") from error
            problem = error
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            problem = error
        there = part.stat().st_size if part.exists() else 0
        fruitless = 0 if there > before else fruitless + 1
        if fruitless >= _ATTEMPTS:
            raise SourceAway(
                f"{file.url} cannot be downloaded: {problem}. The first {there} bytes are kept; a later try resumes "
                "from there."
            )
        clock.sleep(2.0**fruitless)


def _receive(url: str, part: Path, progress: Progress | None) -> bool:
    """Add to ``part`` what one connection gives; whether that was the rest."""
    begin = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})  # noqa: S310  matminer's
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and begin:
            # Nothing lies beyond what is there: the digest will tell whether that is the file.
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
