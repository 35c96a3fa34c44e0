"""Share an experiment's crystals with other machines, as a binary file on the drive or in the object store.

Graphs are not shared, because a machine converts crystals to graphs in seconds. matbench's 132,752 crystals take
109 MB, and their graphs would take six times as much.
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

#: The largest accepted crystals file, in bytes: far larger than any dataset needs.
LARGEST_BYTES = 1 << 32
_NAME = re.compile(rf"([0-9a-f]{{16}})-([0-9a-f]{{64}}){DUPLICATE}\.bin")


@dataclass(frozen=True)
class SharedCrystals:
    """A folder through which machines share crystals. Each file's name contains a hash of the file's content."""

    blobs: Drive | ObjectStore
    folder: str

    @property
    def name(self) -> str:
        return f"{self.blobs.url}/{self.folder}"


def shared_crystals_of(project: ProjectFolder, store: ObjectStore | None = None) -> SharedCrystals | None:
    """Return the folder in which a project shares crystals with other machines; None if there is no such folder."""
    store = store or store_of(project.topology)
    if store is not None:
        return SharedCrystals(store, STORED_CRYSTALS)
    if not project.topology.is_mirrored:
        return None
    return SharedCrystals(Drive(project.root, Belonging.of(project.live_dir)), PUBLISHED_CRYSTALS)


def publish_crystals(
    shared: SharedCrystals,
    file: Path,
    dataset_hash: str,
    note: Callable[[str], None],
    *,
    before_piece: Callable[[int], None] = lambda _left: None,
) -> None:
    """Copy a binary file of crystals to the shared folder, unless it is already there. Report a failing drive or store.

    Args:
        before_piece: called before each piece with the number of bytes left. The copy is removed if ``before_piece``
            raises an exception.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return  # another process has pruned the cache
    name = f"{dataset_hash[:16]}-{hashlib.sha256(content).hexdigest()}.bin"
    try:
        if isinstance(shared.blobs, Drive):
            shared.blobs.put(f"{shared.folder}/{name}", content, before_piece=before_piece)
        elif name not in shared.blobs.names(shared.folder):
            before_piece(len(content))
            shared.blobs.put(f"{shared.folder}/{name}", content)
    except (OSError, StoreError) as error:
        note(
            f"The crystals could not be copied to {shared.name} ({error}). Other machines will read the dataset's "
            "source instead."
        )


def fetch_crystals(shared: SharedCrystals | None, dataset_hash: str, target: Path, note: Callable[[str], None]) -> bool:
    """Copy shared crystals to a local file. Return whether the shared folder had an intact file."""
    if shared is None:
        return False
    try:
        for name in shared.blobs.names(shared.folder):
            match = _NAME.fullmatch(name)
            if not match or match[1] != dataset_hash[:16]:
                continue
            content = shared.blobs.read(f"{shared.folder}/{name}", at_most=LARGEST_BYTES)
            if hashlib.sha256(content).hexdigest() == match[2]:
                files.write_bytes(target, content)
                return True
            note(f"{shared.name}/{name} is incomplete (still uploading?). mbqueue reads the dataset's source instead.")
    except (OSError, StoreError) as error:
        note(f"The crystals in {shared.name} cannot be read ({error}). mbqueue reads the dataset's source instead.")
    return False
