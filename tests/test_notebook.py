"""Run the cells of the Colab notebook in order, with a folder instead of the mounted drive."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mbqueue.project import ENVIRONMENT_VARIABLE
from mbqueue.topology import LIVE_VARIABLE

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "mbqueue_colab.ipynb"
#: Do not run this cell: it needs the network and would install packages into the tests' environment.
NOT_RUN = re.compile(r"pip install")


def cells(kind: str) -> list[str]:
    content = json.loads(NOTEBOOK.read_text())
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def test_the_notebook_has_under_ten_cells_and_no_outputs() -> None:
    content = json.loads(NOTEBOOK.read_text())
    assert len(content["cells"]) < 10
    assert not any(cell.get("outputs") for cell in content["cells"])


class Colab:
    """Runs cells of Python and shell lines as Colab does, replacing {variables} in shell lines."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.names: dict[str, Any] = {}
        self.not_run: list[str] = []
        self.said: list[str] = []
        self.framed: list[str] = []
        program = root / "bin" / "mbqueue"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mbqueue "$@"\n')
        program.chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

        def mount(point: str) -> None:
            (Path(point) / "MyDrive").mkdir(parents=True)

        def serve_kernel_port_as_iframe(port: int, *, path: str, height: str) -> None:
            assert int(height) > 0
            self.framed.append(f"http://127.0.0.1:{port}{path}")

        ipython = SimpleNamespace(display=None, IFrame=None, HTML=lambda text: text)
        colab = SimpleNamespace(
            drive=SimpleNamespace(mount=mount),
            output=SimpleNamespace(serve_kernel_port_as_iframe=serve_kernel_port_as_iframe),
        )
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=ipython, get_ipython=object))
        monkeypatch.setitem(sys.modules, "IPython.display", ipython)
        monkeypatch.setitem(sys.modules, "google", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "google.colab", colab)

    def run(self, cell: str) -> Any:
        """Run a cell; return the value of its last line if that is an expression."""
        lines = cell.replace("/content", str(self.root / "content")).splitlines()
        value, python = None, []
        for line in [*lines, "!"]:
            if not line.startswith("!"):
                python.append(line)
                continue
            value = self._python(python)
            python = []
            if line != "!":
                self._shell(line[1:].format(**self.names))
        return value

    def _python(self, lines: list[str]) -> Any:
        """Execute lines; return the value of the last one if that is an expression."""
        body = ast.parse("\n".join(lines)).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), "cell", "exec"), self.names)
        return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), self.names)

    def _shell(self, line: str) -> None:
        if NOT_RUN.search(line):
            self.not_run.append(line)
            return
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, check=False, timeout=180, env=self.environment
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        self.said.append(done.stdout)


def put_checkout(root: Path) -> None:
    """Create a checkout in My Drive that has only the files for which the install cell looks."""
    folder = root / "content" / "drive" / "MyDrive" / "mbqueue-main"
    for name in (".git", "results", "mbqueue/results"):
        (folder / name).mkdir(parents=True)
    (folder / "pyproject.toml").touch()


def test_the_install_cell_takes_a_wheel_then_a_checkout_then_github(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colab = Colab(tmp_path, monkeypatch)
    mount, install, *_ = cells("code")
    colab.run(mount)
    if 'REPOSITORY = ""' in install:
        with pytest.raises(FileNotFoundError, match="into My Drive"):
            colab.run(install)
    colab.run(re.sub(r'REPOSITORY = ".*"', 'REPOSITORY = "someone/theirs"', install))
    put_checkout(tmp_path)
    colab.run(install)
    copied = tmp_path / "content" / "source"
    assert sorted(path.name for path in copied.rglob("*")) == ["mbqueue", "pyproject.toml", "results"]
    wheel = tmp_path / "content" / "drive" / "MyDrive" / "mbqueue-0.1.0-py3-none-any.whl"
    wheel.touch()
    colab.run(install)
    sources = [re.search(r'install -q "(.*?)"', line) for line in colab.not_run]
    assert [match and match[1] for match in sources] == [
        "mbqueue[board] @ git+https://github.com/someone/theirs",
        f"{copied}[board]",
        f"{wheel}[board]",
    ]


def make_small(project: Path) -> None:
    """Shrink the experiment full_finetune to a few crystals, once a cell has created the project."""
    path = project / "jobs" / "full_finetune.toml"
    text = path.read_text()
    for old, new in {
        'dataset = "matbench_mp_e_form"': 'dataset = "sample"',
        "limit = 0": "limit = 20",
        "epochs = 20": "epochs = 1",
        "folds = [0, 1, 2, 3, 4]": "folds = [0]",
    }.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def test_the_cells_run_from_the_mount_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    # Only a project on a mount gets a live folder by default, so the test chooses a live folder for its project.
    live = tmp_path / "live"
    monkeypatch.setenv(LIVE_VARIABLE, str(live))
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.1)))
    colab = Colab(tmp_path, monkeypatch)
    mount, install, init, enqueue, work, board, report, stop = cells("code")
    colab.run(mount)
    put_checkout(tmp_path)
    colab.run(install)
    colab.run(init)
    project = Path(colab.names["PROJECT"])
    assert project.is_relative_to(tmp_path)
    make_small(project)
    assert colab.run(enqueue) == "created"
    colab.run(work)
    colab.run(board)
    with urllib.request.urlopen(colab.framed[0]) as page:
        assert b"mbqueue" in page.read()
    while (seen := colab.names["project"].status()).is_active:
        sleep(0.1)
    assert seen.experiments.loc["full_finetune", "state"] == "done"
    assert "Plotly" in colab.run(report)
    colab.run(stop)
    # When the cell runs `stop`, the session may be ending or may have ended.
    assert "No session" in colab.said[-1] or "nothing is left to do" in colab.said[-1]
    assert len(colab.not_run) == 1
    # The next session runs the same cells on a different machine.
    shutil.rmtree(live)
    assert colab.run(enqueue) == "unchanged"
    assert colab.names["project"].status().experiments.loc["full_finetune", "state"] == "done"
