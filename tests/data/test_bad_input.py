"""mbqueue reports all unusable entries at once with their reasons, or leaves them out with a report."""

from __future__ import annotations

import bz2
import gzip
import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import DummySpecies, Lattice, Structure

from mbqueue.data import json_stream, source
from mbqueue.data.datasets import load
from mbqueue.data.geometry import count_neighbors, examine
from mbqueue.data.graphs import convert
from mbqueue.errors import DataError, InvalidCrystals
from mbqueue.task import Target
from tests.data.crystal_making import SALT, cubic, entry


def write(path: Path, entries: list) -> str:
    path.write_text("".join(json.dumps(content) + "\n" for content in entries))
    return str(path)


def changed(**changes) -> dict:
    content = json.loads(SALT.to_json())
    for key, value in changes.items():
        place = content
        *way, last = key.split("__")
        for step in way:
            place = place[int(step) if step.isdigit() else step]
        place[int(last) if last.isdigit() else last] = value
    return content


BAD = {
    "nan-coordinate": (changed(sites__1__abc=[0.5, math.nan, 0.5]), "coordinates of atom 1 are not finite"),
    "infinite-lattice": (
        changed(lattice__matrix=[[math.inf, 0, 0], [0, 4, 0], [0, 0, 4]]),
        "lattice contains a number that is not finite",
    ),
    "flat-cell": (changed(lattice__matrix=[[4, 0, 0], [0, 4, 0], [4, 4, 0]]), "cell of 0 Å³ is too small"),
    "nearly-flat-cell": (changed(lattice__matrix=[[4, 0, 0], [0, 4, 0], [4, 4, 1e-9]]), "too small for 2 atoms"),
    "endless-needle": (changed(lattice__matrix=[[1e9, 0, 0], [0, 1e-4, 0], [0, 0, 1e-4]]), "too skewed or too thin"),
    "sheared-cell": (changed(lattice__matrix=[[1, 0, 0], [1e12, 4, 0], [0, 1e12, 4]]), "too skewed or too thin"),
    "far-away": (changed(sites__1__abc=[1e15, 0.5, 0.5]), "atoms are too far apart"),
    "unwrapped": (changed(sites__1__abc=[1000.5, 1000.5, 1000.5]), "atoms are too far apart"),
    "unwrapped-crowd": (
        Structure(cubic(30), ["Fe"] * 2000, 40 * np.random.default_rng(0).uniform(size=(2000, 3))).as_dict(),
        "atoms are too far apart",
    ),
    "empty-cube": (
        Structure(cubic(1e5), ["Fe"] * 4, [[0, 0, 0], [2e-5, 0, 0], [0.5, 0.5, 0.5], [0.50002, 0.5, 0.5]]).as_dict(),
        "atoms are too far apart",
    ),
    "needle": (
        Structure(Lattice.orthorhombic(4000, 0.02, 0.02), ["Fe"], [[0, 0, 0]]).as_dict(),
        "more than 10,000,000 bonds or angles",
    ),
    "crowd": (
        Structure(cubic(6), ["Fe"] * 12**3, np.indices((12, 12, 12)).reshape(3, -1).T / 12).as_dict(),  # 0.5 Å apart
        "more than 10,000,000 bonds or angles",
    ),
    "own-image": (
        Structure(Lattice.orthorhombic(100, 100, 0.005), ["Fe"], [[0, 0, 0]]).as_dict(),
        "atom 0 overlaps its own periodic image",
    ),
    "slab": (changed(lattice__pbc=[True, True, False]), "not periodic in all three directions"),
    "molecule": (changed(lattice__pbc=False), "not periodic in all three directions"),
    "one-place": (changed(sites__1__abc=[1.0, -1.0, 1e-9]), "atoms 0 and 1 overlap"),
    "half-occupied": (
        changed(sites__0__species=[{"element": "Na", "occu": 0.5}]),
        "disordered (Na has an occupancy of 0.5)",
    ),
    "mixed-site": (
        changed(sites__0__species=[{"element": "Na", "occu": 0.5}, {"element": "K", "occu": 0.5}]),
        "disordered (K, Na share a site)",
    ),
    "ghost": (
        json.loads(Structure(Lattice.cubic(4), [DummySpecies("Xx")], [[0, 0, 0]]).to_json()),
        "'Xx' is not an element",
    ),
    "not-an-element": (changed(sites__0__species=[{"element": "Zz", "occu": 1}]), "'Zz' is not an element"),
    "curium": (changed(sites__0__species=[{"element": "Cm", "occu": 1}]), "CHGNet does not support Cm (Z = 96"),
    "no-atoms": (changed(sites=[]), "the structure has no atoms"),
    "two-coordinates": (changed(sites__0__abc=[0, 0]), "not in pymatgen's format"),
    "no-lattice": ({"sites": []}, "not in pymatgen's format (KeyError: 'lattice')"),
    "text": ("NaCl", "the CIF cannot be used: 'NaCl' comes before the first data_ line"),
    "nothing": (None, "the structure is missing"),
    "half-a-character": (changed(sites__0__species=[{"element": "\ud800", "occu": 1}]), "is not an element"),
    "words-for-numbers": (changed(sites__0__abc=["a", 0, 0]), "not in pymatgen's format"),
    "lattice-of-two": (changed(lattice__matrix=[[1, 0], [0, 1]]), "not a 3×3 matrix"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_structure_is_refused_with_its_id_and_the_reason(tmp_path, name):
    content, reason = BAD[name]
    source = write(tmp_path / "bad.jsonl", [entry(), entry(content, name)])
    with pytest.raises(InvalidCrystals) as caught:
        load(source)
    assert [offender for offender, _ in caught.value.offenders] == [name]
    assert reason in caught.value.offenders[0][1]


def test_an_id_that_cannot_be_written_is_refused(tmp_path):
    source = write(tmp_path / "bad.jsonl", [entry(), entry(name="\ud800x")])
    with pytest.raises(InvalidCrystals) as caught:
        load(source)
    assert caught.value.offenders == (
        (
            "\\ud800x",
            "the id has control characters, invisible characters, or characters that cannot be saved to a file",
        ),
    )
    assert str(caught.value).encode()
    assert load(source, drop_invalid=True).crystals.hash


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (None, "the target is missing"),
        (math.nan, "the target is missing"),
        (-math.inf, "the target is -inf"),
        ("low", "'low' is not a number"),
        ([1], "is not a number"),
        (True, "True is not a number"),
        ("1_0", "'1_0' is not a number"),
        ("?", r"'\?' is not a number(?!; leave)"),
        ("-", "'-' is not a number(?!; leave)"),
        ("missing", "'missing' is not a number(?!; leave)"),
        (1e300, r"the target is 1e\+300, beyond ±1e\+06"),
    ],
)
def test_a_bad_target_is_refused(tmp_path, target, reason):
    with pytest.raises(InvalidCrystals, match=reason):
        load(write(tmp_path / "bad.jsonl", [entry(), entry(name="bad", target=target)]))


