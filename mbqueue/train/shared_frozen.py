"""What a frozen backbone gives, in the object store: made once, on whichever machine prepares, and read by the others.

Energies and features of 132,752 crystals take a GPU minutes and a CPU hours, so they are kept; graphs are not, because
they are made from the crystals faster than a link of 100 MB/s brings them. A shard is KIND-NUMBER-HASH.npy, and
KIND-NUMBER.json, put by `create`: of two machines that made one shard the first decides which bytes all others use, for
two devices do not agree in the last digits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from mbqueue.objects import ObjectStore
from mbqueue.train.frozen import FrozenBackbone, Progress

FROZEN = "frozen"
LARGEST_LISTING = 1 << 16
LARGEST_SHARD = 1 << 30
#: Requests at once: most of a small object's time is waiting.
_AT_ONCE = 8
_SHA256 = re.compile(r"[0-9a-f]{64}")


def send_shards(store: ObjectStore, frozen: FrozenBackbone, kinds: Sequence[str]) -> None:
    """Put every whole shard into the store that is not there."""
    prefix = _prefix(frozen)
    there = set(store.names(prefix))

    def send(kind: str, shard: int) -> None:
        content, listing = frozen.exported(kind, shard)
        store.put(f"{prefix}/{_file(kind, shard, listing['sha256'])}", content)
        store.create(f"{prefix}/{kind}-{shard:05d}.json", json.dumps(listing).encode())

    missing = {kind: set(frozen.missing(kind)) for kind in kinds}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        waiting = [
            pool.submit(send, kind, shard)
            for kind in kinds
            for shard in range(frozen.n_shards)
            if shard not in missing[kind] and f"{kind}-{shard:05d}.json" not in there
        ]
        for one in waiting:
            one.result()


def fetch_shards(
    store: ObjectStore,
    frozen: FrozenBackbone,
    kinds: Sequence[str],
    *,
    should_stop: Callable[[], bool],
    on_progress: Callable[[Progress], None],
) -> None:
    """Take every shard from the store that is missing here and whole there; what is left is to be computed."""
    prefix = _prefix(frozen)
    there = set(store.names(prefix))
    wanted = [
        (kind, shard)
        for kind in kinds
        for shard in frozen.missing(kind, verify=True)
        if f"{kind}-{shard:05d}.json" in there
    ]

    def fetch(kind: str, shard: int) -> None:
        if should_stop():
            return
        try:
            listing = json.loads(store.read(f"{prefix}/{kind}-{shard:05d}.json", at_most=LARGEST_LISTING))
            if not _SHA256.fullmatch(listing["sha256"]):
                return  # somebody else's
            content = store.read(f"{prefix}/{_file(kind, shard, listing['sha256'])}", at_most=LARGEST_SHARD)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return  # not whole: computed
        frozen.install(kind, shard, content, listing)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done, one in enumerate([pool.submit(fetch, kind, shard) for kind, shard in wanted], start=1):
            one.result()
            on_progress(Progress(done=done, total=len(wanted)))


def _prefix(frozen: FrozenBackbone) -> str:
    return f"{FROZEN}/{frozen.folder.name}"


def _file(kind: str, shard: int, sha256: str) -> str:
    return f"{kind}-{shard:05d}-{sha256[:16]}.npy"
