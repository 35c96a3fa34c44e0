"""Every error that mbqueue raises on purpose.

    MbqueueError                 root: what went wrong, where, and what to do next
    ├── UsageError               the command or its arguments cannot be carried out (exit code 2)
    │   ├── ProjectNotFound      no project folder here
    │   ├── SpecError            an experiment file or an override is wrong
    │   ├── ExperimentExists     same name, other spec
    │   └── SearchUnavailable    Optuna, which searches need, is not installed
    ├── DataError                a dataset cannot be read as it is
    │   ├── InvalidCrystals      some entries are bad; carries their ids and reasons
    │   ├── SourceAway           it cannot be had just now; a later attempt may succeed
    │   └── CacheError           a cache file is missing, damaged or of another version
    ├── QueueError               the queue cannot do what was asked
    │   ├── LeaseLost            this worker no longer holds the job; nothing was written
    │   │   └── CommitTaken      another writer made the commit first; nothing was written
    │   ├── RewoundBefore        the same damage is found again in what was made again because of it
    │   ├── ForbiddenTransition  a change of state that the table of transitions does not allow
    │   ├── SchemaTooNew         the database was written by a newer mbqueue
    │   ├── QueueLost            its file, or what was in it, is gone; there is work of it to rebuild it from
    │   ├── QueueDamaged         its file is not a whole queue
    │   ├── QueueDiskFull        the disk that its file is on is full; nothing was changed
    │   ├── QueueReplaced        another file took the place of the one that is open; nothing was written
    │   └── QueueMoved           the queue is in another database now
    ├── SessionError             a session in the background did not come to work
    ├── TrainingError            a training step cannot go on
    │   ├── NonFiniteLoss        loss, gradient or prediction is nan or inf; nothing of it is kept
    │   └── DeviceTooSmall       one crystal alone does not fit the device
    ├── DeviceBusy               one crystal alone does not fit what others leave of the device
    ├── CheckpointError          a checkpoint is damaged, foreign or does not fit
    ├── DeviceLost               the GPU stopped working; what is committed is safe
    ├── LimitReached             a limit of the surroundings (memory, size of a file); what is committed is safe
    ├── DiskFull                 the disk of the live state is full; what is committed is safe
    ├── StoreError               the object store is not there, refuses, or cannot do what commits need
    │   └── StoreAway            it does not answer just now; what is committed is safe
    ├── MembersNotRecorded       what an experiment is made from is not recorded just now; a later attempt may succeed
    └── ResultsError             result files are missing, incomplete or contradict each other

Only ``mbqueue.cli`` catches these. The message is one or more full sentences; it names the file, job or
crystal, and ends with what to do.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

#: What to do about an error of the file system.
_REMEDIES = {
    errno.ENOSPC: "The disk is full. Nothing that was saved is lost; free some space there and go on: mbqueue cache "
    "prune removes converted data that nothing needs.",
    errno.EDQUOT: "The quota is used up. Nothing that was saved is lost; free some space there and go on.",
    errno.EACCES: "Check the permissions of this file and of the folders above it.",
    errno.EPERM: "Check the permissions of this file and of the folders above it.",
    errno.EROFS: "The file system is read-only. Put the project where you may write.",
    errno.ENOTCONN: "The drive it lies on is gone. Mount it again (in Colab: drive.mount with force_remount=True).",
    errno.EIO: "The disk or drive does not answer. Is it still mounted? Mount it again, then go on.",
}


def remedy(error: BaseException) -> str:
    """What to do about an error that the system raised; empty where nothing more is known than it says itself."""
    return _REMEDIES.get(error.errno or 0, "") if isinstance(error, OSError) else ""


def causes(error: BaseException, *, hidden: bool = False) -> Iterator[BaseException]:
    """What caused an error, and what caused that; each once, though an error may be among its own causes.

    Args:
        hidden: also errors during whose handling another came up.
    """
    seen = {id(error)}
    cause = error.__cause__ or (error.__context__ if hidden else None)
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or (cause.__context__ if hidden else None)


class MbqueueError(Exception):
    """Root of the errors that mbqueue raises on purpose."""


class UsageError(MbqueueError):
    """The command or its arguments cannot be carried out."""


class ProjectNotFound(UsageError):
    """No project folder (one with jobs/ and state/) was found."""


class SpecError(UsageError):
    """An experiment file or an override is wrong."""


class ExperimentExists(UsageError):
    """An experiment of this name is enqueued with another spec."""


class SearchUnavailable(UsageError):
    """Searches need Optuna, and it is not installed."""


class DataError(MbqueueError):
    """A dataset cannot be read as it is."""


class InvalidCrystals(DataError):
    """Some entries of a dataset are bad.

    Attributes:
        offenders: pairs (crystal id, reason), in the order of the dataset, all of them.
    """

    #: How many offenders the message lists before it only counts the rest.
    LISTED = 20

    def __init__(self, source: str, offenders: Sequence[tuple[str, str]]) -> None:
        self.source = source
        self.offenders = tuple(offenders)
        listed = "\n".join(f"  {crystal_id}: {why}" for crystal_id, why in self.offenders[: self.LISTED])
        rest = len(self.offenders) - self.LISTED
        more = f"\n  … and {rest} more" if rest > 0 else ""
        super().__init__(
            f"{len(self.offenders)} entries of {source} cannot be used:\n{listed}{more}\n"
            "Fix them, or leave them out and have them listed: drop_invalid = true in [data] of an experiment "
            "(--drop-invalid of enqueue), or --drop-invalid of prepare and predict."
        )


class SourceAway(DataError):
    """A dataset cannot be had just now (no network, a disk that does not answer); a later attempt may succeed."""


class CacheError(DataError):
    """A cache file is missing, damaged or of another version."""


class QueueError(MbqueueError):
    """The queue cannot do what was asked."""


class LeaseLost(QueueError):
    """This worker no longer holds the job; nothing was written."""


class CommitTaken(LeaseLost):
    """Another writer made this commit first; nothing was written, and training goes on from what is there."""


class RewoundBefore(QueueError):
    """What was made again because of some damage has the same damage; nothing was written."""


class ForbiddenTransition(QueueError):
    """A change of state that the table of transitions does not allow."""


class SchemaTooNew(QueueError):
    """The database was written by a newer mbqueue than this one."""


class QueueLost(QueueError):
    """The queue, or what was in it, is gone, though work of it is there."""


class QueueDamaged(QueueError):
    """The queue's file is not a whole queue: what is in it is not what was written."""


