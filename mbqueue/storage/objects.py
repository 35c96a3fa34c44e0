"""Read and write objects in a bucket (S3, GCS, Azure) or a shared folder, with the few operations that commits need.

An object is written completely or not at all, and no name is reused for different content. `put` is for names that
contain the content's hash, so that writing twice is harmless. The store refuses `create` if the name exists
(If-None-Match: *), so only one of two writers wins. If the answer is lost, `create` reads the object back.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from mbqueue.buckets import BRISK, LASTING, MARKER, PATIENT, backend_of, explained, is_missing
from mbqueue.errors import StoreAway, StoreError
from mbqueue.storage.blobs import Listed
from mbqueue.topology import Topology

FORMAT = 1
LARGEST_MARKER = 1 << 16
#: The size in bytes above which an object gets the time limit of `LASTING`.
LARGE_BYTES = 16 << 20
#: The number of attempts that `create_patiently` makes, and the pause after the first attempt.
_CREATE_TRIES = 3
_PAUSE_SECONDS = 0.2

Result = TypeVar("Result")


class Watch:
    """Receives a store's outages and answers, from any thread. This class ignores them."""

    def trouble(self, why: str) -> None:
        """The store does not answer, or refuses a request."""

    def answered(self) -> None:
        """The store has answered."""

    def heard(self) -> str | None:
        """Why the store does not answer, if another process has just noticed an outage; otherwise None."""
        return None


UNWATCHED = Watch()


