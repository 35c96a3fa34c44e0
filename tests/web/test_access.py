"""Which requests the board accepts, and from whom."""

from __future__ import annotations

import pytest
from web_board import Board, MakeBoard

OVERVIEW = "/part?part=overview"


def test_without_a_token_the_board_answers_to_names_of_the_loopback_interface_only(board: Board) -> None:
    for name in ("localhost", "127.0.0.1", "[::1]", f"localhost:{board.port}"):
        assert board.get("/", Host=name).status == 200, name
    for name in ("evil.example", "localhost.evil.example", "10.0.0.5", "", "[", "[localhost"):
        refused = board.get("/", Host=name)
        assert refused.status == 403, name
        assert "only accepts requests to localhost" in refused.text


def test_another_interface_needs_the_token(make_board: MakeBoard) -> None:
    board = make_board(host="0.0.0.0")
    assert board.token
    assert len(board.token) >= 24
    for path in ("/", OVERVIEW, "/static/board.js", "/plotly.js", "/figures?name=x", "/file?name=x&file=y"):
        assert board.get(path).status == 403, path
        joined = f"{path}{'&' if '?' in path else '?'}token="
        assert board.get(joined + "wrong").status == 403, path
        assert board.get(joined + board.token[:-1]).status == 403, path


def test_the_token_moves_from_the_address_into_a_cookie_of_this_port(make_board: MakeBoard) -> None:
    board = make_board(host="0.0.0.0")
    first = board.get(f"/experiment?name=a%26b&token={board.token}")
    assert first.status == 303
    assert first.headers["location"] == "?name=a%26b"
    cookie = first.headers["set-cookie"]
    assert f"mbqueue_board_{board.port}=" in cookie
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert board.get("/", Cookie=cookie.split(";")[0], Host="workstation.lan").status == 200
    assert board.get("/", Cookie=cookie.split(";")[0] + "x").status == 403


def test_a_token_in_the_address_never_redirects_away_from_the_board(board: Board, make_board: MakeBoard) -> None:
    guarded = make_board(host="0.0.0.0")
    for asked, token in ((board, "x"), (guarded, guarded.token)):
        for path in ("//evil.example/", "///evil.example", "/\\evil.example/", "/"):
            answer = asked.get(f"{path}?token={token}")
            assert answer.status == 303, path
            assert answer.headers["location"] == "?", path


def test_inside_a_notebook_each_link_carries_the_token(make_board: MakeBoard) -> None:
    board = make_board(is_embedded=True)
    assert board.get("/").status == 403
    page = board.get(f"/?token={board.token}", Host="proxy.of.a.notebook")
    assert page.status == 200
    assert f'href="compare?token={board.token}"' in page.text
    assert "colab.research.google.com" in page.headers["content-security-policy"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"x-mbqueue-csrf": ""},
        {"x-mbqueue-csrf": "guessed"},
    ],
)
def test_an_action_from_another_site_or_without_the_secret_is_refused(board: Board, headers: dict[str, str]) -> None:
    refused = board.act({"act": "pause", "experiment": "first"}, **headers)
    assert refused.status == 403
    assert refused.json["error"]
    assert not board.project.status().overview["experiments"][0]["paused"]
    assert board.act({"act": "pause", "experiment": "first"}, Origin=f"http://127.0.0.1:{board.port}").status == 200


def test_a_get_request_changes_nothing(board: Board) -> None:
    assert board.get("/act?act=cancel&experiment=first").status == 405


def test_a_read_only_board_refuses_changes(make_board: MakeBoard) -> None:
    board = make_board(read_only=True)
    board.project.enqueue("full_finetune", dataset="sample", folds=[0], epochs=1, name="first")
    assert board.act({"act": "pause", "experiment": "first"}).status == 404
    for path in (OVERVIEW, "/part?part=experiment&name=first"):
        html = board.get(path).json["html"]
        assert "first" in html
        assert "data-act" not in html
        assert "enqueue-form" not in html


def test_every_answer_forbids_foreign_scripts_and_frames(board: Board) -> None:
    for path in ("/", OVERVIEW, "/static/board.js", "/nothing", "/figures?name=first"):
        headers = board.get(path).headers
        policy = headers["content-security-policy"]
        assert "script-src 'self';" in policy
        assert "unsafe-eval" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    page = board.get("/").text
    assert "<script>" not in page
    assert " on" not in page.split("<body")[0]
    assert "http" not in page.replace("http-equiv", "").split("<body")[0]


@pytest.mark.parametrize(
    "path",
    [
        "/file?name=first&file=..%2F..%2F..%2F..%2Fmbqueue.toml",
        "/file?name=first&file=%2Fetc%2Fpasswd",
        "/file?name=first&file=link.csv",
        "/file?name=first&file=",
        "/static/..%2fpages.py",
        "/static/../pages.py",
        "/static/%2e%2e/pages.py",
        "/..%2f..%2fetc/passwd",
    ],
)
def test_a_path_in_a_request_never_reaches_the_file_system(board: Board, path: str) -> None:
    folder = board.project.results_folder("first")
    folder.mkdir(parents=True)
    (folder / "link.csv").symlink_to("/etc/passwd")
    (folder / "history_fold_0.csv").write_text("epoch\n")
    answer = board.get(path)
    assert answer.status == 404
    assert b"root:" not in answer.body
    there = board.get("/file?name=first&file=history_fold_0.csv")
    assert there.status == 200
    assert there.body == b"epoch\n"
    assert there.headers["content-disposition"].startswith("attachment")


def test_a_missing_file_of_an_experiment_is_an_error(board: Board) -> None:
    answer = board.get("/file?name=..%2F..&file=mbqueue.toml")
    assert answer.status == 400
    assert "experiment" in answer.json["error"]
