"""Where everything of a project lies. No other module puts a path together.

    PROJECT/
    ├── mbqueue.toml                settings (optional)
    ├── jobs/NAME.toml              experiments
    ├── state/
    │   ├── queue.db                the queue
    │   ├── cache/                  converted crystals; can be deleted at any time
    │   ├── checkpoints/EXPERIMENT/fold_i/
    │   ├── logs/                   of sessions in the background; tensorboard/
    │   └── background.json         which process is the session in the background
    └── results/daily/YYYY-MM-DD/EXPERIMENT/

Paths are derived, never stored, but for the results folder: its day is that of enqueueing.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mbqueue import files
from mbqueue.clock import parse_duration
from mbqueue.errors import ProjectNotFound, SpecError, UsageError

ENVIRONMENT_VARIABLE = "MBQUEUE_PROJECT"
SETTINGS_FILE = "mbqueue.toml"

NotifyEvent = Literal["fold done", "experiment done", "job failed", "session ended"]


class NotifySettings(BaseModel):
    """[notify]: whom a session tells what happened."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    command: str = Field(
        "", description="Run by /bin/sh, with MBQUEUE_EVENT and MBQUEUE_TEXT set and the JSON on standard input."
    )
    webhook: str = Field(
        "", pattern=r"^$|^https?://\S+$", description="Gets the JSON by POST; Slack and Discord read it."
    )
    events: tuple[NotifyEvent, ...] = Field(
        ("fold done", "experiment done", "job failed", "session ended"),
        strict=False,
        description="Which events to tell.",
    )
    timeout_seconds: float = Field(10.0, gt=0, le=300, description="How long one notification may take.")


class Settings(BaseModel):
    """mbqueue.toml: how sessions behave. Nothing in it changes a result."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    session: str = Field("1h50m", description="Length of a session when `mbqueue work` is not told otherwise.")
    checkpoint_minutes: float = Field(5.0, gt=0, description="Minutes between checkpoints within an epoch.")
    lease_seconds: float = Field(120.0, ge=1, description="How long a silent worker keeps its job.")
    notify: NotifySettings = NotifySettings()

    @property
    def session_seconds(self) -> float:
        """Length of a session in seconds."""
        return parse_duration(self.session)


@dataclass(frozen=True)
class ProjectFolder:
    """The paths and settings of one project folder."""

    root: Path
    settings: Settings = field(default_factory=Settings)

    @property
    def jobs_dir(self) -> Path:
        """Experiment files."""
        return self.root / "jobs"

    @property
    def state_dir(self) -> Path:
        """What the program keeps for itself."""
        return self.root / "state"

    @property
    def results_dir(self) -> Path:
        """What people read."""
        return self.root / "results"

    @property
    def queue_db(self) -> Path:
        """The queue's database."""
        return self.state_dir / "queue.db"

    @property
    def cache_dir(self) -> Path:
        """Converted crystals and frozen features; can be rebuilt."""
        return self.state_dir / "cache"

    @property
    def logs_dir(self) -> Path:
        """What sessions in the background said, and TensorBoard's event files."""
        return self.state_dir / "logs"

    @property
    def background_file(self) -> Path:
        """Which process is the session in the background."""
        return self.state_dir / "background.json"

    @property
    def device_limits(self) -> Path:
        """What each device was found to hold (micro-batch after an out-of-memory error)."""
        return self.state_dir / "device_limits.json"

    def checkpoints_dir(self, experiment: str, fold: int) -> Path:
        """Checkpoints and manifests of one fold."""
        return self.state_dir / "checkpoints" / experiment / f"fold_{fold}"

    def results_folder(self, day: str, folder_name: str) -> str:
        """Results folder of an experiment enqueued on ``day`` (YYYY-MM-DD), relative to the project's root."""
        return str(Path("results", "daily", day, folder_name))

    def experiment_file(self, name_or_file: str) -> Path:
        """The spec file of an experiment, by its name in jobs/ or by its path.

        Raises:
            UsageError: when there is none; lists those that exist.
        """
        direct = Path(name_or_file)
        if direct.suffix == ".toml" and direct.is_file():
            return direct
        named = self.jobs_dir / f"{name_or_file}.toml"
        if "/" not in name_or_file and named.is_file():
            return named
        known = ", ".join(sorted(p.stem for p in self.jobs_dir.glob("*.toml"))) or "none"
        raise UsageError(f"There is no experiment {name_or_file!r}. In {self.jobs_dir} are: {known}.")


def find_project(given: Path | None = None, *, start: Path | None = None) -> ProjectFolder:
    """The project at ``given``, else at $MBQUEUE_PROJECT, else at the nearest parent of ``start`` that is one.

    Raises:
        ProjectNotFound: saying where was looked and how to make a project.
        SpecError: when mbqueue.toml is wrong.
    """
    if given is None and (from_environment := os.environ.get(ENVIRONMENT_VARIABLE)):
        given = Path(from_environment)
    if given is not None:
        root = given.expanduser().absolute()
        if not _is_project(root):
            state = "is not a project" if root.is_dir() else "does not exist"
            raise ProjectNotFound(
                f"{root} {state} (a project has jobs/ and state/). Make one with: mbqueue init {given}"
            )
        return ProjectFolder(root, load_settings(root))
    start = (start or Path.cwd()).absolute()
    for folder in (start, *start.parents):
        if _is_project(folder):
            return ProjectFolder(folder, load_settings(folder))
    raise ProjectNotFound(
        f"Neither {start} nor a folder above it is a project (one with jobs/ and state/). "
        f"Go to one, name one with --project DIR or {ENVIRONMENT_VARIABLE}, or make one with: mbqueue init DIR"
    )


def init_project(root: Path) -> tuple[ProjectFolder, list[Path]]:
    """Make ``root`` a project; returns it and the files that were written. What is there already stays as it is."""
    root = root.expanduser().absolute()
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file. Give a folder for the project.")
    for folder in ("jobs", "state", "results"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    written = []
    templates = resources.files("mbqueue") / "templates"
    for template in sorted(templates.iterdir(), key=lambda entry: entry.name):
        target = root / SETTINGS_FILE if template.name == SETTINGS_FILE else root / "jobs" / template.name
        if template.name.endswith(".toml") and not target.exists():
            files.write_text(target, template.read_text(encoding="utf-8"))
            written.append(target)
    return ProjectFolder(root, load_settings(root)), written


def load_settings(root: Path) -> Settings:
    """The settings in ``root``/mbqueue.toml, or the defaults where there is no such file.

    Raises:
        SpecError: naming each wrong key.
    """
    path = root / SETTINGS_FILE
    try:
        settings = Settings.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        parse_duration(settings.session)
    except FileNotFoundError:
        return Settings()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not valid TOML: {error}.") from error
    except UsageError as error:
        raise SpecError(f"{path}: session: {error}") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise SpecError(f"{path}: {wrong}. Known here: {', '.join(Settings.model_fields)}.") from error
    return settings


def _is_project(folder: Path) -> bool:
    return (folder / "jobs").is_dir() and (folder / "state").is_dir()
