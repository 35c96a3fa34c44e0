"""The command ``mbqueue doctor``, which checks this machine and explains how to fix problems."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from mbqueue import __version__
from mbqueue.cli.console import FAILURE, print_json, print_line
from mbqueue.cli.options import JsonOption, current_project
from mbqueue.errors import DataError, MbqueueError, ProjectNotFound, StoreError, UsageError, counted
from mbqueue.experiment import NEEDED_CAPABILITY, OFFICIAL_DATASET
from mbqueue.mounts import mount_of
from mbqueue.project import ProjectFolder

if TYPE_CHECKING:
    from mbqueue.queue.commits_place import CommitsPlace

PACKAGES = ("torch", "chgnet", "pymatgen", "matminer", "numpy", "pandas", "filelock", "rich", "numba")
MATBENCH = "0.6"
#: Disk space, in bytes, for the cache and checkpoints of the full dataset, with a margin.
NEEDED_BYTES = 8e9
_SIGNS = {"ok": "ok     ", "warning": "WARNING", "problem": "PROBLEM"}
#: Width, in characters, of the column that shows the names of the checks.
_WIDTH = 12


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        what: name of the check.
        state: "ok"; "warning" if mbqueue works with limitations; "problem" if it does not work.
        found: what the check found.
        remedy: what to do if ``state`` is not "ok".
    """

    what: str
    state: Literal["ok", "warning", "problem"]
    found: str
    remedy: str = ""


def doctor(context: typer.Context, as_json: JsonOption = False) -> None:
    """Check versions, device, disk, file system, matbench and dataset, and print how to fix each problem.

    The exit code is 1 if a problem prevents mbqueue from working.

    Example: mbqueue doctor
    """
    findings = []
    for finding in _findings(context):
        findings.append(finding)
        if not as_json:  # print each result immediately, because some checks take seconds
            print_line(f"{_SIGNS[finding.state]}  {finding.what:<{_WIDTH}}  {finding.found}")
            if finding.remedy:
                print_line(f"         {'':<{_WIDTH}}  → {finding.remedy}")
    if as_json:
        print_json([asdict(finding) for finding in findings])
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(FAILURE)


def _findings(context: typer.Context) -> Iterator[Finding]:
    version = platform.python_version()
    if sys.version_info >= (3, 11):  # noqa: UP036 - an older Python gets here when run from a checkout
        yield Finding("python", "ok", version)
    else:
        yield Finding("python", "problem", version, "mbqueue needs Python 3.11 or newer.")
    yield Finding("mbqueue", "ok", __version__)
    for package in PACKAGES:
        yield _package(package)
    yield _matbench()
    yield _device()
    yield _dataset()
    try:
        project = current_project(context)
    except ProjectNotFound as error:
        yield Finding("project", "warning", "none here", str(error))
        return
    except UsageError as error:
        yield Finding("project", "problem", "invalid settings", str(error))
        return
    yield Finding("project", "ok", str(project.root))
    yield _file_system(project)
    yield _queue(project)
    place, trouble = _commits(project)
    if project.topology.store:
        yield _store(project.topology.store, place)
    if place is not None:
        yield Finding("commits", "problem" if trouble else "ok", f"the queue's commits are in {place.shown}", trouble)
    yield _writable(project.state_dir)
    yield _disk(project.live_dir if project.live_dir.is_dir() else project.state_dir)


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "problem", "not installed", f"pip install {name}")


def _matbench() -> Finding:
    try:
        found = importlib.metadata.version("matbench")
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "matbench",
            "warning",
            "not installed; needed only for leaderboard submissions",
            f"pip install --no-deps matbench=={MATBENCH}",
        )
    if found != MATBENCH:
        return Finding(
            "matbench",
            "warning",
            found,
            f"mbqueue is tested with {MATBENCH}: pip install --no-deps matbench=={MATBENCH}",
        )
    return Finding("matbench", "ok", found)


def _device() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:  # a missing CUDA library raises OSError
        return Finding("device", "problem", f"cannot import torch: {error}", "pip install --force-reinstall torch")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        capability = torch.cuda.get_device_capability(0)[0]
        missing = [name for name, needed in NEEDED_CAPABILITY.items() if capability < needed]
        lacks = f", no {' or '.join(missing)} (float32 is used instead)" if missing else ""
        return Finding("device", "ok", f"cuda: {torch.cuda.get_device_name(0)}, {memory:.0f} GiB{lacks}")
    return Finding(
        "device",
        "warning",
        f"no GPU; CPU with {counted(os.cpu_count() or 1, 'core')}",
        "The CPU is fast enough for the sample. Use a GPU for the full dataset (in Colab: Runtime → Change runtime "
        "type → GPU).",
    )


