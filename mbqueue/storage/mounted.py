"""Read and write files on an unreliable mount, with the few operations that work on every mount.

A mount such as Google Drive in Colab first stores files on this machine's disk, and uploads them later, in any order. A
cut-off upload leaves a truncated file, and a second file with the same name becomes `name (1)`. Locks, renames,
symbolic links and in-place changes are unreliable, and the mount can vanish at any moment. So mbqueue writes every
file only once and never reuses a name, and every reader checks the hash. After `write_new`, this machine can read the
file. Other machines can read the file once the mount has uploaded it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mbqueue.belonging import Belonging
from mbqueue.files import fsync_dir
from mbqueue.project import PUBLISHED_ID
from mbqueue.storage.blobs import Listed, Unreadable

#: How many bytes to write between checks for a stop request.
PIECE_BYTES = 4 << 20
#: The maximum number of copies of one file, named `name (1)` and so on. A write adds a copy if all existing copies are
#: damaged.
_MOST_DUPLICATES = 10
_LARGEST_MOVED = 1 << 30

_ABOUT_ONE_FILE = {
    errno.ENOENT,
    errno.EFBIG,
    errno.ELOOP,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENXIO,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.EILSEQ,
}


@contextlib.contextmanager
def _about(path: str) -> Iterator[None]:
    """Turn an error about one file into a FileNotFoundError. Any other error means that the mount has failed."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno not in _ABOUT_ONE_FILE:
            raise
        raise Unreadable(error.errno, error.strerror, path) from error


def _go_on(_left: int) -> None:
    """Do nothing before a piece is written (the default for ``before_piece``)."""


class Drive:
    """A project's folder on a mount. Paths are relative to this folder and use slashes.

    Every method raises OSError if the mount fails or has disappeared. An empty mount point, or a different folder in
    its place, would accept files that no other machine ever sees.

    Attributes:
        belonging: the project that must be on the mount; None allows any project.
    """

    def __init__(self, root: Path, belonging: Belonging | None = None) -> None:
        self.root, self.belonging = root, belonging

    @property
    def url(self) -> str:
        return str(self.root)

    def check(self) -> None:
        """Raise OSError if the project is not on the mount."""
        why = None
        if not ((self.root / "jobs").is_dir() and (self.root / PUBLISHED_ID).is_dir()):
            why = "the project is no longer on the mount"
        elif self.belonging is not None:
            why = self.belonging.missing(self.root / PUBLISHED_ID)
        if why is not None:
            raise OSError(errno.ENOTCONN, f"{why}; is the drive still mounted?", str(self.root))

    def names(self, folder: str) -> list[str]:
        """The sorted names in a folder; empty if the folder does not exist or is a file."""
        self.check()
        try:
            return sorted(entry.name for entry in (self.root / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def listed(self, folder: str) -> dict[str, Listed]:
        """Return a folder's entries, keyed by name. Leave out sizes and times, because reading them is slow."""
        return {name: Listed(-1, "", 0.0) for name in self.names(folder)}

    def signature(self, path: str) -> tuple[int, int]:
        """The size and modification time of a file, which show whether the file has changed.

        Raises the same errors as `read`.
        """
        with _about(path):
            found = (self.root / path).stat()
        return found.st_size, found.st_mtime_ns

    def read(self, path: str, *, at_most: int) -> bytes:
        """Read a regular file. Return at most ``at_most`` + 1 bytes.

        Raises:
            Unreadable: if the name belongs to a link or a folder, or if this user may not read the file.
            FileNotFoundError: if there is no such file.
        """
        with _about(path):
            fd = os.open(self.root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(fd, "rb") as stream:
                return stream.read(at_most + 1)

    def write_new(self, path: str, content: bytes, *, before_piece: Callable[[int], None] = _go_on) -> None:
        """Write a new file and read it back; if either fails, remove the file.

        Args:
            before_piece: called before each piece with the number of bytes left; if it raises, the write stops.

        Raises:
            FileExistsError: if the name exists.
            OSError: if the file cannot be written, or different bytes are read back.
        """
        self.check()
        target = self.root / path
        self._make_folder(target.parent)
        new = target.open("xb")
        try:
            with new as stream:
                for start in range(0, len(content), PIECE_BYTES):
                    before_piece(len(content) - start)
                    stream.write(content[start : start + PIECE_BYTES])
                    stream.flush()
                    os.fsync(stream.fileno())  # otherwise the last fsync would write all pieces at once
            fsync_dir(target.parent)
            if self.read(path, at_most=len(content)) != content:
                raise OSError(errno.EIO, "the bytes read back differ from the bytes written", str(target))  # noqa: TRY301
        except BaseException:
            # Remove the file, because each attempt on a full drive would leave another truncated file.
            with contextlib.suppress(OSError):
                target.unlink()
            raise

    def _make_folder(self, folder: Path) -> None:
        """Create a folder and its missing parents in the project, after checking the mount."""
        if folder.is_dir():
            return
        if folder.parent == self.root:
            self.check()
        else:
            self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)

    def put(self, path: str, content: bytes, *, before_piece: Callable[[int], None] = _go_on) -> None:
        """Write a file whose name is used for no other content; ``before_piece`` as in `write_new`.

        A file of this name with different content is a truncated copy. mbqueue keeps the truncated copy, and adds a
        number to the new file's name, as a drive does. Readers try the names of all copies of a file. If a file already
        has the maximum number of copies, `put` replaces the last copy.
        """
        stem, dot, suffix = path.rpartition(".")
        names = [path, *(f"{stem} ({number}){dot}{suffix}" for number in range(1, _MOST_DUPLICATES))]
        if not any(self.create(name, content, before_piece=before_piece) for name in names):
            self.replace(names[-1], content, before_piece=before_piece)

    def replace(self, path: str, content: bytes, *, before_piece: Callable[[int], None] = _go_on) -> None:
        """Write or replace a file. Use `replace` only if readers know the content's hash."""
        if not self.create(path, content, before_piece=before_piece):
            self.remove(path)
            self.write_new(path, content, before_piece=before_piece)

    def create(self, path: str, content: bytes, *, before_piece: Callable[[int], None] = _go_on) -> bool:
        """Write a file unless a file with the same name is already visible on this machine.

        Return False if the existing file differs.
        """
        try:
            self.write_new(path, content, before_piece=before_piece)
        except FileExistsError:
            try:
                return self.read(path, at_most=len(content)) == content
            except FileNotFoundError:
                return False
        return True

    def move(self, path: str, target: str) -> bool:
        """Rename a file by writing a copy, because a mount may undo renames. Return False if there is no such file."""
        try:
            content = self.read(path, at_most=_LARGEST_MOVED)
        except FileNotFoundError:
            return False
        self.put(target, content)
        self.remove(path)
        return True

    def remove(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)
