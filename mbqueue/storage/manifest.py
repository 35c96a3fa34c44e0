"""Define the manifest of a commit. Parse and check manifests as untrusted files. This module does not import torch.

`Manifest.rank` orders the commits of a fold: **further work first (epoch, finished, step), then the higher fence, then
the smaller SHA-256 of the checkpoint**. Sessions that could not see each other's commits may have trained the same
fold. The rank makes all sessions that see the same commits choose the same commit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mbqueue.errors import CheckpointError, CheckpointMisfit
from mbqueue.files import sha256_of_json
from mbqueue.project import NAME_PATTERN
from mbqueue.storage.names import CHECKPOINT, HIGHEST_FENCE, file_name, is_stem, stem_of
from mbqueue.task import N_FOLDS

FORMAT = 1
#: The largest accepted manifest, in bytes. A history of 10,000 epochs takes 4 MB.
LARGEST_MANIFEST = 16 << 20
#: The largest accepted checkpoint, in bytes. A checkpoint of CHGNet takes 5 MB.
LARGEST_CHECKPOINT = 1 << 30

#: The sort key of a fold's commits. mbqueue accepts the commit with the highest rank.
Rank = tuple[int, bool, int, int, int]

#: `identity_in_head` needs this many bytes of a manifest.
HEAD_BYTES = 1024
#: Matches the first keys of a manifest.
_HEAD = re.compile(rb'"experiment": "([^"]*)",\s*"spec_hash": "([^"]*)",\s*"dataset_hash": "[^"]*",\s*"fold": (\d)')
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything needed to resume from a commit, and to rebuild the queue from manifests alone.

    Attributes:
        best: epoch, val_mae and commit (stem) of the best finished epoch, or None.
        history: one row per finished epoch, with all columns of the history file.
        fingerprint: the device and the versions that wrote this commit; a different fingerprint can change the bytes
            of results.
        fingerprint_changes: one entry for each resume with a different fingerprint: epoch, step, session, changes.
        epoch_sessions: the sessions that worked on the epoch so far.
        epoch_seconds: seconds of work in the epoch so far.
        parent_sha256: hash of the checkpoint that this commit continues. The name of the checkpoint is not enough,
            because two sessions that cannot see each other's commits may choose the same name for different commits.
        enqueued: the experiment's entry in the queue, so that `mbqueue recover` can enqueue the experiment again.
        absent_elements: atomic numbers of elements that are missing from the fit of the element references.
    """

    experiment: str
    spec_hash: str
    dataset_hash: str
    fold: int
    epoch: int
    step: int
    steps_per_epoch: int
    complete: bool
    fence: int
    parent: str | None
    session: str
    written_at: str
    size: int
    sha256: str
    best: dict[str, Any] | None
    history: list[dict[str, Any]]
    fingerprint: dict[str, Any]
    fingerprint_changes: list[dict[str, Any]] = field(default_factory=list)
    epoch_sessions: list[str] = field(default_factory=list)
    epoch_seconds: float = 0.0
    absent_elements: list[int] = field(default_factory=list)
    parent_sha256: str | None = None
    enqueued: dict[str, Any] | None = None
    format: int = FORMAT

    @property
    def stem(self) -> str:
        """Name of the commit's files without the suffix."""
        return stem_of(epoch=self.epoch, step=None if self.complete else self.step, fence=self.fence)

    @property
    def needed_stems(self) -> tuple[str, str]:
        """The stems of the commits that a fold needs: the commit of its best epoch, and this commit.

        Both stems are equal if this commit has the best epoch, or if no epoch has finished.
        """
        return self.best["commit"] if self.best else self.stem, self.stem

    @property
    def finished_epochs(self) -> int:
        """The number of finished epochs in the commit."""
        return self.epoch if self.complete else self.epoch - 1

    @property
    def work(self) -> tuple[int, bool, int]:
        """The progress of the commit: the epoch, whether that epoch is finished, and the step."""
        return self.epoch, self.complete, self.step

    @property
    def rank(self) -> Rank:
        """The commit's position in the order of a fold's commits."""
        return (*self.work, self.fence, -int(self.sha256, 16))

    def continues(self, earlier: Manifest) -> bool:
        """Whether this commit continues ``earlier``, judging by the histories of both commits.

        If ``earlier`` is a mid-epoch checkpoint, the sessions that worked on its epoch count too.
        """
        rows = len(earlier.history)
        if earlier.spec_hash != self.spec_hash or earlier.rank > self.rank:
            return False
        if earlier.history != self.history[:rows]:
            return False
        if earlier.complete or earlier.sha256 == self.sha256:
            return True
        ahead = len(self.history) > rows
        worked = str(self.history[rows].get("session")).split("+") if ahead else self.epoch_sessions
        return self.epoch >= earlier.epoch and earlier.epoch_sessions == worked[: len(earlier.epoch_sessions)]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values. ``file`` names the checkpoint, and ``checksum`` covers all other keys."""
        content = {**asdict(self), "file": file_name(self.stem, CHECKPOINT)}
        return {**content, "checksum": sha256_of_json(content)}


@dataclass(frozen=True)
class Commit:
    """A published commit.

    Attributes:
        base: name of the manifest without the suffix.
        content: bytes of the manifest.
    """

    base: str
    manifest: Manifest
    content: bytes = field(repr=False)


class Damaged(CheckpointError):
    """A commit's files have changed since they were written. mbqueue sets them aside and uses the previous commit."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The fold, spec and dataset to which commits must belong. A hash that is None is unknown and not compared."""

    experiment: str
    fold: int
    spec_hash: str | None = None
    dataset_hash: str | None = None

    @property
    def label(self) -> str:
        """The experiment and fold, as shown in messages."""
        return f"{self.experiment} fold {self.fold}"

    def require(self, manifest: Manifest, *, source: str) -> None:
        """Check that a commit belongs to the expected fold, spec and dataset.

        Raises:
            ForeignCommit: if the commit belongs to a different fold.
        """
        why = None
        if (manifest.experiment, manifest.fold) != (self.experiment, self.fold):
            why = f"belongs to {manifest.experiment} fold {manifest.fold}, not to {self.label}"
        elif self.spec_hash not in (None, manifest.spec_hash):
            why = f"was trained with a spec that differs from the spec of {self.experiment} in the queue"
        elif self.dataset_hash not in (None, manifest.dataset_hash):
            why = f"was not trained on the crystals of {self.experiment}"
        if why is not None:
            raise ForeignCommit(f"{source} {why}.")


