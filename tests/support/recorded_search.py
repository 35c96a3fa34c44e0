"""Workers for a search with a real queue and a real sampler and pruner, but recorded learning curves and no model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mbqueue.experiment import Spec, parse_spec
from mbqueue.queue import Kind, Queue
from mbqueue.search import steps
from mbqueue.search.file import Search

SPACE: dict[str, Any] = {
    "train.lr": {"low": 1e-4, "high": 1e-2, "log": True},
    "train.batch_size": {"choices": [16, 32, 64]},
    "train.ema_decay": {"choices": [0.0, 0.9], "when": {"train.batch_size": [16, 32]}},
    "train.unfreeze_epochs": {"low": 0, "high": 4, "step": 2},
}


def make_search(*, epochs: int = 8, base: Spec | None = None, **options: Any) -> Search:
    """A search of 12 trials with up to 8 epochs on one fold."""
    if base is None:
        content = {"name": "base", "data": {"dataset": "sample"}, "train": {"epochs": epochs}}
        base = parse_spec(content, source="test")
    asked = {"name": "hunt", "base": "base", "space": SPACE, "trials": 12, **options}
    return Search.model_validate({**asked, "base_spec": base.to_json()})


def val_mae(settings: Mapping[str, Any], fold: int, epoch: int) -> float:
    """Return the validation MAE for given settings; the best are a learning rate of 1e-3 and a batch size of 32."""
    lr, size = settings.get("train.lr", 1e-3), settings.get("train.batch_size", 32)
    off = abs(math.log10(lr) + 3) + 0.3 * abs(math.log2(size) - 5) + 0.05 * settings.get("train.unfreeze_epochs", 0)
    return 0.03 + 0.02 * off + 0.001 * fold + 0.08 / epoch


def enqueue(queue: Queue, search: Search, *, now: float = 0.0) -> None:
    """Begin the first trial of a search."""
    spec = steps.trial_spec(search, ())
    assert spec is not None
    queue.enqueue(spec, results_dir=f"results/{spec.name}", now=now)


def do_jobs(
    queue: Queue, session: str, *, now: Callable[[], float], jobs: int | None = None, pause: float = 0.0
) -> int:
    """Run ``jobs`` jobs, by default all, as a session does; return how many jobs were run."""
    done = 0
    while jobs is None or done < jobs:
        steps.begin_trials(queue, results_dir=lambda name: f"results/{name}", now=now(), by=session)
        lease = queue.claim(session, now=now(), lease_seconds=60)
        if lease is None:
            return done
        time.sleep(pause)
        if lease.job.kind is not Kind.TRAIN:
            queue.commit(lease, result={"dataset_hash": "d"}, now=now())
            done += 1
            continue
        spec = parse_spec(queue.experiment(lease.job.experiment).spec, source="test")
        fold, epoch = lease.job.fold, lease.job.epoch
        assert fold is not None
        assert epoch is not None
        assert spec.trial is not None
        settings = spec.trial.settings
        history = [{"epoch": n, "val_mae": val_mae(settings, fold, n), "seconds": 1.0} for n in range(1, epoch + 1)]
        why = steps.verdict(queue, spec, fold=fold, history=history, now=now())
        queue.commit(lease, result=history[-1], now=now(), skip_rest=why, prunes=why is not None)
        done += 1
    return done


def main(address: str) -> None:
    """Work on the queue at an address until no jobs are left; a test may kill this process at any instant."""
    from mbqueue.queue.opening import open_on_server

    with open_on_server(address) if address.startswith("postgresql:") else Queue(Path(address)) as queue:
        session = queue.start_session(device="recorded", now=time.time(), alive_seconds=60)
        while True:
            queue.reap_dead(by=session, now=time.time())
            do_jobs(queue, session, now=time.time, pause=0.02)
            if queue.outlook(now=time.time()).is_exhausted:
                break
            time.sleep(0.02)
        queue.end_session(session, reason="nothing is left", now=time.time())
