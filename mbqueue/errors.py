"""Every error that mbqueue raises on purpose.

    MbqueueError                 root: what went wrong, where, and what to do next
    ├── UsageError               the command or its arguments cannot be carried out (exit code 2)
    │   ├── ProjectNotFound      no project folder here
    │   ├── SpecError            an experiment file or an override is wrong
    │   ├── ExperimentExists     same name, other spec
    │   └── SearchUnavailable    Optuna, which searches need, is not installed
    ├── DataError                a dataset cannot be read as it is
    │   ├── InvalidCrystals      some entries are bad; carries their ids and reasons
    │   ├── SourceAway           it is unavailable now; a later attempt may succeed
    │   └── CacheError           a cache file is missing, damaged or of another version
    ├── QueueError               the queue cannot do what was asked
    │   ├── LeaseLost            this worker no longer holds the job; nothing was written
    │   │   └── CommitTaken      another writer made the commit first; nothing was written
    │   ├── RewoundBefore        remaking damaged files gave the same damage
    │   ├── ForbiddenTransition  a change of state that the table of transitions does not allow
    │   ├── SchemaTooNew         the database was written by a newer mbqueue
    │   ├── QueueMissing         nothing was ever enqueued
    │   ├── QueueLost            its file or content is gone, but can be rebuilt
    │   ├── QueueDamaged         its file is damaged
    │   ├── QueueDiskFull        the disk of its file is full; nothing was changed
    │   ├── QueueReplaced        another file replaced the open one; nothing was written
    │   └── QueueMoved           the queue is in another database now
    ├── SessionError             a background session did not start
    ├── TrainingError            a training step failed
    │   ├── NonFiniteLoss        loss, gradient or prediction is nan or inf; it is not kept
    │   └── DeviceTooSmall       one crystal alone does not fit the device
    ├── DeviceBusy               one crystal alone does not fit the free memory of the device
    ├── CheckpointError          a checkpoint is damaged, foreign or does not fit
    │   └── CheckpointMisfit     it is whole, but this experiment or this version cannot use it
    ├── DeviceLost               the GPU stopped working; what is committed is safe
    ├── LimitReached             a limit of the system (memory, file size); what is committed is safe
    ├── DiskFull                 the disk of the live state is full; what is committed is safe
    ├── StoreError               the object store is missing, denies access, or lacks what commits need
    │   └── StoreAway            it does not answer now; what is committed is safe
    ├── MembersNotRecorded       a member of an experiment is not recorded yet; sessions can finish it
    └── ResultsError             result files are missing, incomplete or contradict each other

Only ``mbqueue.cli`` catches these. The message is one or more full sentences that name the file, job or crystal,
and end with what to do.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

#: Advice for file system errors.
_REMEDIES = {
    errno.ENOSPC: "The disk is full. All saved work is safe. Free some space and resume: mbqueue cache prune removes "
    "converted data that nothing needs.",
    errno.EDQUOT: "The quota is used up. All saved work is safe. Free some space there and resume.",
    errno.EACCES: "Check the permissions of this file and of the folders above it.",
    errno.EPERM: "Check the permissions of this file and of the folders above it.",
    errno.EROFS: "The file system is read-only. Move the project to a folder where you can write.",
    errno.ENOTCONN: "The drive is gone. Mount it again (in Colab: drive.mount with force_remount=True).",
    errno.EIO: "The disk or drive does not answer. Check that it is mounted, then resume.",
}


def remedy(error: BaseException) -> str:
    """Advice for an error of the operating system; empty if the error's own text says enough."""
    return _REMEDIES.get(error.errno or 0, "") if isinstance(error, OSError) else ""


def causes(error: BaseException, *, hidden: bool = False) -> Iterator[BaseException]:
    """The causes of an error, each once, even if the chain of causes is circular.

    Args:
        hidden: include errors during whose handling another error was raised.
    """
    seen = {id(error)}
    cause = error.__cause__ or (error.__context__ if hidden else None)
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or (cause.__context__ if hidden else None)


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with a noun, like ``1 job`` or ``2 jobs``; give ``plural`` if the plural is not the noun with an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


