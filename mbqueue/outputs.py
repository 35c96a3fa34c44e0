"""Protect files from output paths that the user names: inputs always, and files not made by mbqueue unless forced."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mbqueue import files
from mbqueue.errors import UsageError
from mbqueue.project import from_here


def require_writable(
    target: Path, *, force: bool, reads: Iterable[Path] = (), ours: bytes | None = None, example: str = "output"
) -> None:
    """Check that an output may be written, before anything is computed for it.

    Args:
        target: the file to write.
        force: overwrite an existing file, but never one that the command reads.
        reads: files and folders that the command reads; a folder includes everything inside.
        ours: text near the start of mbqueue's files of this kind; a file that contains it may be replaced.
        example: a name to suggest if the target is a folder.

    Raises:
        UsageError: if the file is an input, already exists, is a folder, or is in no existing folder.
    """
    there = from_here(target).resolve()
    if target.is_dir():
        raise UsageError(f"{target} is a folder. Name the file to write, like {target / example}.")
    if not target.parent.is_dir():
        raise UsageError(f"There is no folder {target.parent} to write {target.name} into. Create it, or name another.")
    for read in reads:
        source = from_here(read).resolve()
        if there == source or (source.is_dir() and there.is_relative_to(source)) or _is_same(target, read):
            raise UsageError(f"{target} would be overwritten, but this command reads it ({read}). Name another file.")
    if target.exists() and not force and not (ours is not None and _begins_with(target, ours)):
        raise UsageError(f"{target} already exists. Name another file, or replace it with --force.")


def page_for(given: Path, name: str) -> Path:
    """The file to write for ``given``; if ``given`` is an existing folder, the file named ``name`` in that folder.

    Raises:
        UsageError: if the file's folder does not exist: a mistyped folder is not created.
    """
    from_here(given)
    if given.is_dir():
        return given / name
    if not given.parent.is_dir():
        raise UsageError(f"There is no folder {given.parent} to write {given.name} into. Create it, or name another.")
    return given


def require_folder(target: Path, *, force: bool, reads: Iterable[Path], makes: Callable[[str], bool]) -> None:
    """Check that a command may create a folder, before anything is computed for it.

    Args:
        target: the folder; it may exist if it is empty.
        force: replace an existing folder, if the command could have made everything inside.
        reads: folders that the command reads.
        makes: whether the command makes a file with this name.

    Raises:
        UsageError: if the target already exists, is not a folder, or is an input.
    """
    there = from_here(target).resolve()
    for read in reads:
        source = from_here(read).resolve()
        if there.is_relative_to(source) or source.is_relative_to(there):
            raise UsageError(f"{target} would be overwritten, but this command reads {read}. Name another folder.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} already exists and is not a folder. Name another folder.")
    names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if foreign := [name for name in names if not makes(name)]:
        raise UsageError(
            f"{target} already exists and contains {foreign[0]}, which this command does not make. Name another "
            "folder, or move that file."
        )
    if names and not force:
        raise UsageError(f"{target} already exists. Name another folder, or replace it with --force.")


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill, which replaces ``target`` when the block ends without an error.

    After an error or a crash, ``target`` is unchanged; only a crash between the last two renames leaves the target
    under the temporary name.
    """
    files.make_folder(target.parent)
    staging = files.temp_beside(target)
    staging.mkdir()
    before = None
    try:
        yield staging
        files.fsync_dir(staging)
        if target.exists():
            before = files.temp_beside(target)
            target.rename(before)
        try:
            staging.rename(target)
        except OSError:
            if before is not None:
                before.rename(target)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    files.fsync_dir(target.parent)
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths, or hard links, are the same file."""
    return one.exists() and other.exists() and one.samefile(other)


def _begins_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as stream:
        return mark in stream.read(4096)