class ForeignCommit(Damaged):
    """A commit is in the folder of a different experiment or fold. mbqueue sets it aside like a damaged commit."""


def identity_in_head(head: bytes) -> Identity | None:
    """Read the experiment, fold and spec hash from a manifest's first bytes, unchecked; None if they are missing."""
    match = _HEAD.search(head)
    if match is None:
        return None
    name, spec_hash, fold = (part.decode(errors="replace") for part in match.groups())
    return Identity(experiment=name, fold=int(fold), spec_hash=spec_hash)


def manifest_named(stem: str, content: bytes, *, source: str, identity: Identity) -> Manifest:
    """Parse the manifest of the commit named ``stem``.

    Raises:
        Damaged: if the content is not a manifest, or is the manifest of a different commit.
        ForeignCommit: if the commit belongs to a different experiment, spec, dataset or fold.
        CheckpointMisfit: if a newer mbqueue wrote the manifest.
    """
    manifest = manifest_of(content, source=source)
    if manifest.stem != stem:
        raise Damaged(f"The manifest {source} describes a different commit, {manifest.stem}.")
    identity.require(manifest, source=source)
    return manifest


def manifest_of(content: bytes, *, source: str) -> Manifest:
    """Parse a manifest and check every field, so that no value leads to a different folder or crashes a reader.

    Raises:
        Damaged: if the content is not a manifest.
        CheckpointMisfit: if a newer mbqueue wrote the manifest.
    """
    if len(content) > LARGEST_MANIFEST:
        raise Damaged(f"The manifest {source} is larger than any manifest that mbqueue writes.")
    try:
        parts = json.loads(content)
        checksum, format_number = parts.pop("checksum"), int(parts["format"])
        # Check the checksum before using any field, even the format, because a flipped bit can change a digit.
        is_whole = sha256_of_json(parts) == checksum
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"The manifest {source} cannot be read: {error!r:.200}.") from error
    if not is_whole:
        raise Damaged(f"The manifest {source} is damaged: its checksum is wrong.")
    if format_number > FORMAT:
        raise CheckpointMisfit(f"{source} was written by a newer mbqueue (format {format_number}). Update mbqueue.")
    known = {f.name for f in fields(Manifest)}
    try:
        manifest = Manifest(**{key: value for key, value in parts.items() if key in known})
        wrong = [name for name, fits in _CHECKS.items() if not fits(getattr(manifest, name))]
        if not wrong and len(manifest.history) != manifest.epoch - (not manifest.complete):
            wrong = ["history"]
    except (ValueError, TypeError) as error:
        raise Damaged(f"The manifest {source} is not complete: {error}.") from error
    if wrong:
        raise Damaged(f"The manifest {source} has invalid values for: {', '.join(wrong)}.")
    return manifest