def _dataset() -> Finding:
    from mbqueue.data.official import is_whole, official_file

    try:
        file = official_file(OFFICIAL_DATASET)
    except DataError as error:
        return Finding("dataset", "problem", "cannot be checked", str(error))
    if file.path.exists():
        found = f"{OFFICIAL_DATASET}: {file.path} ({file.path.stat().st_size / 1e6:.0f} MB)"
        if is_whole(file):
            return Finding("dataset", "ok", found)
        return Finding(
            "dataset",
            "problem",
            f"{found} differs from the official file",
            "Move this file away. mbqueue then downloads the official file.",
        )
    return Finding(
        "dataset",
        "warning",
        f"{OFFICIAL_DATASET} is not on this machine",
        f"mbqueue downloads the dataset when needed. To download it now: mbqueue prepare {OFFICIAL_DATASET}",
    )


def _file_system(project: ProjectFolder) -> Finding:
    mount = mount_of(project.root)
    if not mount.is_remote:
        return Finding("file system", "ok", f"{mount.fstype} at {mount.point}")
    where = f"{mount.fstype} at {mount.point}, a drive or network mount"
    if (why := project.topology.why_not_safe) is not None:
        return Finding("file system", "warning", where, why)
    return Finding("file system", "ok", f"{where}; the live state is in {project.live_dir}")


def _store(url: str, place: CommitsPlace | None) -> Finding:
    from mbqueue.storage.objects import ObjectStore

    try:
        store = ObjectStore.open(url)
        if place is not None and place.kind == "store" and not store.is_the_one(place.id):
            advice = "The queue's commits are in a different store. Check `store` in mbqueue.toml."
            return Finding("object store", "problem", url, advice)
        if is_new := store.check():
            store.forget()  # `check` marked the store as in use, which only sessions may do
    except (UsageError, StoreError) as error:
        return Finding("object store", "problem", url, str(error))
    return Finding("object store", "ok", f"{url}: writable, does not overwrite objects{', new' if is_new else ''}")


def _commits(project: ProjectFolder) -> tuple[CommitsPlace | None, str]:
    """Find out where the queue's commits are.

    Returns:
        The location of the commits (None if unknown), and why a session cannot start here (empty if it can).
    """
    from mbqueue.queue.opening import open_queue, queue_exists
    from mbqueue.session.commits_binding import opened_store

    place = None
    try:
        if queue_exists(project):
            # The check of the queue already reports a lost queue, so ignore the queue's notes here.
            with open_queue(project, read_only=True, note=lambda _text: None) as queue:
                place = queue.commits_place()
                opened_store(project, queue)
    except (UsageError, StoreError) as error:
        return place, str(error)
    except MbqueueError:  # a different check reports an unreadable queue
        pass
    return place, ""


def _queue(project: ProjectFolder) -> Finding:
    from mbqueue.queue.opening import open_queue, queue_exists

    lost: list[str] = []
    try:
        if not queue_exists(project):
            return Finding("queue", "ok", f"there is no queue at {project.queue_name} yet")
        with open_queue(project, read_only=True, note=lost.append) as queue:
            queue.verify()
            found = queue.database.name
    except MbqueueError as error:
        return Finding("queue", "problem", "cannot be used", str(error))
    if trouble := project.topology.why_not_shared or "".join(lost):
        return Finding("queue", "problem", found, trouble)
    return Finding("queue", "ok", found)


def _writable(folder: Path) -> Finding:
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            return Finding("state folder", "ok", "writable")
    except OSError as error:
        return Finding(
            "state folder", "problem", f"not writable: {error}", f"Make {folder} writable, or free some disk space."
        )


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free"
    if free < NEEDED_BYTES:
        return Finding(
            "disk",
            "warning",
            text,
            f"The full dataset needs {NEEDED_BYTES / 1e9:.0f} GB of disk space. To list caches: mbqueue cache list",
        )
    return Finding("disk", "ok", text)
