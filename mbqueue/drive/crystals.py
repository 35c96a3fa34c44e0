"""An experiment's crystals in binary for other machines, on the drive or in the object store.

Graphs are not kept there: they take six times the space (matbench's 132,752 crystals take 109 MB), and converting
crystals to graphs takes seconds.
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

#: Far more than any dataset takes; mbqueue wrote no larger file.
LARGEST_BYTES = 1 << 32
_NAME = re.compile(rf"([0-9a-f]{{16}})-([0-9a-f]{{64}}){DUPLICATE}\.bin")


@dataclass(frozen=True)
class Shelf:
    """A folder of crystals that other machines see. Names contain the content's hash, so files never change."""

    place: Drive | ObjectStore
    folder: str

    @property
    def name(self) -> str:
        """The address to show."""
        return f"{self.place.url if isinstance(self.place, ObjectStore) else self.place.root}/{self.folder}"


def shelf_of(project: ProjectFolder, store: ObjectStore | None = None) -> Shelf | None:
    """The place of a project's crystals for other machines; None if no other machine can see one."""
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
    """Copy a binary file of crystals to the shelf, once; report a drive or store that fails.

    Args:
        before_piece: called before each piece with the number of bytes left. An exception ends the copy and removes it.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return  # pruned in the meantime
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
    """Copy the binary file of crystals from the shelf to ``target``; return whether an intact one was there."""
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