@dataclass
class ObjectStore:
    """An object store. Paths are relative to the store's prefix and use slashes.

    Every method raises StoreAway if the store does not answer, and StoreError if the store refuses a request.

    Attributes:
        url: the store's address, without secrets.
        watch: receives outages and answers.
        requests: number of operations, by kind.
        put_seconds: duration of the last `put`, in seconds.
        id: identifies the store even if its address changes; empty until the store has been checked.
    """

    url: str
    bulk: Any = field(repr=False)
    brisk: Any = field(repr=False)
    watch: Watch = field(default=UNWATCHED, repr=False)
    requests: dict[str, int] = field(default_factory=dict, repr=False)
    put_seconds: float = field(default=0.0, repr=False)
    large: Any = field(default=None, repr=False)
    id: str = ""

    @classmethod
    def open(cls, url: str, watch: Watch = UNWATCHED) -> ObjectStore:
        """Open the store at an address.

        Raises:
            UsageError: if obstore is not installed, or the address is invalid.
            StoreError: if the configuration is incomplete.
        """
        return cls(
            url.rstrip("/"),
            bulk=backend_of(url, PATIENT),
            brisk=backend_of(url, BRISK),
            large=backend_of(url, LASTING),
            watch=watch,
        )

    def _for(self, size: int) -> Any:
        return self.large if size > LARGE_BYTES and self.large is not None else self.bulk

    def check(self) -> bool:
        """Check that the store exists, is writable, and refuses to `create` a name that exists. Set ``id``.

        Returns:
            True if the store is new, which means that mbqueue has never written to it.

        Raises:
            StoreError: if a check fails; the message names the check.
        """
        mine = json.dumps({"format": FORMAT, "made_by": "mbqueue", "id": secrets.token_hex(8)}).encode()
        is_new = self.create_patiently(MARKER, mine)
        if is_new and self._put_new(MARKER, mine):
            raise StoreError(
                f"{self.url} overwrites objects although the request forbids this (If-None-Match: *). Two machines "
                "could overwrite each other's commits. Use a store that supports conditional writes: AWS S3, "
                "Cloudflare R2, MinIO, GCS or Azure."
            )
        self.id = self._id_in(mine if is_new else self.read(MARKER, at_most=LARGEST_MARKER))
        return is_new

    def is_the_one(self, known: str) -> bool:
        """Whether the store has the id ``known``; if so, set `id`.

        This method writes nothing, because the address may lead to the wrong store, for example an empty folder where a
        network drive is not mounted. The caller needs no write permission for the store.

        Raises:
            StoreError: if the store does not answer, or denies access.
        """
        try:
            marker = self.read(MARKER, at_most=LARGEST_MARKER)
        except FileNotFoundError:
            return False
        if self._id_in(marker) != known:
            return False
        self.id = known
        return True

    def _id_in(self, marker: bytes) -> str:
        try:
            found = json.loads(marker)
            version, known = int(found["format"]), str(found["id"])
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{self.url}/{MARKER} is damaged ({error}). Restore it from a copy.") from error
        if version > FORMAT:
            raise StoreError(f"{self.url} was written by a newer mbqueue (format {version}). Update mbqueue.")
        return known

    def ping(self) -> None:
        """Send a small request to check that the answer comes from this store, not from a proxy or another store.

        Raises:
            StoreAway: if the store does not answer.
        """

        def work() -> bytes:
            marker = bytes(self.brisk.get(MARKER).bytes())
            if self.id and self._id_in(marker) != self.id:
                raise OSError(
                    f"this address now leads to a different store: {self._id_in(marker)} instead of {self.id}"
                )
            return marker

        self._ask("get", work)

    def forget(self) -> None:
        """Remove the object that `check` wrote to a new store, because the store will not be used."""
        self.remove(MARKER)

    def listed(self, folder: str) -> dict[str, Listed]:
        """The entries below a folder ("" for all folders), sorted by path; empty if there is no such folder."""
        start = len(folder) + 1 if folder else 0

        def work() -> dict[str, Listed]:
            return {
                entry["path"][start:]: Listed(entry["size"], entry["e_tag"] or "", entry["last_modified"].timestamp())
                for chunk in self.bulk.list(folder)
                for entry in chunk
            }

        found = self._ask("list", work)
        return dict(sorted((found or {}).items()))

    def names(self, folder: str) -> list[str]:
        """The sorted paths of the objects below a folder."""
        return list(self.listed(folder))

    def read(self, path: str, *, at_most: int) -> bytes:
        backend = self._for(at_most)

        def work() -> bytes:
            answer = backend.get(path)
            if answer.meta["size"] > at_most:
                return bytes(backend.get_range(path, start=0, length=at_most + 1))
            return bytes(answer.bytes())

        content = self._ask("get", work, may_lack=True)
        if content is None:
            raise FileNotFoundError(f"{self.url}/{path} does not exist.")
        return content

    def put(self, path: str, content: bytes) -> None:
        began = time.monotonic()
        self._ask("put", lambda: self._for(len(content)).put(path, content, use_multipart=False) or True)
        self.put_seconds = time.monotonic() - began

    def create(self, path: str, content: bytes) -> bool:
        """Write a new object in one attempt, as `Blobs.create` does.

        Use `create` in the transaction that checks the fence, because other sessions are waiting for that transaction.
        `create` sends at most two requests, each with the short time limit `BRISK`. If another process on this machine
        has just found that the store is not answering, `create` does not send a request. After a failure, the caller
        tries again with the same bytes, outside the transaction.
        """
        if why := self.watch.heard():
            raise StoreAway(why)
        return self._created(path, content)

    def create_patiently(self, path: str, content: bytes) -> bool:
        """Write a new object as `create` does, but with retries.

        Do not call this method in a transaction of the queue, because other sessions would wait for the retries.
        """
        for number in range(1, _CREATE_TRIES):
            try:
                return self._created(path, content)
            except StoreAway:
                time.sleep(_PAUSE_SECONDS * number)
        return self._created(path, content)

    def _created(self, path: str, content: bytes) -> bool:
        if self._put_new(path, content):
            return True
        answer = self._ask("get", lambda: bytes(self.brisk.get(path).bytes()), may_lack=True)
        if answer is None:
            raise StoreAway(f"{self.url} refused to create {path}, although no such object exists. Try again.")
        return answer == content

    def remove(self, path: str) -> None:
        self._ask("delete", lambda: self.bulk.delete(path) or True, may_lack=True)

    def move(self, path: str, target: str) -> bool:
        is_there = bool(self._ask("copy", lambda: self.bulk.copy(path, target) or True, may_lack=True))
        if is_there:
            self.remove(path)
        return is_there

    def _put_new(self, path: str, content: bytes) -> bool:
        put = self.brisk.put
        create = partial(put, path, content, mode="create", use_multipart=False)
        return bool(self._ask("create", lambda: create() or True, may_be_taken=True))

    def _ask(
        self, kind: str, work: Callable[[], Result], *, may_lack: bool = False, may_be_taken: bool = False
    ) -> Result | None:
        """Run ``work`` and return its result; None if the store says that the object is missing or already exists."""
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError  # noqa: PLC0415

        self.requests[kind] = self.requests.get(kind, 0) + 1
        answer = None
        try:
            answer = work()
        except (BaseError, OSError) as error:
            is_taken = may_be_taken and isinstance(error, AlreadyExistsError | PreconditionError)
            if not (is_taken or (may_lack and is_missing(self.url, error))):
                trouble = explained(self.url, error)
                self.watch.trouble(str(trouble))
                raise trouble from None
        self.watch.answered()
        return answer


def store_of(topology: Topology, watch: Watch = UNWATCHED) -> ObjectStore | None:
    """Open the store with a project's commits; None if the commits are in folders.

    Raises:
        UsageError: as for `ObjectStore.open`.
    """
    return ObjectStore.open(topology.store, watch) if topology.store else None
