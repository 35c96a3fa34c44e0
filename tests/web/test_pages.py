"""The content of the board's pages, and their cost."""

from __future__ import annotations

import json
import threading
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped, unused-ignore]
import pytest
import recorded_search
from small_project import ManualClock
from web_board import Board, MakeBoard

from mbqueue.api import Project
from mbqueue.dashboard.snapshot import Status
from mbqueue.errors import QueueError
from mbqueue.project import ProjectFolder
from mbqueue.queue.opening import open_queue
from mbqueue.results.report import comparison
from mbqueue.web import pages
from mbqueue.web.reading import FRESH_SECONDS, PATIENCE_SECONDS, Reader

HOSTILE = "<img src=x onerror=alert(1)>\"'</script>"


def part(board: Board, which: str = "overview", **headers: str) -> Any:
    return board.get(f"/part?part={which}", **headers).json


def test_the_overview_has_each_experiment_with_its_folds(board: Board) -> None:
    html = part(board)["html"]
    assert 'href="experiment?name=first"' in html
    assert html.count('<tr id="fold-first-') == 2
    assert "0/2" in html
    assert "<b>7</b> waiting" in html


def test_foreign_text_is_escaped(board: Board) -> None:
    with open_queue(board.project.folder) as queue, queue.database.writing() as db:
        db.execute("UPDATE jobs SET error = ?, failures = 1 WHERE id = 1", (f"Traceback\nValueError: {HOSTILE}",))
    for which in ("overview", "experiment&name=first"):
        html = part(board, which)["html"]
        assert "onerror=alert(1)&gt;" in html
        assert "<img" not in html
    assert "<img" not in part(board, "experiment&name=%3Cimg%20src%3Dx%3E")["html"]
    assert "<img" not in board.get("/experiment?name=%3Cimg%20src%3Dx%3E").text
    assert "<img" not in part(board, "compare&name=%3Cimg%3E&name=b")["html"]


