"""A file or database operation that fails, once or for good, gives a helpful error and damages no accepted work."""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from pathlib import Path

import pytest
from tripwire import Fault
from warm import Warm

from .conftest import EXPERIMENT, SEED, SHARE, SHARES, WORK, Lab, Straight, points_of, tell

FAILURE = 1
#: The file operations that fail in these tests. The database keeps working, as if it were on a different disk.
FILES = ("open", "write", "fsync", "rename", "unlink")
FAULTS = {
    "EIO once": {"number": errno.EIO},
    "EIO for good": {"number": errno.EIO, "for_good": True},
    "disk full once": {"number": errno.ENOSPC},
    "disk full for good": {"number": errno.ENOSPC, "for_good": True},
    "disk full for good, not the database's": {"number": errno.ENOSPC, "for_good": True, "only": FILES},
    "read-only for good": {"number": errno.EROFS, "for_good": True},
    "half a write once": {"action": "short", "number": errno.EIO, "only": ("write",)},
    "half a write, then the disk is full": {
        "action": "short", "number": errno.ENOSPC, "for_good": True, "only": ("write",),
    },
    "fsync once": {"number": errno.EIO, "only": ("fsync",)},
    "fsync for good": {"number": errno.EIO, "for_good": True, "only": ("fsync",)},
    "done, but said to have failed": {"action": "doubt", "number": errno.EIO},
    "committed, but said to have failed": {"action": "doubt", "number": errno.EIO, "only": ("commit",)},
}  # fmt: skip
SAMPLE = 1


@pytest.mark.parametrize("name", FAULTS)
def test_a_failing_operation_gives_a_helpful_error_and_a_later_session_the_same_bytes(
    warm: Warm, tmp_path: Path, straight: Straight, name: str
) -> None:
    options = {"action": "fail", "only": (), **FAULTS[name]}
    counted = Counter(operation.split(" ")[0] for operation in straight.operations)
    n_operations = sum(n for kind, n in counted.items() if not options["only"] or kind in options["only"])
    assert n_operations > 0, "no operation of this kind was counted"
    codes = Counter()
    for point in points_of(name, n_operations, sample=SAMPLE):
        lab = Lab(warm, tmp_path / str(point))
        lab.make()
        where = f"MBQUEUE_TEST_SEED={SEED}, {name} at {point}"
        code = lab.live(Fault(at=point, **options))
        said = lab.said
        codes[code] += 1
        assert code in {0, FAILURE}, f"{where}\n{said}"
        if code == FAILURE:
            assert "error: " in said or "failed" in said, f"{where}\n{said}"
        if options.get("for_good") and options["number"] == errno.ENOSPC and code == FAILURE:
            assert "full" in said or "No space left" in said, f"{where}\n{said}"
        # Committed work is intact: once the disk has been repaired, the next session resumes from the last commit.
        lab.age_left_overs()
        assert lab.warm.run(lab.root, *lab.commands[:2], ("retry", EXPERIMENT), WORK, log=lab.log) == 0, (
            f"{where}\n{lab.said}"
        )
        assert lab.results() == straight.results, f"{where}\n{lab.said}"
        lab.check_queue(may_fail=True)
        assert not lab.left_over(), where
        shutil.rmtree(lab.folder)
    tell(f"{name}, share {SHARE}/{SHARES}: {codes.total()} of {n_operations} operations, exit codes {dict(codes)}")
