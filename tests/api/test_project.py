"""The API runs a small real experiment in two sessions, with hooks and event files."""

from __future__ import annotations

import http.server
import inspect
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

import mbqueue
from mbqueue import Project
from mbqueue.errors import ResultsError, UsageError

SMALL: dict[str, Any] = {"data.limit": 40, "train.batch_size": 8}


@dataclass
class WebHook:
    """A web server on this machine that stores all messages that it receives."""

    url: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module")
def web_hook() -> Iterator[WebHook]:
    hook = WebHook()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hook.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hook.url = f"http://127.0.0.1:{server.server_port}/hook"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hook
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Worked:
    """A finished project, and what its methods returned between its two sessions."""

    project: Project
    half: pd.DataFrame
    half_report: str
    refused: dict[str, str]
    told: Path
    web_hook: WebHook


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory, web_hook: WebHook) -> Worked:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("api")
    told = root / "told"
    project = Project.create(root / "project")
    (project.folder.root / "mbqueue.toml").write_text(
        f"[notify]\ncommand = 'cat >> {told}; echo \" $MBQUEUE_EVENT\" >> {told}'\nwebhook = '{web_hook.url}'\n"
    )
    project = Project(project.folder.root)
    project.enqueue("head_finetune", dataset="sample", epochs=2, folds=[0, 1], settings=SMALL)
    refused = {}
    for what in ("history", "predictions", "report"):
        with pytest.raises(ResultsError) as raised:
            getattr(project, what)("head_finetune")
        refused[what] = str(raised.value)
    # Run the jobs that prepare the data, and train and predict fold 0.
    project.work(session="none", device="cpu", max_jobs=4, tensorboard=True)
    half = project.history("head_finetune")
    (page,) = project.report("head_finetune", output=root / "half.html")
    assert project.work(device="cpu").jobs_done == 4
    torch.set_num_threads(threads)
    return Worked(project, half, page.read_text(), refused, told, web_hook)


def test_the_status_is_given_as_tables(worked: Worked) -> None:
    status = worked.project.status()
    assert status.experiments.loc["head_finetune", "state"] == "done"
    assert status.experiments.loc["head_finetune", "committed"] == 8
    assert list(status.folds.index) == [("head_finetune", 0), ("head_finetune", 1)]
    assert (status.folds["epochs_done"] == 2).all()
    assert (status.folds["test_mae"] > 0).all()
    assert status.sessions.empty
    assert status.errors.empty
    assert not status.is_active


def test_the_status_shows_itself_in_a_notebook_and_as_text(worked: Worked, capsys: pytest.CaptureFixture[str]) -> None:
    status = mbqueue.status(worked.project.folder.root)
    page = status._repr_html_()
    assert page.startswith("<pre")
    assert "head_finetune" in page
    assert "color" in page
    assert "head_finetune" in str(status)
    assert max(map(len, str(status).splitlines())) <= 80
    assert capsys.readouterr().out == ""


