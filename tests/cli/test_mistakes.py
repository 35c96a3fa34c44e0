"""Mistakes that a new user makes: each message says what is wrong, where, and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mbqueue.cli import main
from mbqueue.project import ENVIRONMENT_VARIABLE, ProjectFolder

Command = Callable[..., Any]
FAILURE, USAGE = 1, 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("enqueue", "ful_finetune"), ["ful_finetune", "full_finetune, head_finetune, pretrained_infer"]),
        (("enqueue", "missing.toml"), ["missing.toml"]),
        (("enqueue", "full_finetune", "--dataset", "no/such/file.json"), ["no/such/file.json"]),
        (("enqueue", "full_finetune", "--dataset", "sample", "--folds", "5"), ["folds", "0 to 4"]),
        (("enqueue", "full_finetune", "--dataset", "sample", "--folds", "all"), ["all", "0-2"]),
        (("enqueue", "full_finetune", "--dataset", "sample", "--epochs", "0"), ["epochs = 0", "trainable"]),
        (("enqueue", "full_finetune", "--set", "train.learning_rate=1"), ["train.learning_rate", "lr"]),
        (("enqueue", "full_finetune", "--set", "train.lr"), ["KEY=VALUE"]),
        (("enqueue", "full_finetune", "--set", "train.lr=fast"), ["train.lr = 'fast'"]),
        (("status",), ["mbqueue enqueue"]),
        (("pause", "full_finetune"), ["mbqueue enqueue"]),
        (("work",), ["mbqueue enqueue"]),
        (("work", "--session", "2"), ["1h50m"]),
        (("work", "--forever", "--session", "1h"), ["--forever"]),
    ],
)
def test_a_mistake_is_answered_with_what_to_do(mbqueue: Command, arguments: tuple[str, ...], said: list[str]) -> None:
    answer = mbqueue(*arguments)
    assert answer.code in {FAILURE, USAGE}
    assert answer.out == ""
    assert "Traceback" not in answer.err
    for text in said:
        assert text in answer.err


@pytest.mark.parametrize("command", ["status", "pause", "events"])
def test_an_unknown_experiment_lists_the_known_ones(mbqueue: Command, command: str) -> None:
    mbqueue("enqueue", "head_finetune", "--dataset", "sample")
    answer = mbqueue(command, "heed_finetune")
    assert answer.code == USAGE
    assert "heed_finetune" in answer.err
    assert "head_finetune" in answer.err


def test_a_command_outside_of_any_project_says_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["status"])
    assert ended.value.code == USAGE
    assert "mbqueue init" in capsys.readouterr().err


def test_an_experiment_file_with_a_slip_is_named_with_the_line(mbqueue: Command, project: ProjectFolder) -> None:
    path = project.jobs_dir / "full_finetune.toml"
    path.write_text("seed = 1\n[train\nlr = 1\n")
    answer = mbqueue("enqueue", "full_finetune")
    assert answer.code == USAGE
    assert str(path) in answer.err
    assert "line 2" in answer.err


def test_a_spec_edited_after_enqueueing_is_not_mixed_in(mbqueue: Command, project: ProjectFolder) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    path = project.jobs_dir / "full_finetune.toml"
    path.write_text(path.read_text().replace("batch_size = 64", "batch_size = 32"))
    answer = mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    assert answer.code == USAGE
    assert "train.batch_size: 64 in the queue, 32 now" in answer.err


def test_a_damaged_queue_is_told_as_such(mbqueue: Command, project: ProjectFolder) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    for path in project.state_dir.glob("queue.db*"):
        path.unlink()
    project.queue_db.write_bytes(b"this is not a database, and never was one" * 100)
    answer = mbqueue("status")
    assert answer.code == FAILURE
    assert "damaged" in answer.err


def test_a_state_folder_that_is_gone_is_told_as_no_project(mbqueue: Command, project: ProjectFolder) -> None:
    shutil.rmtree(project.state_dir)
    answer = mbqueue("status")
    assert answer.code == USAGE
    assert "is not a project" in answer.err


def test_the_traceback_is_shown_on_request_only(mbqueue: Command, project: ProjectFolder) -> None:
    project.queue_db.write_bytes(b"this is not a database, and never was one" * 100)
    assert "Traceback" not in mbqueue("status").err
    assert "Traceback" in mbqueue("--debug", "status").err
