"""Over an unreliable connection, the official file arrives whole or not at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from mbqueue.data.official import OfficialFile, fetch, official_file
from mbqueue.errors import DataError
from mbqueue.files import sha256_of_file
from mbqueue.task import FORMATION_ENERGY

CONTENT = np.random.default_rng(0).bytes(3_000_000)


class FakeClock:
    """A clock that remembers each sleep and returns at once."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def now(self) -> float:
        return 0.0

    def monotonic(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


class Server(ThreadingHTTPServer):
    """Serves CONTENT, but cuts each connection after `cut` bytes; records at which byte each request begins."""

    cut = len(CONTENT)
    content = CONTENT
    knows_ranges = True
    status = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.begins: list[int] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.knows_ranges else 0
        self.server.begins.append(begin)
        if self.server.status:
            self.send_error(self.server.status)
            return
        if begin >= len(self.server.content):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(self.server.content) - begin))
        self.end_headers()
        self.wfile.write(self.server.content[begin : begin + self.server.cut])

    def log_message(self, *args: object) -> None:
        """Do not print requests."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def file(server: Server, tmp_path: Path) -> OfficialFile:
    reference = tmp_path / "reference"
    reference.write_bytes(CONTENT)
    return OfficialFile(
        path=tmp_path / "home" / "set.json.gz",
        url=f"http://127.0.0.1:{server.server_port}/set.json.gz",
        sha256=sha256_of_file(reference),
        n=1,
    )


def test_a_file_is_downloaded_once_with_progress(server, file):
    told = []
    path = fetch(file, progress=lambda done, total: told.append((done, total)), clock=FakeClock())
    assert path.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert fetch(file, clock=FakeClock()) == path
    assert server.begins == [0]
    assert sorted(p.name for p in path.parent.iterdir()) == ["set.json.gz", "set.json.gz.lock"]


def test_another_file_of_the_same_name_is_refused(server, file):
    file.path.parent.mkdir()
    file.path.write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match="its SHA-256 is different"):
        fetch(file, clock=FakeClock())
    assert file.path.read_bytes() == CONTENT[:-1]
    assert server.begins == []


def test_a_connection_that_breaks_resumes_where_it_broke(server, file):
    server.cut = 1_000_000
    clock = FakeClock()
    assert fetch(file, clock=clock).read_bytes() == CONTENT
    assert server.begins == [0, 1_000_000, 2_000_000]
    assert clock.waits == [1.0, 1.0]


def test_a_partial_download_of_an_earlier_process_is_resumed(server, file):
    file.path.parent.mkdir()
    file.path.with_name("set.json.gz.part").write_bytes(CONTENT[:2_500_000])
    assert fetch(file, clock=FakeClock()).read_bytes() == CONTENT
    assert server.begins == [2_500_000]


def test_a_part_that_is_whole_but_was_not_renamed_is_taken(server, file):
    file.path.parent.mkdir()
    file.path.with_name("set.json.gz.part").write_bytes(CONTENT)
    assert fetch(file, clock=FakeClock()).read_bytes() == CONTENT
    assert server.begins == [len(CONTENT)]


def test_a_server_without_ranges_starts_over(server, file):
    server.knows_ranges = False
    file.path.parent.mkdir()
    file.path.with_name("set.json.gz.part").write_bytes(b"x" * 10)
    assert fetch(file, clock=FakeClock()).read_bytes() == CONTENT


def test_a_partial_download_of_another_file_is_discarded(server, file):
    file.path.parent.mkdir()
    file.path.with_name("set.json.gz.part").write_bytes(b"x" * 1_000_000)
    assert fetch(file, clock=FakeClock()).read_bytes() == CONTENT
    assert server.begins == [1_000_000, 0]


def test_a_file_with_another_digest_never_gets_the_name(server, file):
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(DataError, match="its SHA-256 is different"):
        fetch(file, clock=FakeClock())
    assert [p.name for p in file.path.parent.iterdir()] == ["set.json.gz.lock"]


def test_bytes_from_before_the_server_fell_silent_are_kept(server, file):
    server.cut = 0
    file.path.parent.mkdir()
    file.path.with_name("set.json.gz.part").write_bytes(CONTENT[:500])
    clock = FakeClock()
    with pytest.raises(DataError, match="mbqueue keeps the first 500 bytes"):
        fetch(file, clock=clock)
    assert len(server.begins) == 5
    assert clock.waits == sorted(clock.waits)
    assert not file.path.exists()
    server.cut = len(CONTENT)
    assert fetch(file, clock=FakeClock()).read_bytes() == CONTENT


def test_a_file_missing_on_the_server_is_reported_at_once(server, file):
    server.status = 404
    with pytest.raises(DataError, match=r"cannot be downloaded: HTTP Error 404.*Put the file at"):
        fetch(file, clock=FakeClock())
    assert len(server.begins) == 1


def test_a_server_that_is_busy_is_asked_again(server, file):
    server.status = 503
    with pytest.raises(DataError, match="503"):
        fetch(file, clock=FakeClock())
    assert len(server.begins) == 5


def test_a_folder_that_cannot_be_written_is_named(file, tmp_path):
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="Set MATMINER_DATA to a folder"):
        fetch(file, clock=FakeClock())


def test_place_address_and_digest_are_those_of_matminer(monkeypatch, tmp_path):
    from matminer.datasets.dataset_retrieval import get_dataset_attribute
    from matminer.datasets.utils import _get_data_home

    file = official_file(FORMATION_ENERGY.dataset)
    assert str(file.path) == _get_data_home() + "/matbench_mp_e_form.json.gz"
    assert file.url == get_dataset_attribute("matbench_mp_e_form", "url")
    assert file.sha256 == get_dataset_attribute("matbench_mp_e_form", "hash")
    assert file.n == 132_752
    monkeypatch.setenv("MATMINER_DATA", str(tmp_path))
    assert official_file(FORMATION_ENERGY.dataset).path.parent == tmp_path == Path(_get_data_home())
