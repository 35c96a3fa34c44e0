"""The queue of jobs: which job runs next, and which session holds it. The queue's code never imports torch."""

from mbqueue.queue.enqueueing import EnqueueOutcome, Outcome
from mbqueue.queue.jobs import Event, Experiment, Job, Kind, Lease, SessionRow, State
from mbqueue.queue.overview import Outlook
from mbqueue.queue.store import Queue

__all__ = [
    "EnqueueOutcome",
    "Event",
    "Experiment",
    "Job",
    "Kind",
    "Lease",
    "Outcome",
    "Outlook",
    "Queue",
    "SessionRow",
    "State",
]
