"""The Colab notebook: its cells run one after the other, with a folder in place of the mounted drive."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mbqueue.project import ENVIRONMENT_VARIABLE, LIVE_VARIABLE

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "mbqueue_colab.ipynb"
#: Needs the network and would install into the environment of the tests.
NOT_RUN = re.compile(r"pip install|git clone")


def cells(kind: str) -> list[str]:
    content = json.loads(NOTEBOOK.read_text())
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def test_the_notebook_has_under_ten_cells_no_outputs_and_the_badge() -> None:
    content = json.loads(NOTEBOOK.read_text())
    assert len(content["cells"]) < 10
    assert not any(cell.get("outputs") for cell in content["cells"])
    page = (NOTEBOOK.parent.parent / "docs" / "first-session.md").read_text()
    (badge,) = re.findall(r"\[!\[Open in Colab\].*", cells("markdown")[0])
    assert badge in page


class Colab:
    """Runs cells as Colab does, as far as this notebook needs it: Python lines, and shell lines with {variables}."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.names: dict[str, Any] = {}
        self.not_run: list[str] = []
        self.said: list[str] = []
        self.shown: list[Any] = []
        program = root / "bin" / "mbqueue"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mbqueue "$@"\n')
        program.chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        handle = SimpleNamespace(update=self.shown.append)

        def display(what: Any, *, display_id: bool) -> Any:
            assert display_id
            self.shown.append(what)
            return handle

        def mount(point: str) -> None:
            (Path(point) / "MyDrive").mkdir(parents=True)

        ipython = SimpleNamespace(display=display, HTML=lambda text: text)
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=ipython))
        monkeypatch.setitem(sys.modules, "IPython.display", ipython)
        monkeypatch.setitem(sys.modules, "google", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(drive=SimpleNamespace(mount=mount)))

    def run(self, cell: str) -> Any:
        """Run a cell; returns the value of its last line when that is an expression."""
        lines = cell.replace("/content", str(self.root / "content")).splitlines()
        shell = [line[1:] for line in lines if line.startswith("!")]
        if shell:
            assert len(shell) == len([line for line in lines if not line.startswith("#")])
            for line in shell:
                self._shell(line.format(**self.names))
            return None
        *first, last = lines
        exec("\n".join(first), self.names)
        if re.match(r"^\w+ = |^import|^from", last):
            return exec(last, self.names)
        return eval(last, self.names)

    def _shell(self, line: str) -> None:
        if NOT_RUN.search(line):
            self.not_run.append(line)
            return
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, check=False, timeout=180, env=self.environment
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        self.said.append(done.stdout)


def make_small(project: Path) -> None:
    """A full training on few crystals; run after the cell that makes the project."""
    path = project / "jobs" / "full_finetune.toml"
    text = path.read_text()
    for old, new in {
        'dataset = "matbench_mp_e_form"': 'dataset = "sample"',
        "limit = 0": "limit = 40",
        "epochs = 20": "epochs = 1",
        "folds = [0, 1, 2, 3, 4]": "folds = [0]",
    }.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def test_the_cells_run_from_the_mount_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    # A folder is no mount, so the live folder that a drive would get is asked for.
    live = tmp_path / "live"
    monkeypatch.setenv(LIVE_VARIABLE, str(live))
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.1)))
    colab = Colab(tmp_path, monkeypatch)
    mount, install, init, enqueue, work, watch, report, stop = cells("code")
    colab.run(mount)
    colab.run(install)
    colab.run(init)
    project = Path(colab.names["PROJECT"])
    assert project.is_relative_to(tmp_path)
    make_small(project)
    assert colab.run(enqueue) == "created"
    colab.run(work)
    colab.run(watch)
    assert len(colab.shown) >= 2
    assert not colab.shown[-1].is_active
    assert colab.shown[-1].experiments.loc["full_finetune", "state"] == "done"
    assert "Plotly" in colab.run(report)
    colab.run(stop)
    # It may still be leaving, or be gone.
    assert "No session" in colab.said[-1] or "nothing is left to do" in colab.said[-1]
    assert len(colab.not_run) == 2
    # The next session runs the same cells, on another machine.
    shutil.rmtree(live)
    assert colab.run(enqueue) == "unchanged"
    assert colab.names["project"].status().experiments.loc["full_finetune", "state"] == "done"
