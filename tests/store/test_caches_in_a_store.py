"""One machine makes expensive shared data, and all others download them from the store."""

from __future__ import annotations

import gzip
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from s3_server import S3Server
from small_project import make_project

from mbqueue.buckets import STORE_VARIABLE
from mbqueue.data.datasets import SAMPLE_FILE
from mbqueue.errors import StoreAway
from mbqueue.experiment import DataSpec
from mbqueue.project import STORED_FROZEN, ProjectFolder
from mbqueue.session.loading import LoadedData, load_data
from mbqueue.session.sources import DataRequest
from mbqueue.storage.objects import ObjectStore
from mbqueue.train import frozen as frozen_module
from mbqueue.train import shared_frozen
from mbqueue.train.frozen import FrozenBackbone, Preparing
from mbqueue.train.shared_frozen import fetch_shards, send_shards

KINDS = ("energies", "features")
SOURCE = "mine.jsonl"


@pytest.fixture
def store(s3: S3Server) -> ObjectStore:
    return ObjectStore.open(s3.new_store())


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_module, "SHARD_SIZE", 2)


def backbone(folder: Path) -> FrozenBackbone:
    """Five crystals of one to five atoms, in three shards."""
    offsets = np.array([0, 1, 3, 6, 10, 15], np.int64)
    return FrozenBackbone(folder / "frozen-d-w", atom_offsets=offsets, dataset_hash="d" * 64, weights="w" * 64)


def made(folder: Path, *, value: float) -> FrozenBackbone:
    """Return a complete cache whose energies and features are ``value`` plus the number of their shard."""
    frozen = backbone(folder)
    for shard in range(frozen.n_shards):
        rows = frozen.rows_of(shard)
        atoms = frozen.atom_offsets[rows[-1] + 1] - frozen.atom_offsets[rows[0]]
        frozen.write("energies", shard, np.full(len(rows), value + shard, np.float32))
        frozen.write("features", shard, np.full((int(atoms), 64), value + shard, np.float32))
    return frozen


def fetch(store: ObjectStore, frozen: FrozenBackbone) -> FrozenBackbone:
    fetch_shards(store, frozen, KINDS, should_stop=lambda: False, on_progress=lambda _done, _total: None)
    return frozen


def send(store: ObjectStore, frozen: FrozenBackbone) -> None:
    assert send_shards(store, frozen, KINDS, should_stop=lambda: False)


def test_what_one_machine_computed_another_reads(store: ObjectStore, tmp_path: Path) -> None:
    one = made(tmp_path / "one", value=1.0)
    send(store, one)
    two = fetch(store, backbone(tmp_path / "two"))
    assert not any(two.missing(kind, verify=True) for kind in KINDS)
    assert np.array_equal(two.energies(), one.energies())
    assert np.array_equal(two.features(np.arange(5)), one.features(np.arange(5)))


def test_the_first_machine_decides_which_bytes_all_use(store: ObjectStore, tmp_path: Path) -> None:
    send(store, made(tmp_path / "one", value=1.0))
    requests = dict(store.requests)
    send(store, made(tmp_path / "two", value=1.5))
    assert store.requests.get("put") == requests.get("put"), "nothing is sent twice"
    assert fetch(store, backbone(tmp_path / "three")).energies()[0] == 1.0


