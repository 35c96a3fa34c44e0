from __future__ import annotations

from pathlib import Path

import pytest

from mbqueue.mounts import mount_of

TABLE = r"""22 1 8:1 / / rw,relatime - ext4 /dev/root rw
30 22 0:40 / /content/drive rw shared:7 - fuse.drive drive rw
31 22 0:41 / /mnt/my\040share rw - nfs4 server:/x rw
32 22 0:42 / /content rw - overlay overlay rw
garbage
"""


@pytest.mark.parametrize(
    ("path", "fstype", "is_remote"),
    [
        ("/content/drive/MyDrive/project", "fuse.drive", True),
        ("/content/driveway", "overlay", False),
        ("/mnt/my share/project", "nfs4", True),
        ("/home", "ext4", False),
    ],
)
def test_the_deepest_mount_above_a_path_counts(tmp_path: Path, path: str, fstype: str, is_remote: bool) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(TABLE)
    mount = mount_of(Path(path), table=table)
    assert (mount.fstype, mount.is_remote) == (fstype, is_remote)


def test_without_a_mount_table_the_type_is_unknown_and_treated_as_local(tmp_path: Path) -> None:
    mount = mount_of(tmp_path, table=tmp_path / "missing")
    assert mount.fstype == "unknown"
    assert not mount.is_remote
