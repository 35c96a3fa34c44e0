"""Reading tables: the choice of columns, rows that do not fit the header, and the layouts that programs write."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import ase.db
import ase.io
import monty.serialization
import numpy as np
import pandas as pd
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from pymatgen.core import Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor

from mbqueue.data import json_stream, json_values
from mbqueue.data.datasets import check_dataset, load
from mbqueue.errors import DataError, InvalidCrystals, UsageError
from mbqueue.experiment import DataSpec, Spec
from mbqueue.task import FORMATION_ENERGY, Target
from tests.data.crystal_making import SALT, entry

MAGNESIA = Structure(Lattice.cubic(2.7), ["Mg", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
IRON = Structure(Lattice.cubic(2.8), ["Fe"], [[0, 0, 0]])
CRYSTALS = {"mp-1": SALT, "mp-2": MAGNESIA, "mp-3": IRON}
TARGETS = [-2.125, -1.5, 0.25]


def reasons(caught: pytest.ExceptionInfo[InvalidCrystals]) -> dict[str, str]:
    return dict(caught.value.offenders)


def in_column(name: str):
    return replace(FORMATION_ENERGY.target, column=name)


def write_csv(path, heading: str, *rows: list[str]) -> str:
    with path.open("w", newline="") as stream:
        stream.write(heading + "\n")
        csv.writer(stream).writerows(rows)
    return str(path)


def assert_all_three(data, *, ids: list[str], targets: list[float] = TARGETS) -> None:
    assert data.crystals.ids == ids
    np.testing.assert_array_equal(data.crystals.targets, targets)
    assert data.crystals.compositions() == ["NaCl", "MgO", "Fe"]


# ---- rows with the wrong number of cells; repeated column names; repeated keys


CIF = SALT.to(fmt="cif")


def test_a_row_with_more_or_fewer_cells_than_the_heading_is_refused_by_its_number(tmp_path):
    quoted = '"' + CIF.replace('"', '""') + '"'
    lines = ["id,cif,e_form", f"a,{quoted},-2,1", f"b,{quoted}", f"c,{quoted},-1.9", f"d,{quoted},1,2,3"]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path / "t.csv"))
    found = reasons(caught)
    assert list(found) == ["row 1", "row 2", "row 4"]
    assert found["row 1"].startswith("the row has 4 cells, but the header has 3; write numbers with a decimal point")
    kept = load(str(tmp_path / "t.csv"), drop_invalid=True).crystals
    assert (kept.ids, kept.targets.tolist()) == (["c"], [-1.9])


def test_a_decimal_comma_in_id_prop_is_refused_and_is_no_other_number(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.cif").write_text(CIF)
    (tmp_path / "id_prop.csv").write_text('a,-2,1\nb,-1.5\nc,"-1,5"\n')
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path))
    found = reasons(caught)
    assert found["row 1"].startswith("the row has 3 cells, but a file without a header may have only 2")
    assert found["c"].startswith("the target '-1,5' is not a number")
    assert list(found) == ["row 1", "c"]


def test_id_prop_may_have_further_columns_when_a_heading_names_them(tmp_path):
    for name, crystal in CRYSTALS.items():
        crystal.to(filename=str(tmp_path / f"{name}.cif"))
    rows = "\n".join(f"{target},{name},x" for name, target in zip(CRYSTALS, TARGETS, strict=True))
    (tmp_path / "id_prop.csv").write_text("e_form,id,note\n" + rows)
    assert_all_three(load(str(tmp_path)), ids=list(CRYSTALS))
    (tmp_path / "id_prop.csv").write_text(rows)
    with pytest.raises(InvalidCrystals, match="may have only 2"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("heading", "twice"),
    [("id,cif,e_form,e_form", "e_form"), ("id, id,cif,e_form", "id"), ("id,cif,e_form,,", "without a name")],
)
def test_a_repeated_heading_is_refused(tmp_path, heading, twice):
    path = write_csv(tmp_path / "t.csv", heading, ["a", CIF, "-1", "-2"])
    with pytest.raises(DataError, match=rf"has more than one column {twice}\. Rename or remove one"):
        load(path)


def test_a_repeated_column_in_a_json_table_is_refused(tmp_path):
    content = {"index": [0], "columns": ["structure", "e_form", "e_form"], "data": [[SALT.as_dict(), 1, 2]]}
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="has more than one column e_form"):
        load(str(tmp_path / "t.json"))


ROW = f'"id": "a", "structure": {json.dumps(SALT.as_dict())}, "e_form"'
TWICE = f'{{{ROW}: -2.1, "e_form": 5.1}}'


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("a list", f"[{TWICE}]", "e_form"),
        ("rows by id", f'{{"a": {TWICE}}}', "e_form"),
        ("ids twice", f'{{"a": {{{ROW}: 1}}, "b": {{{ROW}: 1}}, "a": {{{ROW}: 2}}}}', "a"),
        ("frames by material", f'{{"mp-1": {{"a": {{{ROW}: 1}}, "a": {{{ROW}: 2}}}}}}', "a"),
        ("columns", '{"structure": [], "e_form": [1], "e_form": [2]}', "e_form"),
        (
            "cells by index",
            f'{{"structure": {{"0": {json.dumps(SALT.as_dict())}}}, "e_form": {{"0": 1, "0": 2}}}}',
            "0",
        ),
        (
            "split",
            '{"index": [0], "columns": ["structure", "e_form"], "data": [[{"sites": 1, "sites": 2}, 1]]}',
            "sites",
        ),
        ("a frame of monty", json.dumps({"@module": "pandas", "data": f"[{TWICE}]"}), "e_form"),
        ("a key with an escape", "[" + TWICE.replace('"e_form": 5.1', r'"\u0065_form": 5.1') + "]", "e_form"),
        ("with NaN", f"[{TWICE}]".replace("5.1", "NaN"), "e_form"),
    ],
)
def test_an_object_with_one_key_twice_is_refused_in_every_shape_of_json(tmp_path, name, content, key):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError, match=rf"t\.json cannot be read: the key '{key}' appears twice in .*; remove one of"):
        load(str(tmp_path / "t.json"))


def test_a_line_with_one_key_twice_is_refused_by_its_number_and_a_structure_by_its_id(tmp_path):
    text = json.dumps(SALT.as_dict()).replace('"abc"', '"abc": [0, 0, 0], "abc"', 1)
    lines = [json.dumps(entry(name="fine")), TWICE, json.dumps(entry(name="inner") | {"structure": text})]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path / "t.jsonl"))
    assert reasons(caught) == {
        "line 2": "the key 'e_form' appears twice in one object; remove one of the two",
        "inner": "in the structure, the key 'abc' appears twice in one object; remove one of the two",
    }


@pytest.mark.parametrize("indent", [None, 1])
def test_the_same_keys_in_different_objects_and_in_texts_are_no_repetition(indent):
    value = {"a": {"a": 1, "b": [{"a": 2}, {"a": 2}]}, "b": '"a": 1, {"a": 1', "": {"": 0}} | {
        f"{n}": n for n in range(999)
    }
    text = json.dumps(value, indent=indent).encode()
    assert json_values.parse_json(text) == value
    assert not json_values._may_repeat_a_key(np.frombuffer(text, np.uint8)), "it would be parsed twice"


# ---- all rows use the same columns


def test_a_missing_target_is_not_filled_from_another_column(tmp_path):
    path = write_csv(tmp_path / "t.csv", "id,cif,e_form,target", ["a", CIF, "-2.1", "5.1"], ["b", CIF, "", "5.2"])
    with pytest.raises(InvalidCrystals) as caught:
        load(path)
    assert reasons(caught) == {"b": "the target is missing"}
    assert "The columns were: target: e_form, 1 value from −2.1 to −2.1 (not target;" in str(caught.value)
    kept = load(path, drop_invalid=True)
    assert kept.crystals.targets.tolist() == [-2.1]
    assert kept.columns.startswith(
        "target: e_form, 1 value from −2.1 to −2.1 (not target; choose with --target-column)"
    )


@pytest.mark.parametrize("form", ["t.jsonl", "t.json"])
def test_rows_without_a_heading_have_one_column_for_all_too(tmp_path, form):
    rows = [entry(name="a", target=-2.1) | {"target": 5.1}, entry(name="b", target=None) | {"target": 5.2}]
    (tmp_path / form).write_text("\n".join(map(json.dumps, rows)) if form == "t.jsonl" else json.dumps(rows))
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path / form))
    assert reasons(caught) == {"b": "the target is missing"}


def test_ids_are_of_one_column_too(tmp_path):
    rows = [entry(name="a") | {"material_id": "mp-1"}, {**entry(), "id": None, "material_id": "mp-2"}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path / "t.json"))
    assert reasons(caught) == {"row 1": "there is no id in column id"}


@pytest.mark.parametrize("form", ["t.csv", "t.jsonl", "t.json"])
def test_columns_can_be_named(tmp_path, form):
    rows = [
        {
            "id": 0,
            "name": name,
            "cif": crystal.to(fmt="cif"),
            "structure": crystal.as_dict(),
            "e_form": 9,
            "E f": target,
        }
        for (name, crystal), target in zip(CRYSTALS.items(), TARGETS, strict=True)
    ]
    path = tmp_path / form
    if form == "t.csv":
        write_csv(path, "id,name,cif,e_form,E f", *([r["id"], r["name"], r["cif"], 9, r["E f"]] for r in rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if form == "t.jsonl" else json.dumps(rows))
    data = load(str(path), id_column="name", target=in_column("E f"))
    assert_all_three(data, ids=list(CRYSTALS))
    assert data.columns.startswith(
        "target: E f, 3 values from −2.125 to 0.25 (not e_form; choose with --target-column)"
    )
    assert "id: name" in data.columns
    for wrong in ({"id_column": "nom"}, {"target": in_column("nom")}):
        with pytest.raises(DataError, match=r"nom, which you named as the (id|target) column. .*, e_form, E f"):
            load(str(path), targets_required=False, **wrong)


@pytest.mark.parametrize("kind", ["scalar", "class"])
def test_a_target_that_is_no_energy_is_never_read_from_a_column_of_energies(tmp_path, kind):
    gap = Target(name="gap", unit="", kind=kind)
    (tmp_path / "t.jsonl").write_text(json.dumps(entry(target=1)))
    with pytest.raises(DataError, match=r"No row of .* has target\. The rows have: .*e_form.* Rename a column"):
        load(str(tmp_path / "t.jsonl"), target=gap)
    (tmp_path / "t.jsonl").write_text(json.dumps(entry(target=9) | {"target": 1}))
    assert load(str(tmp_path / "t.jsonl"), target=gap).crystals.targets.tolist() == [1]


def test_a_spec_without_a_column_of_ids_keeps_the_hash_of_earlier_versions():
    content = Spec(name="a", data=DataSpec(dataset="x.csv")).to_json()
    from mbqueue.experiment import hash_of_spec

    older = {**content, "data": {key: value for key, value in content["data"].items() if key != "id_column"}}
    assert hash_of_spec(content) == hash_of_spec(older)
    assert Spec(name="a", data=DataSpec(dataset="x.csv", id_column="name")).hash != hash_of_spec(older)


# ---- missing targets and ids


MISSING = [None, math.nan, "", " ", "nan", "NaN", "N/A", "n/a", "NA", "null", "NULL", "None", "<NA>"]


@pytest.mark.parametrize("value", MISSING, ids=repr)
@pytest.mark.parametrize("form", ["t.jsonl", "t.json", "t.csv"])
def test_a_missing_target_is_the_same_however_it_is_written(tmp_path, form, value):
    rows = [entry(name="a", target=-1.5), entry(name="b", target=value)]
    path = tmp_path / form
    if form == "t.csv":
        write_csv(path, "id,cif,e_form", ["a", CIF, "-1.5"], ["b", CIF, "" if value is None else str(value)])
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if form == "t.jsonl" else json.dumps(rows))
    with pytest.raises(InvalidCrystals) as caught:
        load(str(path))
    assert reasons(caught) == {"b": "the target is missing"}
    crystals = load(str(path), targets_required=False).crystals
    assert crystals.ids == ["a", "b"]
    assert crystals.targets[0] == -1.5
    assert np.isnan(crystals.targets[1])


def test_ids_that_differ_only_in_blanks_are_refused(tmp_path):
    rows = [entry(name="mp-1"), entry(name="mp-1 "), entry(name="\u00a0mp-1"), entry(name="mp-2")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path / "t.jsonl"))
    assert reasons(caught) == dict.fromkeys(["mp-1 ", "\u00a0mp-1"], "the id differs from 'mp-1' only in whitespace")


def test_ids_that_differ_only_in_the_kind_of_their_blanks_are_refused(tmp_path):
    rows = [entry(name="mp 1"), entry(name="mp\u00a01"), entry(name="mp  1")]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path / "t.jsonl"))
    assert reasons(caught) == dict.fromkeys(["mp\u00a01", "mp  1"], "the id differs from 'mp 1' only in whitespace")


@pytest.mark.parametrize(
    "name",
    [
        f"a{c}b"
        for c in "\r\n\t\x00\x1b\x85\u2028\u2029\u200b\u200d\u2060\u2065\u2800\u3164\ufe0f\ufeff\U000e0041"
        "\xad\u0600\u06dd\u070f\u180e\u08e2\ue000\uf8ff\ufff0\ufff9\ufffe\U0001d173\U0001bca0\U00013430\U0001d159"
        "\U00016fe4\U000110bd\U000e0100\U000f0000"
    ],
)
def test_an_id_with_a_control_or_invisible_character_is_refused_and_shown(tmp_path, name):
    (tmp_path / "t.jsonl").write_text(json.dumps(entry(name=name)))
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path / "t.jsonl"))
    ((shown, reason),) = caught.value.offenders
    assert shown == name.encode("unicode_escape").decode()
    assert reason == "the id has control characters, invisible characters, or characters that cannot be saved to a file"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("\u00e9-1", "e\u0301-1"),
        ("\u212b-1", "\u00c5-1"),
        ("\u2126 1", "\u03a9\u00a01"),
        ("\uac00", "\u1100\u1161"),
        ("a\u0323\u0307", "a\u0307\u0323"),
    ],
)
def test_ids_that_are_one_text_in_two_forms_of_unicode_are_refused_with_both_named(tmp_path, first, second):
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(entry(name=name)) for name in (first, second, "a")))
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path / "t.jsonl"))
    told = f"the id {second!a} is the same text as the id {first!a}, in a different Unicode form"
    assert reasons(caught) == {second: told}
    assert load(str(tmp_path / "t.jsonl"), drop_invalid=True).crystals.ids == [first, "a"]


def test_visible_characters_of_any_script_are_kept_in_ids(tmp_path):
    names = [
        "Fe₂O₃",
        "α-Al2O3",
        "硅",
        "Ünü",
        "a\u0301",
        "mp-1 ~!",
        "a\u00a0b",
        "\u05e9\u05c1",
        "क्ष",
        "−1°",
        "\U0001f9ca",
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(entry(name=name)) for name in names))
    assert load(str(tmp_path / "t.jsonl")).crystals.ids == names


@pytest.mark.parametrize("form", ["t.json", "t.jsonl"])
@pytest.mark.parametrize("written", ["1e2", "0.10", "true", "123456789012345678901234567890", "[1]"])
def test_an_id_that_would_not_keep_its_text_is_refused(tmp_path, form, written):
    row = json.dumps(entry(name="ID")).replace('"ID"', written)
    (tmp_path / form).write_text(f"[{row}]" if form == "t.json" else row)
    with pytest.raises(InvalidCrystals, match="write ids as text"):
        load(str(tmp_path / form))


@pytest.mark.parametrize("second", ["salt.cif", "./salt", "link"])
def test_one_file_under_two_ids_is_refused(tmp_path, second):
    (tmp_path / "salt.cif").write_text(CIF)
    (tmp_path / "link.cif").symlink_to("salt.cif")
    (tmp_path / "id_prop.csv").write_text(f"salt,-1\n{second},-2\n")
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path))
    assert list(reasons(caught)) == [second]
    assert reasons(caught)[second].endswith("also belongs to the id salt")


def test_ids_of_id_prop_keep_their_blanks_as_in_other_tables_and_name_the_file_exactly(tmp_path):
    for name in ("a", "b ", " c", "d e"):
        (tmp_path / f"{name}.cif").write_text(CIF)
    (tmp_path / "id_prop.csv").write_text("a, -1 \nb ,-2\n c,-3\nd e,-4\n")
    crystals = load(str(tmp_path)).crystals
    assert crystals.ids == ["a", "b ", " c", "d e"]
    assert crystals.targets.tolist() == [-1, -2, -3, -4]
    write_csv(tmp_path / "t.csv", "id,cif,e_form", *([name, CIF, "-1"] for name in crystals.ids))
    assert load(str(tmp_path / "t.csv")).crystals.ids == crystals.ids


@pytest.mark.parametrize("heading", ["", "id,e_form\n"])
@pytest.mark.parametrize("name", ["a ", " a", "\ta", "a\u00a0"])
def test_an_id_of_id_prop_with_blanks_around_it_is_no_other_files_id(tmp_path, name, heading):
    (tmp_path / "a.cif").write_text(CIF)
    (tmp_path / "id_prop.csv").write_text(f"{heading}{name},-1\n")
    with pytest.raises(
        InvalidCrystals, match=r"there is no file .*\.cif .*; remove the blanks around the id\n"
    ) as caught:
        load(str(tmp_path))
    assert len(caught.value.offenders) == 1
    (tmp_path / "id_prop.csv").write_text(f"{heading}a,-1\n{name},-2\n")
    (tmp_path / f"{name}.cif").write_text(CIF)
    with pytest.raises(InvalidCrystals, match="the id differs from 'a' only in whitespace"):
        load(str(tmp_path))


def test_two_files_for_one_id_are_refused(tmp_path):
    (tmp_path / "salt.cif").write_text(CIF)
    (tmp_path / "salt.vasp").write_text(SALT.to(fmt="poscar"))
    (tmp_path / "id_prop.csv").write_text("salt,-1\n")
    with pytest.raises(InvalidCrystals, match=r"several files belong to this id: salt\.cif, salt\.vasp"):
        load(str(tmp_path))


# ---- shapes


def frame(structures) -> pd.DataFrame:
    return pd.DataFrame(
        {"material_id": list(CRYSTALS), "structure": structures, "note": ["a", "b", "c"], "e_form": TARGETS},
        index=[10, 20, 30],
    )


@pytest.mark.parametrize("orient", ["split", "records", "index", "columns", "table"])
@pytest.mark.parametrize("as_text", [False, True])
def test_json_of_pandas_is_read_in_every_orient(tmp_path, orient, as_text):
    table = frame([crystal.to_json() if as_text else crystal.as_dict() for crystal in CRYSTALS.values()])
    table.to_json(tmp_path / "t.json", orient=orient)
    assert_all_three(load(str(tmp_path / "t.json")), ids=list(CRYSTALS))


#: pandas' `orient` → where mbqueue finds the ids of a table that has no id column.
NAMED_BY = {"split": "the index", "index": "the key", "columns": "the index", "table": "the index"}


@pytest.mark.parametrize("index", [[10, 20, 30], list(CRYSTALS), ["007", "1e5", "T"], [2, 1, 0]], ids=str)
@pytest.mark.parametrize("orient", [*NAMED_BY, "records", "values"])
def test_without_a_column_of_ids_the_index_names_the_rows(tmp_path, orient, index):
    table = frame([crystal.as_dict() for crystal in CRYSTALS.values()]).drop(columns=["material_id", "note"])
    table.set_index(pd.Index(index)).to_json(tmp_path / "t.json", orient=orient)
    data = load(str(tmp_path / "t.json"))
    assert_all_three(data, ids=[str(name) for name in (index if orient in NAMED_BY else range(3))])
    assert f"; id: {NAMED_BY.get(orient, 'the position')};" in data.columns


@pytest.mark.parametrize("schema_last", [False, True])
def test_the_index_of_a_pandas_table_is_its_primary_key_unless_a_column_of_ids_is_there_or_named(tmp_path, schema_last):
    table = frame([crystal.as_dict() for crystal in CRYSTALS.values()]).set_index(pd.Index(["x", "y", "z"], name="mp"))
    content = json.loads(table.to_json(orient="table"))
    without = json.loads(table.drop(columns="material_id").to_json(orient="table"))
    for name, one in (("with.json", content), ("without.json", without)):
        keys = reversed(one) if schema_last else one
        (tmp_path / name).write_text(json.dumps({key: one[key] for key in keys}))
    assert_all_three(load(str(tmp_path / "with.json")), ids=list(CRYSTALS))
    assert_all_three(load(str(tmp_path / "with.json"), id_column="mp"), ids=["x", "y", "z"])
    data = load(str(tmp_path / "without.json"))
    assert_all_three(data, ids=["x", "y", "z"])
    assert "; id: the index mp;" in data.columns


@pytest.mark.parametrize("orient", ["split", "table"])
@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (["a", "b", "a"], "the id occurs twice"),
        (["a", None, "b"], "there is no id in the index"),
        ([0.5, 1e20, 1.0], "the id was read as float"),
        (["a", "a\u200b", "b"], "invisible characters"),
    ],
    ids=str,
)
def test_an_index_that_names_no_rows_is_refused(tmp_path, orient, index, reason):
    table = frame([crystal.as_dict() for crystal in CRYSTALS.values()]).drop(columns="material_id")
    table.set_index(pd.Index(index)).to_json(tmp_path / "t.json", orient=orient)
    with pytest.raises(InvalidCrystals, match=reason):
        load(str(tmp_path / "t.json"))


def test_an_index_with_several_levels_names_no_rows_and_one_of_them_can_be_named(tmp_path):
    table = frame([crystal.as_dict() for crystal in CRYSTALS.values()]).drop(columns="material_id")
    table.index = pd.MultiIndex.from_tuples([("a", 1), ("b", 1), ("c", 1)], names=["mp", "run"])
    table.to_json(tmp_path / "table.json", orient="table")
    with pytest.raises(DataError, match=r"The index of .* has 2 levels \(mp, run\)\. Name the id column with --id"):
        load(str(tmp_path / "table.json"))
    assert_all_three(load(str(tmp_path / "table.json"), id_column="mp"), ids=["a", "b", "c"])
    table.to_json(tmp_path / "split.json", orient="split")
    with pytest.raises(InvalidCrystals, match="the id was read as list"):
        load(str(tmp_path / "split.json"))


@pytest.mark.parametrize(
    "schema", [{}, {"primaryKey": 3}, {"fields": 3}, {"fields": [3, {"name": 4}]}, {"primaryKey": []}]
)
def test_a_schema_without_an_index_leaves_the_position(tmp_path, schema):
    rows = [{"structure": SALT.as_dict(), "e_form": -1.0}] * 2
    (tmp_path / "t.json").write_text(json.dumps({"schema": schema, "data": rows}))
    data = load(str(tmp_path / "t.json"))
    assert data.crystals.ids == ["0", "1"]
    assert "; id: the position;" in data.columns


def test_rows_without_names_are_recognised_by_their_content(tmp_path):
    table = frame([crystal.as_dict() for crystal in CRYSTALS.values()])
    table.drop(columns="note").to_json(tmp_path / "t.json", orient="values")
    data = load(str(tmp_path / "t.json"))
    assert_all_three(data, ids=list(CRYSTALS))
    assert "target: 2," in data.columns
    table["gap"] = 0.0
    table.to_json(tmp_path / "two.json", orient="values")
    with pytest.raises(DataError, match="the first row does not have exactly one number"):
        load(str(tmp_path / "two.json"))
    named = load(str(tmp_path / "two.json"), id_column="0", target=in_column("3"))
    assert_all_three(named, ids=list(CRYSTALS))


def test_a_frame_that_monty_wrote_is_read(tmp_path):
    monty.serialization.dumpfn(frame(list(CRYSTALS.values())), tmp_path / "t.json")
    assert_all_three(load(str(tmp_path / "t.json")), ids=list(CRYSTALS))


def test_structures_by_id_or_in_a_list_as_monty_writes_them_are_read(tmp_path):
    monty.serialization.dumpfn(CRYSTALS, tmp_path / "dict.json")
    monty.serialization.dumpfn(list(CRYSTALS.values()), tmp_path / "list.json.gz")
    monty.serialization.dumpfn(SALT, tmp_path / "one.json")
    missing = [math.nan] * 3
    by_id = load(str(tmp_path / "dict.json"), targets_required=False)
    assert_all_three(by_id, ids=list(CRYSTALS), targets=missing)
    assert "; id: the key;" in by_id.columns
    in_list = load(str(tmp_path / "list.json.gz"), targets_required=False)
    assert_all_three(in_list, ids=["0", "1", "2"], targets=missing)
    assert load(str(tmp_path / "one.json"), targets_required=False).crystals.compositions() == ["NaCl"]
    with pytest.raises(DataError, match=r"dict.json has e_form or .* The rows have: structure. Rename a column"):
        load(str(tmp_path / "dict.json"))


def chgnet_rows() -> dict:
    return {
        "structure": [crystal.as_dict() for crystal in CRYSTALS.values()],
        "uncorrected_total_energy": [-1.0, -2.0, -3.0],
        "energy_per_atom": TARGETS,
        "force": [[[0, 0, 0]] * len(crystal) for crystal in CRYSTALS.values()],
        "magmom": [None] * 3,
        "stress": [None] * 3,
    }


@pytest.mark.parametrize("structure_last", [False, True])
def test_chgnets_own_datasets_are_read(tmp_path, structure_last):
    content = chgnet_rows()
    if structure_last:
        content["structure"] = content.pop("structure")
    (tmp_path / "t.json").write_text(json.dumps(content))
    data = load(str(tmp_path / "t.json"))
    assert_all_three(data, ids=["0", "1", "2"])
    assert data.columns.startswith("target: energy_per_atom, 3 values")
    content["mp_id"] = list(CRYSTALS)
    (tmp_path / "t.json").write_text(json.dumps(content))
    assert_all_three(load(str(tmp_path / "t.json"), id_column="mp_id"), ids=list(CRYSTALS))


def test_frames_by_material_as_in_mptrj_are_read_with_the_ids_of_the_frames(tmp_path):
    rows = [
        {"structure": crystal.as_dict(), "energy_per_atom": 7.0, "ef_per_atom": target, "force": []}
        for crystal, target in zip(CRYSTALS.values(), TARGETS, strict=True)
    ]
    content = {"mp-9": {"mp-9-0-0": rows[0], "mp-9-0-1": rows[1]}, "mp-8": {"mp-8-0-0": rows[2]}}
    (tmp_path / "t.json").write_text(json.dumps(content))
    assert_all_three(load(str(tmp_path / "t.json")), ids=["mp-9-0-0", "mp-9-0-1", "mp-8-0-0"])


@pytest.mark.parametrize("form", ["t.jsonl", "t.json", "t.csv"])
@pytest.mark.parametrize("text", ["json", "cif", "poscar"])
def test_a_structure_may_be_text_in_a_column(tmp_path, form, text):
    texts = [crystal.to(fmt=text) for crystal in CRYSTALS.values()]
    rows = [
        {"id": name, "structure": content, "e_form": target}
        for name, content, target in zip(CRYSTALS, texts, TARGETS, strict=True)
    ]
    path = tmp_path / form
    if form == "t.csv":
        write_csv(path, "id,structure,e_form", *(list(row.values()) for row in rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if form == "t.jsonl" else json.dumps(rows))
    assert_all_three(load(str(path)), ids=list(CRYSTALS))


@pytest.mark.parametrize("piece", [7, 61, 1 << 22])
@pytest.mark.parametrize("orient", ["split", "index", "columns", "table"])
def test_a_table_is_the_same_in_whatever_pieces_it_is_read(tmp_path, monkeypatch, orient, piece):
    frame([crystal.as_dict() for crystal in CRYSTALS.values()]).to_json(tmp_path / "t.json", orient=orient)
    monkeypatch.setattr(json_stream, "_CHUNK", piece)
    assert_all_three(load(str(tmp_path / "t.json")), ids=list(CRYSTALS))


def test_columns_of_different_lengths_are_refused(tmp_path):
    content = chgnet_rows()
    content["energy_per_atom"] = TARGETS[:2]
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="has 3 cells in column structure, but 2 in energy_per_atom"):
        load(str(tmp_path / "t.json"))


@pytest.mark.parametrize("content", ['{"a": 1, "b": 2}', '{"a": [1], "b": 2}', '"text"', "3", "[1]"])
def test_json_that_is_not_a_table_is_refused_with_the_accepted_shapes(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError, match=r"It must be a list of objects or structures; an object that maps ids"):
        load(str(tmp_path / "t.json"))


def test_a_folder_of_poscars_is_read(tmp_path):
    for name, crystal in CRYSTALS.items():
        folder = tmp_path / "each" / name
        folder.mkdir(parents=True)
        (folder / "POSCAR").write_text(crystal.to(fmt="poscar"))
    (tmp_path / "each" / "id_prop.csv").write_text(
        "\n".join(f"{name},{target}" for name, target in zip(CRYSTALS, TARGETS, strict=True))
    )
    assert_all_three(load(str(tmp_path / "each")), ids=list(CRYSTALS))
    (tmp_path / "each" / "id_prop.csv").unlink()
    bare = load(str(tmp_path / "each"), targets_required=False)
    assert_all_three(bare, ids=list(CRYSTALS), targets=[math.nan] * 3)
    assert "; id: the name of the file;" in bare.columns
    with pytest.raises(DataError, match=r"has no id_prop\.csv"):
        check_dataset(str(tmp_path / "each"))
    flat = tmp_path / "flat"
    flat.mkdir()
    for name, crystal in CRYSTALS.items():
        (flat / f"{name}.vasp").write_text(crystal.to(fmt="poscar"))
    assert load(str(flat), targets_required=False).crystals.ids == list(CRYSTALS)


def atoms_of(name: str, target: float):
    atoms = AseAtomsAdaptor.get_atoms(CRYSTALS[name], msonable=False)
    atoms.info = {"material_id": name, "e_form": target}
    return atoms


def test_a_frame_of_xyz_that_gives_one_key_twice_is_refused(tmp_path):
    text = '1\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3 id={} e_form=-1 note="a=1 a=2" {}\nFe 0 0 0\n'
    (tmp_path / "t.extxyz").write_text(text.format("a", "") + text.format("b", "e_form=5") + text.format("c", ""))
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path / "t.extxyz"))
    assert reasons(caught) == {"b": "the comment line has the key e_form twice; remove one of the two"}


XYZ_FRAME = '1\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3 {}\nFe 0 0 0\n'

#: The text after `id=` in the comment line → the id that mbqueue reads.
XYZ_IDS = {
    "007": "007",
    "1e5": "1e5",
    "T": "T",
    "true": "true",
    "1_000": "1_000",
    "0x1F": "0x1F",
    "1.0": "1.0",
    "-0": "-0",
    "1,2": "1,2",
    "a=b": "a=b",
    "12345678901234567890123": "12345678901234567890123",
    '"007"': "007",
    "'1e5'": "1e5",
    '"1 2"': "1 2",
    '" T "': " T ",
    r'"a\"b"': 'a"b',
    '"[1]"': "[1]",
}


@pytest.mark.parametrize("key", ["id", "uid", "my_name", '"my name"'])
def test_ids_of_extended_xyz_are_the_text_of_the_comment_line(tmp_path, key):
    column = "" if key == "id" else key.strip('"')
    for written, name in XYZ_IDS.items():
        comments = [f"{key}=first e_form=-1", f'{key}={written} note="id=5" e_form=-1', f"e_form=-1 {key} = 7e0"]
        (tmp_path / "t.extxyz").write_text("".join(map(XYZ_FRAME.format, comments)))
        assert load(str(tmp_path / "t.extxyz"), id_column=column).crystals.ids == ["first", name, "7e0"]


@pytest.mark.parametrize("name", ["007", "1e5", "T", "a b", 'a"b', "{a}", "[a]", "a,b", "é", "1_0", "_JSON"])
def test_ids_that_ase_writes_to_extended_xyz_are_read_back(tmp_path, name):
    frames = [atoms_of("mp-3", -1.0), atoms_of("mp-3", -2.0)]
    frames[1].info["material_id"] = name
    ase.io.write(tmp_path / "t.extxyz", frames, format="extxyz")
    assert load(str(tmp_path / "t.extxyz")).crystals.ids == ["mp-3", name]


@pytest.mark.parametrize(
    ("comment", "reason"),
    [
        (r"id=a\b", r"programs read the id a\b in different ways; write it in double quotes"),
        (r'id="a\\b"', "in different ways"),
        (r'id="a\nb"', "in different ways"),
        ("id=[7]", "in different ways"),
        ("id={a b}", "in different ways"),
        ('id=a"b c"d', "in different ways"),
        ("id=a\u00a0b", "in different ways"),
        ('id="_JSON [1]"', "in different ways"),
        ("id", "the crystal has no id"),
        ("note=it's id=7", "the comment line does not close '"),
        ('id="7', 'the comment line does not close "'),
        ("id=7 id=8", "the comment line has the key id twice"),
    ],
)
def test_an_id_of_extended_xyz_that_programs_read_differently_is_refused(tmp_path, comment, reason):
    frames = ["id=first e_form=-1", f"e_form=-1 {comment}", "id=last e_form=-1"]
    (tmp_path / "t.extxyz").write_text("".join(map(XYZ_FRAME.format, frames)))
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path / "t.extxyz"))
    ((_, told),) = caught.value.offenders
    assert reason in told
    assert load(str(tmp_path / "t.extxyz"), drop_invalid=True).crystals.ids == ["first", "last"]


def test_a_target_of_extended_xyz_is_the_text_of_the_comment_line(tmp_path):
    frames = ["id=a e_form=-1.5", "id=b e_form=1_0", 'id=c e_form="0.25"']
    (tmp_path / "t.extxyz").write_text("".join(map(XYZ_FRAME.format, frames)))
    with pytest.raises(InvalidCrystals, match="the target '1_0' is not a number"):
        load(str(tmp_path / "t.extxyz"))
    assert load(str(tmp_path / "t.extxyz"), drop_invalid=True).crystals.targets.tolist() == [-1.5, 0.25]


@pytest.mark.parametrize("form", ["t.extxyz", "t.json"])
def test_ids_that_begin_after_the_first_rows_are_refused(tmp_path, form):
    frames = "".join(map(XYZ_FRAME.format, ["e_form=-1", "id=7 e_form=-1"]))
    rows = [{"structure": SALT.as_dict(), "e_form": -1}, entry(name="7")]
    (tmp_path / form).write_text(frames if form == "t.extxyz" else json.dumps(rows))
    with pytest.raises(DataError, match=r"The first rows have no id, but a later row has the id '?7'?\. Add"):
        load(str(tmp_path / form))


@pytest.mark.parametrize("form", ["t.extxyz", "t.xyz"])
def test_extended_xyz_is_read(tmp_path, form):
    frames = [atoms_of(name, target) for name, target in zip(CRYSTALS, TARGETS, strict=True)]
    frames[0].calc = SinglePointCalculator(frames[0], energy=-7.0)
    ase.io.write(tmp_path / form, frames, format="extxyz")
    data = load(str(tmp_path / form))
    assert_all_three(data, ids=list(CRYSTALS))
    assert "id: material_id" in data.columns
    np.testing.assert_allclose(data.crystals.lattices[1], MAGNESIA.lattice.matrix, atol=1e-8)
    np.testing.assert_allclose(data.crystals.frac_coords[2:4], MAGNESIA.frac_coords, atol=1e-8)


def test_a_database_of_ase_is_read(tmp_path):
    with ase.db.connect(tmp_path / "t.db") as database:
        for name, target in zip(CRYSTALS, TARGETS, strict=True):
            atoms = atoms_of(name, target)
            database.write(atoms, key_value_pairs=atoms.info)
            atoms.info = {}
    told = []
    data = load(str(tmp_path / "t.db"), progress=lambda done, total: told.append((done, total)))
    assert_all_three(data, ids=list(CRYSTALS))
    assert told == [(1, 3), (2, 3), (3, 3)]
    with ase.db.connect(tmp_path / "bare.db") as database:
        database.write(atoms_of("mp-1", 0), e_form=-1.0)
    bare = load(str(tmp_path / "bare.db"))
    assert bare.crystals.ids == ["1"]
    assert "; id: the row number in the database;" in bare.columns


def test_molecules_in_xyz_and_files_that_ase_cannot_read_are_refused(tmp_path):
    (tmp_path / "m.xyz").write_text("2\nid=water e_form=1.0\nO 0 0 0\nH 0 0 1\n")
    with pytest.raises(InvalidCrystals, match="water: the structure is not periodic in all three directions"):
        load(str(tmp_path / "m.xyz"))
    (tmp_path / "bad.extxyz").write_text("1\nno frame\nO 0 0 a\n")
    with pytest.raises(DataError, match=r"bad\.extxyz cannot be read after row 0: ase says"):
        load(str(tmp_path / "bad.extxyz"))
    (tmp_path / "bad.db").write_text("this is no database of ase")
    with pytest.raises(DataError, match=r"bad\.db cannot be read after row 0: ase says"):
        load(str(tmp_path / "bad.db"))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_empty_line_at_which_ase_would_stop_is_refused(tmp_path, at):
    frames = [XYZ_FRAME.format(f"id=c{number} e_form=-1") for number in range(3)]
    (tmp_path / "t.extxyz").write_text("".join([*frames, "\n \n"]))
    assert load(str(tmp_path / "t.extxyz")).crystals.ids == ["c0", "c1", "c2"]
    (tmp_path / "t.extxyz").write_text("".join([*frames[:at], "\n", *frames[at:]]))
    with pytest.raises(DataError, match="is empty, but more crystals follow"):
        load(str(tmp_path / "t.extxyz"))


XYZ_CELL = 'Lattice="3 0 0 0 3 0 0 0 3"'

#: For each case: extra ``Properties`` of the frame, its atom's line (line 6 of the file), and the expected error.
WRONG_ATOMS = {
    "element-in-capitals": ("", "CO 0 0 0", "line 6 has the species 'CO'; write an element's symbol"),
    "oh": ("", "HO 0 0 0", "line 6 has the species 'HO'; write"),
    "lower-case": ("", "fe 0 0 0", "line 6 has the species 'fe'; write"),
    "number-as-species": ("", "26 0 0 0", "line 6 has the species '26'; write"),
    "label": ("", "Fe1 0 0 0", "line 6 has the species 'Fe1'; write"),
    "dummy": ("", "X 0 0 0", "line 6 has the species 'X'; write"),
    "species-last": ("pos:R:3:species:S:1", "0 0 0 CO", "line 6 has the species 'CO'; write"),
    "species-by-the-name-of-ase": ("pos:R:3:symbols:S:1", "0 0 0 CO", "line 6 has the species 'CO'; write"),
    "species-between": ("forces:R:3:species:S:1:pos:R:3", "1 2 3 Co1 0 0 0", "line 6 has the species 'Co1'; write"),
    "z-with-a-fraction": ("Z:R:1:pos:R:3", "26.7 0 0 0", "line 6 has the Z '26.7'; write an atomic number"),
    "z-with-underscore": ("Z:I:1:pos:R:3", "2_6 0 0 0", "line 6 has the Z '2_6'; write"),
    "z-of-no-element": ("Z:I:1:pos:R:3", "0 0 0 0", "line 6 has the Z '0'; write"),
    "contradiction": (
        "species:S:1:Z:I:1:pos:R:3",
        "Fe 27 0 0 0",
        "line 6 has the species Fe, but the atomic number of Co",
    ),
    "contradiction-reversed": (
        "Z:I:1:pos:R:3:species:S:1",
        "27 0 0 0 Fe",
        "line 6 has the species Fe, but the atomic number of Co",
    ),
    "a-value-too-many": ("", "Fe 0 0 0 0.5", "line 6 has 5 values, but species:S:1:pos:R:3 defines 4"),
    "a-value-too-few": ("species:S:1:pos:R:3:q:R:1", "Fe 0 0 0", "line 6 has 4 values, but species:S:1:pos:R:3:q:R:1 "),
    "comment-after-the-atom": ("", "Fe 0 0 0 # iron", "line 6 has 6 values"),
    "blank": ("", "", "line 6 has 0 values"),
    "two-columns-of-species": (
        "species:S:1:symbols:S:1:pos:R:3",
        "Fe Co 0 0 0",
        "the Properties in the comment line contain species twice",
    ),
    "two-columns-of-positions": ("species:S:1:pos:R:3:positions:R:3", "Fe 0 0 0 1 1 1", "contain positions twice"),
    "species-of-two-columns": (
        "species:S:2:pos:R:3",
        "Fe Co 0 0 0",
        "the Properties in the comment line must contain species:S:1 or Z:I:1",
    ),
    "no-species": (
        "pos:R:3",
        "0 0 0",
        "the Properties in the comment line must contain species:S:1 or Z:I:1, and pos:R:3",
    ),
    "no-positions": (
        "species:S:1",
        "Fe",
        "the Properties in the comment line must contain species:S:1 or Z:I:1, and pos:R:3",
    ),
}


@pytest.mark.parametrize("name", WRONG_ATOMS)
@pytest.mark.parametrize("at", ["first", "after"])
def test_an_atom_of_xyz_that_ase_would_guess_is_refused_with_its_line(tmp_path, name, at):
    properties, line, reason = WRONG_ATOMS[name]
    given = f"Properties={properties} " if properties else ""
    wrong = f"1\n{XYZ_CELL} {given}id=odd e_form=-1\n{line}\n"
    right = XYZ_FRAME.format("id=right e_form=-1")
    if at == "first":
        reason = reason.replace("line 6", "line 3")
    (tmp_path / "t.xyz").write_text(wrong + right if at == "first" else right + wrong + right.replace("right", "last"))
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path / "t.xyz"))
    ((refused, told),) = caught.value.offenders
    assert refused == "odd"
    assert reason in told
    kept = load(str(tmp_path / "t.xyz"), drop_invalid=True).crystals
    assert kept.ids == ["right", "last"][: 1 if at == "first" else 2]


@pytest.mark.parametrize(
    ("properties", "line"),
    [
        ("", "Fe 0 0 0"),
        ("", "  Fe\t0 0 0  "),
        ("pos:R:3:species:S:1", "0 0 0 Fe"),
        ("Z:I:1:pos:R:3", "26 0 0 0"),
        ("species:S:1:Z:I:1:pos:R:3", "Fe 26 0 0 0"),
        ("pos:R:3:forces:R:3:Z:I:1:species:S:1", "0 0 0 1 2 3 26 Fe"),
    ],
)
def test_an_atom_of_xyz_has_its_columns_in_any_order(tmp_path, properties, line):
    given = f"Properties={properties} " if properties else ""
    (tmp_path / "t.xyz").write_text(f"1\n{XYZ_CELL} {given}id=a e_form=-1\n{line}\n")
    assert load(str(tmp_path / "t.xyz")).crystals.compositions() == ["Fe"]


def test_vectors_after_the_atoms_are_the_cell_of_xyz(tmp_path):
    frame = "1\nnote\nFe 0 0 0\nVEC1 3 0 0\nVEC2 0 3 0\nVEC3 0 0 3\n"
    (tmp_path / "t.xyz").write_text(frame + frame.replace("Fe", "Co"))
    data = load(str(tmp_path / "t.xyz"), targets_required=False)
    assert data.crystals.compositions() == ["Fe", "Co"]
    np.testing.assert_array_equal(data.crystals.lattices[1], np.eye(3) * 3)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_byte_order_mark_before_extended_xyz_is_no_error(tmp_path, ends):
    text = "".join(XYZ_FRAME.format(f"id=c{number} e_form=-1") for number in range(300))
    (tmp_path / "t.extxyz").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", ends).encode())
    assert load(str(tmp_path / "t.extxyz")).crystals.ids == [f"c{number}" for number in range(300)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2\nid=a e_form=-1\nFe 0 0 0\n", "after row 0: the file ends after 1 of 2 atoms announced in line 1"),
        (XYZ_FRAME.format("id=a e_form=-1") + "Fe 1 1 1\n", "line 4 must be the number of atoms, but is 'Fe 1 1 1'"),
        (XYZ_FRAME.format("id=a e_form=-1") + "-1\n", "line 4 must be the number of atoms, but is '-1'"),
        (XYZ_FRAME.format("id=\udce9 e_form=-1"), "the file is not UTF-8 text"),
    ],
)
def test_an_xyz_file_that_is_cut_short_or_miscounted_is_refused_with_its_line(tmp_path, text, reason):
    (tmp_path / "t.xyz").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError) as caught:
        load(str(tmp_path / "t.xyz"))
    assert reason in str(caught.value)
    assert "ase says" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ('id,e_form,cif\na,-1,"{cif}', "The file is cut short, or a quotation mark is not closed"),
        ('id,cif,e_form\na,"{cif}","-1"5\n', r"line \d+: .* expected after"),
        ('id,e_form,cif,note\na,-1,"{cif}","open\nb,-1,x,y\n', "a quotation mark is not closed"),
    ],
)
def test_a_csv_with_an_open_or_misplaced_quotation_mark_is_refused(tmp_path, table, reason):
    lines = SALT.to(fmt="cif").splitlines()
    cif = "\n".join(line for line in lines if "formula" not in line)
    (tmp_path / "t.csv").write_text(table.format(cif=cif))
    with pytest.raises(DataError, match=reason):
        load(str(tmp_path / "t.csv"))


@pytest.mark.parametrize("bad_line", [1, 3])
def test_a_csv_that_is_not_in_utf_8_is_refused_with_the_line(tmp_path, bad_line):
    lines = [b"id,e_form,cif,note", b"a,-1,x,y", b"b,-1,x,y", b"c,-1,x,y"]
    lines[bad_line - 1] += "é".encode("latin-1")
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=rf"t\.csv: line {bad_line} is not in UTF-8 \(.*\)\. Save the table in UTF-8\."):
        load(str(tmp_path / "t.csv"))


@pytest.mark.parametrize("name", ["b.CIF", "b.cif.gz", "b.Vasp"])
def test_a_structure_file_with_another_suffix_is_not_left_out_in_silence(tmp_path, name):
    (tmp_path / "a.cif").write_text(SALT.to(fmt="cif"))
    (tmp_path / name).write_text("anything")
    (tmp_path / "notes.txt").write_text("anything")
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path), targets_required=False)
    assert reasons(caught) == {
        name: "the file must not be compressed, and its name must end in .cif or .vasp or .poscar, in lower case"
    }


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "t.xlsx").write_text("x")
    with pytest.raises(UsageError, match=r"is unknown\. Give \.json.*\.jsonl.*\.csv.*\.extxyz, an ase \.db"):
        load(str(tmp_path / "t.xlsx"))
