"""An experiment's crystals in binary, where other machines find them: on the drive, or in the object store.

Of the graphs that preparing makes, only this is kept there. It is small (109 MB for matbench's 132,752 crystals), needs
no download from elsewhere and no parsing, and converting it to graphs, which are six times as much, takes seconds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mbqueue import files
from mbqueue.belonging import Belonging
from mbqueue.errors import StoreError
from mbqueue.project import PUBLISHED_CRYSTALS, STORED_CRYSTALS, ProjectFolder
from mbqueue.storage.mounted import Drive
from mbqueue.storage.names import DUPLICATE
from mbqueue.storage.objects import ObjectStore, store_of

#: Far more than any dataset takes; a larger file is none of ours.
LARGEST_BYTES = 1 << 32
_NAME = re.compile(rf"([0-9a-f]{{16}})-([0-9a-f]{{64}}){DUPLICATE}\.bin")


@dataclass(frozen=True)
class Shelf:
    """A folder of crystals that other machines see; names carry the content's hash, so nothing in it ever changes."""

    place: Drive | ObjectStore
    folder: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.place.url if isinstance(self.place, ObjectStore) else self.place.root}/{self.folder}"


def shelf_of(project: ProjectFolder, store: ObjectStore | None = None) -> Shelf | None:
    """Where a project keeps crystals for other machines; None if no other machine could see it."""
    store = store or store_of(project.topology)
    if store is not None:
        return Shelf(store, STORED_CRYSTALS)
    if not project.topology.is_split:
        return None
    return Shelf(Drive(project.root, Belonging.of(project.live_dir)), PUBLISHED_CRYSTALS)


def publish_crystals(
    shelf: Shelf,
    file: Path,
    dataset_hash: str,
    note: Callable[[str], None],
    *,
    before_piece: Callable[[int], None] = lambda _left: None,
) -> None:
    """Put a binary file of crystals on the shelf, once; a drive or store that fails is told, no more.

    Args:
        before_piece: told before each piece how many bytes are left. What it raises ends the copy, of which nothing
            stays then.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return  # pruned meanwhile
    name = f"{dataset_hash[:16]}-{hashlib.sha256(content).hexdigest()}.bin"
    try:
        if isinstance(shelf.place, Drive):
            shelf.place.put(f"{shelf.folder}/{name}", content, before_piece=before_piece)
        elif name not in shelf.place.names(shelf.folder):
            before_piece(len(content))
            shelf.place.put(f"{shelf.folder}/{name}", content)
    except (OSError, StoreError) as error:
        note(f"The crystals could not be kept in {shelf.name} ({error}); other machines read them from their source.")


def fetch_crystals(shelf: Shelf | None, dataset_hash: str, target: Path, note: Callable[[str], None]) -> bool:
    """Copy the binary file of crystals from the shelf to ``target``; whether it was there, whole."""
    if shelf is None:
        return False
    try:
        for name in shelf.place.names(shelf.folder):
            match = _NAME.fullmatch(name)
            if not match or match[1] != dataset_hash[:16]:
                continue
            content = shelf.place.read(f"{shelf.folder}/{name}", at_most=LARGEST_BYTES)
            if hashlib.sha256(content).hexdigest() == match[2]:
                files.write_bytes(target, content)
                return True
            note(f"{shelf.name}/{name} is not whole (still uploading?); the source is read instead.")
    except (OSError, StoreError) as error:
        note(f"The crystals in {shelf.name} cannot be read ({error}); their source is read instead.")
    return False
