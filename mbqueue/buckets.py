"""Use obstore to open the object store that `store` in mbqueue.toml names, and explain the errors of the store.

Credentials come from the environment or the machine's credential chain, never from the address
(docs/how-to/many-machines.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mbqueue.errors import StoreAway, StoreError, UsageError
from mbqueue.files import fsync_dir

STORE_VARIABLE = "MBQUEUE_STORE"
#: The object that marks a bucket or folder as an mbqueue store. The first session creates this object.
MARKER = "mbqueue-store.json"

#: Time limits for requests that a session makes while it blocks the queue for other sessions. A commit makes at most
#: two such requests (`mbqueue.storage.objects.ObjectStore.create`). The requests must finish before other sessions stop
#: waiting for the locked SQLite database (`mbqueue.queue.sqlite.BUSY_SECONDS`).
BRISK = {"connect_timeout": "3s", "timeout": "6s"}
#: Time limits for checkpoints: 5 MB at 80 kB/s take about a minute.
PATIENT = {"connect_timeout": "5s", "timeout": "60s"}
#: Time limits for objects that are larger than a checkpoint.
LASTING = {"connect_timeout": "5s", "timeout": "1800s"}
_SCHEMES = {"s3", "gs", "az", "file"}
#: Matches a store's error text if the bucket or container is missing.
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified bucket does not exist|container does not exist")
_REFUSED = re.compile(r"status code: 40[13]|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken")
#: Matches a store's error text if an object is missing.
_NO_OBJECT = re.compile(r"NoSuchKey|BlobNotFound|No such object|specified (key|blob) does not exist")
#: Matches the cloud-only addresses from which obstore requests credentials if the environment has none.
_NO_CREDENTIALS = re.compile(r"169\.254\.169\.254|metadata\.google\.internal")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def wrong_address(text: str) -> str | None:
    """Describe what is wrong with a store's address, or return None. The description never repeats the address, which
    may contain a secret."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return "must have the form s3://bucket/prefix"
    is_folder = parts.scheme == "file"
    folders = parts.path.strip("/").split("/") if parts.path.strip("/") else []
    wrong = {
        "must begin with s3://, gs://, az:// or file:///": parts.scheme not in _SCHEMES,
        "must not contain credentials or parameters (@, ?, #): set keys in the environment (AWS_ACCESS_KEY_ID …), "
        "see docs/how-to/many-machines.md": "@" in parts.netloc or bool(parts.query or parts.fragment),
        "must give a folder's absolute path, for example file:///folder": is_folder
        and (bool(parts.netloc) or not folders),
        "must name a bucket, for example s3://bucket/prefix": not is_folder and not _NAME.fullmatch(parts.netloc),
        "must have a prefix that contains only letters, digits, dots, dashes, underscores and slashes": not is_folder
        and not all(_NAME.fullmatch(folder) for folder in folders),
    }
    return next((why for why, is_so in wrong.items() if text and is_so), None)


