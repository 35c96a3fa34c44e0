"""Sessions wait while a proxy answers for a store that is restarting, or while a store hangs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from kept_commits import SMALL
from s3_server import ENVIRONMENT, S3Server, faulty
from small_project import ManualClock, make_project

from mbqueue.buckets import BRISK, MARKER
from mbqueue.errors import StoreAway
from mbqueue.queue.sqlite import BUSY_SECONDS
from mbqueue.session.storewatch import StoreWatch
from mbqueue.storage import objects
from mbqueue.storage.objects import ObjectStore, Watch
from mbqueue.storage.own_commits import OwnCommits
from mbqueue.storage.places import in_store


class _Proxied(BaseHTTPRequestHandler):
    """The part of S3 that a commit needs; while `away`, it answers like a proxy without a server."""

    objects: dict[str, bytes]
    away: bool

    def _answer(self, code: int, body: bytes = b"") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", formatdate(usegmt=True))
        self.end_headers()
        self.wfile.write(body)

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if self.away:
            self._answer(404, b"404 page not found\n")
        elif self.command == "PUT" and self.headers.get("If-None-Match") and path in self.objects:
            self._answer(412)
        elif self.command == "PUT":
            self.objects[path] = body
            self._answer(200)
        elif path in self.objects:
            self._answer(200, self.objects[path])
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>gone</Message></Error>")

    do_GET = do_PUT = do_POST = _serve  # noqa: N815 - names that the library looks for

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    monkeypatch.setattr(objects, "_PAUSE_SECONDS", 0.0)
    _Proxied.objects, _Proxied.away = {}, False
    with ThreadingHTTPServer(("127.0.0.1", 0), _Proxied) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield ObjectStore.open("s3://bucket/prefix")
        server.shutdown()


#: The fields of a manifest except size and hash.
FIELDS: dict[str, Any] = {
    "experiment": "small",
    "spec_hash": "s",
    "dataset_hash": "d",
    "fold": 0,
    "epoch": 1,
    "step": 3,
    "steps_per_epoch": 3,
    "complete": True,
    "fence": 1,
    "parent": None,
    "session": "a",
    "written_at": "2026-01-01T00:00:00Z",
    "best": {"epoch": 1, "val_mae": 0.5, "commit": "e0001-done-f0001"},
    "history": [{"epoch": 1, "val_mae": 0.5, "seconds": 1.0}],
    "fingerprint": {},
}


def test_a_proxy_that_says_404_gets_no_manifest_published_without_its_checkpoint(
    proxied: ObjectStore, tmp_path: Path
) -> None:
    commits = OwnCommits(in_store(proxied, SMALL), SMALL, near=tmp_path)
    _Proxied.away = True
    with pytest.raises(StoreAway, match="404"):
        commits.stage(b"state", FIELDS)
    _Proxied.away = False
    commits.stage(b"state", FIELDS).publish()
    assert sorted(name.rpartition(".")[2] for name in _Proxied.objects) == ["json", "pt"]


@pytest.mark.parametrize("operation", ["put", "read", "create", "remove", "move", "listed", "ping"])
def test_no_operation_believes_a_proxy_that_something_is_missing_or_done(operation: str, proxied: ObjectStore) -> None:
    proxied.put("a", b"1")
    proxied.create(MARKER, b"{}")
    told: list[str] = []

    class Listening(Watch):
        def answered(self) -> None:
            told.append("answered")

    proxied = replace(proxied, watch=Listening())
    _Proxied.away = True
    calls: dict[str, Any] = {
        "put": lambda: proxied.put("b", b"2"),
        "read": lambda: proxied.read("a", at_most=9),
        "create": lambda: proxied.create("c", b"3"),
        "remove": lambda: proxied.remove("a"),
        "move": lambda: proxied.move("a", "d"),
        "listed": lambda: proxied.listed("e"),
        "ping": proxied.ping,
    }
    with pytest.raises(StoreAway):
        calls[operation]()
    assert told == []
    _Proxied.away = False
    proxied.ping()
    assert told == ["answered"]


def test_what_the_store_itself_says_is_missing_is_believed(proxied: ObjectStore) -> None:
    with pytest.raises(FileNotFoundError):
        proxied.read("never", at_most=9)


def test_a_commit_holds_the_queue_for_two_requests_at_most(s3: S3Server) -> None:
    store, backend = faulty(s3.new_store())
    store.check()
    backend.calls.clear()
    backend.away = True
    with pytest.raises(StoreAway):
        store.create("a", b"1")
    assert len(backend.calls) == 1, "it is not tried again while others wait for the queue"
    backend.away = False
    assert store.create("a", b"1")
    assert store.create("a", b"1"), "the same writer again, whose answer was lost"
    assert not store.create("a", b"2")
    backend.calls.clear()
    store.create("a", b"2")
    assert len(backend.calls) == 2
    assert 2 * float(BRISK["timeout"].removesuffix("s")) < BUSY_SECONDS / 2


def test_of_sessions_that_wait_for_the_queue_only_the_first_finds_the_store_away_by_waiting(
    s3: S3Server, tmp_path: Path
) -> None:
    project, clock = make_project(tmp_path), ManualClock()
    notes: list[str] = []
    url = s3.new_store()
    ObjectStore.open(url).check()
    sessions = []
    for _ in range(3):
        store, backend = faulty(url, watch=StoreWatch(project, clock=clock, note=notes.append))
        store.ping()
        backend.calls.clear()
        backend.away = True
        sessions.append((store, backend))
    clock.advance(1.0)
    for store, _backend in sessions:
        with pytest.raises(StoreAway, match="connection refused"):
            store.create("a", b"1")
    assert [len(backend.calls) for _store, backend in sessions] == [1, 0, 0]
    store, backend = sessions[2]
    backend.away = False
    clock.advance(1.0)
    store.ping()  # a retry pings the store before it opens its transaction
    assert store.create("a", b"1"), "one's word counts until the store answers oneself"
    assert len(notes) == 1, "who only heard of it does not say so"


def test_a_second_try_finds_out_before_it_holds_the_queue_that_the_store_is_still_away(
    s3: S3Server, tmp_path: Path
) -> None:
    store, backend = faulty(s3.new_store())
    store.check()
    commits = OwnCommits(in_store(store, SMALL), SMALL, near=tmp_path)
    staged = commits.stage(b"state", FIELDS)
    backend.away = True
    with pytest.raises(StoreAway):
        staged.publish()
    with pytest.raises(StoreAway):
        commits.stage(b"state", FIELDS)
    backend.away = False
    backend.calls.clear()
    commits.stage(b"state", FIELDS).publish()
    assert [call.partition(" ")[0] for call in backend.calls] == ["get", "put"], "the checkpoint is not sent again"
