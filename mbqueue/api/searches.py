"""The report of a search, and its export as an Optuna study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbqueue.api.base import OpenedProject, tell
from mbqueue.errors import SearchUnavailable, UsageError
from mbqueue.outputs import page_for, require_writable
from mbqueue.queue.opening import is_queue_there
from mbqueue.search.trials import experiments_of, trials_of

if TYPE_CHECKING:
    from mbqueue.search.file import Search
    from mbqueue.search.trials import Trial

_SQLITE = b"SQLite format 3\x00"


class Searches(OpenedProject):
    def is_search(self, name: str) -> bool:
        """Whether a search with this name is in the queue."""
        if not is_queue_there(self.folder):
            return False
        with self._reading_queue(None) as queue:
            return experiments_of(queue, name) != [name]

    def export_study(self, search: str, output: str | Path = "study.db", *, force: bool = False) -> Path:
        """Export a search as an Optuna study to a SQLite file, which you can open with optuna-dashboard.

        Args:
            output: the file, or a folder for study.db.
            force: overwrite an existing file.

        Raises:
            UsageError: if the search does not exist, or the file must not be overwritten.
            SearchUnavailable: if Optuna is not installed.
        """
        from mbqueue.search.export import write_study  # noqa: PLC0415

        path = page_for(Path(output), "study.db")
        require_writable(path, force=force, reads=self.folder.never_outputs)
        found, _ = self._searched(search)
        return write_study(*found, path)

    def _report_search(
        self, name: str, *, output: str | Path | None, png: str | Path | None, force: bool
    ) -> list[Path]:
        from mbqueue.results.report.markup import MARK  # noqa: PLC0415
        from mbqueue.results.report.page import REPORT_FILE  # noqa: PLC0415
        from mbqueue.search.export import importances  # noqa: PLC0415
        from mbqueue.search.figures import draw  # noqa: PLC0415
        from mbqueue.search.report import write_report  # noqa: PLC0415
        from mbqueue.search.summary import summaries  # noqa: PLC0415
        from mbqueue.task import target_of  # noqa: PLC0415

        (search, trials), overview = self._searched(name)
        # By default, write the page next to the first trial's results. If the project is on a drive, the page is on the
        # drive too, and not in the live folder.
        first = next(entry for entry in overview["experiments"] if entry["name"] == trials[0].experiment)
        folder = (self.folder.root / first["results_dir"]).parent / name
        page = folder / REPORT_FILE if output is None else page_for(Path(output), REPORT_FILE)
        if output is not None or page.exists():  # the default page's folder may not exist yet
            require_writable(page, force=force, reads=self.folder.never_outputs, ours=MARK)
        try:
            shares = importances(search, trials)
        except SearchUnavailable as error:
            shares = {}
            tell(f"{error} Without Optuna, the report cannot rank the settings.")
        target = target_of(search.base_spec)
        figures = draw(search, trials, shares, target)
        (summary,) = (summary for summary in summaries(overview) if summary["name"] == name)
        if png is None:
            return [write_report(search, trials, summary, figures, page, target=target)]
        from mbqueue.results.report.pictures import require_pictures, write_pictures  # noqa: PLC0415

        require_pictures(figures, Path(png), force=force)
        return [
            write_report(search, trials, summary, figures, page, target=target),
            *write_pictures(figures, Path(png)),
        ]

    def _searched(self, name: str) -> tuple[tuple[Search, list[Trial]], dict[str, Any]]:
        from mbqueue.search.file import Search  # noqa: PLC0415

        with self._reading_queue(name) as queue:
            overview = queue.overview(now=self._clock.now())
            trials = trials_of(overview, name)
            if not trials:
                raise UsageError(f"{name} is not a search. List the searches in the queue with: mbqueue status")
            spec = queue.experiment(trials[0].experiment).spec
        return (Search.model_validate(spec["trial"]["search"]), trials), overview
