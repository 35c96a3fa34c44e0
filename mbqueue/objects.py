"""Objects in a bucket (S3, GCS, Azure) or in a shared folder, by the few operations that commits need.

An object is written whole or not at all, under a name that is never given to other bytes. Two kinds of writing:
`put`, for names that carry the content's hash, where writing twice is harmless; and `create`, which the store itself
refuses when the name is taken (If-None-Match: *), so that of two writers one wins. An answer that is lost leaves it
open whether the object was written; `create` then reads back what is there.

Credentials come from the environment or the machine's own chain, never from the address: see docs/many-machines.md.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mbqueue.errors import StoreAway, StoreError, UsageError
from mbqueue.files import fsync_dir

STORE_VARIABLE = "MBQUEUE_STORE"
#: Says that a place is a store of mbqueue's; written once, when the first session comes.
MARKER = "mbqueue-store.json"
FORMAT = 1
LARGEST_MARKER = 1 << 16

#: For requests while a lease is being checked: others wait for the queue meanwhile. All tries together take less than
#: SQLite's patience with a locked database (mbqueue.queue.sqlite).
BRISK = {"connect_timeout": "3s", "timeout": "6s"}
#: For large objects: 5 MB in so long is 30 kB/s.
PATIENT = {"connect_timeout": "5s", "timeout": "180s"}
#: Tries of one `create`, and the pauses between them.
_CREATE_TRIES = 3
_PAUSE_SECONDS = 0.2

_SCHEMES = {"s3", "gs", "az", "file"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: What stores say when the bucket or container itself is missing.
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified bucket does not exist|container does not exist")
_REFUSED = re.compile(r"status code: 40[13]|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken")
#: Where a machine in a cloud asks for credentials; elsewhere nobody answers there.
_NO_CREDENTIALS = re.compile(r"169\.254\.169\.254|metadata\.google\.internal")

Result = TypeVar("Result")


def wrong_address(text: str) -> str | None:
    """What is wrong with the address of a store, or None. Never repeats it: it may hold a secret."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return "must be an address like s3://bucket/prefix"
    is_folder = parts.scheme == "file"
    folders = parts.path.strip("/").split("/") if parts.path.strip("/") else []
    wrong = {
        "must begin with s3://, gs://, az:// or file:///": parts.scheme not in _SCHEMES,
        "must not hold credentials or parameters (@, ?, #): keys are read from the environment (AWS_ACCESS_KEY_ID …), "
        "see docs/many-machines.md": "@" in parts.netloc or bool(parts.query or parts.fragment),
        "must name a folder by its full path, file:///…": is_folder and (bool(parts.netloc) or not folders),
        "must name a bucket, like s3://bucket/prefix": not is_folder and not _NAME.fullmatch(parts.netloc),
        "must have a prefix of letters, digits, and . _ - between slashes": not is_folder
        and not all(_NAME.fullmatch(folder) for folder in folders),
    }
    return next((why for why, is_so in wrong.items() if text and is_so), None)


