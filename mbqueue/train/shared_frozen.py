"""What a frozen backbone gives, in the object store: made once, on whichever machine prepares, and read by the others.

Energies and features of 132,752 crystals take a GPU minutes and a CPU hours, so they are kept; graphs are not, because
they are made from the crystals faster than a link of 100 MB/s brings them. A shard is KIND-NUMBER-HASH.npy, and
KIND-NUMBER.json, put by `create`: of two machines that made one shard the first decides which bytes all others use, for
two devices do not agree in the last digits.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from mbqueue.project import STORED_FROZEN
from mbqueue.storage.objects import ObjectStore
from mbqueue.train.frozen import FrozenBackbone, Progress

LARGEST_LISTING = 1 << 16
LARGEST_SHARD = 1 << 30
#: Requests at once: most of a small object's time is waiting.
_AT_ONCE = 8
_SHA256 = re.compile(r"[0-9a-f]{64}")


def send_shards(
    store: ObjectStore, frozen: FrozenBackbone, kinds: Sequence[str], *, should_stop: Callable[[], bool]
) -> bool:
    """Put every whole shard into the store that is not there; one that another machine put first replaces this one's.

    Returns:
        False when it was stopped before the end.

    Raises:
        StoreError: when the store does not take or give them.
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
    on_progress: Callable[[Progress], None],
) -> None:
    """Take from the store every shard that is whole there and missing or another here; the rest is to be computed.

    Another one is of a cache that this machine filled before it knew of the store.

    Raises:
        StoreError: when the store does not give them.
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
            # Another session on this machine may have fetched it meanwhile.
            if not (frozen.is_whole(kind, shard, verify=True) and _only_ours(frozen, kind, shard, there)):
                _take(store, frozen, kind, shard)

    for done, _ in enumerate(_several_at_once(fetch, wanted), start=1):
        on_progress(Progress(done=done, total=len(wanted)))


def _several_at_once(work: Callable[[str, int], None], shards: Sequence[tuple[str, int]]) -> Iterator[None]:
    """Do what there is to do for each shard, and tell after each; after the first error nothing more is begun."""
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
            has_failed.set()  # the caller may have enough shards
            raise


def _only_ours(frozen: FrozenBackbone, kind: str, shard: int, there: Collection[str]) -> bool:
    """Whether the store has no other bytes of a shard than this machine, by the names alone."""
    files = {name for name in there if name.startswith(f"{kind}-{shard:05d}-")}
    return files == {_file(kind, shard, frozen.sha256(kind, shard))}


def _take(store: ObjectStore, frozen: FrozenBackbone, kind: str, shard: int) -> None:
    """Make a shard what the store has, if that is whole."""
    prefix = _prefix(frozen)
    try:
        listing = json.loads(store.read(f"{prefix}/{_listing(kind, shard)}", at_most=LARGEST_LISTING))
        size = int(listing["size"])
        if not _SHA256.fullmatch(listing["sha256"]) or not 0 <= size <= LARGEST_SHARD:
            return  # of another program
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
