"""The board's buttons do what the command line does."""

from __future__ import annotations

import time
from typing import Any

import pytest
from processes import start_in_background
from web_board import Board, MakeBoard

from mbqueue.api import Project


def entry(project: Project, name: str = "first") -> Any:
    return project.status(name).overview["experiments"][0]


def test_pause_resume_and_priority_of_an_experiment_or_a_fold(board: Board) -> None:
    assert board.act({"act": "pause", "experiment": "first", "fold": None}).json == {"said": "Paused 8 jobs of first."}
    assert entry(board.project)["paused"]
    board.act({"act": "resume", "experiment": "first"})
    assert not entry(board.project)["paused"]
    assert board.act({"act": "pause", "experiment": "first", "fold": 1}).json["said"].endswith("of first fold 1.")
    assert [fold["state"] for fold in entry(board.project)["folds"]] == ["waiting", "paused"]
    assert board.act({"act": "priority", "experiment": "first", "priority": "7"}).status == 200
    assert entry(board.project)["priority"] == 7


def test_cancel_and_retry(board: Board) -> None:
    board.act({"act": "cancel", "experiment": "first"})
    assert entry(board.project)["state"] == "cancelled"
    assert board.act({"act": "retry", "experiment": "first"}).json["said"].endswith("of first will run again.")
    assert entry(board.project)["state"] == "ready"
    assert board.act({"act": "retry", "experiment": "first"}).json == {"said": "There is no job to retry."}


def test_an_experiment_of_jobs_is_enqueued_with_changed_settings(board: Board) -> None:
    form = {"experiment": "head_finetune", "name": "faster", "dataset": "sample", "priority": "2"}
    said = board.act({"act": "enqueue", **form, "settings": "train.epochs=3\n\n folds=[0, 2] \n"})
    assert said.json == {"said": "faster: created."}
    spec = board.project.spec("faster")
    assert spec["train"]["epochs"] == 3
    assert spec["folds"] == [0, 2]
    assert entry(board.project, "faster")["priority"] == 2


def test_stop_says_that_no_session_runs_here(board: Board) -> None:
    assert board.act({"act": "stop"}).json == {"said": "No session of this project is running on this machine."}


def test_stopping_one_session_leaves_the_others_running(board: Board) -> None:
    board.project.enqueue("pretrained_infer", dataset="sample", name="p")
    started = start_in_background(board.project.folder, "--forever", "--device", "cpu")
    (session,) = started.sessions
    html = board.get("/part?part=overview").json["html"]
    try:
        assert board.act({"act": "stop", "session": "another"}).json == {
            "said": "This session is not running on this machine."
        }
        assert started.is_running
        assert f'data-session="{session}"' in html
    finally:
        said = board.act({"act": "stop", "session": session}).json["said"]
    assert said.startswith("Sessions on this machine: 1 ")
    for _ in range(300):
        if not started.is_running:
            break
        time.sleep(0.1)
    assert not started.is_running


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"act": "explode"}, "There is no action 'explode'"),
        ({"act": "pause"}, "Fill in the field experiment"),
        ({"act": "pause", "experiment": "other"}, "other"),
        ({"act": "pause", "experiment": "first", "fold": "one"}, "whole number"),
        ({"act": "priority", "experiment": "first", "priority": ""}, "whole number"),
        ({"act": "enqueue", "experiment": "../../etc/passwd"}, "There is no experiment"),
        ({"act": "enqueue", "experiment": "head_finetune", "settings": "train.lr"}, "KEY=VALUE"),
        ({"act": "enqueue", "experiment": "head_finetune", "settings": "train.lr=-1"}, "train.lr"),
        (
            {"act": "enqueue", "experiment": "head_finetune", "dataset": "/no/such/file.csv", "name": "n"},
            "/no/such/file",
        ),
        ({}, "does not name an action"),
        ([1], "does not name an action"),
        (b"{", "not valid JSON"),
    ],
)
def test_an_impossible_action_says_why_and_changes_nothing(board: Board, given: Any, said: str) -> None:
    before = board.project.events(limit=1000)
    answer = board.act(given)
    assert answer.status == 400
    assert said in answer.json["error"]
    assert board.project.events(limit=1000) == before


def test_an_oversized_request_is_refused(board: Board) -> None:
    answer = board.act({"act": "enqueue", "experiment": "head_finetune", "settings": "#" * 100_000})
    assert answer.status == 403
    assert "larger than 65,536 bytes" in answer.json["error"]


def test_compare_shows_why_it_cannot_compare(make_board: MakeBoard) -> None:
    board = make_board()
    board.project.enqueue("pretrained_infer", dataset="sample", name="a")
    board.project.enqueue("head_finetune", dataset="sample", name="b")
    assert 'value="a"' in board.get("/part?part=compare").json["html"]
    assert 'class="bad"' in board.get("/part?part=compare&name=a&name=b").json["html"]
