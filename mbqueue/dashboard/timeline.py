"""When each session did what, from the queue's events: the timeline of the report.

Events tell when a job was claimed and when it was given back or committed, not what happened in between; loading,
checkpoints and publishing are part of the job that they belong to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mbqueue.queue.jobs import Event, SessionRow, State
from mbqueue.results.report.sessions import Span


def timeline(sessions: Sequence[SessionRow], events: Iterable[Event], *, now: float) -> list[Span]:
    """Spans of the given sessions in order of their start.

    A span is of the job's kind (prepare, train, predict, record) when the work was committed or given back in
    good order; `cut off` when the session died or lost the lease in it (what it had saved was still used); `failed`;
    and `idle` for what is left of a session: start-up, waiting, and jobs of other experiments.

    Args:
        sessions: whose time is drawn.
        events: of one experiment or all, oldest first.
        now: ends what is still going on.
    """
    rows = {row.id: row for row in sessions}
    spans = list(_jobs(rows, events, now))
    idle = [gap for row in sessions for gap in _gaps(row, [span for span in spans if span.session == row.id], now)]
    return sorted([*spans, *idle], key=lambda span: (rows[span.session].started_at, span.session, span.start))


def _jobs(rows: dict[str, SessionRow], events: Iterable[Event], now: float) -> Iterable[Span]:
    claimed: dict[int, Event] = {}
    for event in events:
        if event.job_id is None:
            continue
        if event.from_state is State.LEASED and event.job_id in claimed:
            claim = claimed.pop(event.job_id)
            yield from _span(rows, claim, event.at, _bad_ending(claim, event))
        if event.to_state is State.LEASED:
            claimed[event.job_id] = event
    for claim in claimed.values():
        yield from _span(rows, claim, now, None)


def _bad_ending(claim: Event, end: Event) -> str | None:
    """The kind of a span that did not end in good order, or None."""
    if end.by != claim.by:
        return "cut off"
    return "failed" if end.to_state is State.FAILED or end.why.startswith("failed") else None


def _span(rows: dict[str, SessionRow], claim: Event, end: float, bad: str | None) -> Iterable[Span]:
    row = rows.get(claim.by)
    if row is None:
        return
    end = min(end, _last_sign(row, now=end))
    if end > claim.at:
        fold = "" if claim.fold is None else f"fold {claim.fold}"
        epoch = "" if claim.epoch is None else f" epoch {claim.epoch}"
        yield Span(
            session=row.id,
            device=row.device,
            start=claim.at,
            end=end,
            kind=bad or str(claim.kind),
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
    """When the session ended, or until when it was believed to live."""
    return min(now if row.ended_at is None else row.ended_at, row.alive_until)
