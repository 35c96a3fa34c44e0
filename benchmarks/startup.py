"""Measure how long `mbqueue status` takes in a shell, in a project with many jobs.

    python -m benchmarks.startup --jobs 1000 100000

Each round starts the command in a new process, and discards its output. The benchmark prints the median wall time and
the median CPU time, which depends less on other work on the machine. `--floor` also measures two lower bounds: Python
without libraries, and Python with only the command line's libraries.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mbqueue import Project
from mbqueue.experiment import parse_spec
from mbqueue.queue import Queue

EPOCHS = 19  # 5 folds × (19 epochs + predict) + prepare + record = 102 jobs in an experiment
JOBS_OF_ONE = 102


def make_project(folder: Path, jobs: int) -> Path:
    """Make a project whose queue has at least this many jobs."""
    project = Project.create(folder)
    spec = parse_spec({"name": "x", "data": {"dataset": "sample"}, "train": {"epochs": EPOCHS}}, source="benchmark")
    with Queue(project.folder.queue_db) as queue:
        for number in range(-(-jobs // JOBS_OF_ONE)):
            queue.enqueue(spec.model_copy(update={"name": f"x{number}"}), results_dir=f"results/x{number}", now=1.0)
    return folder


def measure(command: list[str], rounds: int) -> tuple[float, float]:
    """Measure the median wall time and CPU time of a run, in seconds, leaving out the first run, which fills caches."""
    clock, processor = [], []
    for _ in range(rounds + 1):
        before, began = os.times(), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        clock.append(time.perf_counter() - began)
        processor.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return statistics.median(clock[1:]), statistics.median(processor[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--floor", action="store_true")
    options = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as scratch:
        commands = {}
        if options.floor:
            commands["python"] = [sys.executable, "-c", "pass"]
            commands["python, typer, rich"] = [sys.executable, "-c", "import typer, rich.console"]
        for jobs in options.jobs:
            folder = make_project(Path(scratch, str(jobs)), jobs)
            commands[f"status, {jobs:,} jobs"] = [
                sys.executable, "-m", "mbqueue", "--project", str(folder), "status"
            ]  # fmt: skip
        for name, command in commands.items():
            clock, processor = measure(command, options.rounds)
            print(f"{name:24} {clock:6.3f} s   {processor:6.3f} s of CPU")


if __name__ == "__main__":
    main()
