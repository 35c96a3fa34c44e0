"""Files on a mount that lies, by the few operations that mean something there.

What a mount of this kind does (Google Drive in Colab, and network mounts): what is written lies on this machine's
disk at first and is uploaded later, in any order; an upload that is cut off leaves a truncated file; a second file of
one name becomes `name (1)`; locks, renames, symbolic links and changes in place cannot be trusted; the mount can
vanish at any moment. So files are written once, under names that are never used again, and every reader checks
its hash. What is promised when `write_new` returns: this machine reads back the very bytes. When other machines will,
only the mount knows.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mbqueue.belonging import Belonging
from mbqueue.files import fsync_dir
from mbqueue.storage.blobs import Listed, Unreadable

#: Bytes that are written between two checks for a stop.
PIECE_BYTES = 4 << 20
#: So many files of one name are written when those before are damaged and cannot be removed.
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
    """Raise FileNotFoundError for an error about one file, and pass on any other, which means that the mount fails."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno not in _ABOUT_ONE_FILE:
            raise
        raise Unreadable(error.errno, error.strerror, path) from error


def _go_on(_left: int) -> None:
    """Nothing is in the way of the bytes that are left."""


class Drive:
    """A project's folder on a mount. Paths are relative to it, with slashes.

    Every method raises OSError when the mount fails; so does a mount that is gone, whose empty folder, or what was
    made in its place, would take files that no other machine ever sees.

    Attributes:
        belonging: which project must be there; without it any is taken.
    """

    def __init__(self, root: Path, belonging: Belonging | None = None) -> None:
        self.root, self.belonging = root, belonging

    @property
    def url(self) -> str:
        """Where it is, for people."""
        return str(self.root)

    def check(self) -> None:
        """Raise when the project is not there."""
        why = None
        if not ((self.root / "jobs").is_dir() and (self.root / "state").is_dir()):
            why = "the project is not on the mount any more"
        elif self.belonging is not None:
            why = self.belonging.missing(self.root / "state")
        if why is not None:
            raise OSError(errno.ENOTCONN, f"{why}; is it still mounted?", str(self.root))

    def names(self, folder: str) -> list[str]:
        """What is in a folder, sorted; nothing when it does not exist, or is a file from elsewhere."""
        self.check()
        try:
            return sorted(entry.name for entry in (self.root / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def listed(self, folder: str) -> dict[str, Listed]:
        """As `names`: neither size nor time is asked for, which would take long for each file."""
        return {name: Listed(-1, "", 0.0) for name in self.names(folder)}

    def signature(self, path: str) -> tuple[int, int]:
        """Size and time of a file: one that looks the same twice is taken for unchanged. Raises as `read`."""
        with _about(path):
            found = (self.root / path).stat()
        return found.st_size, found.st_mtime_ns

    def read(self, path: str, *, at_most: int) -> bytes:
        """The bytes of a plain file; of one with more than ``at_most``, one more than that.

        Raises:
            Unreadable: when it is a link or no plain file, or may not be read.
            FileNotFoundError: when there is none.
        """
        with _about(path):
            fd = os.open(self.root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(fd, "rb") as stream:
                return stream.read(at_most + 1)

    def write_new(self, path: str, content: bytes, *, before_piece: Callable[[int], None] = _go_on) -> None:
        """Write a file that does not exist yet, and read it back; one that was not written whole is removed again.

        Args:
            before_piece: told before each piece how many bytes are left; what it raises ends the writing.

        Raises:
            FileExistsError: when there is one of that name.
            OSError: when it cannot be written, or what is read back is something else.
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
                    os.fsync(stream.fileno())  # or it would all be waited for at the end
            fsync_dir(target.parent)
            if self.read(path, at_most=len(content)) != content:
                raise OSError(errno.EIO, "what was read back is not what was written", str(target))  # noqa: TRY301
        except BaseException:
            # A full drive would get another truncated file with every try.
            with contextlib.suppress(OSError):
                target.unlink()
            raise

    def _make_folder(self, folder: Path) -> None:
        """Make a folder below the project, one at a time, so that none is made where the mount has just vanished."""
        if folder.is_dir():
            return
        if folder.parent == self.root:
            self.check()
        else:
            self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)

    def put(self, path: str, content: bytes, *, before_piece: Callable[[int], None] = _go_on) -> None:
        """Write a file whose name follows from its content; ``before_piece`` as in `write_new`.

        Where something else has that name (the same file, cut off), it stays, and the name gets a number, as a drive
        itself would do it; readers look at all of them. When too many of them are damaged, none of them is still on its
        way, and the last one makes room.
        """
        stem, dot, suffix = path.rpartition(".")
        names = [path, *(f"{stem} ({number}){dot}{suffix}" for number in range(1, _MOST_DUPLICATES))]
        for name in names:
            if self.create(name, content, before_piece=before_piece):
                return
        self.remove(names[-1])
        self.write_new(names[-1], content, before_piece=before_piece)

    def create(self, path: str, content: bytes, *, before_piece: Callable[[int], None] = _go_on) -> bool:
        """Write a file unless this machine sees one of that name; False when that has another content."""
        try:
            self.write_new(path, content, before_piece=before_piece)
        except FileExistsError:
            try:
                return self.read(path, at_most=len(content)) == content
            except FileNotFoundError:
                return False
        return True

    def move(self, path: str, target: str) -> bool:
        """Give a file another name, by writing it anew, since a rename may be undone; False when it is gone."""
        try:
            content = self.read(path, at_most=_LARGEST_MOVED)
        except FileNotFoundError:
            return False
        self.put(target, content)
        self.remove(path)
        return True

    def remove(self, path: str) -> None:
        """Remove a file; one that is gone already is no error."""
        (self.root / path).unlink(missing_ok=True)
