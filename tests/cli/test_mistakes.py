"""If a new user makes a mistake, the message says what is wrong, where, and what to do."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pymatgen.core import Lattice, Structure

from mbqueue.cli import main
from mbqueue.project import ENVIRONMENT_VARIABLE, ProjectFolder
from mbqueue.queue.store import Queue

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
def test_a_mistake_gives_an_error_with_advice(mbqueue: Command, arguments: tuple[str, ...], said: list[str]) -> None:
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


def test_an_invalid_experiment_file_is_reported_with_file_and_line(mbqueue: Command, project: ProjectFolder) -> None:
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


def test_a_damaged_queue_is_reported_as_damaged(mbqueue: Command, project: ProjectFolder) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    for path in project.state_dir.glob("queue.db*"):
        path.unlink()
    project.queue_db.write_bytes(b"this is not a database, and never was one" * 100)
    answer = mbqueue("status")
    assert answer.code == FAILURE
    assert "damaged" in answer.err


def test_a_folder_without_state_is_not_a_project(mbqueue: Command, project: ProjectFolder) -> None:
    shutil.rmtree(project.state_dir)
    answer = mbqueue("status")
    assert answer.code == USAGE
    assert "is not a project" in answer.err


def test_the_traceback_is_shown_on_request_only(mbqueue: Command, project: ProjectFolder) -> None:
    project.queue_db.write_bytes(b"this is not a database, and never was one" * 100)
    assert "Traceback" not in mbqueue("status").err
    assert "Traceback" in mbqueue("--debug", "status").err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("report", "full_finetune"), ["not been prepared yet", "mbqueue work"]),
        (("report", "ful_finetune"), ["ful_finetune"]),
        (("compare", "full_finetune"), ["two experiments"]),
        (("export", "full_finetune"), ["not been prepared yet", "mbqueue work"]),
        (("logs",), ["mbqueue work --background"]),
        (("work", "--background", "--session", "soon"), ["1h50m"]),
        (("work", "--device", "cuda:77"), ["no usable device 'cuda:77'", "mbqueue doctor"]),
        (("retry", "full_finetune", "--fold", "4"), ["no fold 4", "mbqueue enqueue --folds 4"]),
    ],
)
def test_a_mistake_about_a_queued_experiment_gives_an_error_with_advice(
    mbqueue: Command, arguments: tuple[str, ...], said: list[str]
) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample", "--folds", "0")
    answer = mbqueue(*arguments)
    assert answer.code in {FAILURE, USAGE}
    assert answer.out == ""
    assert "Traceback" not in answer.err
    for text in said:
        assert text in answer.err


def test_a_second_session_in_the_background_is_refused(mbqueue: Command, project: ProjectFolder) -> None:
    from mbqueue.queue.processes import this_process
    from mbqueue.session import background

    mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    mine = background.BackgroundSession(
        process=this_process(), log=project.logs_dir / "work-x.log", sessions=("here",), started_at=0.0
    )
    background._write(project, mine)
    answer = mbqueue("work", "--background")
    assert answer.code == USAGE
    assert "mbqueue stop" in answer.err
    assert "mbqueue logs" in answer.err


def test_a_missing_gpu_is_reported(mbqueue: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def no_gpu(*arguments: object, **options: object) -> None:
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr(torch.cuda, "synchronize", no_gpu)
    mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    answer = mbqueue("work", "--device", "cuda")
    assert answer.code == USAGE
    assert "no usable device 'cuda'" in answer.err
    assert "NVIDIA driver" in answer.err


def test_a_missing_tensorboard_is_reported(mbqueue: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    answer = mbqueue("work", "--tensorboard")
    assert answer.code == USAGE
    assert "pip install tensorboard" in answer.err


def test_a_missing_project_suggests_mounting_the_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--project", str(tmp_path / "drive" / "MyDrive" / "mbqueue"), "status"])
    assert ended.value.code == USAGE
    assert "mount the drive first" in capsys.readouterr().err


def test_a_full_disk_is_reported_with_what_can_be_freed(
    mbqueue: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    monkeypatch.setattr(os, "fsync", full)
    answer = mbqueue("init", str(tmp_path / "fresh"))
    assert answer.code == FAILURE
    assert "No space left" in answer.err
    assert "mbqueue cache prune" in answer.err


def test_an_unopenable_queue_is_reported_with_where_to_look(mbqueue: Command, project: ProjectFolder) -> None:
    project.queue_db.mkdir()
    answer = mbqueue("status")
    assert answer.code == FAILURE
    assert str(project.queue_db) in answer.err
    assert "permissions" in answer.err


def test_an_unreadable_project_is_reported_with_where_to_look(
    mbqueue: Command, project: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path) -> str:
        # The tests may run as root, which can read everything.
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("mbqueue.settings.read_small_text", forbidden)
    answer = mbqueue("status")
    assert answer.code == FAILURE
    assert "mbqueue.toml" in answer.err
    assert "permissions" in answer.err


def test_a_hook_that_is_misspelt_in_the_settings_is_named(mbqueue: Command, project: ProjectFolder) -> None:
    (project.root / "mbqueue.toml").write_text("[notify]\nwebhok = 'https://example.org'\n")
    answer = mbqueue("status")
    assert answer.code == USAGE
    assert "notify.webhok" in answer.err


def test_a_deleted_results_folder_is_reported_with_how_to_rebuild_it(mbqueue: Command, project: ProjectFolder) -> None:
    mbqueue("enqueue", "pretrained_infer", "--dataset", "sample", "--folds", "0", "--set", "data.limit=20")
    assert mbqueue("work", "--device", "cpu").code == 0
    (folder,) = project.results_dir.glob("daily/*/*")
    shutil.rmtree(folder)
    answer = mbqueue("report", "pretrained_infer")
    assert answer.code == FAILURE
    assert str(folder) in answer.err
    assert "mbqueue retry pretrained_infer" in answer.err
    assert mbqueue("retry", "pretrained_infer").code == 0
    assert mbqueue("work", "--device", "cpu").code == 0
    assert mbqueue("report", "pretrained_infer").code == 0


def test_export_without_matbench_says_how_to_install_it(
    mbqueue: Command, project: ProjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project.results_dir / "daily" / "2026-01-01" / "whole"
    folder.mkdir(parents=True)
    content = {
        "format": 1,
        "experiment": "whole",
        "folds": {},
        "leaderboard": {"reasons_against": []},
        "run": {"files": {}},
    }
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "matbench_results.json.gz").write_bytes(gzip.compress(b"{}"))
    monkeypatch.setitem(sys.modules, "matbench.bench", None)
    answer = mbqueue("export", "whole", "--output", str(tmp_path), "--authors", "A. Researcher")
    assert answer.code == FAILURE
    assert "pip install --no-deps matbench==0.6" in answer.err


def test_make_with_an_old_python_says_which_version_it_needs(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text("#!/bin/sh\nexit 1\n")  # a fake Python that fails the Makefile's version check
    old.chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    makefile = Path(__file__).parents[2] / "Makefile"
    done = subprocess.run(
        ["make", "-f", str(makefile), "-C", str(tmp_path), f"PYTHON={old}", "demo"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == USAGE
    assert "3.11 or newer" in done.stdout
    assert "make PYTHON=python3.12 demo" in done.stdout
    assert not (tmp_path / ".venv").exists()


def test_enqueue_refuses_a_csv_without_a_known_target_and_its_advice_leads_to_an_experiment(
    mbqueue: Command, project: ProjectFolder
) -> None:
    salt = Structure(Lattice.cubic(4.1), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    rows = [f'c{number},"{salt.to(fmt="cif")}",{number}.5' for number in range(5)]
    (project.root / "mine.csv").write_text("\n".join(["id,cif,band_gap", *rows]))
    enqueue = ("enqueue", "head_finetune", "--dataset", "mine.csv")
    refused = mbqueue(*enqueue, "--target-column", "band_gap")
    assert refused.code == USAGE
    assert "head_finetune.toml with " in refused.err
    assert 'target.column = "band_gap"' in refused.err
    assert "results_name" not in refused.err
    unknown = mbqueue(*enqueue)
    assert (unknown.code, project.queue_db.exists()) == (USAGE, False)
    said = " ".join(unknown.err.split())
    assert "mine.csv has no column e_form or target or" in said
    assert "Its columns are: id, cif, band_gap." in said
    advice = re.search(r"--target-column band_gap .*?target\.kind=scalar", said)
    assert advice is not None
    assert advice[0] in " ".join(refused.err.split())
    named = mbqueue(*enqueue, "--target-column", "gap", "--set", "target.name=gap", "--set", "target.kind=scalar")
    assert named.code == USAGE
    assert "no column gap, which you named as the target column" in " ".join(named.err.split())
    assert mbqueue("prepare", "mine.csv").code == USAGE
    assert mbqueue(*enqueue, *shlex.split(advice[0])).code == 0
    assert mbqueue("prepare", "mine.csv", "--target-column", "band_gap").code == 0


def test_both_ways_out_of_a_table_without_a_known_target_lead_to_an_experiment(
    mbqueue: Command, project: ProjectFolder
) -> None:
    salt = Structure(Lattice.cubic(4.1), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    rows = [json.dumps({"id": f"c{n}", "structure": salt.as_dict(), "band_gap": n + 0.5}) for n in range(5)]
    (project.root / "mine.jsonl").write_text("\n".join(rows))
    enqueue = ("enqueue", "head_finetune", "--dataset", "mine.jsonl")
    assert mbqueue(*enqueue).code == 0
    said = " ".join(mbqueue("work", "--max-jobs", "1", "--device", "cpu", "--no-end-command").err.split())
    assert "enqueue it again under a new name (--name NAME-2)" in said
    status = " ".join(mbqueue("status").out.split())
    for shown in (said, status):
        assert "after fixing the cause: mbqueue retry head_finetune" in shown
    advice = re.search(r"--target-column band_gap .*?target\.kind=scalar", said)
    assert advice is not None
    assert mbqueue(*enqueue, "--name", "NAME-2", *shlex.split(advice[0])).code == 0
    assert "Rename a column (and run mbqueue retry for a failed experiment)" in said
    (project.root / "mine.jsonl").write_text("\n".join(rows).replace("band_gap", "e_form"))
    assert mbqueue("retry", "head_finetune").code == 0
    mbqueue("work", "--max-jobs", "1", "--device", "cpu", "--no-end-command")
    with Queue(project.queue_db) as queue:
        assert queue.jobs(experiment="head_finetune")[0].state == "committed"


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_report_on_data_that_no_session_will_prepare_names_the_way_out(
    mbqueue: Command, project: ProjectFolder, state: str
) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample", "--folds", "0")
    with Queue(project.queue_db) as queue:
        if state == "failed":
            session = queue.start_session(device="cpu", now=1.0, alive_seconds=60.0)
            lease = queue.claim(session, now=1.0, lease_seconds=60.0)
            assert lease is not None
            queue.fail(lease, error="no crystal", now=2.0, final=True)
        else:
            queue.cancel("full_finetune", now=1.0)
    answer = mbqueue("report", "full_finetune")
    assert answer.code == FAILURE
    told = " ".join(answer.err.split())
    assert f"the prepare job {'failed' if state == 'failed' else 'was cancelled'}" in told
    assert "mbqueue events full_finetune" in told
    assert "mbqueue retry full_finetune" in told
    assert "mbqueue work" not in told