def backend_of(url: str, client: dict[str, Any]) -> Any:
    """obstore's store for an address; reads no network.

    Raises:
        UsageError: when obstore is not installed, or the address is wrong.
        StoreError: when something of the configuration is missing.
    """
    if wrong := wrong_address(url):
        raise UsageError(f"The address of the object store {wrong}.")
    try:
        from obstore import store as stores  # noqa: PLC0415 - only projects with a store need it
        from obstore.exceptions import BaseError  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            f"The project keeps its checkpoints in {url}, and obstore, which reads it, is not installed. "
            "Install it: pip install 'mbqueue[objects]'"
        ) from error
    parts = urlsplit(url)
    prefix = parts.path.strip("/") or None
    retry: Any = {"max_retries": 0} if client is BRISK else {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
    options: Any = {**client, "user_agent": "mbqueue"}
    try:
        if parts.scheme == "file":
            return _LocalFolder(Path(parts.path), stores.LocalStore)
        if parts.scheme == "gs":
            return stores.GCSStore(parts.netloc, prefix=prefix, client_options=options, retry_config=retry)
        if parts.scheme == "az":
            account: Any = {"account_name": name} if (name := os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")) else {}
            return stores.AzureStore(parts.netloc, prefix=prefix, client_options=options, retry_config=retry, **account)
        if _is_loopback(os.environ):
            options["allow_http"] = True
        chain: Any = _boto3_chain(os.environ)
        return stores.S3Store(parts.netloc, prefix=prefix, client_options=options, retry_config=retry, **chain)
    except BaseError as error:
        raise StoreError(
            f"The object store {url} cannot be used: {_said(error)}. Set its credentials in the environment, see "
            "docs/many-machines.md."
        ) from None  # the cause's text may hold what was configured


def _is_loopback(environment: Any) -> bool:
    """Whether S3's endpoint is on this machine: only there, unless AWS_ALLOW_HTTP says otherwise, TLS is left out."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    host = urlsplit(next((environment[name] for name in names if environment.get(name)), "")).hostname
    return host in {"127.0.0.1", "localhost", "::1"}


def _boto3_chain(environment: Any) -> dict[str, Any]:
    """Profiles and ~/.aws, which obstore does not read, by way of boto3 where that is installed and needed."""
    named = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    if any(environment.get(name) for name in named) or not (
        environment.get("AWS_PROFILE") or Path("~/.aws/credentials").expanduser().exists()
    ):
        return {}
    try:
        import boto3  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: PLC0415
        from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            "The AWS profile can only be read with boto3 (pip install boto3); or set AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_REGION."
        ) from error
    session = boto3.Session()
    region = {"region": session.region_name} if session.region_name and not environment.get("AWS_REGION") else {}
    return {"credential_provider": Boto3CredentialProvider(session), **region}


class _LocalFolder:
    """A shared folder, with what obstore leaves out: what was written survives a loss of power, and an empty folder
    where the share was mounted neither takes nor lacks anything."""

    def __init__(self, root: Path, local_store: Any) -> None:
        self._root, self._make = root, local_store
        self._store: Any = None

    def put(self, path: str, content: bytes, **options: Any) -> bool:
        self._at(path).put(path, content, **options)
        target = self._root / path
        fd = os.open(target, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        for folder in target.parents:
            if folder.is_relative_to(self._root):
                fsync_dir(folder)
        return True

    def get(self, path: str) -> Any:
        return self._at(path).get(path)

    def get_range(self, path: str, **options: Any) -> Any:
        return self._at(path).get_range(path, **options)

    def list(self, prefix: str) -> Any:
        return self._at(prefix).list(prefix)

    def delete(self, path: str) -> None:
        self._at(path).delete(path)

    def copy(self, path: str, target: str) -> None:
        self._at(path).copy(path, target)

    def _at(self, path: str) -> Any:
        if self._store is None:
            if not self._root.is_dir():
                raise FileNotFoundError(f"NoSuchBucket: there is no folder {self._root}")
            self._store = self._make(self._root)
        if path != MARKER and not (self._root / MARKER).exists():
            raise OSError(f"{self._root / MARKER} is gone; is the folder still mounted?")
        return self._store


@dataclass(frozen=True)
class Listed:
    """An object as a listing shows it; ``modified`` is in seconds since the epoch by the store's clock."""

    size: int
    e_tag: str
    modified: float


@dataclass
class ObjectStore:
    """A store. Paths are relative to its prefix, with slashes.

    Every method raises StoreAway when the store does not answer, and StoreError when it refuses.

    Attributes:
        url: its address, which holds no secret.
        on_trouble: told why, each time the store does not answer or refuses; may come from any thread.
        on_answer: told each time it answers.
        requests: how many operations were asked of it, by kind.
    """

    url: str
    bulk: Any = field(repr=False)
    brisk: Any = field(repr=False)
    on_trouble: Callable[[str], None] = field(default=lambda _why: None, repr=False)
    on_answer: Callable[[], None] = field(default=lambda: None, repr=False)
    requests: dict[str, int] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, url: str) -> ObjectStore:
        """The store at an address.

        Raises:
            UsageError: when obstore is not installed, or the address is wrong.
            StoreError: when something of the configuration is missing.
        """
        return cls(url.rstrip("/"), bulk=backend_of(url, PATIENT), brisk=backend_of(url, BRISK))

    def check(self) -> bool:
        """Make sure that the store is there, lets itself be written, and refuses to write a name twice.

        Returns:
            whether it is new: nothing of mbqueue's was ever there.

        Raises:
            StoreError: saying which of these is not so.
        """
        mine = json.dumps({"format": FORMAT, "made_by": "mbqueue", "id": secrets.token_hex(8)}).encode()
        if is_new := self.create(MARKER, mine):
            # A store that ignores the condition would let two machines overwrite each other's commits.
            if self._put_new(MARKER, mine):
                raise StoreError(
                    f"{self.url} writes a name twice although it was asked not to (If-None-Match: *), so two machines "
                    "could overwrite each other's commits. Use a store that honours it: AWS S3, Cloudflare R2, MinIO, "
                    "GCS, Azure."
                )
        else:
            marker = self.read(MARKER, at_most=LARGEST_MARKER)
            try:
                found = json.loads(marker)["format"]
            except (ValueError, TypeError, KeyError) as error:
                raise StoreError(f"{self.url}/{MARKER} is damaged ({error}). Put it back from a copy.") from error
            if found > FORMAT:
                raise StoreError(f"{self.url} was written by a newer mbqueue (format {found}). Update mbqueue.")
        return is_new

    def ping(self) -> None:
        """Ask something small, to see whether it answers."""
        self._ask("get", lambda: self.brisk.get(MARKER))

    def forget(self) -> None:
        """Take back that the store is in use, after `check` found it new and it is not to be used."""
        self.remove(MARKER)

    def listed(self, folder: str) -> dict[str, Listed]:
        """Path below a folder → what the listing says of it, in order; nothing when there is no such folder."""

        def work() -> dict[str, Listed]:
            return {
                entry["path"][len(folder) + 1 :]: Listed(
                    entry["size"], entry["e_tag"] or "", entry["last_modified"].timestamp()
                )
                for chunk in self.bulk.list(folder)
                for entry in chunk
            }

        found = self._ask("list", work)
        return dict(sorted((found or {}).items()))

    def names(self, folder: str) -> list[str]:
        """Paths of the objects below a folder, sorted."""
        return list(self.listed(folder))

    def read(self, path: str, *, at_most: int) -> bytes:
        """The bytes of an object; of one with more than ``at_most``, one more than that.

        Raises:
            FileNotFoundError: when there is none.
        """

        def work() -> bytes:
            answer = self.bulk.get(path)
            if answer.meta["size"] > at_most:
                return bytes(self.bulk.get_range(path, start=0, length=at_most + 1))
            return bytes(answer.bytes())

        content = self._ask("get", work)
        if content is None:
            raise FileNotFoundError(f"There is no {self.url}/{path}.")
        return content

    def put(self, path: str, content: bytes) -> None:
        """Write an object whose name belongs to this very content, be it there already or not."""
        self._ask("put", lambda: self.bulk.put(path, content, use_multipart=False) or True)

    #: For those who keep things on a drive or in a store alike (`mbqueue.data.shelf`).
    write_new = put

    def create(self, path: str, content: bytes) -> bool:
        """Write an object that does not exist yet; False when there is one with another content.

        An object with the same content is taken for that of an earlier try whose answer was lost, so the content of
        two writers must differ. Quick: it may be called while a lease is checked.
        """
        for number in range(1, _CREATE_TRIES + 1):
            try:
                if self._put_new(path, content):
                    return True
                answer = self._ask("get", lambda: bytes(self.brisk.get(path).bytes()))
                if answer is not None:
                    return answer == content
            except StoreAway:
                if number == _CREATE_TRIES:
                    raise
            time.sleep(_PAUSE_SECONDS * number)
        raise StoreAway(f"{self.url}/{path} is neither there nor can it be written. Try again.")

    def remove(self, path: str) -> None:
        """Remove an object; one that is gone already is no error."""
        self._ask("delete", lambda: self.bulk.delete(path) or True)

    def move(self, path: str, target: str) -> bool:
        """Give an object another name; False when it is gone."""
        is_there = bool(self._ask("copy", lambda: self.bulk.copy(path, target) or True))
        if is_there:
            self.remove(path)
        return is_there

    def _put_new(self, path: str, content: bytes) -> bool:
        put = self.brisk.put
        return bool(self._ask("create", lambda: put(path, content, mode="create", use_multipart=False) or True))

    def _ask(self, kind: str, work: Callable[[], Result]) -> Result | None:
        """What ``work`` gives; None when there is no such object, or, for create, when there is one."""
        from obstore.exceptions import (  # noqa: PLC0415 - only projects with a store need it
            AlreadyExistsError,
            BaseError,
            PermissionDeniedError,
            PreconditionError,
            UnauthenticatedError,
        )

        self.requests[kind] = self.requests.get(kind, 0) + 1
        try:
            answer = work()
        except (AlreadyExistsError, PreconditionError):
            answer = None
        except (BaseError, OSError) as error:
            text = str(error)
            if _NO_BUCKET.search(text):
                where = "folder" if self.url.startswith("file:") else "bucket"
                raise self._trouble(
                    StoreError(f"There is no {where} for {self.url}. Make it, or mend `store` in mbqueue.toml.")
                ) from None
            if not isinstance(error, FileNotFoundError):
                if _NO_CREDENTIALS.search(text):
                    raise self._trouble(
                        StoreError(
                            f"There are no credentials for {self.url} in the environment, and this machine gives none. "
                            "Which ones are read is in docs/many-machines.md."
                        )
                    ) from None
                is_refused = isinstance(error, PermissionDeniedError | UnauthenticatedError) or _REFUSED.search(text)
                if is_refused:
                    raise self._trouble(
                        StoreError(
                            f"{self.url} refuses ({_said(error)}). Check the credentials in the environment and what "
                            "they allow: list, read, write and delete below this prefix."
                        )
                    ) from None
                raise self._trouble(StoreAway(f"{self.url} does not answer ({_said(error)}).")) from None
            answer = None
        self.on_answer()
        return answer

    def _trouble(self, error: StoreError) -> StoreError:
        self.on_trouble(str(error))
        return error


def _said(error: BaseException) -> str:
    """An error's own words, short and without what may be a secret: query strings and the bodies of answers."""
    line = str(error).split("\n", 1)[0].split("<?xml", 1)[0]
    return re.sub(r"\?\S*", "", line).strip().rstrip(":.")[:300]