def backend_of(url: str, client: dict[str, Any]) -> Any:
    """Open the store at an address, without making a request.

    Raises:
        UsageError: if obstore is not installed, or the address is wrong.
        StoreError: if the configuration is incomplete.
    """
    if wrong := wrong_address(url):
        raise UsageError(f"The address of the object store {wrong}.")
    try:
        from obstore import store as stores  # noqa: PLC0415 - only projects with a store need it
        from obstore.exceptions import BaseError  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            f"The project's checkpoints are in the object store {url}, but the package obstore is not installed. "
            "Install obstore with: pip install 'mbqueue[objects]'"
        ) from error
    parts = urlsplit(url)
    prefix = parts.path.strip("/") or None
    retry: Any = {"max_retries": 0} if client is BRISK else {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}
    options: Any = {**client, "user_agent": "mbqueue"}
    try:
        if parts.scheme == "file":
            return _LocalFolder(Path(unquote(parts.path)), stores.LocalStore)
        if parts.scheme == "gs":
            return stores.GCSStore(parts.netloc, prefix=prefix, client_options=options, retry_config=retry)
        if parts.scheme == "az":
            account: Any = {"account_name": name} if (name := os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")) else {}
            return stores.AzureStore(parts.netloc, prefix=prefix, client_options=options, retry_config=retry, **account)
        if _needs_http(os.environ):
            options["allow_http"] = True
        chain: Any = _boto3_chain(os.environ)
        return stores.S3Store(parts.netloc, prefix=prefix, client_options=options, retry_config=retry, **chain)
    except BaseError as error:
        raise StoreError(
            f"mbqueue cannot use the object store {url}: {said(error)}. Set the store's credentials in the "
            "environment (docs/how-to/many-machines.md)."
        ) from None  # the cause's text may contain configured secrets


def _needs_http(environment: Mapping[str, str]) -> bool:
    """Allow plain HTTP only for an S3 server on this machine, or if AWS_ALLOW_HTTP is set."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    name = next((name for name in names if environment.get(name)), "")
    endpoint = urlsplit(environment.get(name, ""))
    is_here = endpoint.hostname in {"127.0.0.1", "localhost", "::1"}
    if is_here or environment.get("AWS_ALLOW_HTTP", "").lower() in {"true", "1"}:
        return True
    if endpoint.scheme == "http":
        raise UsageError(
            f"{name} is the address of another machine without TLS, so others could read and change the data. "
            "Use an https:// address. If you trust the network, set AWS_ALLOW_HTTP=true"
        )
    return False


def _boto3_chain(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return an AWS profile's credentials as store options, because obstore cannot read AWS profiles.

    If the environment already contains credentials, or there is no profile, return no options.
    """
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
            "Reading the AWS profile requires boto3 (pip install boto3). Alternatively, set AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_REGION."
        ) from error
    session = boto3.Session()
    region = {"region": session.region_name} if session.region_name and not environment.get("AWS_REGION") else {}
    return {"credential_provider": Boto3CredentialProvider(session), **region}


class _LocalFolder:
    """A store in a shared folder, with two guarantees that obstore does not give.

    Written data survives a power loss. An empty mount point raises an error instead of looking like an empty store.
    """

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
            raise OSError(f"{self._root / MARKER} is missing. Check that the folder is still mounted.")
        return self._store


def is_missing(url: str, error: BaseException) -> bool:
    """Whether an error says that an object is missing.

    A proxy may answer 404 while the store restarts. So the text of the error must come from the store itself.
    """
    text = _text(error)
    is_told = url.startswith("file:") or _NO_OBJECT.search(text)
    return isinstance(error, FileNotFoundError) and bool(is_told) and not _NO_BUCKET.search(text)


def explained(url: str, error: BaseException) -> StoreError:
    """Return an error for the user that says why a request failed, and what to do."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError  # noqa: PLC0415

    text = _text(error)
    if _NO_BUCKET.search(text):
        where = "folder" if url.startswith("file:") else "bucket"
        return StoreError(f"There is no {where} for {url}. Create it, or correct `store` in mbqueue.toml.")
    if _NO_CREDENTIALS.search(text):
        return StoreError(
            f"There are no credentials for {url} in the environment, and this machine provides none. "
            "See docs/how-to/many-machines.md."
        )
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _REFUSED.search(text):
        return StoreError(
            f"{url} refused the request ({said(error)}). Check the credentials in the environment: "
            "they must allow list, read, write and delete under this prefix."
        )
    return StoreAway(f"{url} is not responding, or reports an error ({said(error)}).")


def _text(error: BaseException) -> str:
    return str(error).partition("\n\nDebug source")[0]


def said(error: BaseException) -> str:
    """Shorten an error's message, and remove query strings and response bodies, which may contain secrets."""
    line = str(error).split("\n", 1)[0].split("<?xml", 1)[0]
    return re.sub(r"\?\S*", "", line).strip().rstrip(":.")[:300]
