"""Every error that mbqueue raises on purpose.

    MbqueueError                 base class: what went wrong, where, and what to do next
    ├── UsageError               the command or its arguments are wrong (exit code 2)
    │   ├── ProjectNotFound      there is no project folder
    │   ├── SpecError            an experiment file or an override is wrong
    │   ├── ExperimentExists     the queue has an experiment of this name with a different spec
    │   └── SearchUnavailable    searches need Optuna, which is not installed
    ├── DataError                a dataset cannot be read
    │   ├── ColumnMissing        a table lacks a column; also a UsageError, since an option can name another column
    │   ├── InvalidCrystals      some entries are invalid; has their ids and reasons
    │   ├── SourceAway           a dataset is temporarily unavailable
    │   └── CacheError           a cache file is missing, damaged or from a different version
    ├── QueueError               the queue refused an operation or could not complete it
    │   ├── LeaseLost            this worker no longer holds the job; nothing was written
    │   │   └── CommitTaken      another writer made the commit first; nothing was written
    │   ├── RewoundBefore        a damaged file was rebuilt, with the same damage
    │   ├── ForbiddenTransition  the transition table does not allow this change of state
    │   ├── SchemaTooNew         a newer mbqueue wrote the database
    │   ├── QueueMissing         nothing was ever enqueued
    │   ├── QueueLost            the queue's file or content is missing, but can be rebuilt
    │   ├── QueueDamaged         the queue's file is damaged
    │   ├── QueueDiskFull        the disk with the queue's file is full; nothing was changed
    │   ├── QueueReplaced        another file replaced the open one; nothing was written
    │   └── QueueMoved           the queue has moved to a different database
    ├── SessionError             a session in another process did not start, or failed
    ├── TrainingError            a training step failed
    │   ├── NonFiniteLoss        a loss, gradient or prediction is nan or inf, and was discarded
    │   └── DeviceTooSmall       a single crystal does not fit in the device's memory
    ├── DeviceBusy               a single crystal does not fit in the device's free memory
    ├── CheckpointError          a checkpoint is damaged, belongs elsewhere, or does not fit the model
    │   └── CheckpointMisfit     a checkpoint is intact, but this experiment or version cannot use it
    ├── DeviceLost               the GPU stopped working; committed work is safe
    ├── LimitReached             a system limit (memory, file size) was reached; committed work is safe
    ├── DiskFull                 the disk that holds the live state is full; committed work is safe
    ├── StoreError               the object store is missing, denies access, or lacks a needed feature
    │   └── StoreAway            the object store is not responding; committed work is safe
    ├── MembersNotRecorded       a member of a blend has not been recorded yet
    └── ResultsError             result files are missing, incomplete or contradictory

Only ``mbqueue.cli`` turns these errors into exit codes. An error's message consists of full sentences, names the file,
job or crystal, and ends with what to do.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

_REMEDIES = {
    errno.ENOSPC: "The disk is full. All saved work is safe. Free some space and resume: mbqueue cache prune removes "
    "converted data that no unfinished experiment needs.",
    errno.EDQUOT: "The disk quota is used up. All saved work is safe. Free some of the quota, then resume.",
    errno.EACCES: "Check the permissions of this file and of its parent folders.",
    errno.EPERM: "Check the permissions of this file and of its parent folders.",
    errno.EROFS: "The file system is read-only. Move the project to a writable folder.",
    errno.ENOTCONN: "The drive is gone. Mount it again (in Colab: drive.mount with force_remount=True).",
    errno.EIO: "The disk or drive is not responding. Check that it is mounted, then resume.",
}


def remedy(error: BaseException) -> str:
    """Advice for an operating system error; empty if there is none for this error."""
    return _REMEDIES.get(error.errno or 0, "") if isinstance(error, OSError) else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def causes(error: BaseException, *, hidden: bool = False) -> Iterator[BaseException]:
    """Yield the causes of an error, each once, even if the chain of causes is circular.

    Args:
        hidden: also follow implicit causes (``__context__``).
    """
    seen = {id(error)}
    cause = error.__cause__ or (error.__context__ if hidden else None)
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or (cause.__context__ if hidden else None)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Combine a number with a noun, for example ``1 job`` or ``1,200 jobs``.

    Args:
        plural: the plural of the noun; by default, the noun followed by an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


class MbqueueError(Exception):
    """Base class of the errors that mbqueue raises on purpose."""


class UsageError(MbqueueError):
    """The command cannot run with these arguments."""


class ProjectNotFound(UsageError):
    """mbqueue found no project folder (a folder that contains jobs/ and state/)."""


class SpecError(UsageError):
    """An experiment file or an override is wrong."""


class ExperimentExists(UsageError):
    """The queue already has an experiment of this name, with a different spec."""


class SearchUnavailable(UsageError):
    """Searches need Optuna, which is not installed."""


class DataError(MbqueueError):
    """A dataset cannot be read."""


#: The advice for changing the options of an enqueued experiment whose `prepare` job failed.
UNDER_A_NEW_NAME = (
    "If the experiment is already enqueued, enqueue it again under a new name (--name NAME-2), because the options of "
    "an enqueued experiment never change."
)


#: The last sentence of an error that no retry can fix, because the spec of an enqueued experiment never changes.
#: Queues store error messages, so `next_step` also finds this sentence in old queues.
ONLY_UNDER_A_NEW_NAME = "Then enqueue the experiment under a new name (--name)."


def next_step(message: str, experiment: str, fold: int | None = None) -> str:
    """Return what the user can do about a failed job with this error message."""
    if ONLY_UNDER_A_NEW_NAME in message:
        return "enqueue the experiment again under a new name (--name)"
    only = "" if fold is None else f" --fold {fold}"
    return f"after fixing the cause: mbqueue retry {experiment}{only}"


class InvalidCrystals(DataError):
    """Some entries of a dataset are invalid.

    Attributes:
        offenders: a (crystal id, reason) pair for each invalid entry, in the order of the dataset.
        columns: a description of the columns that mbqueue read; empty if unknown.
    """

    #: The message lists at most this many invalid entries, then says how many more there are.
    LISTED = 20

    def __init__(self, source: str, offenders: Sequence[tuple[str, str]], columns: str = "") -> None:
        self.source = source
        self.offenders = tuple(offenders)
        listed = "\n".join(f"  {crystal_id}: {why}" for crystal_id, why in self.offenders[: self.LISTED])
        rest = len(self.offenders) - self.LISTED
        more = f"\n  … and {rest} more" if rest > 0 else ""
        self.columns = columns
        read = f"The columns were: {columns}.\n" if columns else ""
        super().__init__(
            f"{counted(len(self.offenders), 'entry', 'entries')} of {source} cannot be used:\n{listed}{more}\n{read}"
            "Fix them (and run mbqueue retry for a failed experiment), or use "
            "--drop-invalid of enqueue, prepare or predict to leave them out and list them. " + UNDER_A_NEW_NAME
        )


class ColumnMissing(UsageError, DataError):
    """A table lacks a column that the user named or that mbqueue needs."""


class SourceAway(DataError):
    """A dataset is temporarily unavailable, for example because the network is down. Retrying later may help."""


class CacheError(DataError):
    """A cache file is missing, is damaged, or was written by a different version of mbqueue."""


class QueueError(MbqueueError):
    """The queue refused an operation or could not complete it."""


class LeaseLost(QueueError):
    """This worker no longer holds the job's lease. Nothing was written."""


