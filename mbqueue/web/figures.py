"""Render the report's figures for the browser, as JSON, and re-render them only when their data change."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import orjson

from mbqueue.api import Project
from mbqueue.errors import MbqueueError

#: Maximum number of experiments whose figures are cached. For the official dataset, the figures of an experiment take a
#: few megabytes.
_KEPT = 8
_CURVES = "learning-curves"


class Figures:
    """A thread-safe cache of each experiment's figures, so that each figure is rendered only once for all pages."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._drawing = threading.Lock()
        self._drawn: OrderedDict[tuple[str, str], tuple[Hashable, dict[str, bytes]]] = OrderedDict()
        self._compared: tuple[Hashable, tuple[str, bytes]] | None = None

    def of(self, entry: Mapping[str, Any]) -> bytes:
        """All figures of an experiment.

        Args:
            entry: the experiment's entry in the overview.

        Returns:
            A JSON object that maps each figure's name to a plotly figure; empty if the experiment has no figures.
        """
        name = entry["name"]
        epochs = tuple((fold["fold"], fold["epochs_done"]) for fold in entry["folds"])
        predicted = (*(fold["fold"] for fold in entry["folds"] if fold["state"] == "done"), entry["record"])
        found = self._newest(name, "curves", epochs, lambda: self._curves(entry))
        found = found | self._newest(name, "finished", predicted, lambda: self._finished(entry))
        # `running` is part of the key, because the timeline is complete only after the last session has ended.
        running = entry["state"] == "running"
        found |= self._newest(name, "sessions", (epochs, running), lambda: self._sessions(name))
        return b"{" + b",".join(orjson.dumps(key) + b":" + content for key, content in found.items()) + b"}"

    def _newest(
        self, name: str, part: str, of_what: Hashable, draw: Callable[[], Mapping[str, Any]]
    ) -> dict[str, bytes]:
        with self._drawing:
            drawn = self._drawn.get((name, part))
            if drawn is None or drawn[0] != of_what:
                try:
                    content = {key: figure.to_json().encode() for key, figure in draw().items()}
                except (MbqueueError, OSError):
                    # A session may be replacing a result file. Other parts of the page report damaged files.
                    return {} if drawn is None else drawn[1]
                self._drawn[name, part] = drawn = (of_what, content)
            self._drawn.move_to_end((name, part))
            while len(self._drawn) > 3 * _KEPT:
                self._drawn.popitem(last=False)
            return drawn[1]

    def _curves(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """Render the learning curves. They change with every epoch, but need only the histories."""
        from mbqueue.results.report import figures  # noqa: PLC0415 - plotly takes a second to import
        from mbqueue.results.tables import history_file, read_history  # noqa: PLC0415

        folder = self._project.results_folder(entry["name"])
        paths = {fold["fold"]: history_file(folder, fold["fold"]) for fold in entry["folds"]}
        histories = {fold: read_history(path) for fold, path in paths.items() if path.is_file()}
        if not any(histories.values()):
            return {}
        return {_CURVES: figures.learning_curves(histories, self._project.target(entry["name"]))}

    def _finished(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        if not any(fold["state"] == "done" for fold in entry["folds"]):
            return {}
        from mbqueue.results.report.page import draw  # noqa: PLC0415

        drawn = draw(self._project.results(entry["name"]))
        return {key: figure for key, figure in drawn.items() if key not in (_CURVES, "sessions")}

    def _sessions(self, name: str) -> Mapping[str, Any]:
        from mbqueue.results.report.sessions import timeline  # noqa: PLC0415

        spans = self._project.timeline(name)
        return {"timeline": timeline(spans)} if spans else {}

    def paired(self, names: list[str]) -> tuple[str, bytes]:
        """Compare recorded experiments. The result is cached until one of the experiments' files changes.

        Returns:
            The comparison's HTML, and its figure as JSON.

        Raises:
            UsageError, ResultsError: for the same reasons as in `Project.compare`.
        """
        asked = (tuple(names), tuple(self._state_of_files(name) for name in names))
        with self._drawing:
            if self._compared is None or self._compared[0] != asked:
                self._compared = (asked, self._compare(names))
            return self._compared[1]

    def _compare(self, names: list[str]) -> tuple[str, bytes]:
        from mbqueue.results.report.comparison import paired_differences, sections  # noqa: PLC0415

        comparison = self._project.compare(names)
        placeholder = '<div class="figure" id="figure-paired" data-figure="paired"></div>'
        figure = b'{"paired":' + paired_differences(comparison).to_json().encode() + b"}"
        return "\n".join(sections(comparison, placeholder)), figure

    def _state_of_files(self, name: str) -> tuple[tuple[str, int, int], ...]:
        folder = self._project.results_folder(name)
        if not folder.is_dir():
            return ()
        stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
        return tuple((file, stat.st_mtime_ns, stat.st_size) for file, stat in stats)
