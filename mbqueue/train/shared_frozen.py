"""Share a frozen backbone's outputs in the object store: one machine computes them, and other machines read them.

The backbone takes minutes on a GPU, or hours on a CPU, for 132,752 crystals, so machines share its outputs. Machines do
not share graphs, because converting the crystals is faster than downloading the graphs at 100 MB/s. A shard consists of
two objects, KIND-NUMBER-HASH.npy and KIND-NUMBER.json. Outputs computed on different devices differ in the last digits.
If several machines compute a shard, all of them therefore use the copy whose .json was stored first.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from mbqueue.project import STORED_FROZEN
from mbqueue.storage.objects import ObjectStore
from mbqueue.train.frozen import FrozenBackbone

LARGEST_LISTING = 1 << 16
LARGEST_SHARD = 1 << 30
#: The number of concurrent requests. A request for a small object spends most of its time waiting for the reply.
_AT_ONCE = 8
_SHA256 = re.compile(r"[0-9a-f]{64}")


def send_shards(
    store: ObjectStore, frozen: FrozenBackbone, kinds: Sequence[str], *, should_stop: Callable[[], bool]
) -> bool:
    """Upload every intact shard that is missing from the store.

    If another machine stores a shard first, download its copy.

    Returns:
        Whether all shards were uploaded; False if ``should_stop`` ended the upload.

    Raises:
        StoreError: if the store cannot be read or written.
    """
    prefix = _prefix(frozen)
    there = set(store.names(prefix))

    def send(kind: str, shard: int) -> None:
        if should_stop():
            return
        if _listing(kind, shard) not in there:
            content, listing = frozen.exported(kind, shard)
            store.put(f"{prefix}/{_file(kind, shard, listing['sha256'])}", content)
            if store.create_patiently(f"{prefix}/{_listing(kind, shard)}", json.dumps(listing).encode()):
                return
        elif _only_ours(frozen, kind, shard, there):
            return
        _take(store, frozen, kind, shard)

    missing = {kind: set(frozen.missing(kind)) for kind in kinds}
    shards = [(kind, shard) for kind in kinds for shard in range(frozen.n_shards) if shard not in missing[kind]]
    for _ in _several_at_once(send, shards):
        pass
    return not should_stop()


def fetch_shards(
    store: ObjectStore,
    frozen: FrozenBackbone,
    kinds: Sequence[str],
    *,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int, int], None],
) -> None:
    """Download every stored shard that is missing on this machine or differs from this machine's copy.

    This machine's copy of a shard can differ if the machine filled its cache before it used the store. This function
    does not compute shards that are missing from the store.

    Raises:
        StoreError: if the store cannot be read.
    """
    prefix = _prefix(frozen)
    there = set(store.names(prefix))
    missing = {kind: set(frozen.missing(kind, verify=True)) for kind in kinds}
    wanted = [
        (kind, shard)
        for kind in kinds
        for shard in range(frozen.n_shards)
        if _listing(kind, shard) in there and (shard in missing[kind] or not _only_ours(frozen, kind, shard, there))
    ]

    def fetch(kind: str, shard: int) -> None:
        with frozen.making(shard):
            if should_stop():
                return
            # Another session on this machine may have fetched the shard in the meantime.
            if not (frozen.is_whole(kind, shard, verify=True) and _only_ours(frozen, kind, shard, there)):
                _take(store, frozen, kind, shard)

    for done, _ in enumerate(_several_at_once(fetch, wanted), start=1):
        on_progress(done, len(wanted))


def _several_at_once(work: Callable[[str, int], None], shards: Sequence[tuple[str, int]]) -> Iterator[None]:
    """Process shards concurrently, and yield after each shard; stop starting new shards after the first error."""
    has_failed = threading.Event()

    def unless_failed(kind: str, shard: int) -> None:
        if has_failed.is_set():
            return
        try:
            work(kind, shard)
        except BaseException:
            has_failed.set()
            raise

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for one in [pool.submit(unless_failed, *shard) for shard in shards]:
                yield one.result()
        except BaseException:
            has_failed.set()  # runs even if the caller closes this generator early
            raise


def _only_ours(frozen: FrozenBackbone, kind: str, shard: int, there: Collection[str]) -> bool:
    """Whether the store's copy of a shard is identical to this machine's copy, judging by the hash in the file name."""
    files = {name for name in there if name.startswith(f"{kind}-{shard:05d}-")}
    return files == {_file(kind, shard, frozen.sha256(kind, shard))}


def _take(store: ObjectStore, frozen: FrozenBackbone, kind: str, shard: int) -> None:
    """Replace a shard with the store's copy, if that copy is intact."""
    prefix = _prefix(frozen)
    try:
        listing = json.loads(store.read(f"{prefix}/{_listing(kind, shard)}", at_most=LARGEST_LISTING))
        size = int(listing["size"])
        if not _SHA256.fullmatch(listing["sha256"]) or not 0 <= size <= LARGEST_SHARD:
            return  # mbqueue did not write this listing
        content = store.read(f"{prefix}/{_file(kind, shard, listing['sha256'])}", at_most=size)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return
    frozen.install(kind, shard, content, listing)


def _prefix(frozen: FrozenBackbone) -> str:
    return f"{STORED_FROZEN}/{frozen.folder.name}"


def _listing(kind: str, shard: int) -> str:
    return f"{kind}-{shard:05d}.json"


def _file(kind: str, shard: int, sha256: str) -> str:
    return f"{kind}-{shard:05d}-{sha256[:16]}.npy"
