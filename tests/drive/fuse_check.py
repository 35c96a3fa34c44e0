"""Train on a real FUSE mount that fails, is lost with ENOTCONN and comes back, and compare with a local disk.

pytest does not collect this file, because not every machine allows mounts. The check needs Linux with /dev/fuse, root
(or fusermount), the package mfusepy, and libfuse (set FUSE_LIBRARY_PATH if libfuse is not installed):

    pip install mfusepy && python tests/drive/fuse_check.py

Exit code 1 means that a check failed. Exit code 2 means that this machine does not allow mounts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from processes import outcome, run, start, until
from small_project import enqueue, make_project, small_spec

from mbqueue.mounts import mount_of

EPOCHS = 80
SERVER = Path(__file__).parents[1] / "support" / "faulty_fuse.py"


class Mount:
    """A folder behind a FUSE mount."""

    def __init__(self, base: Path) -> None:
        self.folder, self.point, self._control = base / "behind", base / "mount", base / "control"
        for folder in (self.folder, self.point):
            folder.mkdir()
        self.fails("")
        self._log = (base / "fuse.log").open("ab")
        self.mount()

    def fails(self, how: str) -> None:
        """Make operations fail with "EIO", "ENOSPC" or "ALL EIO", or with none."""
        other = self._control.with_suffix(".new")
        other.write_text(how)
        other.replace(self._control)

    def mount(self) -> None:
        """Mount the folder, or mount it again after a loss."""
        command = [sys.executable, str(SERVER), str(self.folder), str(self.point), str(self._control)]
        self._server = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        until(lambda: mount_of(self.point).is_remote, self._server)

    def lose(self) -> None:
        """Lose the mount: every operation fails with ENOTCONN."""
        self._server.kill()
        self._server.wait()

    def unmount(self) -> None:
        """Unmount the folder, which leaves an empty mount point."""
        subprocess.run(["umount", "--lazy", str(self.point)], check=True)


def status(root: Path) -> dict[str, Any]:
    """Return the entry ``publishing`` in the output of `mbqueue status --json`."""
    done = run(root, "status", "--json")
    return json.loads(done.stdout)["publishing"] if done.returncode == 0 else {"state": done.stderr}


def check_away(root: Path) -> None:
    """Check that without the mount, `status` still works and `pause` says what to do."""
    told = status(root)
    assert told["state"] == "degraded", told
    other = run(root, "pause", "full_finetune").stderr
    assert "not mounted" in other and "mbqueue init" not in other, other  # noqa: PT018


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def check(base: Path) -> None:
    """Train on the mount through every failure, and compare with a local disk."""
    straight = make_project(base / "straight", checkpoint_minutes=60.0)
    expected = enqueue(straight, small_spec(straight, train__epochs=EPOCHS))
    assert start(straight.root, "work", "--device", "cpu").wait() == 0

    mount = Mount(base)
    os.environ["XDG_CACHE_HOME"] = str(base / "cache")
    project = make_project(mount.point / "project")
    assert project.topology.is_mirrored, "the mount was not recognised"
    say(f"{mount_of(project.root).fstype} mount recognised; live folder {project.live_dir.name} on the local disk")
    results = enqueue(project, small_spec(project, train__epochs=EPOCHS)).relative_to(project.root)
    log = base / "log"
    session = start(project.root, "work", "--device", "cpu", log=log)

    def said(word: str) -> int:
        return log.read_text().count(word)

    published = project.root / "state" / "checkpoints"
    until(lambda: any(published.glob("*/*/*.json")), session)
    for number, fault in enumerate(("EIO", "ENOSPC", "ALL EIO"), start=1):
        mount.fails(fault)
        until(lambda number=number: said("DEGRADED") >= number, session)
        if fault.startswith("ALL"):
            check_away(project.root)
        else:
            told = status(project.root)
            assert told["state"] == "degraded", told
        mount.fails("")
        until(lambda number=number: said("The mount is back") >= number, session)
        say(f"{fault}: DEGRADED, then published")
    mount.lose()
    until(lambda: said("DEGRADED") >= 4, session)
    say("ENOTCONN: DEGRADED: " + log.read_text().split("DEGRADED: ")[-1].splitlines()[0])
    check_away(project.root)
    mount.unmount()
    check_away(project.root)
    assert run(base, "init", str(project.root)).returncode == 0  # a user runs `init` without mounting the drive
    check_away(project.root)
    back = said("The mount is back")
    until(lambda: "is not the project's folder" in status(project.root)["why"], session)
    assert said("The mount is back") == back
    shutil.rmtree(project.root)
    mount.mount()
    assert session.wait() == 0, log.read_text()
    # The next session publishes what the previous session could not.
    assert run(project.root, "work", "--device", "cpu").returncode == 0
    told = status(project.root)
    assert told["state"] == "published", told
    say("mounted again: published")
    assert outcome(mount.folder / "project" / results, 0) == outcome(expected, 0), "another result"
    assert not list((mount.folder / "project" / "state").rglob("queue.db*")), "a live database on the mount"
    mount.lose()
    mount.unmount()
    say("model, predictions and history are those of a local disk, byte for byte")


if __name__ == "__main__":
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        say("There is no /dev/fuse that can be used here.")
        sys.exit(2)
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder))
