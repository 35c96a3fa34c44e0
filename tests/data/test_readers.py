"""Every dataset format gives the crystals that pymatgen reads from it."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure

from mbqueue.data import datasets
from mbqueue.data.crystals import Crystals
from mbqueue.data.datasets import check_columns, check_dataset, load
from mbqueue.errors import DataError, UsageError
from mbqueue.files import sha256_of_file
from mbqueue.task import FORMATION_ENERGY, TASKS
from tests.data.crystal_making import SALT, entry


def assert_same(crystals: Crystals, structures: list[Structure]) -> None:
    assert len(crystals) == len(structures)
    for row, structure in enumerate(structures):
        atoms = slice(crystals.atom_offsets[row], crystals.atom_offsets[row + 1])
        np.testing.assert_array_equal(crystals.lattices[row], structure.lattice.matrix)
        np.testing.assert_array_equal(crystals.frac_coords[atoms], structure.frac_coords)
        assert crystals.atomic_numbers[atoms].tolist() == [site.specie.Z for site in structure]


@pytest.fixture(scope="module")
def frame(sample) -> pd.DataFrame:
    rows = range(0, 100, 4)
    structures = [sample.crystals.structure(row) for row in rows]
    # Include coordinates that have many digits or lie outside the cell, and charged species.
    structures[3] = structures[3].copy().translate_sites([0], [1.234567890123456789, -3.3, 1e-17], to_unit_cell=False)
    structures[4] = structures[4].copy().add_oxidation_state_by_guess()
    return pd.DataFrame({"structure": structures, "e_form": sample.crystals.targets[list(rows)]})


@pytest.mark.parametrize("name", ["frame.json.gz", "frame.json.bz2", "frame.json"])
def test_a_file_of_matminer_gives_the_same_as_matminer(frame, tmp_path, name):
    from matminer.utils.io import load_dataframe_from_json, store_dataframe_as_json

    path = tmp_path / name
    packed = path if path.suffix != ".json" else tmp_path / "frame.json.gz"
    store_dataframe_as_json(frame, str(packed), compression=packed.suffix[1:], pbar=False)
    if packed != path:
        path.write_bytes(gzip.decompress(packed.read_bytes()))
    loaded = load_dataframe_from_json(str(path), pbar=False)
    ours = load(str(path)).crystals
    assert_same(ours, list(loaded["structure"]))
    np.testing.assert_array_equal(ours.targets, loaded["e_form"])
    assert ours.ids == [str(number) for number in range(len(frame))]


def test_members_of_the_table_may_come_in_any_order(frame, tmp_path):
    content = {
        "data": [
            [target, json.loads(s.to_json())] for s, target in zip(frame["structure"], frame["e_form"], strict=True)
        ],
        "note": {"made": ["by [hand]", 'with "brackets" } and \\'], "n": 3},
        "columns": ["e_form", "structure"],
        "index": [f"row {number}" for number in range(len(frame))],
    }
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content, indent=1))
    ours = load(str(path)).crystals
    assert_same(ours, list(frame["structure"]))
    assert ours.ids[-1] == f"row {len(frame) - 1}"


def test_a_plain_list_of_entries_is_read(frame, tmp_path):
    entries = [entry(s, f"m{number}", t) for number, (s, t) in enumerate(frame.itertuples(index=False))]
    path = tmp_path / "list.json.bz2"
    path.write_bytes(bz2.compress(json.dumps(entries).encode()))
    ours = load(str(path)).crystals
    assert_same(ours, list(frame["structure"]))
    assert ours.ids[:2] == ["m0", "m1"]


def test_rows_longer_than_the_pieces_that_a_file_is_read_in_are_whole(frame, tmp_path, monkeypatch):
    from mbqueue.data import json_stream

    path = tmp_path / "list.json"
    path.write_text(
        json.dumps([entry(s, f"m{number}", t) for number, (s, t) in enumerate(frame.itertuples(index=False))])
    )
    monkeypatch.setattr(json_stream, "_CHUNK", 77)
    assert_same(load(str(path)).crystals, list(frame["structure"]))


@pytest.mark.parametrize("packed", [True, False])
def test_json_lines_are_read(frame, tmp_path, packed):
    lines = (
        "\n".join(json.dumps(entry(s, f"m{n}", t)) for n, (s, t) in enumerate(frame.itertuples(index=False))) + "\n\n"
    )
    path = tmp_path / ("own.jsonl.gz" if packed else "own.jsonl")
    path.write_bytes(gzip.compress(lines.encode()) if packed else lines.encode())
    ours = load(path.name, project_root=tmp_path)
    assert_same(ours.crystals, list(frame["structure"]))
    np.testing.assert_array_equal(ours.crystals.targets, frame["e_form"])
    assert not ours.official


def cif_of(structure: Structure) -> str:
    return structure.to(fmt="cif")


def from_cif(text: str) -> Structure:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Structure.from_str(text, fmt="cif")


def test_a_csv_with_cifs_is_read(tmp_path):
    texts = [
        cif_of(SALT),
        cif_of(Structure(Lattice.hexagonal(3.2, 5.1), ["Mg", "Mg"], [[0, 0, 0], [1 / 3, 2 / 3, 0.5]])),
    ]
    path = tmp_path / "mp.csv"
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["material_id", "formation_energy_per_atom", "cif", "band_gap"])
        rows.writerows([[f"mp-{number}", -0.5 * number, text, 0] for number, text in enumerate(texts)])
    ours = load(str(path)).crystals
    assert_same(ours, [from_cif(text) for text in texts])
    assert ours.ids == ["mp-0", "mp-1"]
    assert ours.targets.tolist() == [0, -0.5]


def test_crystals_may_lack_targets_if_that_is_allowed(tmp_path):
    line = entry(name="new")
    del line["e_form"]
    (tmp_path / "new.jsonl").write_text(json.dumps(line))
    (tmp_path / "new.csv").write_text('id,cif\nnew,"' + cif_of(SALT).replace('"', '""') + '"\n')
    for name in ("new.jsonl", "new.csv"):
        crystals = load(name, project_root=tmp_path, targets_required=False).crystals
        assert crystals.ids == ["new"]
        assert np.isnan(crystals.targets).all()
        with pytest.raises(DataError):
            load(name, project_root=tmp_path)


def test_a_folder_of_cifs_is_read_by_the_conventions_of_cgcnn_and_alignn(tmp_path):
    (tmp_path / "id_prop.csv").write_text("salt,-1.5\nPOSCAR-2.vasp,0.25\n")
    (tmp_path / "salt.cif").write_text(cif_of(SALT))
    (tmp_path / "POSCAR-2.vasp").write_text(SALT.to(fmt="poscar"))
    (tmp_path / "atom_init.json").write_text("{}")
    told = []
    ours = load(str(tmp_path), progress=lambda done, total: told.append((done, total))).crystals
    assert ours.ids == ["salt", "POSCAR-2.vasp"]
    assert ours.targets.tolist() == [-1.5, 0.25]
    assert_same(ours, [from_cif(cif_of(SALT)), Structure.from_str(SALT.to(fmt="poscar"), fmt="poscar")])
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.dataset)
def test_the_file_of_a_task_gets_the_ids_of_matbench_and_its_own_target(frame, tmp_path, monkeypatch, task):
    from matminer.utils.io import store_dataframe_as_json

    from mbqueue.data import official

    values = frame["e_form"] > frame["e_form"].median() if task.target.is_class else frame["e_form"]
    table = frame[["structure"]].assign(decoy=1.0, **{task.target.column or "e_form": values})
    monkeypatch.setenv("MATMINER_DATA", str(tmp_path))
    file = official.official_file(task.dataset)
    assert file.path == tmp_path / f"{task.dataset}.json.gz"
    assert file.n == task.n
    store_dataframe_as_json(table, str(file.path), compression="gz", pbar=False)
    with pytest.raises(DataError, match="its SHA-256 is different"):
        load(task.dataset)
    file = replace(file, sha256=sha256_of_file(file.path))
    monkeypatch.setattr(official, "official_file", lambda _name: file)
    with pytest.raises(DataError, match=f"has 25 entries instead of {task.n}"):
        load(task.dataset)
    file = replace(file, n=len(frame))
    ours = load(task.dataset)
    assert ours.official
    assert [ours.crystals.ids[0], ours.crystals.ids[-1]] == [task.id_of(0), task.id_of(24)]
    np.testing.assert_array_equal(ours.crystals.targets, values.to_numpy().astype(float))
    assert not load(task.dataset, limit=9).official


def test_a_limit_draws_crystals_with_the_seed_and_keeps_their_order(sample):
    drawn = load("sample", limit=50, seed=1).crystals
    places = [sample.crystals.ids.index(name) for name in drawn.ids]
    assert len(drawn) == 50
    assert places == sorted(places)
    assert drawn.hash == load("sample", limit=50, seed=1).crystals.hash
    assert drawn.hash != load("sample", limit=50, seed=2).crystals.hash
    assert load("sample", limit=5000).crystals.hash == sample.crystals.hash


def test_reading_reports_its_progress(tmp_path):
    told = []
    load("sample", progress=lambda done, total: told.append((done, total)))
    size = datasets.SAMPLE_FILE.stat().st_size
    assert told[-1] == (size, size)
    assert told == sorted(told)


def test_the_sample_matches_its_notice(sample):
    crystals = sample.crystals
    assert len(crystals) == 700
    assert (crystals.n_atoms.min(), crystals.n_atoms.max()) == (1, 25)
    assert len(np.unique(crystals.atomic_numbers)) > 80
    assert crystals.targets.max() <= 2.5
    assert datasets.SAMPLE_FILE.stat().st_size < 300_000
    notice = (datasets.SAMPLE_FILE.parent / "NOTICE").read_text()
    assert "matminer 0.3.9" in notice
    assert "CC BY 4.0" in notice


def test_checking_a_data_set_imports_nothing_that_takes_time(tmp_path):
    code = (
        "import sys; from mbqueue.data.datasets import check_dataset; check_dataset('matbench_mp_e_form');"
        "print([m for m in ('torch', 'pymatgen', 'matminer', 'numba', 'pandas', 'numpy') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "heading", "target", "id_column", "message"),
    [
        ("t.csv", "id,cif,gap", "", "", r"no column e_form or .* Its columns are: id, cif, gap\. Rename a column"),
        ("t.csv", "id,cif,gap", "egap", "", "no column egap, which you named as the target column"),
        ("t.csv", "id,cif,e_form", "", "name", "no column name, which you named as the id column"),
        ("t.csv", "id,e_form", "", "", "no column cif or structure"),
        ("t.csv", "cif,e_form", "", "", "no column id or material_id"),
        ("t.csv", "id,cif,e_form,e_form", "", "", "more than one column e_form"),
        ("cifs/id_prop.csv", "id,gap", "", "", r"no column e_form or .* Its columns are: id, gap\. Rename a column"),
        ("cifs/id_prop.csv", "one,-1.5", "gap", "", "has no header, so it has no column gap"),
    ],
)
def test_checking_the_columns_of_a_table_names_the_wrong_one_as_reading_does(
    tmp_path: Path, name: str, heading: str, target: str, id_column: str, message: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{heading}\n")
    source = str(path if path.parent == tmp_path else path.parent)
    wanted = replace(FORMATION_ENERGY.target, column=target)
    with pytest.raises(DataError, match=message):
        check_columns(source, target=wanted, id_column=id_column)
    with pytest.raises(DataError, match=message):
        load(source, target=wanted, id_column=id_column)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'id,cif,e_form\n"not closed'),
        ("cifs/id_prop.csv", "one,-1.5"),
        ("t.jsonl", '{"id": "a", "structure": {}}'),
        ("t.json", '{"structure": []}'),
    ],
)
def test_checking_the_columns_accepts_wrong_rows_and_other_formats(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    check_columns(str(path if path.parent == tmp_path else path.parent), target=FORMATION_ENERGY.target)


def test_a_folder_with_the_name_of_the_sample_is_not_checked_as_its_columns(tmp_path: Path) -> None:
    (tmp_path / "sample").mkdir()
    check_columns("sample", project_root=tmp_path, target=FORMATION_ENERGY.target)


def test_checking_names_missing_files_and_unknown_formats(tmp_path: Path):
    with pytest.raises(UsageError, match="There is no dataset 'sampel'"):
        check_dataset("sampel", project_root=tmp_path)
    (tmp_path / "data.xlsx").write_text("x")
    with pytest.raises(UsageError, match=r"The format of .* is unknown"):
        check_dataset("data.xlsx", project_root=tmp_path)
    (tmp_path / "data.jsonl").touch()
    with pytest.raises(DataError, match="is empty"):
        check_dataset("data.jsonl", project_root=tmp_path)
    (tmp_path / "cifs").mkdir()
    with pytest.raises(DataError, match=r"has no id_prop\.csv"):
        check_dataset("cifs", project_root=tmp_path)
