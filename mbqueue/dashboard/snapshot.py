"""The status of a project as a Python object, with pandas tables and a view for terminals and notebooks."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.terminal_theme import TerminalTheme

from mbqueue.dashboard.status import Dashboard
from mbqueue.queue.jobs import State

if TYPE_CHECKING:
    import pandas as pd

_NOTEBOOK_COLUMNS = 110
#: RGB values of black, red, green, yellow, blue, magenta, cyan and white, in medium tones that are legible in light and
#: dark notebooks.
_TONES = [
    (100, 100, 100), (207, 64, 64), (45, 145, 80), (176, 128, 0),
    (74, 125, 220), (160, 95, 205), (20, 145, 165), (140, 140, 140),
]  # fmt: skip
_EXPERIMENT_COLUMNS = (
    "name", "state", "paused", "priority", "dataset", "target", "dataset_hash", "spec_hash", "enqueued_at",
    "results_dir", "prepare", "record", "seconds", "unit", *(state.value for state in State),
)  # fmt: skip
_FOLD_COLUMNS = (
    "experiment", "fold", "state", "epochs_done", "epochs_skipped", "epochs_total", "best_val_mae", "best_epoch",
    "last_val_mae", "test_mae", "test_rocauc", "seconds", "epoch_seconds",
)  # fmt: skip
_SESSION_COLUMNS = (
    "id", "state", "host", "pid", "device", "started_at", "heartbeat_at", "deadline_at", "structures_per_second", "job",
)  # fmt: skip
_ERROR_COLUMNS = ("job", "experiment", "kind", "fold", "epoch", "state", "failures", "at", "retry_at", "error")
#: Overview keys whose values change constantly.
_FLEETING = frozenset(
    {
        "now",
        "heartbeat_at",
        "structures_per_second",
        "progress",
        "lease_expires_at",
        "seconds_at_risk",
        "retry_at",
        "preparing",
        "seconds",
    }
)
_THEME = TerminalTheme((255, 255, 255), (0, 0, 0), _TONES)


@dataclass(frozen=True, kw_only=True)
class Status:
    """The result of `Project.status`, which notebooks display; `str` returns the output of `mbqueue status`.

    The tables (`experiments`, `folds`, `sessions`, `errors`) are pandas DataFrames. pandas is imported only when you
    use one of them. MAEs are in the target's unit; times are Unix timestamps in seconds.

    Attributes:
        overview: the whole status as one dictionary (see `mbqueue.queue.overview`).
        session_seconds: the usual length of a session, to estimate how many sessions are left.
        whole: the overview of the whole queue if ``overview`` covers only some experiments and no session is running.
        search: name of the search whose trials are shown, or None.
        errors_in_full: whether to show errors in full, as in the status of one experiment or search.
    """

    overview: Mapping[str, Any]
    session_seconds: float
    whole: Mapping[str, Any] | None = None
    search: str | None = None
    errors_in_full: bool = False

    @property
    def is_active(self) -> bool:
        return any(session["state"] == "live" for session in self.overview["sessions"])

    @property
    def experiments(self) -> pd.DataFrame:
        """A table with one row per experiment: state, dataset, target, results folder, and number of jobs by state."""
        rows = [
            {
                **{
                    key: value
                    for key, value in entry.items()
                    if key not in ("folds", "jobs", "preparing", "trial", "chosen")
                },
                "target": entry["target"]["name"],
                "unit": entry["target"]["unit"],
                **entry["jobs"],
            }
            for entry in self.overview["experiments"]
        ]
        return _frame(rows, _EXPERIMENT_COLUMNS, index="name")

    @property
    def folds(self) -> pd.DataFrame:
        """A table with one row per experiment and fold: state, epochs, validation and test scores, and time used."""
        rows = [
            {"experiment": entry["name"], **{k: v for k, v in fold.items() if k not in ("jobs", "running", "val_mae")}}
            for entry in self.overview["experiments"]
            for fold in entry["folds"]
        ]
        return _frame(rows, _FOLD_COLUMNS, index=["experiment", "fold"])

    @property
    def sessions(self) -> pd.DataFrame:
        """A table with one row per session that has not ended."""
        rows = ({**row, "job": _label(row["job"])} for row in self.overview["sessions"])
        return _frame(rows, _SESSION_COLUMNS, index="id")

    @property
    def errors(self) -> pd.DataFrame:
        """A table with one row per job whose last attempt failed, newest first."""
        return _frame(self.overview["errors"], _ERROR_COLUMNS, index="job")

    def view(self, *, fits_height: bool = False) -> RenderableType:
        """Render the output of `mbqueue status` for a rich console.

        Args:
            fits_height: limit the view to the console's height.
        """
        return Dashboard(
            overview=self.overview,
            session_seconds=self.session_seconds,
            whole=self.whole,
            fits_height=fits_height,
            opened=self.search is not None,
            errors_in_full=self.errors_in_full,
        )

    def says_more_than(self, earlier: Status) -> bool:
        """Whether a state, an epoch, a session or an error changed since ``earlier``.

        Ages, rates and progress change constantly, so they are ignored.
        """
        return bool(_lasting(self.overview) != _lasting(earlier.overview))

    def __rich__(self) -> RenderableType:
        return self.view()

    def __str__(self) -> str:
        console = Console(width=80, no_color=True, color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(self.view())
        return captured.get().rstrip()

    def _repr_html_(self) -> str:
        nowhere = io.StringIO()
        console = Console(
            file=nowhere, width=_NOTEBOOK_COLUMNS, record=True, force_jupyter=False, color_system="truecolor"
        )
        console.print(self.view())
        body = console.export_html(theme=_THEME, inline_styles=True, code_format="{code}")
        title = html.escape(str(self.overview["project"]))
        return (
            f'<pre title="{title}" style="font-family:Menlo,\'DejaVu Sans Mono\',Consolas,monospace;line-height:1.2;'
            f'white-space:pre;overflow-x:auto">{body}</pre>'
        )


def _lasting(told: Any) -> Any:
    """Copy an overview without the keys whose values change constantly."""
    if isinstance(told, Mapping):
        return {key: _lasting(value) for key, value in told.items() if key not in _FLEETING}
    return [_lasting(value) for value in told] if isinstance(told, list) else told


def _frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, index: str | list[str]) -> pd.DataFrame:
    """Make a DataFrame from the rows; without rows, the DataFrame still has ``columns``."""
    import pandas as pd  # noqa: PLC0415 - importing pandas takes half a second, and `mbqueue status` does not need it

    found = list(rows)
    return (pd.DataFrame(found) if found else pd.DataFrame(columns=list(columns))).set_index(index)


def _label(job: Mapping[str, Any] | None) -> str | None:
    if job is None:
        return None
    parts = [job["experiment"], job["kind"]]
    parts += [f"{key} {job[key]}" for key in ("fold", "epoch") if job[key] is not None]
    return " ".join(parts)