def test_a_cell_is_to_be_left_empty_only_where_targets_are_not_required(tmp_path):
    source = write(tmp_path / "bad.jsonl", [entry(), entry(name="bad", target="?")])
    with pytest.raises(InvalidCrystals, match=r"'\?' is not a number; leave the cell empty if there is no target"):
        load(source, targets_required=False)


IS_METAL = Target(name="metallicity", unit="", kind="class", column="is_metal")


@pytest.mark.parametrize("value", [2, 0.5, "maybe", [1], "1_0"])
def test_a_class_that_is_neither_0_nor_1_is_refused(tmp_path, value):
    rows = [{**entry(name="good"), "is_metal": True}, {**entry(name="bad"), "is_metal": value}]
    with pytest.raises(InvalidCrystals, match=r"bad: the target .* is not a class: give 0 or 1, or true or false"):
        load(write(tmp_path / "bad.jsonl", rows), target=IS_METAL)


def test_a_class_may_be_given_as_a_number_or_a_word(tmp_path):
    values = [1, 0, 1.0, 0.0, True, False, "true", "False", "1", "0"]
    rows = [{**entry(name=str(number)), "is_metal": value} for number, value in enumerate(values)]
    crystals = load(write(tmp_path / "good.jsonl", rows), target=IS_METAL).crystals
    assert crystals.targets.tolist() == [1, 0] * 5


