"""A simulated drive that lies: a cloud, and for each client a folder with the files that the client can see.

A client sees its own writes at once. The drive uploads files later, one by one and in any order. Other clients see an
uploaded file even later, again in any order. Removals are as slow as uploads, and may overtake them. When a client
dies, files that were not uploaded are lost, and the cloud may keep a truncated file. `move` uploads every file
that was written more than `LONGEST_UPLOAD` seconds ago. Two different files with the same name become `name` and
`name (1)`. A mount can be lost and come back. A test fails if it changes a written file, or uses links or locks on the
drive.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

#: The only folder on a drive where mbqueue may replace files.
REPLACEABLE = "results"
#: The suffix of a client's folder while its mount is lost.
AWAY = ".away"
#: Seconds after which a mounted client has uploaded every file.
LONGEST_UPLOAD = 90.0


@dataclass
class Client:
    """What one machine sees of the drive, and the changes that the machine has not uploaded yet."""

    folder: Path
    seen: dict[str, bytes] = field(default_factory=dict)
    signatures: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    uploads: list[str] = field(default_factory=list)
    written_at: dict[str, float] = field(default_factory=dict)
    removals: list[str] = field(default_factory=list)
    is_mounted: bool = True

    @property
    def _away(self) -> Path:
        return self.folder.with_name(self.folder.name + AWAY)

    def lose_mount(self) -> None:
        """Lose the mount, which leaves an empty folder."""
        if self.is_mounted:
            self.folder.rename(self._away)
            self.folder.mkdir()
            self.is_mounted = False

    def remount(self) -> None:
        """Mount again, with the previous content."""
        if not self.is_mounted:
            assert not any(self.folder.iterdir()), "something was written to a mount that is gone"
            self.folder.rmdir()
            self._away.rename(self.folder)
            self.is_mounted = True


class LyingDrive:
    """The cloud and its clients.

    Args:
        base: an empty folder for the clients' folders.
        chance: the random number generator that decides what happens when.
        now: returns the current time in seconds; by default, time stands still, and uploads may never happen.
    """

    def __init__(self, base: Path, chance: random.Random, now: Callable[[], float] = lambda: 0.0) -> None:
        self._base, self._chance, self._now = base, chance, now
        self.cloud: dict[str, bytes] = {}
        self.clients: list[Client] = []
        self._connected = 0

    def connect(self) -> Client:
        """Connect a new machine, which at first sees only a random part of the cloud."""
        self._connected += 1
        folder = self._base / f"client{self._connected}"
        for name in ("jobs", "state", "results"):
            (folder / name).mkdir(parents=True)
        client = Client(folder)
        self.clients.append(client)
        self.deliver(client, share=self._chance.choice([0.3, 0.9, 1.0, 1.0]))
        return client

    def kill(self, client: Client) -> None:
        """Lose a machine: each pending upload is lost, truncated or completed, and each removal lost or completed."""
        if client.is_mounted:
            self.notice(client)
            self._upload_overdue(client)
        client.remount()
        self.notice(client)
        for path in client.removals:
            if self._chance.random() < 0.5:
                self.cloud.pop(path, None)
        for path in client.uploads:
            fate = self._chance.random()
            content = client.seen[path]
            if fate < 0.4:
                continue
            self._store(path, content if fate < 0.7 else content[: self._chance.randrange(len(content) + 1)])
        shutil.rmtree(client.folder)
        self.clients.remove(client)

    def move(self) -> None:
        """Let a random part of the pending uploads, removals and deliveries happen."""
        for client in self.clients:
            if client.is_mounted:
                self.notice(client)
                self._upload_overdue(client)
                while client.uploads and self._chance.random() < 0.6:
                    self._upload(client, self._chance.randrange(len(client.uploads)))
                while client.removals and self._chance.random() < 0.5:
                    self.cloud.pop(client.removals.pop(self._chance.randrange(len(client.removals))), None)
                self.deliver(client, share=self._chance.random())

    def _upload_overdue(self, client: Client) -> None:
        for path in [*client.uploads]:
            if self._now() - client.written_at[path] > LONGEST_UPLOAD:
                self._upload(client, client.uploads.index(path))

    def settle(self) -> None:
        """Complete all uploads and removals, and show all files to all clients."""
        for client in self.clients:
            client.remount()
            self.notice(client)
            while client.uploads:
                self._upload(client, 0)
            for path in client.removals:
                self.cloud.pop(path, None)
            client.removals.clear()
        for client in self.clients:
            self.deliver(client, share=1.0)

    def notice(self, client: Client) -> None:
        """Detect the client's changes to its folder."""
        now: dict[str, bytes] = {}
        root = str(client.folder)
        for folder, _, names in os.walk(root):
            for name in names:
                full = f"{folder}/{name}"
                path = full[len(root) + 1 :]
                status = os.lstat(full)
                assert stat.S_ISREG(status.st_mode), f"{path}: a link on a drive that has none"
                assert not name.endswith(".lock"), f"{path}: a lock on a drive that has none"
                # A rewritten file has a new inode or modification time, so read a file again only if either differs.
                signature = (status.st_ino, status.st_size, status.st_mtime_ns)
                if client.signatures.get(path) != signature or path not in client.seen:
                    now[path] = Path(full).read_bytes()
                    client.signatures[path] = signature
                else:
                    now[path] = client.seen[path]
        for path, content in now.items():
            before = client.seen.get(path)
            if before != content:
                assert before is None or path.startswith(REPLACEABLE), f"{path} was changed in place"
                if path not in client.uploads:
                    client.uploads.append(path)
                    client.written_at[path] = self._now()
        for path in client.seen.keys() - now.keys():
            if path in client.uploads:
                client.uploads.remove(path)
            elif path in client.known:
                client.removals.append(path)
        client.seen = now

    def deliver(self, client: Client, *, share: float) -> None:
        """Show the client a random part of the new files, and hide files that the cloud no longer has."""
        if not client.is_mounted:
            return
        for path, content in sorted(self.cloud.items()):
            if path in client.uploads or path in client.removals or client.seen.get(path) == content:
                continue
            if self._chance.random() < share:
                target = client.folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                client.seen[path] = content
                client.known.add(path)
        for path in sorted(client.known - self.cloud.keys()):
            if path not in client.uploads and self._chance.random() < share:
                (client.folder / path).unlink(missing_ok=True)
                client.seen.pop(path, None)
                client.known.discard(path)

    def _upload(self, client: Client, place: int) -> None:
        path = client.uploads.pop(place)
        self._store(path, client.seen[path])
        client.known.add(path)

    def _store(self, path: str, content: bytes) -> None:
        if path.startswith(REPLACEABLE):
            self.cloud[path] = content
            return
        name, number = path, 0
        stem, dot, suffix = path.rpartition(".")
        while name in self.cloud and self.cloud[name] != content:
            number += 1
            name = f"{stem} ({number}){dot}{suffix}"
        self.cloud[name] = content
        # Real drives sometimes upload a file again under a different name.
        if self._chance.random() < 0.03:
            self.cloud[f"{stem} ({number + 1}){dot}{suffix}"] = content
