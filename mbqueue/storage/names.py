"""Make and parse the names of commit files. The drive ends the names of its own files with as many digits.

e0012-done-f0003.json                 the end of epoch 12, written under fence 3
e0013-s000040-f0003.pt                the checkpoint after 40 steps of epoch 13
e0012-done-f0003-9f86d081884c.pt      the same, with the beginning of a SHA-256: of the checkpoint itself in an
                                      object store, or of its manifest on a mount
e0012-done-f0003-9f86d081884c (1).pt  the name that a drive gives to a second file with the same name
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mbqueue.project import fold_named

#: The suffixes of a commit's two files.
MANIFEST, CHECKPOINT = "json", "pt"
#: Matches the number in ``name (1)``, which a drive inserts into the name of a second file.
DUPLICATE = r"(?: \(\d{1,4}\))?"
#: How many hexadecimal digits of a hash a file name contains.
HASH_DIGITS = 12
#: The highest accepted fence. A fence is the number of times a job has been claimed, so a fence above this limit means
#: that the name is damaged.
HIGHEST_FENCE = 10**6

_STEM = re.compile(r"e(?P<epoch>\d{4,9})-(?:done|s(?P<step>\d{6,12}))-f(?P<fence>\d{4,9})")
_FILE = re.compile(
    rf"(?P<stem>{_STEM.pattern})(?:-(?P<digits>[0-9a-f]{{{HASH_DIGITS}}}){DUPLICATE})?\.(?P<suffix>{MANIFEST}|{CHECKPOINT})"
)


@dataclass(frozen=True, kw_only=True)
class CommitFile:
    """The parsed name of a commit's file.

    Attributes:
        stem: the part of the name that all files of the commit share.
        digits: the first hexadecimal digits of a hash; empty if the name contains no hash.
        suffix: either `MANIFEST` or `CHECKPOINT`.
    """

    stem: str
    digits: str
    suffix: str

    @property
    def is_plain_manifest(self) -> bool:
        """Whether the file is a manifest without a hash in its name, as in a folder or an object store."""
        return self.suffix == MANIFEST and not self.digits

    @property
    def finished_epochs(self) -> int:
        """The number of finished epochs in the commit."""
        epoch, is_finished, *_ = order_of(self.stem)
        return epoch if is_finished else epoch - 1

    @property
    def base(self) -> str:
        """The file's name without the suffix and without the number that a drive may add."""
        return with_hash(self.stem, self.digits) if self.digits else self.stem

    @property
    def name(self) -> str:
        """The file's name without the number that a drive may add."""
        return file_name(self.base, self.suffix)


def stem_of(*, epoch: int, step: int | None, fence: int) -> str:
    """The name of the commit after ``step`` steps of an epoch, or at the epoch's end if ``step`` is None."""
    where = "done" if step is None else f"s{step:06d}"
    return f"e{epoch:04d}-{where}-f{fence:04d}"


def file_name(base: str, suffix: str) -> str:
    """The name of a commit's file.

    Args:
        base: the commit's stem, followed by a hash if the names in the commit's place contain one.
        suffix: either `MANIFEST` or `CHECKPOINT`.
    """
    return f"{base}.{suffix}"


def order_of(stem: str) -> tuple[int, bool, int, int]:
    """The part of `mbqueue.storage.manifest.Manifest.rank` that a commit's name encodes."""
    match = _STEM.fullmatch(stem)
    assert match is not None
    epoch, step, fence = match.groups()
    return int(epoch), step is None, int(step or 0), int(fence)


def is_stem(text: object) -> bool:
    """Whether a text is the name of a commit."""
    return isinstance(text, str) and _STEM.fullmatch(text) is not None


def hashed_name(stem: str, content: bytes) -> str:
    """The name, without the suffix, that a file with the given content gets on a mount.

    The name ends with the first digits of the content's SHA-256. The digits reveal a truncated file, and distinguish
    files with different content.
    """
    return with_hash(stem, hashlib.sha256(content).hexdigest())


def with_hash(stem: str, sha256: str) -> str:
    """The name, without the suffix, that ends with the first digits of ``sha256``, which may be cut off after them."""
    return f"{stem}-{sha256[:HASH_DIGITS]}"


def commit_file(name: str) -> CommitFile | None:
    """Parse a file's name; None if the file does not belong to a commit."""
    match = _FILE.fullmatch(name)
    if match is None:
        return None
    return CommitFile(stem=match["stem"], digits=match["digits"] or "", suffix=match["suffix"])


def newest_plain_manifest(names: Iterable[str]) -> CommitFile | None:
    """Find the newest manifest among the file names in a fold's folder. Names that contain a hash are ignored."""
    manifests = [file for file in map(commit_file, names) if file is not None and file.is_plain_manifest]
    return max(manifests, key=lambda file: order_of(file.stem), default=None)


def manifests_named(paths: Iterable[str]) -> Iterator[tuple[str, int, CommitFile]]:
    """Find the manifests among paths such as EXPERIMENT/fold_i/NAME. Yield (experiment, fold, parsed name)."""
    for path in paths:
        experiment, _, rest = path.partition("/")
        folder, _, name = rest.partition("/")
        fold, file = fold_named(folder), commit_file(name)
        if fold is not None and file is not None and file.suffix == MANIFEST:
            yield experiment, fold, file
