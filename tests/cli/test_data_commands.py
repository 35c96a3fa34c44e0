from __future__ import annotations

import csv
import errno
import gzip
import json
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_project import enqueue, small_spec

from mbqueue.cli.datasets import progress_bars
from mbqueue.data.datasets import SAMPLE_FILE, load
from mbqueue.files import write_bytes
from mbqueue.project import ProjectFolder
from mbqueue.queue.store import Queue
from mbqueue.train.chgnet import load_pretrained, model_bytes

Command = Callable[..., Any]
FAILURE, USAGE, MORE_TO_DO = 1, 2, 75
ROOT = Path(__file__).parents[2]


def test_prepare_fills_the_cache_and_a_second_call_finds_it(mbqueue: Command, project: ProjectFolder) -> None:
    first = mbqueue("prepare", "sample", "--limit", "30")
    assert (first.code, first.out.startswith("30 crystals in ")) == (0, True)
    shard = next(project.cache_dir.glob("*/shard-*.bin"))
    before = shard.stat().st_mtime_ns
    assert mbqueue("prepare", "sample", "--limit", "30").out == first.out
    assert shard.stat().st_mtime_ns == before


def test_prepare_names_the_offenders_and_drops_them_only_when_asked(mbqueue: Command, project: ProjectFolder) -> None:
    lattice = {"matrix": [[4, 0, 0], [0, 4, 0], [0, 0, 4]]}
    good = {"lattice": lattice, "sites": [{"species": [{"element": "Cu", "occu": 1}], "abc": [0, 0, 0]}]}
    flat = {**good, "lattice": {"matrix": [[4, 0, 0], [0, 4, 0], [0, 0, 0]]}}
    rows = [{"id": f"good-{i}", "structure": good, "e_form": 0.0} for i in range(6)]
    rows.insert(2, {"id": "flat-one", "structure": flat, "e_form": 0.0})
    (project.root / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused = mbqueue("prepare", "mine.jsonl")
    assert refused.code == FAILURE
    assert "flat-one" in refused.err
    assert "--drop-invalid" in refused.err
    assert "enqueue it again under a new name (--name NAME-2)" in " ".join(refused.err.split())
    dropped = mbqueue("prepare", "mine.jsonl", "--drop-invalid")
    assert dropped.code == 0
    assert dropped.out.startswith("6 crystals")
    assert "dropped flat-one" in dropped.err


def test_a_table_that_cannot_be_read_at_the_moment_is_enqueued(
    mbqueue: Command, project: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.root / "mine.csv").write_text("id,cif\n")
    opened = Path.open

    def failing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "mine.csv":
            raise OSError(errno.EIO, "the mount does not answer")
        return opened(path, *arguments, **options)

    enqueued = ("enqueue", "head_finetune", "--dataset", "mine.csv")
    assert mbqueue(*enqueued).code == USAGE
    monkeypatch.setattr(Path, "open", failing)
    assert mbqueue(*enqueued).code == 0


def test_the_cache_is_listed_verified_repaired_and_pruned(mbqueue: Command, project: ProjectFolder) -> None:
    mbqueue("prepare", "sample", "--limit", "30")
    (entry,) = json.loads(mbqueue("cache", "list", "--json").out)
    assert (entry["n_crystals"], entry["source"], entry["current"]) == (30, "sample", True)
    assert "sound" in mbqueue("cache", "verify").out
    shard = next(project.cache_dir.glob("*/shard-*.bin"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    damaged = mbqueue("cache", "verify")
    assert (damaged.code, "DAMAGED" in damaged.out, "--repair" in damaged.err) == (FAILURE, True, True)
    repaired = mbqueue("cache", "verify", "--repair")
    assert (repaired.code, "repaired" in repaired.out) == (0, True)
    assert "sound" in mbqueue("cache", "verify").out
    assert mbqueue("cache", "prune").out.startswith("removed ")
    assert json.loads(mbqueue("cache", "list", "--json").out) == []


def test_a_cache_that_the_queue_needs_is_pruned_only_when_all_are(mbqueue: Command, project: ProjectFolder) -> None:
    mbqueue("prepare", "sample", "--limit", "30")
    mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    mbqueue("cache", "prune")
    assert len(json.loads(mbqueue("cache", "list", "--json").out)) == 1
    assert mbqueue("cache", "prune", "--all").out.startswith("removed ")
    assert json.loads(mbqueue("cache", "list", "--json").out) == []


def test_damaged_crystals_are_not_called_repaired(mbqueue: Command, project: ProjectFolder) -> None:
    mbqueue("prepare", "sample", "--limit", "30")
    file = next(project.cache_dir.glob("*/crystals.bin"))
    file.write_bytes(file.read_bytes()[:-1])
    said = mbqueue("cache", "verify", "--repair")
    assert (said.code, "repaired" in said.out, "DAMAGED" in said.out) == (FAILURE, False, True)
    assert "Run mbqueue prepare" in said.err
    assert mbqueue("prepare", "sample", "--limit", "30").code == 0
    assert "sound" in mbqueue("cache", "verify").out


def test_an_unfinished_cache_is_listed_and_verified_as_such(mbqueue: Command, project: ProjectFolder) -> None:
    mbqueue("prepare", "sample", "--limit", "30")
    next(project.cache_dir.glob("*/shard-*.bin")).unlink()
    how_far = "unfinished, 0 of 1 shard; run mbqueue prepare to continue"
    assert how_far in mbqueue("cache", "list").out
    verified = mbqueue("cache", "verify")
    assert (verified.code, how_far in verified.out) == (0, True)
    assert "completed" in mbqueue("cache", "verify", "--repair").out


def test_a_log_shows_the_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done_at = {0.0: 0, 20.0: 100, 30.0: 200, 40.0: 300, 200.0: 600}
    instants = iter(done_at)
    monkeypatch.setattr(time, "monotonic", lambda: next(instants))
    with progress_bars() as progress:
        advanced = progress("converting")
        for done in done_at.values():
            advanced(done, 600)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "converting 0/600",
        "converting 100/600",
        "converting 300/600, 10/s, 30s left",
        "converting 600/600",
    ]


def test_a_log_and_a_terminal_show_in_percent_how_much_of_a_file_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for is_terminal, percents in ((False, ["0%", "100%"]), (True, ["100%"])):
        monkeypatch.setattr("rich.console.Console.is_terminal", is_terminal)
        with progress_bars() as progress:
            advanced = progress("reading")
            for done in (8, 64_291):
                advanced(done, 64_291)
        said = capsys.readouterr().err
        assert all(percent in said for percent in percents)
        assert "64291" not in said


def test_predict_gives_the_mean_and_the_spread_of_its_models(
    mbqueue: Command, project: ProjectFolder, tmp_path: Path
) -> None:
    models = []
    for number, shift in enumerate((0.0, 0.5)):
        model = load_pretrained("0.3.0")
        with torch.no_grad():
            model.composition_model.fc.weight += shift  # shift every prediction by `shift`
        models.append(tmp_path / f"model_fold_{number}.pth")
        write_bytes(models[-1], model_bytes(model))
    few = gzip.decompress(SAMPLE_FILE.read_bytes()).splitlines(keepends=True)[:30]
    (tmp_path / "few.jsonl").write_bytes(b"".join(few))
    table = tmp_path / "table.csv"
    said = mbqueue("predict", str(tmp_path / "few.jsonl"), *map(str, models), "--output", str(table), "--device", "cpu")
    assert (said.code, "MAE against" in said.out) == (0, True)
    assert "a test score only if no model was trained on any of these crystals" in said.out
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 30
    for row in rows:
        assert float(row["y_pred_1"]) - float(row["y_pred_0"]) == pytest.approx(0.5, abs=1e-4)
        assert float(row["spread"]) == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("known_from", ["the queue", "results.json"])
def test_predict_warns_about_errors_on_training_crystals(
    mbqueue: Command, project: ProjectFolder, tmp_path: Path, known_from: str
) -> None:
    few = gzip.decompress(SAMPLE_FILE.read_bytes()).splitlines(keepends=True)[:10]
    (project.root / "few.jsonl").write_bytes(b"".join(few))
    dataset_hash = load(str(project.root / "few.jsonl")).crystals.hash
    if known_from == "the queue":
        enqueue(project, small_spec(project, data__dataset="few.jsonl", data__limit=0))
        with Queue(project.queue_db) as queue:
            session = queue.start_session(device="cpu", now=1.0, alive_seconds=100.0)
            lease = queue.claim(session, now=1.0, lease_seconds=100.0)
            assert lease is not None
            queue.commit(lease, result={"dataset_hash": dataset_hash}, now=2.0)
    else:
        (tmp_path / "results.json").write_text(json.dumps({"dataset": {"hash": dataset_hash}}))
    model = tmp_path / "model_fold_0.pth"
    write_bytes(model, model_bytes(load_pretrained("0.3.0")))
    table = str(tmp_path / "table.csv")
    said = mbqueue("predict", str(project.root / "few.jsonl"), str(model), "--output", table, "--device", "cpu")
    assert said.code == 0
    assert "models were trained on most of these crystals" in said.out
    assert "results.json" in said.out


def test_columns_can_be_named_and_are_printed(
    mbqueue: Command, project: ProjectFolder, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [json.loads(line) for line in gzip.decompress(SAMPLE_FILE.read_bytes()).splitlines()[:6]]
    named = [{"id": 0, "name": row["id"], "structure": row["structure"], "e_form": 9, "E f": -1.5} for row in rows]
    (project.root / "mine.json").write_text(json.dumps(named))
    said = mbqueue("prepare", "mine.json", "--id-column", "name", "--target-column", "E f")
    assert (said.code, said.out.startswith("6 crystals")) == (0, True)
    assert "target: E f, 6 values from −1.5 to −1.5 (not e_form; choose with --target-column); id: name" in caplog.text
    wrong = mbqueue("prepare", "mine.json", "--id-column", "name", "--target-column", "E_f")
    assert (wrong.code, "No row of" in wrong.err, "has E_f" in wrong.err) == (USAGE, True, True)


def test_the_commands_for_a_property_of_your_own_prepare_a_csv_as_the_page_says(
    mbqueue: Command, project: ProjectFolder
) -> None:
    page = (ROOT / "docs/how-to/targets.md").read_text()
    enqueue_one, enqueue_seeds = re.findall(
        r"^    mbqueue (enqueue scalar_head --name.*|enqueue .* --seeds.*)$", page, re.M
    )
    crystals = load("sample", limit=12).crystals
    (project.root / "data").mkdir()
    with (project.root / "data/mine.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["id", "cif", "gap"])
        table.writerows([crystals.ids[row], crystals.structure(row).to(fmt="cif"), row / 10] for row in range(12))
    said = mbqueue(*shlex.split(enqueue_one))
    assert (said.code, "Target: band gap (eV), of kind scalar" in " ".join((said.out + said.err).split())) == (0, True)
    assert mbqueue("work", "--device", "cpu", "--max-jobs", "1").code == MORE_TO_DO
    assert json.loads(mbqueue("status", "--json").out)["experiments"][0]["jobs"]["committed"] == 1
    file = (project.jobs_dir / "scalar_head.toml").read_text().replace("matbench_log_kvrh", "data/mine.csv")
    file += '[target]\nname = "band gap"\nunit = "eV"\nkind = "scalar"\ncolumn = "gap"\n'
    (project.jobs_dir / "mine.toml").write_text(file)
    assert re.findall(r"mine\.seed\d: enqueued", mbqueue(*shlex.split(enqueue_seeds)).out) == [
        f"mine.seed{seed}: enqueued" for seed in range(3)
    ]


def test_enqueueing_the_head_for_energies_for_another_target_names_the_one_that_fits(mbqueue: Command) -> None:
    said = mbqueue("enqueue", "head_finetune", "--dataset", "matbench_mp_gap", "--name", "gap")
    assert "For a target of kind scalar, use scalar_head instead." in " ".join(said.err.split())
    assert "instead" not in mbqueue("enqueue", "head_finetune").err


def test_predict_accepts_missing_targets_and_drops_unusable_entries(
    mbqueue: Command, project: ProjectFolder, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in gzip.decompress(SAMPLE_FILE.read_bytes()).splitlines()[:3]]
    for row, missing in zip(rows, (None, "N/A", float("nan")), strict=True):
        row["e_form"] = missing
    path = tmp_path / "new.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {"id": "empty", "structure": {}}])))
    model = tmp_path / "model_fold_0.pth"
    write_bytes(model, model_bytes(load_pretrained("0.3.0")))
    call = ("predict", str(path), str(model), "--output", str(tmp_path / "table.csv"), "--device", "cpu")
    refused = mbqueue(*call)
    assert (refused.code, "--drop-invalid of enqueue, prepare or predict" in refused.err) == (FAILURE, True)
    said = mbqueue(*call, "--drop-invalid")
    assert (said.code, len((tmp_path / "table.csv").read_text().splitlines())) == (0, 4)
    assert "dropped empty: the structure is not in pymatgen's format" in said.err


def test_predict_names_a_missing_model_once(mbqueue: Command, tmp_path: Path) -> None:
    said = mbqueue("predict", "sample", str(tmp_path / "model.pth"))
    assert said.code == USAGE
    assert f"There is no model file {tmp_path / 'model.pth'}." in said.err.replace("\n", " ")
    assert "because" not in said.err


def test_predict_refuses_a_file_that_is_no_model(mbqueue: Command, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(b"not a model")
    said = mbqueue("predict", "sample", str(tmp_path / "model.pth"))
    assert said.code == FAILURE
    assert "model.pth" in said.err


@pytest.mark.parametrize("command", ["report", "export"])
def test_missing_results_are_an_error_with_advice(mbqueue: Command, command: str) -> None:
    said = mbqueue(command, "full_finetune")
    assert said.code == FAILURE
    assert "mbqueue status" in said.err


def test_compare_needs_two_experiments(mbqueue: Command) -> None:
    said = mbqueue("compare", "full_finetune")
    assert said.code == USAGE
    assert "two experiments" in said.err
