"""mbqueue from Python: everything that the command line can do with a project. The command line itself goes this way.

    from mbqueue import Project

    project = Project.create("my-project")
    project.enqueue("full_finetune", dataset="sample", epochs=2, folds=[0])
    project.work(session="1h50m")
    project.status()                          # shows itself in a notebook; .folds is a pandas frame
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

    Objects are cheap and hold nothing open; any number of them, in any number of processes, may stand for the same
    folder. What is wrong raises a subclass of `mbqueue.errors.MbqueueError` whose message says what to do.

    Args:
        path: the project's folder; without it, $MBQUEUE_PROJECT or the nearest folder above this one that is one.
        while_away: also when its drive is not mounted and a live folder of it is here: for `status`, and no more.

    Raises:
        ProjectNotFound: when there is none.
        SpecError: when its mbqueue.toml is wrong.
    """

    @classmethod
    def create(cls, path: str | Path = ".") -> Project:
        """Make a folder a project, with five experiments in jobs/; what is there already stays as it is."""
        return cls(init_project(Path(path))[0].root)


def status(path: str | Path | None = None) -> Status:
    """Where everything stands in the project at ``path`` (by default the one above the working folder)."""
    return Project(path, while_away=True).status()


def watch(path: str | Path | None = None, *, seconds: float = 5.0) -> None:
    """`Project.watch` of the project at ``path`` (by default the one above the working folder)."""
    Project(path).watch(seconds=seconds)