class CommitTaken(LeaseLost):
    """Another writer made this commit first. Nothing was written; training continues from the other writer's commit."""


class RewoundBefore(QueueError):
    """A damaged file was rebuilt, and the new file has the same damage. Nothing was written."""


class ForbiddenTransition(QueueError):
    """The transition table does not allow this change of a job's state."""


class SchemaTooNew(QueueError):
    """A newer version of mbqueue wrote the database."""


class QueueMissing(QueueError):
    """There is no queue, because nothing has ever been enqueued."""


class QueueLost(QueueError):
    """The queue or its content is missing, but results or checkpoints exist, so the queue can be rebuilt."""


class QueueDamaged(QueueError):
    """The queue's file is damaged: its content differs from what mbqueue wrote."""


class QueueDiskFull(QueueError):
    """The disk with the queue's file is full; nothing was changed."""


class QueueReplaced(QueueError):
    """The queue's file was replaced, for example by `recover` or `restore`; nothing was written."""


class QueueMoved(QueueError):
    """The queue has moved to a different database. The old database refuses all work."""


class SessionError(MbqueueError):
    """A session in another process did not start, or failed."""


class TrainingError(MbqueueError):
    """A training step failed."""


class NonFiniteLoss(TrainingError):
    """A loss, gradient or prediction is nan or inf. mbqueue discards that step or prediction."""


class DeviceTooSmall(TrainingError):
    """A single crystal does not fit in the device's memory."""


class DeviceBusy(MbqueueError):
    """Other programs are using so much of the device's memory that not even a single crystal fits.

    If a job ends with this error, the queue does not count a failed attempt.
    """


class CheckpointError(MbqueueError):
    """A checkpoint is damaged, belongs to another experiment, or does not fit the model."""


class CheckpointMisfit(CheckpointError):
    """A checkpoint is intact, but this experiment or this version of mbqueue cannot use it."""


class DeviceLost(MbqueueError):
    """The GPU stopped working; committed work is safe.

    Attributes:
        why: the GPU's error, in a few words.
    """

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(
            f"The GPU stopped working ({why}). Committed work is safe, but this process can no longer use the GPU. "
            "Start a new session: mbqueue work (in a notebook, restart the kernel first). If the new session "
            "also fails, use another GPU, or --device cpu."
        )


class LimitReached(MbqueueError):
    """The process reached a system limit on memory or file size; committed work is safe."""


class DiskFull(MbqueueError):
    """The disk that holds the live state is full. Committed work is safe."""


class StoreError(MbqueueError):
    """The object store is missing, denies access, or lacks a feature that commits need."""


class StoreAway(StoreError):
    """The object store is not responding; committed work is safe."""


class MembersNotRecorded(MbqueueError):
    """A blend's member has no recorded results yet, but a session can still produce them."""


class ResultsError(MbqueueError):
    """Result files are missing or incomplete, or they contradict each other."""
