"""A flipped bit or a truncated file of any kind in a project is detected or has no effect, and training continues."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from tripwire import Fault
from warm import Warm

from .conftest import ENQUEUE, EXPERIMENT, LONG, ON_A_DRIVE, SEED, SETTINGS, WORK, Lab, Straight, tell

FLIPS, CUTS = (40, 10) if LONG else (2, 1)


@dataclass(frozen=True)
class Target:
    """A kind of file to damage.

    Attributes:
        name: glob pattern of the files, relative to the project.
        is_checked: whether a checksum covers every byte. Without a checksum, damage to unused bytes (blanks, padding,
            free pages) may go unnoticed if the results are the same.
    """

    name: str
    is_checked: bool = False


#: Files left behind when a session is killed in epoch 2.
TRAINING = [
    Target("state/queue.db"),
    Target("state/queue.db-wal"),
    Target("state/queue.db-shm"),
    Target("state/checkpoints/*/fold_0/e0001-done-f*.pt", is_checked=True),
    Target("state/checkpoints/*/fold_0/e0001-done-f*.json"),
    Target("state/cache/*/crystals.bin"),
    Target("state/cache/*/shard-00000.bin"),
    Target("state/cache/frozen-*/features-00000.npy", is_checked=True),
    Target("state/cache/frozen-*/features-00000.json"),
    Target("state/cache/frozen-*/energies-00000.npy", is_checked=True),
    Target("state/cache/frozen-*/energies-00000.json"),
    Target("mbqueue.toml"),
    Target(f"jobs/{EXPERIMENT}.toml"),
]
#: Files left behind when a session is killed during `record`.
RECORDING = [
    Target("state/queue.db"),
    Target("state/queue.db-wal"),
    Target("results/daily/*/*/model_fold_0.pth", is_checked=True),
    Target("results/daily/*/*/preds_fold_0.csv", is_checked=True),
    Target("results/daily/*/*/history_fold_0.csv", is_checked=True),
]

#: Files left behind on a mount when the machine is lost while publishing a fold's results.
ON_THE_MOUNT = [
    "state/checkpoints/*/fold_0/*.pt",
    "state/checkpoints/*/fold_0/*.json",
    "state/snapshots/*.db",
    "state/snapshots/*.json",
    "state/outcomes/*/*.json",
    "state/sessions/*.json",
    "state/crystals/*.bin",
    "state/project-*.json",
]


@pytest.fixture(scope="module")
def training(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed_at("e0002-done", warm, tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def recording(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed_at("RESULTS.md", warm, tmp_path_factory.mktemp("recording"))


@pytest.fixture(scope="module")
def published(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed_at(f"outcomes/{EXPERIMENT}/fold_0", warm, tmp_path_factory.mktemp("published"), ON_A_DRIVE)


def killed_at(word: str, warm: Warm, folder: Path, settings: str = SETTINGS) -> Path:
    """Kill a session at its first operation on a path that contains ``word``; return the folder."""
    lab = Lab(warm, folder, settings=settings)
    lab.make()
    assert lab.live(Fault(at=1, about=word)) == -signal.SIGKILL
    return lab.folder


@pytest.mark.parametrize("target", TRAINING, ids=lambda target: target.name)
def test_damage_in_the_middle_of_training_changes_no_result(
    warm: Warm, tmp_path: Path, straight: Straight, training: Path, target: Target
) -> None:
    wrong = damage_in_many_places(warm, tmp_path, straight, training, target, sample=2)
    assert not wrong, "\n".join([f"{len(wrong)} wrong, MBQUEUE_TEST_SEED={SEED}", *wrong[:4]])


@pytest.mark.parametrize("target", RECORDING, ids=lambda target: target.name)
def test_damage_before_recording_changes_no_result(
    warm: Warm, tmp_path: Path, straight: Straight, recording: Path, target: Target
) -> None:
    wrong = damage_in_many_places(warm, tmp_path, straight, recording, target, sample=1)
    assert not wrong, "\n".join([f"{len(wrong)} wrong, MBQUEUE_TEST_SEED={SEED}", *wrong[:4]])


@pytest.mark.parametrize("name", ON_THE_MOUNT)
def test_damage_on_a_mount_whose_machine_was_lost_changes_no_result(
    warm: Warm, tmp_path: Path, straight: Straight, published: Path, name: str
) -> None:
    original = max((published / "project").glob(name))
    for number, (what, content) in enumerate(damages(original.read_bytes(), random.Random(f"{SEED} {name}"), sample=1)):
        lab = Lab(warm, tmp_path / str(number), settings=ON_A_DRIVE)
        shutil.copytree(published, lab.folder)
        shutil.rmtree(lab.live_folder)
        (lab.folder / original.relative_to(published)).write_bytes(content)
        lab.log.unlink()
        assert lab.work(patience=60) == 0, f"{what} in {original.name}, MBQUEUE_TEST_SEED={SEED}\n{lab.said}"
        assert lab.results() == straight.results, f"{what} in {original.name}, MBQUEUE_TEST_SEED={SEED}"
        lab.check_queue(may_rewind=True)
        shutil.rmtree(lab.folder)


def damage_in_many_places(
    warm: Warm, tmp_path: Path, straight: Straight, base: Path, target: Target, *, sample: int
) -> list[str]:
    """Damage a file in many places, one at a time; return a description of each failure."""
    (original,) = (base / "project").glob(target.name)
    whole = original.read_bytes()
    counts, wrong = Counter(), []
    for number, (what, bytes_) in enumerate(damages(whole, random.Random(f"{SEED} {target.name}"), sample=sample)):
        lab = Lab(warm, tmp_path / str(number))
        shutil.copytree(base, lab.folder)
        path = lab.folder / original.relative_to(base)
        path.write_bytes(bytes_)
        try:
            counts[survive(lab, straight, path, whole, target)] += 1
        except Exception as error:  # noqa: BLE001 - the other places are to be tried too
            wrong.append(f"{what}: {type(error).__name__}: {str(error)[:1500]}\n{lab.said[-3000:]}")
        shutil.rmtree(lab.folder)
    tell(f"{target.name} ({len(whole)} bytes), MBQUEUE_TEST_SEED={SEED}: {dict(counts)}, {len(wrong)} wrong")
    return wrong


def damages(whole: bytes, chance: random.Random, *, sample: int) -> list[tuple[str, bytes]]:
    """Damage a file's content by flipping a bit or cutting off the end; return a list of (description, content).

    The first flip, and every fourth flip after it, is near the start. A short test run uses only a random sample.
    """
    found = []
    for number in range(FLIPS):
        place = chance.randrange(min(100, len(whole)) if number % 4 == 0 else len(whole))
        bit = chance.randrange(8)
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        found.append((f"bit {bit} of byte {place} flipped", bytes(flipped)))
    for number in range(CUTS):
        length = 0 if number == 1 else chance.randrange(len(whole))
        found.append((f"cut to {length} bytes", whole[:length]))
    return found if LONG else chance.sample(found, sample)


def survive(lab: Lab, straight: Straight, path: Path, whole: bytes, target: Target) -> str:
    """Resume, follow the error message if there is one, and compare; return the outcome."""
    lab.log.unlink()
    if path.name == f"{EXPERIMENT}.toml":
        # Only `enqueue` reads the experiment file, and refuses it if it is damaged.
        code = lab.warm.run(lab.root, ENQUEUE, log=lab.log)
        assert code in {0, 1, 2}
        assert (code == 0) == ("already in the queue with this spec" in lab.said)
        lab.log.unlink()
    code = lab.work(patience=60)
    assert code in {0, 1, 2}
    said = lab.said
    how = "without effect" if code == 0 else "error"
    if code:
        assert "error: " in said or "failed" in said
        is_of_queue = path.name.startswith("queue.db")
        assert path.name in said or (is_of_queue and ("queue.db" in said or "The queue lacks" in said))
        if path.name == "mbqueue.toml":
            path.write_bytes(whole)
            commands = [WORK]
        elif path.name.startswith("queue.db"):
            assert "mbqueue recover" in said
            commands = [("recover", "--force"), WORK]
            how = "error, recovered"
        else:
            commands = [("retry", EXPERIMENT), WORK]
        assert lab.warm.run(lab.root, *commands, log=lab.log, patience=60) == 0
    elif not path.name.startswith("queue.db") and path.suffix != ".toml":
        if not path.exists():
            how = "set aside" if path.with_name(path.name + ".damaged").exists() else "removed"
        elif path.read_bytes() == whole:
            how = "made again"
    assert lab.results() == straight.results, "another result"
    if path.name.startswith("queue.db"):
        lab.check_database()
    else:
        lab.check_queue(may_rewind=True)
    if target.is_checked:
        assert how != "without effect", "not noticed"
    return how
