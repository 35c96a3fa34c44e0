"""No command overwrites its inputs or files of other programs, and each command checks this before it computes."""

from __future__ import annotations

import shutil
from pathlib import Path

import plotly.io
import pytest
from small_project import RememberedReport, enqueue, make_project, small_spec
from typer.testing import CliRunner

from mbqueue.api import Project
from mbqueue.api.data import Data
from mbqueue.cli import main
from mbqueue.cli.app import app
from mbqueue.errors import UsageError
from mbqueue.experiment import DataSpec
from mbqueue.results.tables import model_file
from mbqueue.session.options import WorkOptions
from mbqueue.session.worker import work


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(tmp_path_factory.mktemp("recorded") / "project", checkpoint_minutes=60.0)
    enqueue(project, small_spec(project, "pretrained_infer"))
    work(project, WorkOptions(device="cpu"), report=RememberedReport())
    return Project(project.root)


def test_predict_refuses_its_dataset_its_models_and_files_of_others_before_it_computes(
    recorded: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, notes = tmp_path / "model.pth", tmp_path / "data.csv", tmp_path / "notes.txt"
    shutil.copy(model_file(recorded.results("pretrained_infer").folder, 0), model)
    data.write_text("id,cif,e_form\n")
    notes.write_text("mine")
    before = {path: path.read_bytes() for path in (model, data, notes)}
    monkeypatch.setattr(Data, "predict", lambda *_, **__: pytest.fail("it computed"))
    for output, force in ((model, True), (data, True), (notes, False)):
        said = CliRunner().invoke(
            app,
            ["--project", str(recorded.folder.root), "predict", str(data), str(model), "--output", str(output)]
            + ["--force"] * force,
        )
        assert isinstance(said.exception, UsageError), said.output
    assert {path: path.read_bytes() for path in before} == before


def test_no_output_replaces_the_settings_or_the_state_of_the_project(recorded: Project, tmp_path: Path) -> None:
    model, data = tmp_path / "model.pth", tmp_path / "data.csv"
    shutil.copy(model_file(recorded.results("pretrained_infer").folder, 0), model)
    data.write_text("id,cif,e_form\n")
    queue, settings = recorded.folder.queue_db, recorded.folder.root / "mbqueue.toml"
    before = queue.read_bytes(), settings.exists() and settings.read_bytes()
    for output in (queue, settings):
        for command in (["predict", str(data), str(model)], ["report", "pretrained_infer"]):
            said = CliRunner().invoke(
                app, ["--project", str(recorded.folder.root), *command, "--output", str(output), "--force"]
            )
            assert isinstance(said.exception, UsageError), said.output
            assert "reads it" in str(said.exception)
    assert (queue.read_bytes(), settings.exists() and settings.read_bytes()) == before


def test_a_table_of_predictions_replaces_only_tables_of_predictions(recorded: Project, tmp_path: Path) -> None:
    model = model_file(recorded.results("pretrained_infer").folder, 0)
    table = recorded.predict(DataSpec(dataset="sample", limit=8), [str(model)], device="cpu")
    table.write(str(tmp_path / "out.csv"))
    table.write(tmp_path / "out.csv")
    (tmp_path / "notes.csv").write_text("mine")
    with pytest.raises(UsageError, match="--force"):
        table.write(tmp_path / "notes.csv")
    with pytest.raises(UsageError, match="reads it"):
        table.write(model, force=True)
    table.write(tmp_path / "notes.csv", force=True)
    assert (tmp_path / "notes.csv").read_bytes() == (tmp_path / "out.csv").read_bytes()


def test_reports_take_a_text_as_well_as_a_path_and_replace_only_reports(recorded: Project, tmp_path: Path) -> None:
    (page,) = recorded.report("pretrained_infer", output=str(tmp_path / "x.html"))
    assert page == tmp_path / "x.html"
    recorded.report("pretrained_infer", output=page)
    page.write_text("<html>mine</html>")
    with pytest.raises(UsageError, match="--force"):
        recorded.report("pretrained_infer", output=page)
    with pytest.raises(UsageError, match="--force"):
        recorded.compare(["pretrained_infer", "pretrained_infer"], html=str(page))
    assert page.read_text() == "<html>mine</html>"
    results = recorded.results("pretrained_infer").folder / "results.json"
    with pytest.raises(UsageError, match="reads it"):
        recorded.report("pretrained_infer", output=results, force=True)
    recorded.report("pretrained_infer", output=page, force=True)
    assert b"mbqueue" in page.read_bytes()


def test_the_default_page_of_a_report_replaces_only_reports_too(recorded: Project) -> None:
    folder = recorded.results("pretrained_infer").folder
    (page,) = recorded.report("pretrained_infer")
    assert page.parent == folder
    recorded.report("pretrained_infer")
    page.write_text("<html>mine</html>")
    with pytest.raises(UsageError, match="--force"):
        recorded.report("pretrained_infer")
    assert page.read_text() == "<html>mine</html>"
    recorded.report("pretrained_infer", force=True)


def test_pictures_replace_those_that_are_there_only_with_force_and_only_all_of_them(
    recorded: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    command = ["--project", str(recorded.folder.root), "report", "pretrained_infer", "--png", str(folder)]
    drawn, breaks_after = [], 1000

    def draw(_figures: object, paths: list[Path], **_: object) -> None:
        for path in paths[:breaks_after]:
            path.write_text(f"drawing {len(drawn)}")
        drawn.append(len(paths))
        if len(paths) > breaks_after:
            raise OSError("the browser ended")

    def report(*options: str) -> BaseException | None:
        return CliRunner().invoke(app, [*command, "--output", str(tmp_path / "page.html"), *options]).exception

    def shown() -> dict[str, str]:
        return {path.name: path.read_text() for path in folder.iterdir()}

    monkeypatch.setattr(plotly.io, "write_images", draw)
    assert report() is None
    first = shown()
    assert set(first.values()) == {"drawing 0"}
    assert len(first) == drawn[0]
    assert "--force" in str(report())
    assert len(drawn) == 1  # the refused command did not render figures
    assert report("--force") is None
    assert set(shown().values()) == {"drawing 1"}
    breaks_after = 1
    error = report("--force")
    assert error is not None
    assert "the browser ended" in str(error.__cause__)
    assert set(shown().values()) == {"drawing 1"}


def test_pictures_that_cannot_be_drawn_are_reported_with_the_cause(
    recorded: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("\n\nKaleido requires Google Chrome to be installed.\n\nEither download it, or …") from why

    why = TimeoutError()
    monkeypatch.setattr(plotly.io, "write_images", fail)
    command = ["report", "pretrained_infer", "--output", str(tmp_path / "page.html"), "--png", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(["--project", str(recorded.folder.root), *command])
    told = capsys.readouterr().err
    assert told.count("Kaleido requires Google Chrome to be installed.") == 1
    assert [line.strip() for line in told.splitlines() if "because" in line] == ["because: TimeoutError"]
