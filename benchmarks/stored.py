"""Check that mbqueue does not compute stored backbone outputs again.

    python -m benchmarks.stored --data FILE --limit 4000

In a new project, the benchmark runs ``pretrained_infer``, then ``head_finetune`` for one epoch, on the same crystals.
For each job, the benchmark prints the wall time and the number of crystals whose graphs went through the backbone. To
measure a different version of mbqueue, put its folder first on PYTHONPATH. All versions draw the same crystals for the
same ``data.limit``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbqueue.experiment import load_spec
from mbqueue.project import init_project
from mbqueue.queue.jobs import Job
from mbqueue.queue.opening import open_queue
from mbqueue.session.options import WorkOptions
from mbqueue.session.report import Report
from mbqueue.session.worker import work
from mbqueue.train.feeds import GraphFeed


class Ledger(Report):
    """A report that prints a line for each finished job."""

    def __init__(self) -> None:
        self.crystals = 0
        self.total = (0.0, 0)
        self._begun = (0.0, 0)

    def job_started(self, job: Job) -> None:  # noqa: ARG002
        self._begun = time.monotonic(), self.crystals

    def job_finished(self, job: Job, summary: str) -> None:
        seconds, crystals = time.monotonic() - self._begun[0], self.crystals - self._begun[1]
        self.total = self.total[0] + seconds, self.total[1] + crystals
        print(f"{job.label:<44}{seconds:>10.1f} s{crystals:>10} crystals  {summary}", flush=True)

    def job_failed(self, job: Job, error: BaseException, retry_at: float | None) -> None:  # noqa: ARG002
        raise error

    def note(self, text: str) -> None:
        print(f"note: {text}", flush=True)


def run(data: Path, limit: int, device: str, root: Path) -> None:
    """Run both experiments, one after the other."""
    project, _ = init_project(root)
    ledger = Ledger()
    load = GraphFeed.load

    def counted(feed: GraphFeed, rows: Any, *arguments: Any) -> Any:
        ledger.crystals += len(rows)
        return load(feed, rows, *arguments)

    GraphFeed.load = counted  # type: ignore[method-assign]
    for name in ("pretrained_infer", "head_finetune"):
        overrides: Mapping[str, Any] = {"data.dataset": str(data.resolve()), "data.limit": limit}
        if name == "head_finetune":
            overrides = {**overrides, "train.epochs": 1}
        spec = load_spec(project.experiment_file(name), overrides=dict(overrides))
        with open_queue(project) as queue:
            queue.enqueue(spec, results_dir=project.results_folder("2026-01-01", spec.folder_name), now=time.time())
        ledger.total = (0.0, 0)
        work(project, WorkOptions(device=device), report=ledger)
        print(f"{name:<44}{ledger.total[0]:>10.1f} s{ledger.total[1]:>10} crystals", flush=True)


def main() -> None:
    """Parse the command line, and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a file of crystals with targets")
    parser.add_argument("--limit", type=int, default=0, help="crystals to draw; 0 for all")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(arguments.data, arguments.limit, arguments.device, Path(folder))


if __name__ == "__main__":
    main()
