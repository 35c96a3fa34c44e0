"""For each kind of store, its addresses, and the requests that a commit makes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mbqueue.buckets import PATIENT, backend_of, wrong_address
from mbqueue.errors import StoreError, UsageError
from mbqueue.storage.objects import ObjectStore


class _Blobs(BaseHTTPRequestHandler):
    """A server that imitates conditional puts on Azure and on Google, with the header and status code of each."""

    protocol_version = "HTTP/1.1"
    blobs: dict[str, bytes]
    conditions: list[str]

    def _answer(self, code: int, body: bytes = b"") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 23 Nov 2026 08:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        azure, google = self.headers.get("If-None-Match"), self.headers.get("x-goog-if-generation-match")
        self.conditions.append(f"If-None-Match: {azure}" if azure else f"x-goog-if-generation-match: {google}")
        if self.path in self.blobs:
            self._answer(409 if azure else 412)
            return
        self.blobs[self.path] = body
        self._answer(201)

    def do_GET(self) -> None:
        self._answer(200, self.blobs[self.path])

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def blobs() -> Iterator[ThreadingHTTPServer]:
    _Blobs.blobs, _Blobs.conditions = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Blobs) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("url", "condition"),
    [("az://box/prefix", "If-None-Match: *"), ("gs://box/prefix", "x-goog-if-generation-match: 0")],
)
def test_a_commit_is_put_only_if_its_name_is_free(
    url: str, condition: str, blobs: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = f"http://127.0.0.1:{blobs.server_port}"
    account = {"client_email": "a@b", "private_key_id": "x", "private_key": "", "token_uri": server}
    (tmp_path / "account.json").write_text(json.dumps({**account, "gcs_base_url": server, "disable_oauth": True}))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", server)
    backend = backend_of(url, {**PATIENT, "allow_http": True})
    store = ObjectStore(url, bulk=backend, brisk=backend)
    assert store.create("a/manifest.json", b"one")
    assert store.create("a/manifest.json", b"one"), "the same writer again, whose answer was lost"
    assert not store.create("a/manifest.json", b"two")
    assert _Blobs.conditions == [condition] * 3
    assert list(_Blobs.blobs.values()) == [b"one"]


@pytest.mark.parametrize("url", ["", "s3://bucket", "s3://bucket/a/b", "gs://bucket/a", "az://box/a", "file:///a/b"])
def test_valid_addresses_are_accepted(url: str) -> None:
    assert wrong_address(url) is None


@pytest.mark.parametrize(
    "url",
    [
        "http://bucket/a",
        "bucket/a",
        "s3:///a",
        "s3://key:secret@bucket/a",
        "s3://bucket/a?X-Amz-Signature=secret",
        "az://box/a?sig=secret",
        "s3://bucket/a#secret",
        "s3://bucket/../secret",
        "s3://[secret",
        "file://secret/a",
        "file:///",
    ],
)
def test_invalid_addresses_are_refused_and_not_repeated(url: str) -> None:
    wrong = wrong_address(url)
    assert wrong
    assert "secret" not in wrong


def test_plain_http_to_another_machine_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.delenv("AWS_ALLOW_HTTP", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for fine in ("https://192.0.2.1:9000", "http://127.0.0.1:9000", "http://[::1]:9000"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", fine)
        backend_of("s3://bucket/prefix", PATIENT)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://192.0.2.1:9000")
    with pytest.raises(UsageError, match=r"AWS_ENDPOINT_URL is the address .* without TLS.*AWS_ALLOW_HTTP=true"):
        backend_of("s3://bucket/prefix", PATIENT)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    backend_of("s3://bucket/prefix", PATIENT)


def test_missing_credentials_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(StoreError, match="many-machines"):
        ObjectStore.open("az://box/prefix")