def _is_count(value: Any, largest: int = 10**9) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_best(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and _is_count(value.get("epoch"))
        and _is_number(value.get("val_mae"))
        and is_stem(value.get("commit"))
    )


def _is_number(value: Any) -> bool:
    return math.isfinite(value) if isinstance(value, float) else _is_count(value, 2**53)


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict)
        and row.get("epoch") == number
        and _is_number(row.get("val_mae"))
        and all(_is_number(row[name]) for name in ("test_mae", "seconds") if name in row)
        for number, row in enumerate(value, start=1)
    )


def _is_enqueued(value: Any) -> bool:
    """Whether a value is None or looks like an experiment's entry in the queue.

    The spec in the entry is not checked.
    """
    if value is None:
        return True
    if not (isinstance(value, dict) and isinstance(value.get("spec"), dict)):
        return False
    if not (isinstance(value.get("results_dir"), str) and isinstance(value.get("priority"), int)):
        return False
    prepare = value.get("prepare", "")
    is_prepare = prepare is None or (isinstance(prepare, dict) and isinstance(prepare.get("dataset_hash"), str))
    return is_prepare and _is_number(value.get("enqueued_at"))


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "experiment": lambda value: isinstance(value, str) and re.fullmatch(NAME_PATTERN, value) is not None,
    "spec_hash": lambda value: isinstance(value, str),
    "dataset_hash": lambda value: isinstance(value, str),
    "fold": lambda value: _is_count(value, N_FOLDS - 1),
    "epoch": lambda value: _is_count(value) and value > 0,
    "step": _is_count,
    "steps_per_epoch": _is_count,
    "complete": lambda value: isinstance(value, bool),
    "fence": lambda value: _is_count(value, HIGHEST_FENCE),
    "parent": lambda value: value is None or is_stem(value),
    "parent_sha256": lambda value: value is None or _is_sha256(value),
    "session": lambda value: isinstance(value, str),
    "written_at": lambda value: isinstance(value, str),
    "size": lambda value: _is_count(value, LARGEST_CHECKPOINT),
    "sha256": _is_sha256,
    "best": _is_best,
    "history": _are_rows,
    "fingerprint": lambda value: isinstance(value, dict),
    "fingerprint_changes": lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value),
    "epoch_sessions": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "epoch_seconds": _is_number,
    "absent_elements": lambda value: isinstance(value, list) and all(_is_count(one) for one in value),
    "enqueued": _is_enqueued,
}
