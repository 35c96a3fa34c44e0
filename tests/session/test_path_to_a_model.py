"""The list of calls from `enqueue` to a model in ARCHITECTURE.md, compared with a real session."""

from __future__ import annotations

import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from small_project import make_project

import mbqueue
from mbqueue.cli import main
from mbqueue.queue.claiming import Claims
from mbqueue.queue.enqueueing import Enqueueing
from mbqueue.session import predict
from mbqueue.session.working_set import WorkingSet
from mbqueue.storage.own_commits import OwnCommits
from mbqueue.train import chgnet
from mbqueue.train.fold import FoldRun

PACKAGE = Path(mbqueue.__file__).parent
#: The test records the call stack of each of these functions. A run calls them in this order.
STATIONS: list[tuple[Any, str]] = [
    (Enqueueing, "enqueue"),
    (Claims, "claim"),
    (WorkingSet, "fold_run"),
    (OwnCommits, "stage"),
    (OwnCommits, "publish"),
    (FoldRun, "best_model"),
    (chgnet, "model_bytes"),
    (predict, "commit_fold"),
]
#: Files to omit from call stacks: the command line, and the file with the decorator for the queue's transactions.
LEFT_OUT = {"cli/app.py", "cli/__init__.py", "queue/database.py"}


def listed_calls() -> list[str]:
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    found = re.findall(r"^(\d+)\. `([\w/]+\.py:[\w.]+)`", text, flags=re.MULTILINE)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [call for _, call in found]


def calls_into_other_files(codes: list[CodeType]) -> list[str]:
    """The functions on a stack, outermost first, that were called from another file of mbqueue."""
    calls, before = [], ""
    for code in codes:
        path = Path(code.co_filename)
        if not path.is_relative_to(PACKAGE) or path.relative_to(PACKAGE).as_posix() in LEFT_OUT:
            continue
        if str(path) != before:
            calls.append(f"{path.relative_to(PACKAGE).as_posix()}:{code.co_qualname.split('.<locals>')[0]}")
        before = str(path)
    return calls


def noting(function: Callable[..., Any], stacks: list[list[str]]) -> Callable[..., Any]:
    """Wrap a function so that each call also appends its call stack to ``stacks``."""

    def noted(*given: Any, **options: Any) -> Any:
        frame: FrameType | None = sys._getframe(1)
        codes = [inspect.unwrap(function).__code__]
        while frame is not None:
            codes.append(frame.f_code)
            frame = frame.f_back
        stacks.append(calls_into_other_files(codes[::-1]))
        return function(*given, **options)

    return noted


def test_the_list_of_calls_from_enqueue_to_a_model_is_short_and_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: dict[tuple[Any, str], list[list[str]]] = defaultdict(list)
    for station in STATIONS:
        monkeypatch.setattr(*station, noting(getattr(*station), stacks[station]))
    project = make_project(tmp_path, checkpoint_minutes=60.0)
    small = ("--dataset", "sample", "--set", "data.limit=40", "--folds", "0", "--epochs", "1")
    for command in (("enqueue", "head_finetune", *small), ("work", "--device", "cpu")):
        with pytest.raises(SystemExit) as ended:
            main(["--project", str(project.root), *command])
        assert not ended.value.code
    assert list(project.root.glob("results/daily/*/*/model_fold_0.pth"))
    # Take each function's shortest stack: a hash is computed with a call of `model_bytes` that has a longer stack.
    path = [call for station in STATIONS for call in min(stacks[station], key=len)]
    assert list(dict.fromkeys(path)) == listed_calls()
    assert len(listed_calls()) <= 20