class QueueDiskFull(QueueError):
    """The disk that the queue's file is on is full; nothing was changed."""


class QueueReplaced(QueueError):
    """Another file took the place of the queue's (recover, restore); nothing was written into either."""


class QueueMoved(QueueError):
    """The queue was moved to another database, and this one is not worked with any more."""


class SessionError(MbqueueError):
    """A session in the background did not come to work."""


class TrainingError(MbqueueError):
    """A training step cannot go on."""


class NonFiniteLoss(TrainingError):
    """Loss or gradient is nan or inf, or a prediction: raised before the optimizer step, or before it counts."""


class DeviceTooSmall(TrainingError):
    """One crystal alone does not fit the device's memory."""


class DeviceBusy(MbqueueError):
    """One crystal alone does not fit what others leave of a device's memory; there is nothing wrong with the work."""


class CheckpointError(MbqueueError):
    """A checkpoint is damaged, foreign or does not fit the model."""


class DeviceLost(MbqueueError):
    """The GPU stopped working; what is committed is safe.

    Attributes:
        why: what it says.
    """

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(
            f"The GPU stopped working ({why}). What is committed is safe; this process cannot use the GPU any more. "
            "Start a new session: mbqueue work (in a notebook, restart its kernel first). If that ends the same way, "
            "take another GPU, or --device cpu."
        )


class LimitReached(MbqueueError):
    """A limit of the surroundings, not of the work, was reached: memory, or the size of a file."""


class DiskFull(MbqueueError):
    """The disk of the live state is full; what is committed is safe."""


class StoreError(MbqueueError):
    """The object store is not there, refuses, or cannot do what commits need."""


class StoreAway(StoreError):
    """The object store does not answer just now; what is committed is safe."""


class MembersNotRecorded(MbqueueError):
    """What an experiment is made from is not recorded just now; a later attempt may succeed."""


class ResultsError(MbqueueError):
    """Result files are missing, incomplete or contradict each other."""