def test_of_two_machines_that_prepare_at_once_both_use_the_bytes_of_the_first(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second machine lists the store before the first has uploaded its shards."""
    one, two = made(tmp_path / "one", value=1.0), made(tmp_path / "two", value=1.5)
    late = ObjectStore.open(store.url)
    before = late.names(f"{STORED_FROZEN}/frozen-d-w")
    monkeypatch.setattr(late, "names", lambda _folder: before)
    send(store, one)
    send(late, two)
    assert np.array_equal(two.energies(), one.energies())
    assert np.array_equal(two.features(np.arange(5)), one.features(np.arange(5)))
    send(ObjectStore.open(store.url), two)  # both machines stored files under the same names
    assert np.array_equal(two.energies(), one.energies())


def test_a_machine_that_computed_its_own_before_it_knew_of_the_store_uses_what_all_use(
    store: ObjectStore, tmp_path: Path
) -> None:
    one, two = made(tmp_path / "one", value=1.0), made(tmp_path / "two", value=1.5)
    two.features(np.arange(5))  # memory-map the file before `fetch` replaces it
    send(store, one)
    fetch(store, two)
    assert np.array_equal(two.energies(), one.energies())
    assert np.array_equal(two.features(np.arange(5)), one.features(np.arange(5)))
    gets = store.requests["get"]
    fetch(store, two)
    assert store.requests["get"] == gets, "what is the same is known by its name"


def test_two_sessions_of_one_machine_fetch_each_shard_once(store: ObjectStore, tmp_path: Path) -> None:
    send(store, made(tmp_path / "one", value=1.0))
    stores = [ObjectStore.open(store.url) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda own: fetch(own, backbone(tmp_path / "two")), stores))
    assert sum(own.requests.get("get", 0) for own in stores) == 2 * 2 * backbone(tmp_path).n_shards
    assert not backbone(tmp_path / "two").missing("features", verify=True)


def test_preparing_writes_only_what_was_missing(tmp_path: Path) -> None:
    """The machine computes features and energies, but keeps the energies that are already stored."""
    frozen = made(tmp_path, value=1.0)
    for path in frozen.folder.glob("features-*"):
        path.unlink()
    energies = frozen.energies()

    def compute(rows: np.ndarray, _tell: object) -> tuple[np.ndarray, np.ndarray]:
        atoms = int(frozen.atom_offsets[rows[-1] + 1] - frozen.atom_offsets[rows[0]])
        return np.full((atoms, 64), 2.0, np.float32), np.full(len(rows), 2.0, np.float32)

    assert Preparing(frozen=frozen, compute=compute, kinds=KINDS).run()
    assert np.array_equal(frozen.energies(), energies)
    assert (frozen.features(np.arange(5)) == 2.0).all()


def test_a_shard_that_is_damaged_in_the_store_is_left_to_be_computed(store: ObjectStore, tmp_path: Path) -> None:
    send(store, made(tmp_path / "one", value=1.0))
    prefix = f"{STORED_FROZEN}/frozen-d-w"
    (name,) = [name for name in store.names(prefix) if name.startswith("energies-00001-")]
    content = bytearray(store.read(f"{prefix}/{name}", at_most=1 << 20))
    content[-1] ^= 1
    store.put(f"{prefix}/{name}", bytes(content))
    store.put(f"{prefix}/energies-00002.json", b'{"sha256": "../../../etc"}')
    two = fetch(store, backbone(tmp_path / "two"))
    assert two.missing("energies", verify=True) == [1, 2]
    assert two.missing("features", verify=True) == []


def load(project: ProjectFolder, dataset_hash: str | None, notes: list[str]) -> LoadedData:
    loaded = load_data(
        project,
        DataRequest(data=DataSpec(dataset=SOURCE)),
        dataset_hash=dataset_hash,
        progress=lambda _what: lambda _done, _total: None,
        note=notes.append,
    )
    assert loaded is not None
    return loaded


def test_a_new_machine_takes_the_crystals_from_the_store_and_needs_no_source(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORE_VARIABLE, store.url)
    one = make_project(tmp_path / "one")
    lines = gzip.decompress(SAMPLE_FILE.read_bytes()).splitlines(keepends=True)
    (one.root / SOURCE).write_bytes(b"".join(lines[:12]))
    notes: list[str] = []
    first = load(one, None, notes)
    again = load(make_project(tmp_path / "two"), first.crystals.hash, notes)
    assert again.crystals.hash == first.crystals.hash
    assert (again.source, again.dropped) == (first.source, first.dropped)
    assert [note for note in notes if not note.startswith("target: ")] == []
    assert len(store.names("crystals")) == 1


def test_a_session_that_is_to_stop_sends_no_more_shards(store: ObjectStore, tmp_path: Path) -> None:
    one = made(tmp_path / "one", value=1.0)
    assert not send_shards(store, one, KINDS, should_stop=lambda: True)
    assert store.names(f"{STORED_FROZEN}/frozen-d-w") == []
    assert send_shards(store, one, KINDS, should_stop=lambda: False)
    assert len(store.names(f"{STORED_FROZEN}/frozen-d-w")) == 12, "three shards of two kinds, two objects each"


def test_after_an_error_of_the_store_no_further_shard_is_begun(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_frozen, "_AT_ONCE", 1)
    asked: list[str] = []

    def away(path: str, _content: bytes) -> None:
        asked.append(path)
        raise StoreAway("it does not answer")

    monkeypatch.setattr(store, "put", away)
    with pytest.raises(StoreAway):
        send(store, made(tmp_path / "one", value=1.0))
    assert len(asked) == 1