def test_a_column_that_is_named_is_the_only_one_that_counts(tmp_path):
    rows = [{**entry(name=str(number)), "gap": number / 2} for number in range(3)]
    gap = Target(name="band gap", unit="eV", kind="scalar", column="gap")
    assert load(write(tmp_path / "two.jsonl", rows), target=gap).crystals.targets.tolist() == [0, 0.5, 1]
    with pytest.raises(DataError, match=r"bandgap|the target is missing"):
        load(str(tmp_path / "two.jsonl"), target=replace(gap, column="bandgap"))


def test_all_offenders_are_named_at_once_and_the_rest_can_be_had_without_them(tmp_path):
    entries = [entry(name="first")] + [entry(content, name) for name, (content, _) in BAD.items()]
    entries += [entry(name="first"), entry(name="last")]
    source = write(tmp_path / "bad.jsonl", entries)
    with pytest.raises(InvalidCrystals) as caught:
        load(source)
    assert [name for name, _ in caught.value.offenders] == [*BAD, "first"]
    assert caught.value.offenders[-1][1] == "the id occurs twice"
    kept = load(source, drop_invalid=True)
    assert kept.crystals.ids == ["first", "last"]
    assert kept.dropped == list(caught.value.offenders)
    np.testing.assert_array_equal(kept.crystals.targets, [-1.5, -1.5])


def test_a_data_set_of_which_nothing_is_left_is_refused(tmp_path):
    source = write(tmp_path / "bad.jsonl", [entry(BAD["flat-cell"][0])])
    with pytest.raises(DataError, match="contains no usable crystal"):
        load(source, drop_invalid=True)


def test_bonds_and_angles_are_counted_as_the_converter_finds_them(some_crystals):
    packed = convert(some_crystals)
    for row, index in enumerate(packed.index.tolist()):
        atoms = slice(*some_crystals.atom_offsets[row : row + 2])
        coords, matrix = np.array(some_crystals.frac_coords[atoms]), np.array(some_crystals.lattices[row])
        n_bonds, n_angles, overlap = count_neighbors(coords, matrix, 0.01, 1e7)
        assert packed.cutoffs[row] > 6 or (n_bonds, n_angles) == (index[1], index[4])
        assert overlap == -1
        assert examine(coords, matrix, 0.01)[4] >= max(n_bonds, n_angles)


