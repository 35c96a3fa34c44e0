"""The layout of a project's folders. Other modules only name files in them.

    PROJECT/
    ├── mbqueue.toml                settings (optional)
    ├── jobs/NAME.toml              experiments
    ├── state/
    │   ├── queue.db                the queue
    │   ├── cache/                  converted crystals; can be deleted at any time
    │   ├── checkpoints/EXPERIMENT/fold_i/
    │   ├── wanted/EXPERIMENT.json  what was enqueued, to rebuild the queue from
    │   ├── logs/                   of background sessions; tensorboard/
    │   ├── commits.json            the id by which a queue on a server knows these checkpoints
    │   └── background.json         the process of the background session
    └── results/daily/YYYY-MM-DD/EXPERIMENT/

Paths are derived, never stored, except the results folder, whose date is the day of enqueueing.

On a drive or network mount (or with a live folder given) the project is *split*: what changes is in a live folder on a
local disk, and the mount receives files that are written once, under names that are never reused:

    LIVE/                           queue.db, cache/, checkpoints/, logs/ …, as in state/ above
    ├── publishing.json             what is published, and why something is not
    ├── project.json                the project of this folder (`mbqueue.belonging`)
    └── results/daily/…             results in progress
    PROJECT/state/
    ├── checkpoints/EXPERIMENT/fold_i/STEM-HASH.pt, STEM-HASH.json
    ├── snapshots/NUMBER-DATABASE-HASH.db, .json
    ├── outcomes/EXPERIMENT/…       the result files with their hashes
    ├── sessions/SESSION-NUMBER.json
    ├── project-ID.json             the project's id; written once
    └── crystals/DATASET-HASH.bin   what a new machine makes its cache/ from

With an object store, commits, results and expensive data are there, below the prefix that `store` names. The folders
above hold copies. Objects never change; a name without a hash is written once.

    STORE/
    ├── mbqueue-store.json          the store's id, by which queues know it (`mbqueue.buckets.MARKER`)
    ├── checkpoints/EXPERIMENT/fold_i/STEM-HASH.pt, STEM.json; set aside ones end in .damaged
    ├── results/EXPERIMENT/HASH-NAME            files that the queue's committed jobs list
    ├── crystals/DATASET-HASH.bin               as on a drive
    └── frozen/frozen-DATASET-WEIGHTS/KIND-NUMBER-HASH.npy, KIND-NUMBER.json
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path

from mbqueue import files
from mbqueue.belonging import Belonging, answer_within, live_dir_of
from mbqueue.errors import ProjectNotFound, UsageError
from mbqueue.settings import SETTINGS_FILE, Settings, load_settings
from mbqueue.topology import LIVE_VARIABLE, Topology, live_folder

ENVIRONMENT_VARIABLE = "MBQUEUE_PROJECT"
#: The form of an experiment's name, and so of its folders.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

#: How long to wait for a drive before using only the local records about its project.
LOOK_SECONDS = 20.0

#: The folders of published files, relative to the project's folder on the drive, for `mbqueue.storage.mounted.Drive`.
PUBLISHED_ID = "state"
PUBLISHED_CHECKPOINTS = "state/checkpoints"
PUBLISHED_SNAPSHOTS = "state/snapshots"
PUBLISHED_OUTCOMES = "state/outcomes"
PUBLISHED_SESSIONS = "state/sessions"
PUBLISHED_CRYSTALS = "state/crystals"

#: The folders of objects, relative to the prefix of the store, for `mbqueue.storage.objects.ObjectStore`.
STORED_CHECKPOINTS = "checkpoints"
STORED_RESULTS = "results"
STORED_CRYSTALS = "crystals"
STORED_FROZEN = "frozen"


@dataclass(frozen=True)
class ProjectFolder:
    """The paths and settings of one project folder.

    Attributes:
        live: the live folder if it is not state/ (see the module's docstring), else None.
        away: the reason why only the live folder can be read; None if the project itself is reachable.
    """

    root: Path
    settings: Settings = field(default_factory=Settings)
    live: Path | None = None
    away: str | None = None

    @cached_property
    def topology(self) -> Topology:
        """The locations of the queue, the live state, the commits and the results.

        Raises:
            UsageError: if an environment variable that sets one of these locations is wrong.
        """
        return Topology.of(self.root, self.settings, live=self.live)

    @property
    def unsplit(self) -> ProjectFolder:
        """The same project without its live folder."""
        return replace(self, live=None)

    def with_queue(self, *, on_server: bool) -> ProjectFolder:
        """The same project with its queue moved to a server or to a file, which may change the live folder."""
        return replace(self, live=live_folder(self.root, self.settings, on_server=on_server))

    @property
    def store_file(self) -> Path:
        """The file that says why commits do not reach the store; it exists only while they do not."""
        return self.live_dir / "store.json"

    @property
    def commits_file(self) -> Path:
        """The id by which a shared queue knows this folder's checkpoints, if the project has no store."""
        return self.live_dir / "commits.json"

    @property
    def home_file(self) -> Path:
        """The file that records where the project's folder last was, to recognise copies
        (`mbqueue.session.originals`)."""
        return self.state_dir / "home.json"

    @property
    def live_dir(self) -> Path:
        """The live state, which sessions change; always on a local disk."""
        return self.live if self.live is not None else self.state_dir

    @property
    def jobs_dir(self) -> Path:
        """Experiment files."""
        return self.root / "jobs"

    @property
    def state_dir(self) -> Path:
        """The folder of the program's own files; in a split project, of the published files."""
        return self.root / "state"

    @property
    def results_dir(self) -> Path:
        """The results."""
        return self.root / "results"

    @property
    def never_outputs(self) -> tuple[Path, ...]:
        """The project's files that commands read; no output may overwrite them, even with --force."""
        return (self.root / SETTINGS_FILE, self.state_dir, self.live_dir)

    @property
    def queue_db(self) -> Path:
        """The queue's database."""
        return self.live_dir / "queue.db"

    @property
    def cache_dir(self) -> Path:
        """Converted crystals and frozen features, which can be rebuilt."""
        return self.live_dir / "cache"

    @property
    def logs_dir(self) -> Path:
        """Logs of background sessions, and TensorBoard event files."""
        return self.live_dir / "logs"

    @property
    def launched_dir(self) -> Path:
        """Files and logs of submitted cluster jobs, visible to all machines."""
        return self.state_dir / "logs" / "launched"

    @property
    def background_file(self) -> Path:
        """The file that records the process of the background session."""
        return self.live_dir / "background.json"

    def predictions_dir(self, *names: str) -> Path:
        """Outputs of interrupted predictions, kept until the fold is predicted or, for `mbqueue predict`, for a
        week."""
        return self.live_dir.joinpath("predictions", *names)

    @property
    def device_limits(self) -> Path:
        """The file that records how many crystals fit each device when nothing else uses it."""
        return self.live_dir / "device_limits.json"

    @property
    def all_checkpoints(self) -> Path:
        """Checkpoints and manifests of all folds."""
        return self.live_dir / "checkpoints"

    def checkpoints_dir(self, experiment: str, fold: int) -> Path:
        """Checkpoints and manifests of one fold."""
        return self.all_checkpoints / experiment / f"fold_{fold}"

    def fold_dirs(self) -> list[Path]:
        """Every existing folder in `checkpoints_dir`."""
        return sorted(self.all_checkpoints.glob("*/fold_[0-4]"))

    @property
    def wanted_dir(self) -> Path:
        """The record of what was enqueued for each experiment, for `mbqueue recover`."""
        return self.live_dir / "wanted"

    @property
    def entering_lock(self) -> Path:
        """The lock of the process that creates or replaces the queue's file."""
        return self.live_dir / "entering.lock"

    @property
    def publishing_lock(self) -> Path:
        """The lock of the session that publishes."""
        return self.live_dir / "publishing.lock"

    @property
    def crystals_lock(self) -> Path:
        """The lock of the session that copies crystals for other machines."""
        return self.live_dir / "crystals.lock"

    @property
    def publishing_file(self) -> Path:
        """The record of published files, and of errors in publishing."""
        return self.live_dir / "publishing.json"

    def working_results(self, results_dir: str) -> Path:
        """The folder where sessions write the results that appear at ``results_dir``, a path relative to the root."""
        return (self.root if self.live is None else self.live) / results_dir

    def results_folder(self, day: str, folder_name: str) -> str:
        """Results folder of an experiment enqueued on ``day`` (YYYY-MM-DD), relative to the project's root."""
        return str(Path("results", "daily", day, folder_name))

    def experiment_file(self, name_or_file: str) -> Path:
        """The spec file of an experiment, given its name in jobs/ or its path.

        Raises:
            UsageError: if there is no such file; the error lists those that exist.
        """
        direct = Path(name_or_file)
        if direct.suffix == ".toml" and direct.is_file():
            return direct
        named = self.jobs_dir / f"{name_or_file}.toml"
        if "/" not in name_or_file and named.is_file():
            return named
        known = ", ".join(sorted(p.stem for p in self.jobs_dir.glob("*.toml"))) or "none"
        raise UsageError(f"There is no experiment {name_or_file!r}. In {self.jobs_dir} are: {known}.")


def find_project(given: Path | None = None, *, start: Path | None = None, while_away: bool = False) -> ProjectFolder:
    """Find the project at ``given``, else at $MBQUEUE_PROJECT, else at the nearest parent of ``start`` that is one.

    Args:
        while_away: also return a project whose drive is not mounted but whose live folder is here (see
            `ProjectFolder.away`).

    Raises:
        ProjectNotFound: if there is no project, or its drive is not mounted; the error says where mbqueue looked and
            what to do.
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
    """The working folder. Relative paths need it, and so do PyTorch and Numba while they load.

    Raises:
        ProjectNotFound: if the folder no longer exists, for example after remounting a drive.
    """
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ProjectNotFound(
            "The working folder of this shell is gone: it was removed, or its drive was mounted again. Change to one "
            f"that exists, for example with: cd {os.environ.get('PWD') or '~'}"
        ) from None


def from_here(path: Path) -> Path:
    """Make a path from the user absolute.

    Raises:
        ProjectNotFound: if the path is relative to a working folder that is gone.
    """
    return path if path.is_absolute() else working_folder() / path


def _looked_for(paths: list[Path], look: Callable[[], ProjectFolder], while_away: bool) -> ProjectFolder:
    """Return the result of ``look``, unless one of the paths belongs to a known project that is unavailable now."""
    given = os.environ.get(LIVE_VARIABLE)
    known = next(((path, live) for path in paths if (live := live_dir_of(path, given)) is not None), None)
    if known is None:
        return look()
    root, live = known
    belonging = Belonging.of(live)

    def look_closely() -> tuple[ProjectFolder, str | None]:
        found = look()
        if found.root != root and root.is_relative_to(found.root):
            raise ProjectNotFound  # the project that was found is above the mount point of the known project
        return found, belonging.missing(found.state_dir) if belonging is not None and found.root == root else None

    try:
        found, why = answer_within(LOOK_SECONDS, look_closely)
    except ProjectNotFound:
        why = "the project is not there"
    except PermissionError:
        raise
    except OSError as error:  # including TimeoutError
        why = error.strerror or str(error)
    if why is None:
        return found
    if while_away:
        return ProjectFolder(root, Settings(), live, why)
    raise ProjectNotFound(
        f"{root} is on a drive that is not mounted, or does not answer: {why}. Mount it, and resume (in Colab: "
        "drive.mount with force_remount=True). Unpublished work is safe here, and mbqueue status shows it. "
        f"If this is a new or a different project, move the old live folder away: {live}"
    )


def _project_at(root: Path, given: Path) -> ProjectFolder:
    if _is_project(root):
        return _opened(root)
    state = "is not a project" if root.is_dir() else "does not exist"
    drive = "" if root.parent.exists() else " If it is on a drive, mount that first."
    above = next((folder for folder in root.parents if _is_project(folder)), None)
    to_do = f"Make one with: mbqueue init {given}" if above is None else f"The project above it is {above}: name that."
    raise ProjectNotFound(f"{root} {state} (a project has jobs/ and state/).{drive} {to_do}")


def _project_above(start: Path) -> ProjectFolder:
    for folder in (start, *start.parents):
        if _is_project(folder):
            return _opened(folder)
    raise ProjectNotFound(
        f"Neither {start} nor a folder above it is a project (one with jobs/ and state/). "
        f"Go to one, name one with --project DIR or {ENVIRONMENT_VARIABLE}, or make one with: mbqueue init DIR"
    )


def _opened(root: Path) -> ProjectFolder:
    settings = load_settings(root)
    return ProjectFolder(root, settings, live_folder(root, settings))


def init_project(root: Path) -> tuple[ProjectFolder, list[Path]]:
    """Make ``root`` a project; return it and the files that were written. Existing files stay unchanged."""
    root = from_here(root.expanduser())
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file. Give a folder for the project.")
    for folder in ("jobs", "state", "results"):
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
    return (folder / "jobs").is_dir() and (folder / "state").is_dir()
