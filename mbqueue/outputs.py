"""Check output paths, so that commands never overwrite their inputs, and overwrite other files only with --force."""

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
    """Check that a command may write an output file, before the command computes the content.

    Args:
        target: the file to write.
        force: overwrite an existing file, but never one that the command reads.
        reads: files and folders that the command reads; a folder includes everything inside.
        ours: bytes near the start of every output of this command; an existing file with these bytes may be replaced.
        example: the file name to suggest if the target is a folder.

    Raises:
        UsageError: if the target is an input, already exists, is a folder, or is in a missing folder.
    """
    there = from_here(target).resolve()
    if target.is_dir():
        raise UsageError(f"{target} is a folder. Give the file to write, for example {target / example}.")
    if not target.parent.is_dir():
        raise UsageError(_no_folder(target))
    for read in reads:
        source = from_here(read).resolve()
        if there == source or (source.is_dir() and there.is_relative_to(source)) or _is_same(target, read):
            raise UsageError(
                f"{target} would be overwritten, but this command reads it ({read}). Choose another output file."
            )
    if target.exists() and not force and not (ours is not None and _begins_with(target, ours)):
        raise UsageError(f"{target} already exists. Choose another name, or replace the file with --force.")


def page_for(given: Path, name: str) -> Path:
    """Return ``given`` or, if it is an existing folder, the path of the file ``name`` in this folder.

    Raises:
        UsageError: if the file's folder does not exist. mbqueue does not create it, because the path may be mistyped.
    """
    from_here(given)
    if given.is_dir():
        return given / name
    if not given.parent.is_dir():
        raise UsageError(_no_folder(given))
    return given


def require_folder(target: Path, *, force: bool, reads: Iterable[Path], makes: Callable[[str], bool]) -> None:
    """Check that a command may create an output folder, before the command computes the content.

    Args:
        target: the folder; may exist if it is empty.
        force: replace an existing folder, if this command could have made all files in it.
        reads: folders that the command reads.
        makes: a function that returns whether the command makes files with a given name.

    Raises:
        UsageError: if the target is an input, is not a folder, or already has content and may not be replaced.
    """
    there = from_here(target).resolve()
    for read in reads:
        source = from_here(read).resolve()
        if there.is_relative_to(source) or source.is_relative_to(there):
            raise UsageError(
                f"{target} would be overwritten, but this command reads {read}. Choose another output folder."
            )
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} already exists and is not a folder. Choose another name.")
    names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if foreign := [name for name in names if not makes(name)]:
        raise UsageError(
            f"{target} already exists and contains {foreign[0]}, which is not an output of this command. Choose "
            "another folder, or move that file."
        )
    if names and not force:
        raise UsageError(f"{target} already exists. Choose another name, or replace the folder with --force.")


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, which replaces ``target`` when the ``with`` block ends without an error.

    After an error or a crash, ``target`` is unchanged, with one exception: after a crash between the last two renames,
    the old folder has a temporary name.
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


def _no_folder(target: Path) -> str:
    return f"There is no folder {target.parent}, so {target.name} cannot be written. Create the folder first."


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file, for example through hard links."""
    return one.exists() and other.exists() and one.samefile(other)


def _begins_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as stream:
        return mark in stream.read(4096)
