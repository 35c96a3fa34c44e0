"""Find the file system that a path is on, in Linux's mount table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

#: Types of file systems on which other machines see writes late, or do not see locks. Google Drive in Colab is a FUSE
#: mount. A file system whose type is not listed counts as local.
_REMOTE = re.compile(r"^(fuse(\..*)?|nfs\d?|cifs|smb.*|9p|afs|ceph|glusterfs|lustre|gpfs|beegfs|drvfs|sshfs|davfs.*)$")
#: Network file systems of clusters, where all machines see a file as soon as it is closed, and renames are atomic.
_CLUSTERED = re.compile(r"^(nfs\d?|ceph|glusterfs|lustre|gpfs|beegfs)$")
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A mounted file system.

    Attributes:
        point: the mount point.
        fstype: the kernel's name for the type of file system; "unknown" if the mount table cannot be read.
        source: the mounted device or share.
    """

    point: Path
    fstype: str
    source: str

    @property
    def is_remote(self) -> bool:
        """Whether this is a drive or network mount, where a live database is not safe."""
        return _REMOTE.match(self.fstype) is not None

    @property
    def is_clustered(self) -> bool:
        """Whether this is a network file system through which a cluster's machines can share commits."""
        return _CLUSTERED.match(self.fstype) is not None


def mount_of(path: Path, *, table: Path = Path("/proc/self/mountinfo")) -> Mount:
    """Find the file system that ``path`` is on, even if ``path`` does not exist.

    If several file systems are mounted at the same point, the last one hides the others.
    """
    target = path.expanduser().absolute()
    target = target.resolve() if target.exists() else target
    found = Mount(point=Path("/"), fstype="unknown", source="unknown")
    try:
        lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        # Format, see proc(5): "36 35 98:0 /root /point options optional-fields... - fstype source options"
        left, separator, right = line.partition(" - ")
        left_fields, right_fields = left.split(" "), right.split(" ")
        if not separator or len(left_fields) < 5 or len(right_fields) < 2:
            continue
        point = Path(_unescape(left_fields[4]))
        if target.is_relative_to(point) and len(point.parts) >= len(found.point.parts):
            found = Mount(point=point, fstype=right_fields[0], source=_unescape(right_fields[1]))
    return found


def _unescape(field: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match.group(1), 8)), field)
