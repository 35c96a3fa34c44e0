"""The speed of a job in logs and terminals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_project import ManualClock, RememberedReport, enqueue, make_project, small_spec

from mbqueue.queue.jobs import Job, Kind, State
from mbqueue.queue.opening import open_queue
from mbqueue.session.narration import Narration
from mbqueue.session.options import WorkOptions
from mbqueue.session.pace import Pace
from mbqueue.session.worker import work


def job_of(kind: Kind) -> Job:
    values: dict[str, Any] = dict.fromkeys(Job.__dataclass_fields__)
    return Job(**{**values, "kind": kind, "state": State.LEASED, "experiment": "small", "fold": 0})


def test_a_pace_covers_only_this_session() -> None:
    clock = ManualClock()
    pace = Pace(clock)
    pace.reached(1000)
    assert pace.per_second is None, "what was there before took no time"
    clock.advance(10.0)
    pace.reached(1200)
    assert pace.per_second == 20.0


def test_a_log_shows_the_speed_and_time_left_of_a_job() -> None:
    said: list[str] = []
    narration = Narration(lambda text, _style: said.append(text))
    narration.advanced(job_of(Kind.PREDICT), "crystals", 1600, 21_578, {"per second": 57.08})
    assert said == ["small fold 0 predict: crystals 1600/21578, 57.1/s, 5m50s left"]


def test_a_terminal_shows_megabytes_a_second_while_a_source_is_read() -> None:
    shown: list[str] = []
    narration = Narration(lambda *_: None, show=shown.append)
    narration.advanced(job_of(Kind.PREPARE), "reading", 30_000_000, 40_000_000, {"per second": 2.5e6})
    assert shown == ["small fold 0 prepare: reading 75%, 4s left"]


def test_the_time_of_every_kind_of_job_is_measured(tmp_path: Path, report: RememberedReport) -> None:
    project = make_project(tmp_path)
    enqueue(project, small_spec(project, "pretrained_infer"))
    work(project, WorkOptions(device="cpu"), report=report)
    with open_queue(project) as queue:
        seconds = {job.kind: (job.result or {})["seconds"] for job in queue.jobs()}
        [experiment] = queue.overview(now=0.0)["experiments"]
    assert set(seconds) == {Kind.PREPARE, Kind.PREDICT, Kind.RECORD}
    assert all(value > 0 for value in seconds.values())
    assert experiment["seconds"] == sum(seconds.values())
    assert experiment["folds"][0]["epoch_seconds"] == 0.0