def test_the_errors_of_an_experiment_are_shown_even_if_others_have_many_newer_errors(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbqueue.queue.overview._ERRORS_SHOWN", 1)
    board.project.enqueue("pretrained_infer", dataset="sample", name="second")
    change = "UPDATE jobs SET error = ?, failures = 1, changed_at = ? WHERE kind = 'prepare' AND experiment_id = ?"
    with open_queue(board.project.folder) as queue, queue.database.writing() as db:
        for experiment_id in (1, 2):
            db.execute(change, (f"ValueError: of {experiment_id}", 2e9 + experiment_id, experiment_id))
    assert [error["experiment"] for error in board.project.status().overview["errors"]] == ["second"]
    html = part(board, "experiment&name=first")["html"]
    assert "ValueError: of 1" in html
    assert "ValueError: of 2" not in html


def test_a_missing_experiment_is_reported(board: Board) -> None:
    assert "has no experiment other" in part(board, "experiment&name=other")["html"]


def test_an_unchanged_part_is_not_sent_again(board: Board) -> None:
    first = board.get("/part?part=overview")
    assert board.get("/part?part=overview", If_None_Match=first.headers["etag"]).status == 304
    assert board.act({"act": "pause", "experiment": "first"}).status == 200
    assert board.get("/part?part=overview", If_None_Match=first.headers["etag"]).status == 200


def test_the_board_keeps_running_while_the_queue_is_unavailable_and_says_so(board: Board) -> None:
    assert part(board)["trouble"] is None
    queue_db = board.project.folder.queue_db
    away = queue_db.with_suffix(".away")
    queue_db.rename(away)
    board.act({"act": "pause", "experiment": "first"})  # after an action, the next request reads the status again
    seen = _until(board, lambda content: content["trouble"] is not None)
    assert "first" in seen["html"], "the last known state stays on the page"
    away.rename(queue_db)
    assert _until(board, lambda content: content["trouble"] is None)["html"]


def test_the_page_of_an_experiment_says_that_the_queue_is_unavailable(board: Board) -> None:
    assert part(board, "experiment&name=first")["html"]
    board.project.folder.queue_db.rename(board.project.folder.queue_db.with_suffix(".away"))
    answer = board.get("/part?part=experiment&name=first")
    assert answer.status == 200
    assert "queue" in answer.json["trouble"]


def test_a_comparison_is_recomputed_only_after_a_file_changed(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    board.project.enqueue("full_finetune", dataset="sample", folds=[0], epochs=1, name="second")
    folder = board.project.results_folder("first")
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    made: list[list[str]] = []
    monkeypatch.setattr(Project, "compare", lambda _self, names: made.append(list(names)))
    monkeypatch.setattr(comparison, "sections", lambda _comparison, _place: ["<p>compared</p>"])
    monkeypatch.setattr(comparison, "paired_differences", lambda _comparison: go.Figure())
    for _ in range(3):
        assert "compared" in part(board, "compare&name=first&name=second")["html"]
    assert made == [["first", "second"]]
    (folder / "results.json").write_text("{} ")
    assert "compared" in part(board, "compare&name=first&name=second")["html"]
    part(board, "compare&name=second&name=first")
    assert made == [["first", "second"], ["first", "second"], ["second", "first"]]


def test_a_file_whose_name_is_not_utf8_does_not_break_the_page(board: Board) -> None:
    folder = board.project.results_folder("first")
    folder.mkdir(parents=True)
    (folder / "predictions.csv").write_text("id\n")
    (folder / "odd\udcff.csv").write_text("id\n")
    answer = board.get("/part?part=experiment&name=first")
    assert answer.status == 200
    assert "predictions.csv" in answer.json["html"]
    assert "odd" not in answer.json["html"]


def _until(board: Board, holds: Any) -> Any:
    for _ in range(100):
        content = part(board)
        if holds(content):
            return content
        threading.Event().wait(0.1)
    raise AssertionError("the page never said so")


def test_a_project_without_a_queue_has_a_page_that_says_what_to_do(make_board: MakeBoard) -> None:
    board = make_board()
    assert board.get("/").status == 200
    assert "mbqueue enqueue" in part(board)["trouble"]


def test_the_queue_is_read_once_for_all_pages(project: ProjectFolder, clock: ManualClock) -> None:
    looks: list[float] = []
    reader = Reader(_Looking(lambda: looks.append(clock.monotonic())), clock)  # type: ignore[arg-type]
    for _ in range(10):
        assert reader.read().status is not None
    assert len(looks) == 1
    clock.advance(FRESH_SECONDS)
    reader.read()
    assert len(looks) == 2
    reader.expire()
    reader.read()
    assert len(looks) == 3


def test_a_change_during_a_read_is_read_again(clock: ManualClock) -> None:
    looks: list[float] = []

    def look() -> None:
        looks.append(clock.monotonic())
        if len(looks) == 1:
            reader.expire()

    reader = Reader(_Looking(look), clock)  # type: ignore[arg-type]
    reader.read()
    reader.read()
    reader.read()
    assert len(looks) == 2


def test_each_experiment_shows_the_time_used_and_left(board: Board) -> None:
    assert "0s used; the time left is estimated after the first epoch or fold</span>" in part(board)["html"]


def test_the_page_of_all_experiments_is_complete(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_SHOWN", 1)
    board.project.enqueue("pretrained_infer", dataset="sample", name="second")
    board.act({"act": "priority", "experiment": "first", "priority": 1})  # the board then reads the status again
    few, every = part(board)["html"], part(board, "overview&all=1")["html"]
    assert few.count('<section class="experiment"') == 1
    assert 'href="./?all=1"' in few
    assert every.count('<section class="experiment"') == 2
    assert "all=1" in board.get("/?all=1").text


def test_a_slow_queue_is_read_less_often(clock: ManualClock) -> None:
    looks: list[float] = []

    def slow() -> None:
        looks.append(clock.monotonic())
        clock.advance(3.0)

    reader = Reader(_Looking(slow), clock)  # type: ignore[arg-type]
    for _ in range(29):
        reader.read()
        clock.advance(1.0)
    assert len(looks) == 1
    clock.advance(2.0)
    reader.read()
    assert len(looks) == 2


def test_while_one_read_hangs_other_pages_show_the_last_known_state(clock: ManualClock) -> None:
    hanging, entered = threading.Event(), threading.Event()
    looking = _Looking(lambda: None)
    reader = Reader(looking, clock)  # type: ignore[arg-type]
    known = reader.read()

    def hang() -> None:
        entered.set()
        hanging.wait()
        raise QueueError("The server is away.")

    looking.first = hang
    reader.expire()
    thread = threading.Thread(target=reader.read)
    thread.start()
    entered.wait()
    assert reader.read() is known
    clock.advance(PATIENCE_SECONDS + 1)
    told = reader.read()
    assert told.status is known.status
    assert told.trouble == "The queue has not answered for 6s."
    hanging.set()
    thread.join()
    after = reader.read()
    assert after.trouble == "The server is away."
    assert after.status is known.status


class _Looking:
    """A stand-in for a project that calls a function before each status."""

    def __init__(self, first: Any) -> None:
        self.first = first

    def status(self) -> Status:
        self.first()
        return Status(overview={}, session_seconds=60.0)


def test_the_figures_of_a_page_are_those_of_the_report(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    from mbqueue.results.report.page import draw

    project: Project = board.project
    project.enqueue(
        "head_finetune", dataset="sample", folds=[0], name="small", settings={"train.epochs": 3, "data.limit": 40}
    )
    project.pause("first")
    assert board.get("/figures?name=small").json == {}
    assert project.work(session="none", device="cpu").jobs_done
    drawn = draw(project.results("small"), timeline=project.timeline("small"))
    html = _until(board, lambda content: "no epoch" not in content["html"] and content["html"])["html"]
    assert html
    board.act({"act": "priority", "experiment": "small", "priority": 1})  # the board then reads the status again
    shown = board.get("/figures?name=small").json
    for name in ("learning-curves", "parity", "errors", "periodic-table", "timeline"):
        assert shown[name] == json.loads(drawn[name].to_json()), name
    page = part(board, "experiment&name=small")
    assert "preds_fold_0.csv" in page["html"]
    assert "3/3" in page["html"]
    assert "<polyline" in page["html"]


def test_a_search_is_one_row_that_opens_and_its_trials_are_pages(board: Board) -> None:
    with open_queue(board.project.folder) as queue:
        session = queue.start_session(device="recorded", now=1.0, alive_seconds=60)
        recorded_search.enqueue(queue, recorded_search.make_search())
        queue.pause("first", now=1.0)
        recorded_search.do_jobs(queue, session, now=lambda: 2.0, jobs=40)
        queue.end_session(session, reason="test", now=3.0)
    overview = board.project.status().overview
    (search,) = overview["searches"]
    html = _until(board, lambda content: 'id="search-hunt"' in content["html"])["html"]
    assert html.count('id="search-hunt"') == 1
    assert f"{search['best']['val_mae']:.4f}" in html
    trials = [entry for entry in overview["experiments"] if entry["trial"]]
    assert len(trials) > 2
    for entry in trials:
        assert f'id="trial-{entry["name"]}"' in html
        assert f'id="experiment-{entry["name"]}"' not in html
    assert 'id="experiment-first"' in html
    page = part(board, f"experiment&name={trials[0]['name']}")["html"]
    assert "of the search hunt: train.lr=" in page
    page = part(board, "experiment&name=hunt")["html"]
    assert '<details id="trials-hunt" open>' in page
    counts = ", ".join(f"{number} {state}" for state, number in search["trials"].items() if number)
    assert f"of 12 trials ({counts})" in page
    assert f"{search['epochs_saved']} epochs (about " in page
    assert " used; " in page
    assert " left</p>" in page
    pruned = next(entry["name"] for entry in trials if entry["state"] == "pruned")
    page = part(board, f"experiment&name={pruned}")["html"]
    assert 'data-act="retry"' in page
    assert 'data-act="cancel"' not in page
    assert 'data-act="pause"' not in page
    assert board.act({"act": "pause", "experiment": "hunt"}).status == 200
    assert board.project.status().overview["searches"][0]["state"] == "paused"
