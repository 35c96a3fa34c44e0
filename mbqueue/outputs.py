"""Outputs that a person names: never overwrite a file that is read, nor a file that mbqueue did not make, unasked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mbqueue.errors import UsageError


def require_writable(
    target: Path, *, force: bool, reads: Iterable[Path] = (), ours: bytes | None = None, example: str = "output"
) -> None:
    """Refuse an output that must not be written, before anything is computed for it.

    Args:
        target: the file to write.
        force: overwrite an existing file, but never one that is read.
        reads: what the command reads; a folder stands for everything in it.
        ours: what a file of mbqueue's own of this kind contains near its beginning; such a file may be replaced.
        example: a name to suggest if the target is a folder.

    Raises:
        UsageError: when the file is read, is there, is a folder, or has no folder.
    """
    if target.is_dir():
        raise UsageError(f"{target} is a folder. Name the file to write, like {target / example}.")
    if not target.parent.is_dir():
        raise UsageError(f"There is no folder {target.parent} to write {target.name} into. Make it, or name another.")
    there = target.resolve()
    for read in reads:
        source = read.resolve()
        if there == source or (source.is_dir() and there.is_relative_to(source)) or _is_same(target, read):
            raise UsageError(f"{target} would be overwritten, but this command reads it ({read}). Name another file.")
    if target.exists() and not force and not (ours is not None and _begins_with(target, ours)):
        raise UsageError(f"{target} is there already. Name another file, or replace it with --force.")


def page_for(given: Path, name: str) -> Path:
    """The file to write for ``given``; if that is an existing folder, the file of that name in it.

    Raises:
        UsageError: if its folder does not exist: a mistyped folder is not created.
    """
    if given.is_dir():
        return given / name
    if not given.parent.is_dir():
        raise UsageError(f"There is no folder {given.parent} to write {given.name} into. Make it, or name another.")
    return given


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths, or hard links, are the same file."""
    return one.exists() and other.exists() and one.samefile(other)


def _begins_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as stream:
        return mark in stream.read(4096)
