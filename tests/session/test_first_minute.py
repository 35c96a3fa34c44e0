"""On a new machine, a session reports what it loads and compiles once per machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_project import RememberedReport, enqueue, make_project, small_spec

import mbqueue
from mbqueue.cli.datasets import progress_bars
from mbqueue.data.machine_code import telling
from mbqueue.session.narration import Narration
from mbqueue.session.options import WorkOptions
from mbqueue.session.worker import work

ONCE = "mbqueue keeps the code"
#: Another worker of this test run may be writing these files.
UNFINISHED = shutil.ignore_patterns(".tmp-*", "*.pyc*")

STARTING = """
import sys
from mbqueue.api import Project
from mbqueue.session.report import Report
class First(Report):
    def starting(self, what):
        print(what, "torch" in sys.modules, flush=True)
        raise SystemExit
Project(sys.argv[1]).work(report=First())
"""


def test_a_session_reports_loading_before_it_loads(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    command = [sys.executable, "-c", STARTING, str(project.root)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout == "loading PyTorch and CHGNet False\n"


def test_compiling_on_a_new_machine_is_noted_once(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    package = Path(shutil.copytree(Path(mbqueue.__file__).parent, tmp_path / "mbqueue", ignore=UNFINISHED))
    # Compiling everything takes half a minute, so keep the code of other modules if this machine has compiled it.
    for code in (package / "data" / "__pycache__").glob("json_values.*.code"):
        code.unlink()
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    command = [sys.executable, "-m", "mbqueue", "--project", str(project.root), "prepare", "sample", "--limit"]
    first, second = (
        subprocess.run(
            [*command, limit], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        ).stderr
        for limit in ("10", "11")
    )
    assert list((package / "data" / "__pycache__").glob("json_values.*.code"))
    assert first.count(ONCE) == 1
    lines = first.splitlines()
    assert lines[0] == "preparing sample …"
    places = [
        next(i for i, line in enumerate(lines) if text in line) for text in (ONCE, "converting 0/", "converting 10")
    ]
    assert places == sorted(places)
    assert ONCE not in second


def increment_of(package: str, folder: Path) -> Callable[[float], float]:
    """Create a module of the package with a kernel that has never been compiled, and return the kernel."""
    folder.mkdir()
    (folder / "kernel.py").write_text(
        "from mbqueue.data.machine_code import compiled\n@compiled\ndef increment(x):\n    return x + 1\n"
    )
    spec = importlib.util.spec_from_file_location(f"{package}.kernel", folder / "kernel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    increment: Callable[[float], float] = module.increment
    return increment


def test_compiling_is_noted_once_and_only_for_our_own_code(tmp_path: Path) -> None:
    told: list[str] = []
    ours, theirs = (increment_of(package, tmp_path / package) for package in ("mbqueue", "others"))
    with telling(told.append):
        theirs(1)
        assert told == []
        ours(1)
        ours(1.0)
    with telling(told.append):
        ours(2)
    assert len(told) == 1


def test_progress_is_reported_from_zero(tmp_path: Path, report: RememberedReport) -> None:
    project = make_project(tmp_path)
    enqueue(project, small_spec(project, "pretrained_infer"))
    told: list[tuple[str, int]] = []
    report.on_advanced = lambda _job, what, done, _total: told.append((what, done))
    work(project, WorkOptions(device="cpu", max_jobs=1), report=report)
    for what in ("converting", "pretrained energies"):
        assert next(done for name, done in told if name == what) == 0
        assert [done for name, done in told if name == what][-1] == 40


def test_a_log_has_a_line_at_the_beginning_of_each_part_of_a_job() -> None:
    said: list[str] = []
    report = Narration(lambda text, _style: said.append(text))
    job = SimpleNamespace(label="e prepare", progress=None)
    report.job_started(job)  # type: ignore[arg-type]
    for what in ("converting", "pretrained energies"):
        for done in range(3):
            report.advanced(job, what, done, 3, {})  # type: ignore[arg-type]
    assert said == ["e prepare: started", "e prepare: converting 0/3", "e prepare: pretrained energies 0/3"]


def test_commands_report_progress_in_a_log_too(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as progress:
        advanced = progress("converting")
        for done in range(4):
            advanced(done, 3)
    assert capsys.readouterr().err.split("\n")[:2] == ["converting 0/3", "converting 3/3"]
