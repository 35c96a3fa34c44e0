"""mbqueue from Python: everything that the command line can do with a project. The commands use this API themselves.

    from mbqueue import Project

    project = Project.create("my-project")
    project.enqueue("full_finetune", dataset="sample", epochs=2, folds=[0])
    project.work(session="1h50m")
    project.status()                          # a notebook displays it; .folds is a pandas frame
    project.history("full_finetune")          # pandas
    project.predictions("full_finetune")      # pandas
    project.model("full_finetune", fold=0)    # a CHGNet

Importing this module imports nothing heavy; torch, pandas and plotly come with the first method that needs them.
Times are seconds since the epoch (UTC), errors in the unit of the target.
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

    Objects are cheap and hold no files open. Any number of objects, in any number of processes, may use the same
    folder. Errors are subclasses of `mbqueue.errors.MbqueueError` whose message says what to do.

    Args:
        path: the project's folder; by default $MBQUEUE_PROJECT, else the nearest project above the working folder.
        while_away: open the project for `status` even if its drive is not mounted, as long as its live folder is here.

    Raises:
        ProjectNotFound: if there is no project.
        SpecError: if the project's mbqueue.toml is wrong.
    """

    @classmethod
    def create(cls, path: str | Path = ".") -> Project:
        """Turn a folder into a project with five experiments in jobs/; existing files stay unchanged."""
        return cls(init_project(Path(path))[0].root)


def status(path: str | Path | None = None) -> Status:
    """The status of the project at ``path`` (by default the nearest one above the working folder)."""
    return Project(path, while_away=True).status()


def watch(path: str | Path | None = None, *, seconds: float = 5.0) -> None:
    """`Project.watch` for the project at ``path`` (by default the nearest one above the working folder)."""
    Project(path).watch(seconds=seconds)