@pytest.mark.parametrize("name", ["large", "unwrapped"])
def test_a_large_cell_and_coordinates_some_cells_away_are_read(tmp_path, name):
    large = Structure(cubic(600), ["H", "H"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    unwrapped = Structure(cubic(4), ["Na", "Cl"], [[0, 0, 0], [60.5, -60.5, 60.5]])
    content = {"large": large, "unwrapped": unwrapped}[name]
    assert len(load(write(tmp_path / "one.jsonl", [entry(content)])).crystals) == 1


def test_deuterium_and_tritium_are_hydrogen(tmp_path):
    ice = Structure(cubic(4.0), ["O", "D", "T"], [[0, 0, 0], [0.25, 0, 0], [0, 0.25, 0]])
    crystals = load(write(tmp_path / "ice.jsonl", [entry(ice)])).crystals
    assert crystals.atomic_numbers.tolist() == [8, 1, 1] == [site.specie.Z for site in ice]


def test_one_element_in_two_halves_of_a_site_is_that_element(tmp_path):
    halves = changed(sites__0__species=[{"element": "Na", "occu": 0.5}, {"element": "Na", "occu": 0.5}])
    assert load(write(tmp_path / "halves.jsonl", [entry(halves)])).crystals.atomic_numbers.tolist() == [11, 17]


def test_a_cell_of_2000_atoms_is_read(tmp_path):
    large = SALT.make_supercell([10, 10, 10], in_place=False)
    crystals = load(write(tmp_path / "large.jsonl", [entry(large)])).crystals
    np.testing.assert_array_equal(crystals.frac_coords, large.frac_coords)


def table(rows: str, *, index: str = "[0]", columns: str = '["structure", "e_form"]') -> str:
    return f'{{"index": {index}, "columns": {columns}, "data": [{rows}]}}'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("hello", "expected '{', but found 'hello'"),
        ('{"a": 1}', "'a' is 1, which is neither a structure nor an object"),
        ("[]", "contains no usable crystal"),
        ("[1, 2, 3]", "row 0 is 1, which is neither an object nor a list"),
        ("[{}, 5, null]", "row 1 is 5, which is neither an object nor a list"),
        ("[{}, null, {}]", "row 1 is None, which is neither an object nor a list"),
        ("[null, {}]", "row 0 is None"),
        ("[{} {}]", "expected ',', but found '{}]'"),
        ("[{} garbage {}]", "expected ',', but found 'garbage {}]'"),
        ("[{},, {}]", "expected a value, but found ', {}]'"),
        ("[{},]", "there is a comma before ']'"),
        ("[{}}", "expected ',', but found '}'"),
        (table("null, [{}, 1]"), "Row 0 of .* does not have one cell for each"),
        (table("[{}, 1], 7"), "Row 1 of .* does not have one cell for each"),
        (table("[{}, 1] [{}, 1]"), r"expected ',', but found '\[\{\}, 1\].*"),
        (table("[{}, 1]").replace("]]}", "]}}"), "expected ',', but found '}}'"),
        (table("[{}, 1]").replace("]]}", "]]]"), "is not a JSON table"),
        (table("[{}, 1]").replace("[0]", "[0] xx"), r"expected ',', but found 'xx, .*"),
        (table("[{}, 1]").replace('{"index"', '{xx "index"'), "is not a JSON table"),
        (table("[{}, 1]")[:-1] + ' "more": 1}', "expected ',', but found '\"more.*"),
        (table("[{}, 1]")[:-1] + ', "data": [[{}, 1]]}', "the key 'data' appears twice"),
        (table("[{}, 1]")[:-1] + ', "note": [1}}', "is not a JSON table"),
        (table("[{}, 1]") + " xx", "expected the end, but found 'xx'"),
        (table('"a": [{}, 1]').replace('"data": [', '"data": {').replace("]]}", "]}}"), "'data' is not a list"),
        (table("[{}, 1]", index='["a", "b"]'), "has 1 row, but its index has 2"),
        (table("", index='["a", "b"]'), "has 0 rows, but its index has 2"),
        (table("[1]", columns='["e_form"]'), "has no column structure or cif. Its columns are: e_form"),
        (
            table("[{}, 1]", columns='["structure", "energy"]'),
            "has no column e_form or .* Its columns are: structure, energy",
        ),
        ('[{"id": "a", "structure": {}, "e_form": 1}', "is truncated"),
        ('{"index": [0], "columns": ["structure", "e_form"], "data": [[{"sites"', "is truncated"),
        (
            '{"index": [0], "columns": ["structure", "e_form"], "data": [[{}, 1, 2]]}',
            "Row 0 of .* does not have one cell for each",
        ),
        ('{"index": [], "columns": ["structure", "e_form"], "data": [[{}, 1]]}', "more rows than its index"),
        ('{"index": 3, "columns": {"a": 1}, "data": []}', "'columns' is not a list"),
        ('{"data": [[{}, 1]]}', "0: the structure is not in pymatgen's format"),
        ('[{"id": "a", nonsense}]', "is not a JSON table"),
        ("[]]", "expected the end, but found ']'"),
        ("][]", r"expected '\{', but found '\]\[\]'"),
        ("[] []", r"expected the end, but found '\[\]'"),
        ("{[]}", "expected a key"),
    ],
)
def test_json_of_another_shape_is_refused(tmp_path, content, reason):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(DataError, match=reason):
        load(str(path))


@pytest.mark.parametrize("order", [("index", "columns", "data"), ("data", "columns", "index")])
def test_an_invalid_row_gives_its_name_to_no_other_row(tmp_path, order):
    salt = SALT.as_dict()
    content = {"index": ["a", "b"], "columns": ["structure", "e_form"], "data": [None, [salt, -2.0]]}
    (tmp_path / "table.json").write_text(json.dumps({key: content[key] for key in order}))
    with pytest.raises(DataError, match=r"Row 0 of .* does not have one cell for each"):
        load(str(tmp_path / "table.json"), drop_invalid=True)


def test_json_that_is_nested_without_end_is_refused(tmp_path):
    nest = '{"id": "deep", "structure": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / "deep.jsonl").write_text(json.dumps(entry()) + "\n" + nest)
    with pytest.raises(InvalidCrystals, match=r"line 2: the line is not JSON .*nested too deeply"):
        load(str(tmp_path / "deep.jsonl"))
    (tmp_path / "deep.json").write_text("[" + nest + "]")
    with pytest.raises(DataError, match="nested too deeply"):
        load(str(tmp_path / "deep.json"))


