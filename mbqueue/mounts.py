"""The kind of file system at a path, read from Linux's mount table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

#: File systems whose writes reach other machines late, or whose locks other machines do not see. Google Drive in Colab
#: is a FUSE mount. Any other type counts as local.
_REMOTE = re.compile(r"^(fuse(\..*)?|nfs\d?|cifs|smb.*|9p|afs|ceph|glusterfs|lustre|gpfs|beegfs|drvfs|sshfs|davfs.*)$")
#: The network file systems that clusters share: all machines see a file once it is closed, and renames are atomic.
_CLUSTERED = re.compile(r"^(nfs\d?|ceph|glusterfs|lustre|gpfs|beegfs)$")
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, kw_only=True)
class Mount:
    """The mount that a path is on.

    Attributes:
        point: the mount point.
        fstype: the kernel's name for the file system; "unknown" if the table cannot be read.
        source: the device or share that is mounted.
    """

    point: Path
    fstype: str
    source: str

    @property
    def is_remote(self) -> bool:
        """Whether this is a drive or network mount, on which a live database must not be kept."""
        return _REMOTE.match(self.fstype) is not None

    @property
    def is_clustered(self) -> bool:
        """Whether this is a network file system on which a cluster's machines can share commits."""
        return _CLUSTERED.match(self.fstype) is not None


def mount_of(path: Path, *, table: Path = Path("/proc/self/mountinfo")) -> Mount:
    """The mount of ``path``, which need not exist: the last mount at the deepest mount point above the path."""
    target = path.expanduser().absolute()
    target = target.resolve() if target.exists() else target
    found = Mount(point=Path("/"), fstype="unknown", source="unknown")
    try:
        lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        # "36 35 98:0 /root /point options optional-fields... - fstype source options", see proc(5).
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
