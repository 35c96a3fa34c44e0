"""An experiment's crystals on the mount, in binary: what spares the next machine its source.

Of all that preparing makes, only this is kept there. It is small (109 MB for matbench's 132,752 crystals), needs no
download and no parsing, and converting it to graphs, which are six times as much, takes seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from mbqueue import files
from mbqueue.drive.mounted import Drive
from mbqueue.project import ProjectFolder

FOLDER = "state/crystals"
#: Far more than any dataset takes; a larger file is none of ours.
LARGEST_BYTES = 1 << 32


def publish_crystals(project: ProjectFolder, file: Path, dataset_hash: str, note: Callable[[str], None]) -> None:
    """Put a binary file of crystals on the mount of a split project, once; a mount that fails is told, no more."""
    if not project.is_split:
        return
    drive = Drive(project.root)
    content = file.read_bytes()
    name = f"{dataset_hash[:16]}-{hashlib.sha256(content).hexdigest()}.bin"
    try:
        if name not in drive.names(FOLDER):
            drive.write_new(f"{FOLDER}/{name}", content)
    except OSError as error:
        note(f"The crystals could not be kept on {project.root} ({error}); other machines read them from their source.")


def fetch_crystals(project: ProjectFolder, dataset_hash: str, target: Path, note: Callable[[str], None]) -> bool:
    """Copy the binary file of crystals from the mount of a split project to ``target``; whether it was there, whole."""
    if not project.is_split:
        return False
    drive = Drive(project.root)
    try:
        for name in drive.names(FOLDER):
            dataset, _, digest = name.removesuffix(".bin").partition("-")
            if dataset != dataset_hash[:16]:
                continue
            content = drive.read(f"{FOLDER}/{name}", at_most=LARGEST_BYTES)
            if hashlib.sha256(content).hexdigest() == digest:
                files.write_bytes(target, content)
                return True
            note(f"{project.root / FOLDER / name} is not whole (still uploading?); the source is read instead.")
    except OSError as error:
        note(f"The crystals on {project.root} cannot be read ({error}); their source is read instead.")
    return False
