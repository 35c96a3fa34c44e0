"""Explain from the queue's overview why no session can run the unfinished jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def paused_jobs(overview: Mapping[str, Any]) -> dict[str, int]:
    """Map each experiment with ready jobs that are paused to the number of these jobs."""
    counts = {entry["name"]: _paused(entry) for entry in overview["experiments"]}
    return {name: count for name, count in counts.items() if count}


def obstacles(overview: Mapping[str, Any]) -> list[str]:
    """List what keeps the unfinished jobs from running, if no job can be claimed and none is leased.

    Returns:
        A clause for each obstacle, for example ``jobs failed``; an empty list if no job is unfinished. Cancelled jobs
        count as finished.
    """
    jobs = overview["jobs"]
    causes = {"jobs failed": jobs.get("failed"), "jobs are paused": paused_jobs(overview)}
    found = [text for text, is_true in causes.items() if is_true]
    is_unfinished = any(jobs.get(state) for state in ("waiting", "ready", "leased"))
    return found or (["jobs depend on cancelled jobs"] if is_unfinished else [])


def _paused(entry: Mapping[str, Any]) -> int:
    """Count the ready jobs of an experiment that are paused. You can pause and resume each fold by itself."""
    ready: int = entry["jobs"].get("ready", 0)
    of_folds = {fold["fold"]: int(fold["jobs"].get("ready", 0)) for fold in entry["folds"]}
    of_paused_folds = sum(of_folds[fold["fold"]] for fold in entry["folds"] if fold["state"] == "paused")
    return of_paused_folds + (ready - sum(of_folds.values()) if entry["paused"] else 0)