def test_watching_renews_one_display_until_no_session_runs(worked: Worked, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    handle = SimpleNamespace(update=shown.append)

    def display(what: object, *, display_id: bool) -> object:
        assert display_id
        shown.append(what)
        return handle

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    active = iter([True, True, False])
    monkeypatch.setattr(mbqueue.Status, "is_active", property(lambda _: next(active)))
    worked.project.watch(seconds=0.0)
    assert len(shown) == 3


def test_the_history_has_a_row_for_every_epoch_of_every_fold(worked: Worked) -> None:
    history = worked.project.history("head_finetune")
    assert list(zip(history["fold"], history["epoch"], strict=True)) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert (history["val_mae"] > 0).all()
    assert list(zip(worked.half["fold"], worked.half["epoch"], strict=True)) == [(0, 1), (0, 2)]


def test_predictions_returns_the_values_of_the_files(worked: Worked) -> None:
    predictions = worked.project.predictions("head_finetune")
    folder = worked.project.results("head_finetune").folder
    files = [pd.read_csv(folder / f"preds_fold_{fold}.csv", float_precision="round_trip") for fold in (0, 1)]
    assert predictions["id"].tolist() == [*files[0]["id"], *files[1]["id"]]
    assert predictions["y_pred"].tolist() == [*files[0]["y_pred"], *files[1]["y_pred"]]
    assert predictions["fold"].tolist() == [0] * len(files[0]) + [1] * len(files[1])


def test_the_model_of_a_fold_is_a_chgnet_and_a_missing_one_is_an_error(worked: Worked) -> None:
    from chgnet.model import CHGNet

    assert isinstance(worked.project.model("head_finetune", 1), CHGNet)
    with pytest.raises(ResultsError, match="Folds with a model: 0, 1"):
        worked.project.model("head_finetune", 2)


def test_before_there_are_results_each_method_says_what_to_do(worked: Worked) -> None:
    assert len(worked.refused) == 3
    for said in worked.refused.values():
        assert "mbqueue work" in said


def test_an_unfinished_experiment_can_be_reported(worked: Worked) -> None:
    assert "head_finetune" in worked.half_report
    assert "fold 0" in worked.half_report.lower()


def test_a_report_of_an_unfinished_experiment_shows_resumes_under_other_conditions(
    worked: Worked, tmp_path: Path
) -> None:
    shutil.copytree(worked.project.folder.root, tmp_path / "project")
    (tmp_path / "project" / "mbqueue.toml").unlink()  # remove the settings, which contain a notify command
    project = Project(tmp_path / "project")
    project.enqueue("head_finetune", dataset="sample", epochs=3, folds=[0], settings=SMALL, name="moved")
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        project.work(device="cpu", max_jobs=2 if threads == 1 else 1)
    torch.set_num_threads(before)
    (page,) = project.report("moved", output=tmp_path / "moved.html")
    assert "Not finished." in page.read_text()
    assert "Resumed under different conditions at fold 0, epoch 1" in page.read_text()


def test_results_that_are_only_in_the_live_folder_are_found_with_a_note(
    worked: Worked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MBQUEUE_LIVE_DIR", str(tmp_path / "live"))
    project = Project.create(tmp_path / "drive")
    recorded = worked.project.results("head_finetune").folder
    for root, name in (
        (project.folder.live_dir, "only_here"),
        (project.folder.root, "published"),
        (project.folder.live_dir, "both"),
        (project.folder.root, "both"),
    ):
        shutil.copytree(recorded, root / "results" / "daily" / "2026-01-01" / name)
    assert len(project.compare(["only_here", "published", "both"]).pairs) == 3
    assert len(project.history("only_here")) == 4
    assert not project.predictions("only_here").empty
    assert project.model("only_here", fold=0) is not None
    told = {record.getMessage() for record in caplog.records}
    assert len(told) == 1
    assert str(tmp_path / "live") in told.pop()


def test_the_notify_command_gets_events_of_folds_experiments_and_sessions(worked: Worked) -> None:
    told = worked.told.read_text()
    assert [told.count(f"}} {event}\n") for event in ("fold done", "experiment done", "session ended")] == [2, 1, 2]
    assert "job failed" not in told


def test_a_webhook_gets_the_same_events_as_json(worked: Worked) -> None:
    messages = worked.web_hook.messages
    assert [message["event"] for message in messages] == [
        "fold done",
        "session ended",
        "fold done",
        "experiment done",
        "session ended",
    ]
    assert (messages[0]["experiment"], messages[0]["fold"]) == ("head_finetune", 0)
    assert "test MAE" in messages[0]["text"]
    assert messages[0]["text"] == messages[0]["content"]


def test_tensorboard_files_hold_every_epoch_and_step(worked: Worked) -> None:
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    folder = worked.project.folder.logs_dir / "tensorboard" / "head_finetune"
    assert {path.name for path in folder.iterdir()} == {"fold_0"}  # only one of the two sessions wrote event files
    epochs = accumulator.EventAccumulator(str(folder / "fold_0" / "epochs")).Reload()
    assert [event.step for event in epochs.Scalars("epoch/val_mae")] == [1, 2]
    steps = accumulator.EventAccumulator(str(folder / "fold_0")).Reload()
    assert [event.step for event in steps.Scalars("step/loss")] == list(range(1, 9))


def test_deleted_results_are_reported_and_rebuilt_by_retry(worked: Worked, tmp_path: Path) -> None:
    copied = tmp_path / "project"
    shutil.copytree(worked.project.folder.root, copied)
    project = Project(copied)
    before = project.predictions("head_finetune")
    shutil.rmtree(project.results("head_finetune").folder)
    with pytest.raises(ResultsError, match="mbqueue retry head_finetune"):
        project.report("head_finetune")
    project.retry("head_finetune")
    project.work(device="cpu")
    pd.testing.assert_frame_equal(project.predictions("head_finetune"), before)


def test_a_typing_error_in_the_name_of_an_experiment_lists_the_known_ones(worked: Worked) -> None:
    with pytest.raises(UsageError, match="head_finetune"):
        worked.project.status("heed_finetune")
    with pytest.raises(ResultsError, match="head_finetune"):
        worked.project.history("heed_finetune")


def test_importing_mbqueue_imports_no_other_package() -> None:
    program = (
        "import sys, mbqueue\n"
        "assert not [m for m in sys.modules if m.startswith('mbqueue.')]\n"
        "assert mbqueue.__version__\n"
        "from mbqueue import Project\n"
        "heavy = {'torch', 'chgnet', 'pymatgen', 'pandas', 'plotly', 'numba', 'scipy', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_help_shows_each_argument_that_the_python_page_names() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/python.md").read_text()
    table = "\n".join(line for line in page.splitlines() if line.startswith("| `"))
    shown, told = {}, {}
    for method, arguments in re.findall(r"`(\w+)\(([^`]*)\)`", table):
        shown[method] = set(inspect.signature(getattr(Project, method)).parameters) - {"self"}
        names = (one.partition("=")[0] for one in arguments.split(", "))
        told[method] = {name for name in names if name.isidentifier()}
    assert {method: names - shown[method] for method, names in told.items() if names - shown[method]} == {}
    assert told["work"] == shown["work"]
    assert told["work"] - shown["work_on_devices"] == {"device", "end_command", "report"}
    assert inspect.signature(Project.work_in_background).parameters["session"].default is None
