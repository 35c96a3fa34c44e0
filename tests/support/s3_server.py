"""An S3 server on the loopback interface, and other stores for tests."""

from __future__ import annotations

import logging
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from mbqueue.storage.objects import UNWATCHED, ObjectStore, Watch

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_REGION": "us-east-1",
}


@dataclass
class S3Server:
    """An S3 server from moto, which honours If-None-Match."""

    url: str
    _buckets: int = 0

    def new_store(self) -> str:
        """Create a bucket, and return the address of a prefix in it."""
        self._buckets += 1
        bucket = f"bucket-{self._buckets}"
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{bucket}", method="PUT")).close()
        return f"s3://{bucket}/mbqueue/project"


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """Start one server for all tests of a process, and put its address and keys into the environment."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # do not log every request
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = {name: os.environ.get(name) for name in (*ENVIRONMENT, "AWS_ENDPOINT_URL")}
    os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=f"http://{host}:{port}")
    yield S3Server(f"http://{host}:{port}")
    server.stop()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@dataclass
class FaultyBackend:
    """The operations of obstore, one of which can fail, either without effect or so that only the answer is lost.

    Attributes:
        at: number of the operation that fails, from 1; 0 for none.
        after: whether the failing operation takes effect.
        away: whether every operation fails without effect.
    """

    real: Any
    at: int = 0
    after: bool = False
    away: bool = False
    calls: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self.real, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(f"{name} {arguments[0]}")
            if self.away:
                raise OSError("connection refused")
            fails = len(self.calls) == self.at
            if fails and not self.after:
                raise OSError("connection reset")
            answer = operation(*arguments, **options)
            if name == "list":
                answer = list(answer)
            if fails:
                raise OSError("connection reset after the request was sent")
            return answer

        return call


def faulty(url: str, *, watch: Watch = UNWATCHED, **faults: Any) -> tuple[ObjectStore, FaultyBackend]:
    """Open a store with the given ``faults``; return the store and its backend."""
    store = ObjectStore.open(url)
    backend = FaultyBackend(store.bulk, **faults)
    return ObjectStore(store.url, bulk=backend, brisk=backend, watch=watch), backend


def open_always(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every address lead to ``store``."""
    monkeypatch.setattr(ObjectStore, "open", lambda _url, watch=UNWATCHED: replace(store, watch=watch))


def new_store(kind: str, s3: S3Server, folder: Path) -> ObjectStore:
    """Create an empty store of the kind "s3" or "shared folder"."""
    if kind == "s3":
        store = ObjectStore.open(s3.new_store())
    else:
        folder.mkdir(parents=True)
        store = ObjectStore.open(folder.as_uri())
    assert store.check(), "the store was used before"
    return store
