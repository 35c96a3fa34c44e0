from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from mbqueue.cli.app import app
from mbqueue.project import ProjectFolder
from mbqueue.queue.opening import open_queue

Command = Callable[..., Any]
USAGE = 2


def names(group: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command of a group, including those of its subgroups."""
    found = []
    for name, command in sorted(group.commands.items()):
        found += names(command, (*prefix, name)) if hasattr(command, "commands") else [(*prefix, name)]
    return found


@pytest.mark.parametrize("command", names(typer.main.get_command(app)), ids=" ".join)
def test_every_command_has_help_with_an_example(mbqueue: Command, command: tuple[str, ...]) -> None:
    said = mbqueue(*command, "--help")
    assert said.code == 0
    assert f"Example: mbqueue {' '.join(command)}" in said.out


def test_enqueueing_the_same_thing_twice_changes_nothing_and_says_so(mbqueue: Command) -> None:
    first = mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    assert "enqueued, 107 jobs" in first.out  # prepare + 5 × (20 train + predict) + record
    before = mbqueue("events", "--json").out
    second = mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    assert (second.code, "nothing was changed" in second.out) == (0, True)
    assert mbqueue("events", "--json").out == before


def test_a_changed_spec_under_the_same_name_is_refused_with_the_differences(mbqueue: Command) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    said = mbqueue("enqueue", "full_finetune", "--dataset", "sample", "--set", "train.lr=3e-4")
    assert said.code == USAGE
    assert "train.lr: 0.001 in the queue, 0.0003 now" in said.err
    assert "--name" in said.err


def test_a_changed_spec_under_a_new_name_is_another_experiment(mbqueue: Command) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    said = mbqueue("enqueue", "full_finetune", "--dataset", "sample", "--epochs", "3", "--name", "short")
    assert said.code == 0
    names = {e["name"]: e for e in json.loads(mbqueue("status", "--json").out)["experiments"]}
    assert set(names) == {"full_finetune", "short"}
    assert names["short"]["results_dir"].endswith("/short")


def test_more_folds_are_added_to_an_experiment(mbqueue: Command) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample", "--folds", "0")
    said = mbqueue("enqueue", "full_finetune", "--dataset", "sample", "--folds", "0-2")
    assert "folds 1, 2 added" in said.out


def test_the_priority_of_a_second_enqueue_is_ignored_with_a_note(mbqueue: Command) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample", "--priority", "2")
    said = mbqueue("enqueue", "full_finetune", "--dataset", "sample", "--priority", "5")
    assert "still 2" in said.err
    assert "mbqueue priority full_finetune 5" in said.err
    assert "stays" not in mbqueue("enqueue", "full_finetune", "--dataset", "sample").err


def test_a_results_name_that_is_given_counts_beside_another_name(mbqueue: Command) -> None:
    said = mbqueue("enqueue", "full_finetune", "--dataset", "sample", "--name", "b", "--set", "results_name=mine")
    assert said.out.rstrip().endswith("/mine")


def test_status_json_has_the_documented_keys(mbqueue: Command) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample", "--folds", "0,1", "--epochs", "3")
    overview = json.loads(mbqueue("status", "--json").out)
    assert overview["format"] == 1
    assert {"experiments", "jobs", "sessions", "errors", "project", "now"} <= set(overview)
    (experiment,) = overview["experiments"]
    assert (experiment["name"], experiment["state"]) == ("full_finetune", "ready")
    fold = experiment["folds"][1]
    assert (fold["fold"], fold["epochs_done"], fold["epochs_total"], fold["state"]) == (1, 0, 3, "waiting")
    assert {"best_val_mae", "last_val_mae", "test_mae", "best_epoch"} <= set(fold)
    assert overview["jobs"]["ready"] == 1


def test_status_is_plain_in_a_pipe_and_fits_80_columns(mbqueue: Command) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    said = mbqueue("status", "full_finetune")
    assert "\x1b" not in said.out
    assert max(map(len, said.out.splitlines())) <= 80


def test_pausing_and_resuming_is_seen_in_status(mbqueue: Command) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample")

    def state() -> str:
        return str(json.loads(mbqueue("status", "--json").out)["experiments"][0]["state"])

    assert mbqueue("pause", "full_finetune").code == 0
    assert state() == "paused"
    assert mbqueue("resume", "full_finetune").code == 0
    assert state() == "ready"


def test_cancelled_jobs_can_be_retried(mbqueue: Command) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample", "--epochs", "2", "--folds", "0")
    assert "5 jobs cancelled" in mbqueue("cancel", "full_finetune", "--yes").out
    assert json.loads(mbqueue("status", "--json").out)["jobs"]["cancelled"] == 5
    assert "5 jobs" in mbqueue("retry", "full_finetune").out
    assert json.loads(mbqueue("status", "--json").out)["jobs"]["cancelled"] == 0


def test_work_exits_with_0_when_only_cancelled_jobs_are_left_and_with_1_when_paused_ones_are(mbqueue: Command) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample", "--epochs", "2", "--folds", "0")
    mbqueue("pause", "full_finetune")
    assert mbqueue("work", "--session", "none").code == 1
    mbqueue("cancel", "full_finetune", "--yes")
    told = mbqueue("work", "--session", "none")
    assert (told.code, "nothing is left to do" in told.out) == (0, True)


def test_priority_is_set_for_an_experiment(mbqueue: Command) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    assert mbqueue("priority", "full_finetune", "7").code == 0
    assert json.loads(mbqueue("status", "--json").out)["experiments"][0]["priority"] == 7


def test_events_show_what_happened_to_which_job(mbqueue: Command) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample", "--epochs", "1", "--folds", "0")
    mbqueue("cancel", "full_finetune", "--yes")
    lines = mbqueue("events", "full_finetune").out.splitlines()
    assert any("full_finetune fold 0 epoch 1" in line and "waiting → cancelled" in line for line in lines)
    events = json.loads(mbqueue("events", "--json", "--limit", "1").out)
    assert [event["to_state"] for event in events] == ["cancelled"]


def test_doctor_says_what_is_there_and_what_to_do(mbqueue: Command, project: ProjectFolder) -> None:
    findings = {finding["what"]: finding for finding in json.loads(mbqueue("doctor", "--json").out)}
    assert findings["project"]["found"] == str(project.root)
    assert findings["state folder"]["state"] == "ok"
    for finding in findings.values():
        assert finding["state"] == "ok" or finding["remedy"], f"{finding} says nothing about what to do"


def test_doctor_fails_and_says_what_to_do_when_a_package_is_missing(
    mbqueue: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    version = importlib.metadata.version

    def without_two(name: str) -> str:
        if name in {"chgnet", "matbench"}:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_two)
    said = mbqueue("doctor")
    assert said.code == 1
    assert "pip install chgnet" in said.out
    assert "pip install --no-deps matbench==0.6" in said.out


def test_doctor_reports_a_damaged_queue(mbqueue: Command, project: ProjectFolder) -> None:
    assert f"there is no queue at {project.queue_db} yet" in mbqueue("doctor").out
    mbqueue("enqueue", "head_finetune", "--dataset", "sample")
    assert str(project.queue_db) in mbqueue("doctor").out
    project.queue_db.write_bytes(b"garbage" * 5000)
    said = mbqueue("doctor")
    assert said.code == 1
    assert "mbqueue recover" in said.out


def test_doctor_continues_if_settings_and_matminer_cannot_be_used(
    mbqueue: Command, project: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.root / "mbqueue.toml").write_text("checkpoint_minutes = -1\n")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matminer" else find_spec(name))
    findings = {finding["what"]: finding for finding in json.loads(mbqueue("doctor", "--json").out)}
    assert findings["dataset"]["state"] == findings["project"]["state"] == "problem"
    assert "pip install matminer" in findings["dataset"]["remedy"]
    assert "checkpoint_minutes" in findings["project"]["remedy"]


@pytest.mark.parametrize("folds", ["²", "٣", "3-1", "0-99999999999", "1-", "", "a"])
def test_invalid_folds_are_refused(mbqueue: Command, folds: str) -> None:
    said = mbqueue("enqueue", "full_finetune", "--folds", folds)
    assert said.code == 2
    assert "Write, for example, 0,1,2 or 0-2" in said.err


def test_an_experiment_is_enqueued_once_for_each_seed(mbqueue: Command, project: ProjectFolder) -> None:
    said = mbqueue("enqueue", "head_finetune", "--dataset", "sample", "--seeds", "0-2,7", "--name", "head")
    assert said.code == 0
    with open_queue(project, read_only=True) as queue:
        found = [(one.name, one.spec["seed"], Path(one.results_dir).name) for one in queue.experiments()]
    assert found == [(f"head.seed{seed}", seed, f"head.seed{seed}") for seed in (0, 1, 2, 7)]
    again = mbqueue("enqueue", "head_finetune", "--dataset", "sample", "--seeds", "0,1", "--name", "head")
    assert again.out.count("nothing was changed") == 2


def test_one_seed_is_the_experiment_with_that_seed(mbqueue: Command, project: ProjectFolder) -> None:
    assert mbqueue("enqueue", "head_finetune", "--dataset", "sample", "--seeds", "3").code == 0
    assert mbqueue("enqueue", "head_finetune", "--dataset", "sample", "--set", "seed=3").code == 0
    with open_queue(project, read_only=True) as queue:
        assert queue.experiment("head_finetune.seed3").spec_hash == queue.experiment("head_finetune").spec_hash


def test_of_several_seeds_none_is_enqueued_when_the_name_of_one_is_taken(
    mbqueue: Command, project: ProjectFolder
) -> None:
    taken = ("--name", "head_finetune.seed2", "--set", "train.lr=1e-4")
    assert mbqueue("enqueue", "head_finetune", "--dataset", "sample", *taken).code == 0
    said = mbqueue("enqueue", "head_finetune", "--dataset", "sample", "--seeds", "0-2")
    assert said.code != 0
    assert "head_finetune.seed2 is already in the queue with a different spec" in said.err
    with open_queue(project, read_only=True) as queue:
        assert [one.name for one in queue.experiments()] == ["head_finetune.seed2"]


@pytest.mark.parametrize(
    ("seeds", "why"),
    [
        ("3-1", "Write, for example, 0,1,2"),
        ("0,0", "each seed once"),
        ("0-5000000000", "more than 100"),
        ("²", "list of seeds"),
    ],
)
def test_invalid_seeds_are_refused(mbqueue: Command, seeds: str, why: str) -> None:
    said = mbqueue("enqueue", "head_finetune", "--dataset", "sample", "--seeds", seeds)
    assert said.code == 2
    assert why in said.err


def test_seeds_and_a_seed_do_not_go_together(mbqueue: Command) -> None:
    said = mbqueue("enqueue", "head_finetune", "--dataset", "sample", "--seeds", "0-2", "--set", "seed=1")
    assert said.code == 2
    assert "both the setting `seed` and a list of seeds" in said.err


def test_init_makes_a_project_and_prints_the_next_step(mbqueue: Command, tmp_path: Path) -> None:
    said = mbqueue("init", str(tmp_path / "fresh"))
    assert said.code == 0
    assert "mbqueue enqueue" in said.err
    assert (tmp_path / "fresh" / "jobs" / "full_finetune.toml").exists()


def test_status_and_enqueue_import_nothing_heavy(mbqueue: Command, project: ProjectFolder) -> None:
    mbqueue("enqueue", "head_finetune", "--dataset", "sample")  # the first command also creates the database
    program = (
        "import sys\n"
        "from mbqueue.cli import main\n"
        "for arguments in (['status', '--json'], ['enqueue', 'full_finetune', '--dataset', 'sample']):\n"
        f"    try: main(['--project', {str(project.root)!r}, *arguments])\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'chgnet', 'pymatgen', 'matbench', 'matminer', 'pandas', 'numba', 'scipy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_predict_checks_its_paths_before_it_loads_pytorch(project: ProjectFolder, tmp_path: Path) -> None:
    for name in ("model.pth", "notes.csv"):
        (tmp_path / name).write_text("mine")
    refused = {
        ("missing.csv", "model.pth", "new.csv"): "There is no dataset",
        ("sample", "missing.pth", "new.csv"): "There is no model file",
        ("sample", "model.pth", "notes.csv"): "already exists",
        ("sample", "model.pth", "missing/new.csv"): "Create the folder first",
    }
    program = (
        "import sys\n"
        "from mbqueue.cli import main\n"
        f"for dataset, model, output in {list(refused)!r}:\n"
        f"    try: main(['--project', {str(project.root)!r}, 'predict', dataset, model, '--output', output])\n"
        "    except SystemExit as end: assert end.code == 2, end.code\n"
        "    print('---', file=sys.stderr)\n"
        "assert not {'torch', 'chgnet', 'pymatgen'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said, why in zip(done.stderr.split("---\n")[:-1], refused.values(), strict=True):
        assert why in said
    assert "loading" not in done.stderr


def test_status_waits_for_no_other_command_and_not_for_pydantic() -> None:
    program = (
        "import sys, mbqueue.cli.app, mbqueue.cli.status\n"
        "ours = {name for name in sys.modules if name.startswith('mbqueue.cli.')}\n"
        "assert ours == {f'mbqueue.cli.{name}' for name in ('app', 'console', 'options', 'status')}, ours\n"
        "assert not {'pydantic', 'numpy', 'plotly', 'psycopg'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_list_of_commands_explains_each_in_one_line(mbqueue: Command) -> None:
    said = mbqueue("--help").out
    assert "..." not in said.partition("Get started:")[2]
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert re.search(rf"^  {name} +\w.*\.$", said, re.MULTILINE), name


def test_the_program_runs_as_a_module_and_prints_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mbqueue", "--version"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "mbqueue")
