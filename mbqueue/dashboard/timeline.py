"""When each session did what, from the queue's events: the timeline of the report.

Events tell when a job was claimed, when its data and model were loaded, and when it was given back or committed.
Publishing to a drive goes on beside the training and takes none of its time, so it is not in here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mbqueue.queue.jobs import LOADED_NOTE, Event, SessionRow, State
from mbqueue.results.report.sessions import Span


def timeline(
    sessions: Sequence[SessionRow],
    events: Iterable[Event],
    *,
    now: float,
    checkpoint_seconds: Mapping[int, float] | None = None,
) -> list[Span]:
    """Spans of the given sessions in order of their start.

    A span is of the job's kind (prepare, train, predict, record) when the work was committed or given back in
    good order; `load` before its data and model were there, `checkpoint` for what saving took of it (drawn at its
    end); `cut off` when the session died or lost the lease in it (what it had saved was still used); `failed`;
    and `idle` for what is left of a session: start-up, waiting, and jobs of other experiments.

    Args:
        sessions: whose time is drawn.
        events: of one experiment or all, oldest first.
        now: ends what is still going on.
        checkpoint_seconds: what saving took, by job id, of committed epochs.
    """
    rows = {row.id: row for row in sessions}
    spans = list(_jobs(rows, events, now, checkpoint_seconds or {}))
    idle = [gap for row in sessions for gap in _gaps(row, [span for span in spans if span.session == row.id], now)]
    return sorted([*spans, *idle], key=lambda span: (rows[span.session].started_at, span.session, span.start))


def _jobs(
    rows: dict[str, SessionRow], events: Iterable[Event], now: float, checkpoint_seconds: Mapping[int, float]
) -> Iterable[Span]:
    claimed: dict[int, Event] = {}
    loaded: dict[int, float] = {}
    for event in events:
        job = event.job_id
        if job is None:
            continue
        if event.to_state is None and event.why == LOADED_NOTE:
            loaded[job] = event.at
        if event.from_state is State.LEASED and job in claimed:
            claim = claimed.pop(job)
            saving = checkpoint_seconds.get(job, 0.0) if event.to_state is State.COMMITTED else 0.0
            yield from _spans(rows, claim, event.at, _bad_ending(claim, event), loaded.pop(job, claim.at), saving)
        if event.to_state is State.LEASED:
            claimed[job] = event
            loaded.pop(job, None)
    for job, claim in claimed.items():
        yield from _spans(rows, claim, now, None, loaded.get(job, claim.at), 0.0)


def _bad_ending(claim: Event, end: Event) -> str | None:
    """The kind of a span that did not end in good order, or None."""
    if end.by != claim.by:
        return "cut off"
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
    """When the session ended, or until when it was believed to live."""
    return min(now if row.ended_at is None else row.ended_at, row.alive_until)
