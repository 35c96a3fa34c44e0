"""The layout of a project's folders. All other modules get the paths of these folders from this module.

    PROJECT/
    ├── mbqueue.toml                settings (optional)
    ├── jobs/NAME.toml              experiments
    ├── state/
    │   ├── queue.db                the queue
    │   ├── cache/                  converted crystals; can be deleted at any time
    │   ├── checkpoints/EXPERIMENT/fold_i/
    │   ├── wanted/EXPERIMENT.json  what was enqueued, to rebuild the queue from
    │   ├── logs/                   logs of background sessions; TensorBoard files
    │   ├── commits.json            the id of these checkpoints in a queue on a server
    │   └── background.json         the process of the background session
    └── results/daily/YYYY-MM-DD/EXPERIMENT/

mbqueue computes all paths from the project's folder, except the path of a results folder. mbqueue stores the path of a
results folder, because it contains the date on which the experiment was enqueued.

On a drive or network mount, or if the user gives a live folder, the project is *split*. Files that change are in the
live folder on a local disk. Each file on the mount is written once, under a name that is never reused:

    LIVE/                           queue.db, cache/, checkpoints/, logs/ …, as in state/ above
    ├── publishing.json             which files are published, and errors in publishing
    ├── project.json                the project that this live folder belongs to (`mbqueue.belonging`)
    └── results/daily/…             results in progress
    PROJECT/state/
    ├── checkpoints/EXPERIMENT/fold_i/STEM-HASH.pt, STEM-HASH.json
    ├── snapshots/NUMBER-DATABASE-HASH.db, .json
    ├── outcomes/EXPERIMENT/…       the result files with their hashes
    ├── sessions/SESSION-NUMBER.json
    ├── project-ID.json             the project's id; written once
    └── crystals/DATASET-HASH.bin   crystals from which a new machine makes its cache/

With an object store, the store contains the commits, the results, and data that is expensive to compute, under the
prefix in the setting `store`. The project's own folders contain copies of the stored objects. Stored objects never
change. An object whose name contains no hash is written only once.

    STORE/
    ├── mbqueue-store.json          the store's id, which queues record (`mbqueue.buckets.MARKER`)
    ├── checkpoints/EXPERIMENT/fold_i/STEM-HASH.pt, STEM.json; damaged ones end in .damaged
    ├── results/EXPERIMENT/HASH-NAME            result files of committed jobs
    ├── crystals/DATASET-HASH.bin               as on a drive
    └── frozen/frozen-DATASET-WEIGHTS/KIND-NUMBER-HASH.npy, KIND-NUMBER.json
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path

from mbqueue import files
from mbqueue.belonging import Belonging, answer_within, live_dir_of
from mbqueue.errors import ProjectNotFound, UsageError
from mbqueue.settings import SETTINGS_FILE, Settings, load_settings
from mbqueue.task import N_FOLDS
from mbqueue.topology import LIVE_VARIABLE, STATE_FOLDER, Topology, live_folder

ENVIRONMENT_VARIABLE = "MBQUEUE_PROJECT"
#: The pattern of an experiment's name, which is also the name of its folders.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
#: Matches the folder names that `fold_name` creates, both as a regular expression and as a glob.
FOLD_PATTERN = f"fold_[0-{N_FOLDS - 1}]"

#: Seconds to wait for a drive before using only what this machine recorded about the project.
LOOK_SECONDS = 20.0

#: Folders of published files on a drive (`mbqueue.storage.mounted.Drive`), relative to the project's folder.
PUBLISHED_ID = "state"
PUBLISHED_CHECKPOINTS = "state/checkpoints"
PUBLISHED_SNAPSHOTS = "state/snapshots"
PUBLISHED_OUTCOMES = "state/outcomes"
PUBLISHED_SESSIONS = "state/sessions"
PUBLISHED_CRYSTALS = "state/crystals"

#: Folders in an object store (`mbqueue.storage.objects.ObjectStore`), relative to the store's prefix.
STORED_CHECKPOINTS = "checkpoints"
STORED_RESULTS = "results"
STORED_CRYSTALS = "crystals"
STORED_FROZEN = "frozen"


@dataclass(frozen=True)
class ProjectFolder:
    """The paths and settings of one project folder.

    Attributes:
        live: the live folder, if the project is split (see the module's docstring); None if the live state is in
            state/.
        away: why only the live folder can be read; None if the project's own folder is reachable.
    """

    root: Path
    settings: Settings = field(default_factory=Settings)
    live: Path | None = None
    away: str | None = None

    @cached_property
    def topology(self) -> Topology:
        """The locations of the queue, the live state, the commits and the results.

        Raises:
            UsageError: if $MBQUEUE_QUEUE or $MBQUEUE_STORE is not a valid address.
        """
        return Topology.of(self.root, self.settings, live=self.live)

    @property
    def unsplit(self) -> ProjectFolder:
        return replace(self, live=None)

    def with_queue(self, *, on_server: bool) -> ProjectFolder:
        """Return this project with its queue on a server or in a file, which may also change the live folder."""
        return replace(self, live=live_folder(self.root, self.settings, on_server=on_server))

    @property
    def store_file(self) -> Path:
        """The file that records why commits are not reaching the object store; exists only during an outage."""
        return self.live_dir / "store.json"

    @property
    def commits_file(self) -> Path:
        """The file with the id of this folder's checkpoints, as recorded by a queue on a server.

        A project with an object store does not use commits.json.
        """
        return self.live_dir / "commits.json"

    @property
    def home_file(self) -> Path:
        """The file that records the project's last path, so that mbqueue detects a copied project
        (`mbqueue.session.originals`)."""
        return self.state_dir / "home.json"

    @property
    def live_dir(self) -> Path:
        """The folder in which sessions change files: state/ or, in a split project, the live folder."""
        return self.live if self.live is not None else self.state_dir

    @property
    def jobs_dir(self) -> Path:
        return self.root / "jobs"

    @property
    def state_dir(self) -> Path:
        """The state/ folder: mbqueue's own files or, in a split project, only the published ones."""
        return self.root / STATE_FOLDER

    @property
    def results_dir(self) -> Path:
        return self.root / "results"

    @property
    def never_outputs(self) -> tuple[Path, ...]:
        """Files and folders that no command may overwrite with its output, even with --force."""
        return (self.root / SETTINGS_FILE, self.state_dir, self.live_dir)

    @property
    def queue_db(self) -> Path:
        """The queue's file, which may not exist, and is not used if the queue is on a server."""
        return self.live_dir / "queue.db"

    @property
    def queue_name(self) -> str:
        """Where the queue is, as shown in messages."""
        return "the configured server" if self.topology.queue_url else str(self.queue_db)

    @property
    def cache_dir(self) -> Path:
        """The cache of converted crystals and frozen features; mbqueue can rebuild it."""
        return self.live_dir / "cache"

    @property
    def logs_dir(self) -> Path:
        """The folder for background sessions' logs and TensorBoard event files."""
        return self.live_dir / "logs"

    @property
    def launched_dir(self) -> Path:
        """A folder that all machines can read, for the files and logs of submitted cluster jobs."""
        return self.state_dir / "logs" / "launched"

    @property
    def background_file(self) -> Path:
        return self.live_dir / "background.json"

    def predictions_dir(self, *names: str) -> Path:
        """The folder for the outputs of an unfinished prediction.

        mbqueue removes the outputs once the fold has been predicted, and the outputs of `mbqueue predict` after a week.
        """
        return self.live_dir.joinpath("predictions", *names)

    @property
    def device_limits(self) -> Path:
        """The file that records how many crystals fit on each device when no other program is using the device."""
        return self.live_dir / "device_limits.json"

    @property
    def all_checkpoints(self) -> Path:
        return self.live_dir / "checkpoints"

    def checkpoints_dir(self, experiment: str, fold: int) -> Path:
        return self.all_checkpoints / experiment / fold_name(fold)

    def fold_dirs(self) -> list[Path]:
        """The existing `checkpoints_dir` folders of all folds, sorted."""
        return sorted(self.all_checkpoints.glob(f"*/{FOLD_PATTERN}"))

    @property
    def notes_dir(self) -> Path:
        """The folder of notes, one per enqueued experiment, from which `mbqueue recover` can rebuild the queue."""
        return self.live_dir / "wanted"

    @property
    def entering_lock(self) -> Path:
        """The lock file for creating or replacing the queue's file."""
        return self.live_dir / "entering.lock"

    @property
    def publishing_lock(self) -> Path:
        """The lock file for publishing to the drive."""
        return self.live_dir / "publishing.lock"

    @property
    def crystals_lock(self) -> Path:
        """The lock file for copying crystals for other machines."""
        return self.live_dir / "crystals.lock"

    @property
    def publishing_file(self) -> Path:
        """The file that records which files are published, and errors in publishing."""
        return self.live_dir / "publishing.json"

    def working_results(self, results_dir: str) -> Path:
        """The folder in which sessions write an experiment's results.

        Args:
            results_dir: the final folder of these results, relative to the project's folder.
        """
        return (self.root if self.live is None else self.live) / results_dir

    def results_folder(self, day: str, folder_name: str) -> str:
        """The results folder of an experiment enqueued on ``day`` (YYYY-MM-DD), relative to the project's folder."""
        return str(Path("results", "daily", day, folder_name))

    def experiment_file(self, name_or_file: str) -> Path:
        """Find an experiment file by its name in jobs/ or by its path.

        Raises:
            UsageError: if the file does not exist; the error lists the experiments in jobs/.
        """
        direct = Path(name_or_file)
        if direct.suffix == ".toml" and direct.is_file():
            return direct
        named = self.jobs_dir / f"{name_or_file}.toml"
        if "/" not in name_or_file and named.is_file():
            return named
        known = ", ".join(sorted(p.stem for p in self.jobs_dir.glob("*.toml"))) or "none"
        raise UsageError(f"There is no experiment {name_or_file!r}. The experiments in {self.jobs_dir} are: {known}.")


def fold_name(fold: int) -> str:
    return f"fold_{fold}"


def fold_named(name: str) -> int | None:
    """The number of the fold whose folder has this name; None if there is no such fold."""
    return int(name[-1]) if re.fullmatch(FOLD_PATTERN, name) else None


def find_project(given: Path | None = None, *, start: Path | None = None, while_away: bool = False) -> ProjectFolder:
    """Find the project to work on.

    Args:
        given: the project's folder; by default $MBQUEUE_PROJECT, else the nearest project at or above ``start``.
        start: where to begin the search; by default the working directory.
        while_away: also return a project whose drive is not mounted, if its live folder is on this machine (see
            `ProjectFolder.away`).

    Raises:
        ProjectNotFound: if there is no project, or its drive is not mounted.
        SpecError: if mbqueue.toml is wrong.
    """
    if given is None and (from_environment := os.environ.get(ENVIRONMENT_VARIABLE)):
        given = Path(from_environment)
    if given is not None:
        root = from_here(given.expanduser())
        return _looked_for([root], lambda: _project_at(root, given), while_away)
    start = (start or working_folder()).absolute()
    return _looked_for([start, *start.parents], lambda: _project_above(start), while_away)


def working_folder() -> Path:
    """The current working directory. Relative paths need one, and so does loading PyTorch or Numba.

    Raises:
        ProjectNotFound: if the folder no longer exists, for example because a drive was remounted.
    """
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ProjectNotFound(
            "This shell's working directory no longer exists: it was removed, or its drive was remounted. Change to a "
            f"folder that exists, for example with: cd {os.environ.get('PWD') or '~'}"
        ) from None


def from_here(path: Path) -> Path:
    """Interpret a user's path relative to the working directory.

    Raises:
        ProjectNotFound: if the path is relative, and the working directory no longer exists.
    """
    return path if path.is_absolute() else working_folder() / path


def _looked_for(paths: list[Path], look: Callable[[], ProjectFolder], while_away: bool) -> ProjectFolder:
    """Return the project that ``look`` finds, after comparing it with the live folders on this machine."""
    given = os.environ.get(LIVE_VARIABLE)
    known = next(((path, live) for path in paths if (live := live_dir_of(path, given)) is not None), None)
    if known is None:
        return look()
    root, live = known
    belonging = Belonging.of(live)

    def look_closely() -> tuple[ProjectFolder, str | None]:
        found = look()
        if found.root != root and root.is_relative_to(found.root):
            raise ProjectNotFound  # the known project is not mounted, so `look` found a project above it
        return found, belonging.missing(found.state_dir) if belonging is not None and found.root == root else None

    try:
        found, why = answer_within(LOOK_SECONDS, look_closely)
    except ProjectNotFound:
        why = "the folder contains no project"
    except PermissionError:
        raise
    except OSError as error:  # OSError includes TimeoutError
        why = error.strerror or str(error)
    if why is None:
        return found
    if while_away:
        return ProjectFolder(root, Settings(), live, why)
    raise ProjectNotFound(
        f"The drive of {root} is not mounted or is not responding: {why}. Mount the drive, and resume (in Colab: "
        "drive.mount with force_remount=True). Unpublished work is safe on this machine; mbqueue status shows it. "
        f"If this is a new or a different project, move the old live folder away: {live}"
    )


def _project_at(root: Path, given: Path) -> ProjectFolder:
    if _is_project(root):
        return _opened(root)
    state = "is not a project" if root.is_dir() else "does not exist"
    drive = "" if root.parent.exists() else " If the project is on a drive, mount the drive first."
    above = next((folder for folder in root.parents if _is_project(folder)), None)
    to_do = f"Create a project with: mbqueue init {given}" if above is None else f"Use the enclosing project: {above}"
    raise ProjectNotFound(f"{root} {state} (a project contains jobs/ and state/).{drive} {to_do}")


def _project_above(start: Path) -> ProjectFolder:
    for folder in (start, *start.parents):
        if _is_project(folder):
            return _opened(folder)
    raise ProjectNotFound(
        f"Neither {start} nor a folder above it is a project (a folder with jobs/ and state/). Change to a project's "
        f"folder, set --project DIR or {ENVIRONMENT_VARIABLE}, or create a project with: mbqueue init DIR"
    )


def _opened(root: Path) -> ProjectFolder:
    settings = load_settings(root)
    return ProjectFolder(root, settings, live_folder(root, settings))


def init_project(root: Path) -> tuple[ProjectFolder, list[Path]]:
    """Create a project in the folder ``root``, without changing existing files.

    Returns:
        The project, and the files that this function wrote.
    """
    root = from_here(root.expanduser())
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file. Give the path of a folder instead.")
    for folder in ("jobs", STATE_FOLDER, "results"):
        files.make_folder(root / folder)
    written = []
    templates = resources.files("mbqueue") / "templates"
    for template in sorted(templates.iterdir(), key=lambda entry: entry.name):
        target = root / SETTINGS_FILE if template.name == SETTINGS_FILE else root / "jobs" / template.name
        if template.name.endswith(".toml") and not target.exists():
            files.write_text(target, template.read_text(encoding="utf-8"))
            written.append(target)
    return _opened(root), written


def _is_project(folder: Path) -> bool:
    return (folder / "jobs").is_dir() and (folder / STATE_FOLDER).is_dir()
