"""If the queue is lost, commands report the loss and create no new queue, and `recover` rebuilds the queue."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from lost_queues import LACKS, STATES, commit, spec_of
from processes import run
from small_project import RememberedReport, make_project
from typer.testing import CliRunner

from mbqueue.api import Project
from mbqueue.cli.app import app
from mbqueue.cli.doctor import _queue
from mbqueue.errors import MbqueueError, QueueLost, UsageError
from mbqueue.experiment import load_spec
from mbqueue.project import ProjectFolder
from mbqueue.queue.opening import note_once, open_queue, queue_exists
from mbqueue.queue.store import Queue
from mbqueue.session.options import WorkOptions
from mbqueue.session.worker import work
from mbqueue.web.acts import act

TO_DO = "mbqueue recover"


@pytest.fixture
def whole(tmp_path: Path) -> Project:
    """A project with an experiment of two folds, one of which has a commit."""
    project = Project(make_project(tmp_path / "project").root)
    project.enqueue("head_finetune", dataset="sample", folds=[0, 1], epochs=5)
    commit(project.folder, spec_of(project, folds=[0, 1], **{"train.epochs": 5}), 0, epoch=1)
    return project


@pytest.fixture
def lost(tmp_path: Path) -> Project:
    project = Project(make_project(tmp_path / "project").root)
    project.enqueue("head_finetune", dataset="sample", folds=[0])
    project.folder.queue_db.unlink()
    return project


NO_QUEUE = {"gone", "emptied"}
TRAINS_OVER = {"with other settings", "other settings, no note", "an older one"}


def _worked(project: Project) -> str:
    report = RememberedReport()
    work(project.folder, WorkOptions(device="cpu", max_jobs=0), report=report)
    return "\n".join(report.lines)


def _search(project: Project) -> Path:
    path = project.folder.jobs_dir / "rates.toml"
    search = '[search]\nbase = "full_finetune"\ntrials = 2\nsampler = "grid"\n'
    path.write_text(search + '[search.space]\n"train.lr" = { choices = [1e-3, 1e-2] }\n')
    return path


#: Commands that only read the queue.
READING: dict[str, Callable[[Project], object]] = {
    "status": lambda project: project.status(),
    "events": lambda project: project.events(),
}
#: Commands that fall back to reading files if there is no queue.
READING_FILES: dict[str, Callable[[Project], object]] = {
    "is it a search": lambda project: project.is_search("head_finetune"),
    "results": lambda project: project.results("head_finetune"),
    "timeline": lambda project: project.timeline("head_finetune"),
    "stop": lambda project: project.stop(),
}
#: Commands that add to the queue, move the queue, or remove data that its experiments need.
ADDING: dict[str, Callable[[Project], object]] = {
    "enqueue": lambda project: project.enqueue("pretrained_infer", dataset="sample"),
    "enqueue it again": lambda project: project.enqueue("head_finetune", dataset="sample", folds=[0, 1], epochs=5),
    "enqueue other settings": lambda project: project.enqueue("head_finetune", dataset="sample", folds=[3]),
    "enqueue seeds": lambda project: project.enqueue_seeds("pretrained_infer", [0, 1], dataset="sample"),
    "enqueue a search": lambda project: project.enqueue(_search(project)),
    "enqueue on the board": lambda project: act(project, "enqueue", {"experiment": "pretrained_infer"}),
    "promote": lambda project: project.promote("head_finetune"),
    "blend": lambda project: project.blend(["head_finetune", "full_finetune"], name="blend"),
    "predict again": lambda project: project.predict_again("head_finetune", test_strains=2, name="again"),
    "migrate the queue": lambda project: project.migrate_queue("sqlite"),
    "move commits": lambda project: project.move_commits(),
    "prune the cache": lambda project: project.prune_cache(),
}
#: Commands that would overwrite the note that the lost queue wrote about the experiment.
STEERING: dict[str, Callable[[Project], object]] = {
    "pause": lambda project: project.pause("head_finetune"),
    "resume": lambda project: project.resume("head_finetune"),
    "cancel": lambda project: project.cancel("head_finetune"),
    "retry": lambda project: project.retry("head_finetune"),
    "priority": lambda project: project.set_priority("head_finetune", 3),
    "pause on the board": lambda project: act(project, "pause", {"experiment": "head_finetune"}),
}
WORKING: dict[str, Callable[[Project], object]] = {
    "work": _worked,
}
COMMANDS = READING | READING_FILES | ADDING | STEERING | WORKING


def content_of(folder: ProjectFolder) -> Mapping[str, object]:
    """Everything that a command could damage: the queue's experiments, notes and commits."""
    files = {str(path): path.read_bytes() for path in folder.live_dir.glob("wanted/*")}
    files |= {str(path): path.read_bytes() for path in folder.live_dir.glob("checkpoints/*/*/*")}
    if not folder.queue_db.exists():
        return files
    with Queue(folder.queue_db, read_only=True) as queue:
        return files | {one.name: (one.spec, one.paused, one.priority) for one in queue.experiments()}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_is_lost_and_changes_nothing(
    whole: Project, command: str, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    if command == "enqueue a search":
        pytest.importorskip("optuna")
    lose, said = STATES[state]
    lose(whole)
    before = content_of(whole.folder)
    note_once.cache_clear()
    is_refused, told = False, ""
    try:
        told = str(COMMANDS[command](whole))
    except QueueLost as error:
        is_refused, told = True, str(error)
    except MbqueueError:
        pass  # some commands fail for a different reason, such as missing results
    assert is_refused is refuses(command, state), told
    told += caplog.text
    assert said in told
    assert TO_DO in told
    assert told.count(said) == 1, "it is said once"
    assert content_of(whole.folder) == before


def refuses(command: str, state: str) -> bool:
    if state == "gone":
        return command not in READING_FILES
    if state == "emptied":
        return True
    if command in WORKING:
        return state in TRAINS_OVER
    return command in ADDING or command in STEERING


@pytest.mark.parametrize("state", ["of another experiment", "with fewer folds"])
def test_commands_in_a_terminal_report_the_loss_once(whole: Project, state: str) -> None:
    STATES[state][0](whole)
    done = run(whole.folder.root, "status", "--json")
    assert done.returncode == 0
    assert [one["state"] for one in json.loads(done.stdout)["experiments"]] == ["ready"]
    assert done.stderr.count(LACKS) == 1
    done = run(whole.folder.root, "enqueue", "pretrained_infer", "--dataset", "sample")
    assert done.returncode == 1
    assert done.stdout == ""
    assert STATES[state][1] in done.stderr
    assert f"First rebuild the missing parts: {TO_DO}" in done.stderr


def test_an_experiment_that_is_not_lost_can_be_steered(whole: Project, caplog: pytest.LogCaptureFixture) -> None:
    STATES["of another experiment"][0](whole)
    note_once.cache_clear()
    assert whole.pause("full_finetune") > 0
    assert LACKS in caplog.text


def test_a_session_does_not_give_the_names_of_lost_trials_to_others(whole: Project) -> None:
    pytest.importorskip("optuna")
    whole.recover(force=True)
    whole.enqueue(_search(whole))
    with open_queue(whole.folder) as queue:
        note = json.loads((whole.folder.notes_dir / "rates.000.json").read_bytes())
        assert [one.name for one in queue.trials()] == ["rates.000"]
    lost_note = whole.folder.notes_dir / "rates.001.json"
    lost_note.write_text(json.dumps(note))
    with pytest.raises(QueueLost, match=r"rates\.001"):
        whole.work(device="cpu", max_jobs=0)
    with pytest.raises(QueueLost, match=r"rates\.001"):
        whole.pause("rates")


def test_cancel_reports_the_loss_instead_of_asking_for_confirmation(lost: Project) -> None:
    said = CliRunner().invoke(app, ["--project", str(lost.folder.root), "cancel", "head_finetune"])
    assert isinstance(said.exception, QueueLost)
    assert "Cancel the unfinished jobs" not in said.output


def test_doctor_reports_the_loss(lost: Project) -> None:
    assert "mbqueue recover" in _queue(lost.folder).remedy
    assert _queue(lost.folder).state == "problem"


def test_recover_restores_what_was_lost(lost: Project) -> None:
    lost.recover()
    assert [one["name"] for one in lost.status().overview["experiments"]] == ["head_finetune"]


def test_recover_restores_the_lost_queue_after_another_was_started(lost: Project) -> None:
    spec = load_spec(lost.folder.experiment_file("full_finetune"), overrides={"data.dataset": "sample"})
    with Queue(lost.folder.queue_db) as queue:
        queue.enqueue(spec, results_dir="results/full", now=0.0)
        lost._keep_note(queue, "full_finetune")
    lost.recover()
    names = {one["name"] for one in lost.status().overview["experiments"]}
    assert names == {"head_finetune", "full_finetune"}
    with pytest.raises(UsageError, match="is intact"):
        lost.recover()


def test_recover_merges_a_second_queue_and_keeps_what_only_it_has(lost: Project) -> None:
    spec = load_spec(lost.folder.experiment_file("full_finetune"), overrides={"data.dataset": "sample"})
    with Queue(lost.folder.queue_db) as queue:
        queue.enqueue(spec, results_dir="results/full", now=0.0)
        queue.pause("full_finetune", now=0.0)
    report = RememberedReport()
    work(lost.folder, WorkOptions(device="cpu"), report=report)
    for told in (_queue(lost.folder).remedy, "\n".join(report.lines)):
        assert "The queue lacks head_finetune" in told
        assert "mbqueue recover" in told
    lost.recover()
    assert _queue(lost.folder).state == "ok"
    found = {one["name"]: one["paused"] for one in lost.status().overview["experiments"]}
    assert found == {"head_finetune": False, "full_finetune": True}


def test_an_interrupted_recover_loses_nothing_of_a_second_queue(lost: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(lost.folder.experiment_file("full_finetune"), overrides={"data.dataset": "sample"})
    with Queue(lost.folder.queue_db) as queue:
        queue.enqueue(spec, results_dir="results/full", now=0.0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("mbqueue.drive.recovery.write_note", full)
        with pytest.raises(OSError, match="No space"):
            lost.recover()
    lost.recover()
    names = {one["name"] for one in lost.status().overview["experiments"]}
    assert names == {"head_finetune", "full_finetune"}


def test_a_project_where_nothing_was_ever_enqueued_has_lost_nothing(tmp_path: Path) -> None:
    project = Project(make_project(tmp_path / "project").root)
    assert not queue_exists(project.folder)
    open_queue(project.folder).close()