class MbqueueError(Exception):
    """Root of the errors that mbqueue raises on purpose."""


class UsageError(MbqueueError):
    """The command cannot run with these arguments."""


class ProjectNotFound(UsageError):
    """No project folder (one with jobs/ and state/) was found."""


class SpecError(UsageError):
    """An experiment file or an override is wrong."""


class ExperimentExists(UsageError):
    """An experiment of this name is in the queue with another spec."""


class SearchUnavailable(UsageError):
    """Searches need Optuna, and it is not installed."""


class DataError(MbqueueError):
    """A dataset cannot be read as it is."""


class InvalidCrystals(DataError):
    """Some entries of a dataset are bad.

    Attributes:
        offenders: pairs (crystal id, reason), in the order of the dataset, all of them.
        columns: a sentence about the columns that were read; empty if they are unknown.
    """

    #: How many offenders the message lists before it only counts the rest.
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
            "Fix them, or leave them out and list them: drop_invalid = true in [data] of an experiment "
            "(--drop-invalid of enqueue), or --drop-invalid of prepare and predict."
        )


class SourceAway(DataError):
    """A dataset is unavailable now (no network, a disk that does not answer); a later attempt may succeed."""


class CacheError(DataError):
    """A cache file is missing, damaged or of another version."""


class QueueError(MbqueueError):
    """The queue cannot do what was asked."""


class LeaseLost(QueueError):
    """This worker no longer holds the job; nothing was written."""


class CommitTaken(LeaseLost):
    """Another writer made this commit first; nothing was written, and training continues from that commit."""


class RewoundBefore(QueueError):
    """Remaking damaged files gave the same damage; nothing was written."""


class ForbiddenTransition(QueueError):
    """A change of state that the table of transitions does not allow."""


class SchemaTooNew(QueueError):
    """The database was written by a newer mbqueue than this one."""


class QueueMissing(QueueError):
    """There is no queue, since nothing was ever enqueued."""


class QueueLost(QueueError):
    """The queue or its content is gone, although its results or checkpoints exist."""


class QueueDamaged(QueueError):
    """The queue's file is damaged: its content has changed since it was written."""


class QueueDiskFull(QueueError):
    """The disk of the queue's file is full; nothing was changed."""


class QueueReplaced(QueueError):
    """Another file replaced the queue's file (after recover or restore); nothing was written to either file."""


class QueueMoved(QueueError):
    """The queue was moved to another database, and the old database refuses all work."""


class SessionError(MbqueueError):
    """A background session did not start."""


class TrainingError(MbqueueError):
    """A training step failed."""


class NonFiniteLoss(TrainingError):
    """A loss, gradient or prediction is nan or inf; raised before the optimizer step, or before the step counts."""


class DeviceTooSmall(TrainingError):
    """One crystal alone does not fit the device's memory."""


class DeviceBusy(MbqueueError):
    """One crystal alone does not fit the device memory that other programs leave free; the job itself is fine."""


class CheckpointError(MbqueueError):
    """A checkpoint is damaged, foreign or does not fit the model."""


class CheckpointMisfit(CheckpointError):
    """A checkpoint is whole, but this experiment or this version of mbqueue cannot use it."""


class DeviceLost(MbqueueError):
    """The GPU stopped working; what is committed is safe.

    Attributes:
        why: the reason.
    """

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(
            f"The GPU stopped working ({why}). What is committed is safe, but this process can no longer use the GPU. "
            "Start a new session: mbqueue work (in a notebook, restart its kernel first). If that fails, too, "
            "use another GPU, or --device cpu."
        )


class LimitReached(MbqueueError):
    """A limit of the system, not of the job, was reached: memory, or the size of a file."""


class DiskFull(MbqueueError):
    """The disk of the live state is full; what is committed is safe."""


class StoreError(MbqueueError):
    """The object store is missing, denies access, or lacks what commits need."""


class StoreAway(StoreError):
    """The object store does not answer now; what is committed is safe."""


class MembersNotRecorded(MbqueueError):
    """A member of an experiment is not recorded yet, and sessions can finish it."""


class ResultsError(MbqueueError):
    """Result files are missing, incomplete or contradict each other."""
