"""The Python API, which can do everything with a project that the command line can. The commands use this API.

    from mbqueue import Project

    project = Project.create("my-project")
    project.enqueue("full_finetune", dataset="sample", epochs=2, folds=[0])
    project.work(session="1h50m")
    project.status()                          # a notebook displays it; .folds is a pandas frame
    project.history("full_finetune")          # pandas
    project.predictions("full_finetune")      # pandas
    project.model("full_finetune", fold=0)    # a CHGNet

Importing this module is fast: torch, pandas and plotly are imported only by methods that need them. Times are
Unix timestamps in seconds. Prediction errors are in the target's unit.
"""

from __future__ import annotations

from pathlib import Path

from mbqueue.api.blending import Blending
from mbqueue.api.data import Data
from mbqueue.api.keeping import Keeping
from mbqueue.api.launching import Launching
from mbqueue.api.sessions import Working
from mbqueue.dashboard.snapshot import Status
from mbqueue.project import init_project

__all__ = ["Project", "Status", "status", "watch"]


class Project(Blending, Working, Launching, Data, Keeping):
    """One project: its queue, its sessions, its results.

    `Project` objects are cheap and keep no files open. Several objects and processes can use the same folder at the
    same time. Errors are subclasses of `mbqueue.errors.MbqueueError`, and their messages explain what to do.

    Args:
        path: the project's folder; by default $MBQUEUE_PROJECT, else the nearest project above the working directory.
        while_away: open the project for `status` while its drive is not mounted, provided that its live folder is on
            this machine.

    Raises:
        ProjectNotFound: if there is no project.
        SpecError: if the project's mbqueue.toml is wrong.
    """

    @classmethod
    def create(cls, path: str | Path = ".") -> Project:
        """Turn a folder into a project with five experiments in jobs/; existing files stay unchanged."""
        return cls(init_project(Path(path))[0].root)


def status(path: str | Path | None = None) -> Status:
    """Return the status of the project at ``path`` (by default the nearest one above the working directory)."""
    return Project(path, while_away=True).status()


def watch(path: str | Path | None = None, *, seconds: float = 5.0) -> None:
    """Run `Project.watch` for the project at ``path`` (by default the nearest one above the working directory)."""
    Project(path).watch(seconds=seconds)