@pytest.mark.parametrize("name", ["long.jsonl", "long.jsonl.gz", "long.jsonl.bz2", "long.csv", "long.json"])
def test_a_line_or_row_longer_than_any_entry_is_refused_without_being_held(tmp_path, monkeypatch, name):
    monkeypatch.setattr(source, "LONGEST_ROW", 1 << 20)
    monkeypatch.setattr(json_stream, "_CHUNK", 1 << 18)
    content = b"id,cif,e_form\n" if name.endswith(".csv") else b"[" if name.endswith(".json") else b"\n"
    pack = {".gz": gzip.compress, ".bz2": bz2.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(content + bytes(1 << 25)))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"Line 2 of .* is longer than 1 MiB|expected a value"):
        load(str(tmp_path / name))
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_lines_that_are_no_entries_are_named_by_their_number(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(entry()) + '\n{"id": "cut", "stru\n[1]\n{"e_form": 1}\n')
    with pytest.raises(InvalidCrystals) as caught:
        load(str(path))
    assert [name for name, _ in caught.value.offenders] == ["line 2", "line 3", "line 4"]


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.json.gz"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.98])
def test_a_truncated_archive_is_refused(sample, tmp_path, name, kept):
    lines = [json.dumps(entry(sample.crystals.structure(row), f"c{row}")) for row in range(40)]
    text = "\n".join(lines) if ".jsonl" in name else "[" + ",".join(lines) + "]"
    whole = gzip.compress(text.encode())
    (tmp_path / name).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(DataError, match="cut short or damaged"):
        load(str(tmp_path / name), drop_invalid=True)


def test_a_damaged_archive_is_refused(tmp_path):
    whole = bytearray(gzip.compress(b"".join(json.dumps(entry(name=f"c{n}")).encode() + b"\n" for n in range(500))))
    whole[len(whole) // 2] ^= 0xFF
    (tmp_path / "damaged.jsonl.gz").write_bytes(whole)
    with pytest.raises(DataError, match="cut short or damaged"):
        load(str(tmp_path / "damaged.jsonl.gz"), drop_invalid=True)


def test_a_file_that_only_has_an_archives_name_is_refused(tmp_path):
    (tmp_path / "text.jsonl.gz").write_text(json.dumps(entry()))
    with pytest.raises(DataError, match="cut short or damaged"):
        load(str(tmp_path / "text.jsonl.gz"))


def test_a_row_without_an_id_is_refused_by_its_number(tmp_path):
    (tmp_path / "table.csv").write_text("e_form,cif,id\n1,x,\n2,y\n")
    with pytest.raises(InvalidCrystals) as refused:
        load(str(tmp_path / "table.csv"))
    assert [name for name, _ in refused.value.offenders] == ["row 1", "row 2"]


def test_a_csv_without_a_cif_column_is_refused(tmp_path):
    (tmp_path / "table.csv").write_text("id,e_form\na,1\n")
    with pytest.raises(DataError, match="has no column cif"):
        load(str(tmp_path / "table.csv"))


def test_cifs_that_cannot_be_read_and_files_that_are_not_there_are_named(tmp_path):
    (tmp_path / "id_prop.csv").write_text("good,-1.5\nbad,1\ngone,2\ntargetless\n,3\nnu\0ll,4\n")
    (tmp_path / "good.cif").write_text(SALT.to(fmt="cif"))
    (tmp_path / "bad.cif").write_text("this is no CIF")
    (tmp_path / "targetless.cif").write_text(SALT.to(fmt="cif"))
    with pytest.raises(InvalidCrystals) as caught:
        load(str(tmp_path))
    reasons = dict(caught.value.offenders)
    assert list(reasons) == ["bad", "gone", "targetless", "row 5", "nu\\x00ll"]
    assert "the CIF cannot be used" in reasons["bad"]
    assert reasons["gone"].startswith("there is no file gone.cif (or gone.vasp,")
    assert reasons["targetless"] == "the target is missing"
    assert reasons["row 5"] == "the row has no id"
    assert "there is no file" in reasons["nu\\x00ll"]
