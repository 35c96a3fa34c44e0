"""Commands, files and pages name only the property and unit that an experiment predicts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pymatgen.core import Lattice, Structure
from web_board import MakeBoard

from mbqueue.cli import main
from mbqueue.project import ENVIRONMENT_VARIABLE

TARGETS = {
    "scalar": {"name": "bulk modulus", "unit": "GPa", "kind": "scalar", "column": "K"},
    "class": {"name": "metallicity", "kind": "class", "column": "is_metal"},
}


def table(path: Path) -> Path:
    rows = []
    for number in range(30):
        crystal = Structure(Lattice.cubic(2.6 + 0.02 * number), [("Fe", "Cu")[number % 2]], [[0, 0, 0]])
        values = {"K": 200.0 - number, "is_metal": number % 3 == 0}
        rows.append(json.dumps({"id": str(number), "structure": crystal.as_dict(), **values}))
    path.write_text("\n".join(rows))
    return path


@pytest.mark.parametrize("kind", TARGETS)
def test_no_text_about_another_target_mentions_formation_energy_or_its_unit(
    make_board: MakeBoard,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    board = make_board()
    root = board.project.folder.root
    said: dict[str, str] = {}

    def command(*arguments: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["--project", str(root), *arguments])
        captured = capsys.readouterr()
        said[" ".join(arguments[:2])] = captured.out + captured.err
        assert not ended.value.code, captured.err

    data = table(tmp_path / "mine.jsonl")
    options = [f"target.{key}={json.dumps(value)}" for key, value in TARGETS[kind].items()]
    options += [f"data.dataset={json.dumps(str(data))}", "folds=[0, 1]"]
    set_all = [part for option in options for part in ("--set", option)]
    command("enqueue", "pretrained_infer", "--name", "plain", *set_all)
    command("enqueue", f"{kind}_head", "--name", "head", *set_all, "--set", "train.epochs=1")
    command("status")
    command("work", "--device", "cpu", "--session", "none")
    command("status", "--json")
    command("status", "head")
    command("compare", "plain", "head")
    command("report", "head")
    for page in ("overview", "experiment&name=head", "compare&name=plain&name=head"):
        said[f"board {page}"] = json.dumps(board.get(f"/part?part={page}").json)
    said["figures"] = board.get("/figures?name=head").text
    for path in root.glob("results/**/*"):
        if path.suffix in (".md", ".json", ".csv", ".html"):
            said[path.name] = path.read_text()
    assert {"RESULTS.md", "results.json", "preds_fold_0.csv", "history_fold_0.csv"} <= said.keys()
    for place, text in said.items():
        assert not wrong_words(text), place
    named = [f"enqueue {kind}_head", "status head", "board experiment&name=head", "RESULTS.md"]
    assert not [place for place in named if TARGETS[kind]["name"] not in said.get(place, "")]
    score = "ROC-AUC" if kind == "class" else "MAE"
    assert re.search(rf"test {score} 0\.\d{{4}} .*over 2 folds|test {score} \d", said["status head"]), said[
        "status head"
    ]
    assert f"Test {score}" in said["board experiment&name=head"]


def wrong_words(text: str) -> list[Any]:
    words = ("formation energ", "formation_energ", "energy per atom")
    return [unit for unit in ("eV/atom", "meV/", "(eV)", " eV ") if unit in text] + [
        word for word in words if word in text.lower()
    ]
