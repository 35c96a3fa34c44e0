"""Compute the report's timeline, which shows what each session did and when, from the queue's events.

Events record when a job was claimed, when its data and model were loaded, and when it was released or committed. On a
drive, events also record when a session published, and for how long. A session publishes while it trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mbqueue.queue.jobs import LOADED_NOTE, Event, Kind, SessionRow, State, published_seconds
from mbqueue.results.report.sessions import CUT_OFF, LOST, PUBLISH, Span


def timeline(
    sessions: Sequence[SessionRow],
    events: Iterable[Event],
    *,
    now: float,
    results: Mapping[int, Mapping[str, Any]] | None = None,
) -> list[Span]:
    """Divide the time of sessions into spans, each with a kind.

    If the work of a job was committed or properly released, the span has the job's kind: prepare, train, predict or
    record. The other kinds are:

    * `load`: loading the data and the model.
    * `checkpoint`: writing checkpoints, shown at the end of the attempt.
    * `repeated`: work that had to be repeated because the session died or lost its lease, shown at the end of the
      attempt.
    * `cut off`: an attempt of a session that died or lost its lease, if the lost part of the work is unknown.
    * `failed`: an attempt that ended with an error.
    * `idle`: all other time of a session, such as start-up, waiting, and jobs of other experiments.
    * `publish`: publishing to a drive, which may overlap with spans of other kinds.

    Args:
        sessions: the sessions in the timeline.
        events: events of one experiment or of all experiments, oldest first, and events of publishing.
        now: the current time, at which unfinished spans end, as a Unix timestamp.
        results: job id → result of the committed job; only the keys `seconds` and `checkpoint_seconds` are used.

    Returns:
        The spans, sorted by session, then by start.
    """
    rows = {row.id: row for row in sessions}
    events = list(events)
    spans = [span for job in _jobs(rows, events, now, results or {}) for span in job]
    idle = [gap for row in sessions for gap in _gaps(row, [span for span in spans if span.session == row.id], now)]
    return sorted(
        [*spans, *idle, *_publishing(rows, events)],
        key=lambda span: (rows[span.session].started_at, span.session, span.start),
    )


def _jobs(
    rows: dict[str, SessionRow], events: Iterable[Event], now: float, results: Mapping[int, Mapping[str, Any]]
) -> Iterable[list[Span]]:
    claimed: dict[int, Event] = {}
    loaded: dict[int, float] = {}
    spans: dict[int, list[Span]] = {}
    committed: dict[int, Event] = {}
    for event in events:
        job = event.job_id
        if job is None:
            continue
        if event.to_state is None and event.why == LOADED_NOTE:
            loaded[job] = event.at
        if event.from_state is State.LEASED and job in claimed:
            claim = claimed.pop(job)
            is_committed = event.to_state is State.COMMITTED
            saving = results.get(job, {}).get("checkpoint_seconds", 0.0) if is_committed else 0.0
            ending = _bad_ending(claim, event)
            found = _spans(rows, claim, event.at, ending, loaded.pop(job, claim.at), saving)
            spans.setdefault(job, []).extend(found)
            if is_committed:
                committed[job] = event
        if event.to_state is State.LEASED:
            claimed[job] = event
            committed.pop(job, None)
            loaded.pop(job, None)
    for job, claim in claimed.items():
        spans.setdefault(job, []).extend(_spans(rows, claim, now, None, loaded.get(job, claim.at), 0.0))
    for job, found in spans.items():
        end = committed.get(job)
        kept = None if end is None else _kept(end.kind, results.get(job, {}))
        yield found if end is None or kept is None else _with_losses(found, str(end.kind), kept)


def _kept(kind: Kind | None, result: Mapping[str, Any]) -> float | None:
    """Seconds of work, over all attempts, that are part of a finished job's result; None if unknown."""
    if kind is Kind.TRAIN:
        return result.get("seconds")
    # If a `predict` or `record` job runs again, it starts over. If a `prepare` job runs again, it keeps complete
    # shards, but the time that they took is unknown.
    return None if kind is Kind.PREPARE else 0.0


def _with_losses(spans: list[Span], work: str, kept: float) -> list[Span]:
    """Mark which work was lost in the attempts that were cut off, given the spans of a finished job.

    The lost time is divided among the attempts that were cut off, in proportion to their lengths.

    Args:
        work: the kind of the attempts that were not cut off, such as ``train``.
        kept: seconds of work that are part of the job's result.
    """
    cut_off = sum(span.end - span.start for span in spans if span.kind == CUT_OFF)
    worked = cut_off + sum(span.end - span.start for span in spans if span.kind == work)
    share = min(1.0, max(0.0, worked - kept) / cut_off) if cut_off else 0.0
    found = []
    for span in spans:
        if span.kind != CUT_OFF:
            found.append(span)
            continue
        lost_from = span.end - share * (span.end - span.start)
        found += [replace(span, kind=work, end=lost_from), replace(span, kind=LOST, start=lost_from)]
    return [span for span in found if span.end > span.start]


def _publishing(rows: dict[str, SessionRow], events: Iterable[Event]) -> Iterable[Span]:
    for event in events:
        seconds = published_seconds(event.why)
        row = rows.get(event.by)
        if seconds is not None and row is not None:
            start = max(event.at - seconds, row.started_at)
            yield Span(session=row.id, device=row.device, start=start, end=event.at, kind=PUBLISH)


def _bad_ending(claim: Event, end: Event) -> str | None:
    """The kind of a span whose attempt failed or was cut off; None if the attempt ended properly."""
    if end.by != claim.by:
        return CUT_OFF
    return "failed" if end.to_state is State.FAILED or end.why.startswith("failed") else None


def _spans(
    rows: dict[str, SessionRow], claim: Event, end: float, bad: str | None, loaded_at: float, saving: float
) -> Iterable[Span]:
    row = rows.get(claim.by)
    if row is None:
        return
    end = min(end, _last_sign(row, now=end))
    fold = "" if claim.fold is None else f"fold {claim.fold}"
    epoch = "" if claim.epoch is None else f" epoch {claim.epoch}"
    loaded_at = min(max(loaded_at, claim.at), end)
    saved_from = max(loaded_at, end - saving)
    for kind, start, stop in (
        ("load", claim.at, loaded_at),
        (bad or str(claim.kind), loaded_at, saved_from),
        ("checkpoint", saved_from, end),
    ):
        if stop > start:
            yield Span(
                session=row.id,
                device=row.device,
                start=start,
                end=stop,
                kind=kind,
                label=f"{claim.experiment} {fold}{epoch}".strip(),
            )


def _gaps(row: SessionRow, spans: Sequence[Span], now: float) -> Iterable[Span]:
    at = row.started_at
    busy = sorted((span.start, span.end) for span in spans)
    for start, end in [*busy, (_last_sign(row, now=now), 0.0)]:
        if start > at:
            yield Span(session=row.id, device=row.device, start=at, end=start, kind="idle")
        at = max(at, end)


def _last_sign(row: SessionRow, *, now: float) -> float:
    """When a session ended or, if it died, when it stopped counting as live."""
    return min(now if row.ended_at is None else row.ended_at, row.alive_until)
