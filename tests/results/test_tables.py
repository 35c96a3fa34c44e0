"""Histories and predictions on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbqueue import files
from mbqueue.errors import ResultsError
from mbqueue.results.tables import (
    HISTORY_COLUMNS,
    Predictions,
    read_history,
    read_predictions,
    write_history,
    write_predictions,
)


def test_history_has_exactly_the_promised_columns(tmp_path, history):
    write_history(tmp_path / "h.csv", history(2))
    assert (tmp_path / "h.csv").read_text().splitlines()[0] == (
        "epoch,train_loss,train_mae,val_loss,val_mae,lr,grad_norm,seconds,structures_per_second,session,device"
    )


def test_history_is_read_back_unchanged(tmp_path, history):
    rows = history(5)
    write_history(tmp_path / "h.csv", rows)
    assert read_history(tmp_path / "h.csv") == rows


def test_a_history_without_epochs_is_a_header_and_reads_back_empty(tmp_path):
    write_history(tmp_path / "h.csv", [])
    assert (tmp_path / "h.csv").read_text() == ",".join(HISTORY_COLUMNS) + "\n"
    assert read_history(tmp_path / "h.csv") == []


def test_equal_rows_give_equal_bytes_whatever_type_the_numbers_have(tmp_path, history):
    rows = history(3)
    write_history(tmp_path / "a.csv", rows)
    in_numpy = [{**row, "epoch": np.int64(row["epoch"]), "val_mae": np.float64(row["val_mae"])} for row in rows]
    write_history(tmp_path / "b.csv", in_numpy)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_an_epoch_twice_is_refused_and_the_old_file_stays(tmp_path, history):
    path = tmp_path / "h.csv"
    write_history(path, history(2))
    before = path.read_bytes()
    rows = history(3)
    with pytest.raises(ResultsError, match="has epoch 2, but the epochs must be"):
        write_history(path, [*rows[:2], rows[1]])
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", [{"val_mae": None}, {"extra": 1.0}])
def test_a_row_of_other_columns_is_refused_by_name(tmp_path, history, change):
    row = {**history(1)[0], **change}
    row = {key: value for key, value in row.items() if value is not None}
    with pytest.raises(ResultsError, match=next(iter(change))):
        write_history(tmp_path / "h.csv", [row])


def test_a_death_while_writing_leaves_the_old_history(tmp_path, history, monkeypatch):
    path = tmp_path / "h.csv"
    write_history(path, history(1))
    before = path.read_bytes()

    def die(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_history(path, history(2))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["h.csv"]


def test_predictions_read_back_as_they_were_written(tmp_path, predictions):
    table = predictions(30)
    write_predictions(tmp_path / "p.csv", table)
    back = read_predictions(tmp_path / "p.csv")
    assert list(back.ids) == list(table.ids)
    assert list(back.compositions) == list(table.compositions)
    np.testing.assert_array_equal(back.n_atoms, table.n_atoms)
    np.testing.assert_array_equal(back.y_true, table.y_true)
    np.testing.assert_array_equal(back.y_pred, table.y_pred)


def test_the_error_column_is_the_absolute_difference(tmp_path):
    table = Predictions(["a"], ["NaCl"], np.array([2]), np.array([-1.0]), np.array([-1.25]))
    write_predictions(tmp_path / "p.csv", table)
    assert (tmp_path / "p.csv").read_text() == (
        "id,composition,n_atoms,y_true,y_pred,abs_error\na,NaCl,2,-1.0,-1.25,0.25\n"
    )


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_every_finite_number_survives_the_file(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("p") / "p.csv"
    y = np.array(values)
    n = len(y)
    write_predictions(path, Predictions([f"i{k}" for k in range(n)], ["C"] * n, np.ones(n, np.int64), y / 2, y))
    np.testing.assert_array_equal(read_predictions(path).y_pred, y)


def test_ids_with_commas_quotes_and_umlauts_survive(tmp_path):
    ids = ['a,b"c', "Å-1", "x y"]
    table = Predictions(ids, ["C", "C", "C"], np.ones(3, np.int64), np.zeros(3), np.ones(3))
    write_predictions(tmp_path / "p.csv", table)
    assert read_predictions(tmp_path / "p.csv").ids == ids


def test_a_prediction_that_is_not_finite_is_refused_by_id(tmp_path):
    table = Predictions(["a", "b"], ["C", "C"], np.ones(2, np.int64), np.zeros(2), np.array([0.0, np.nan]))
    with pytest.raises(
        ResultsError, match=r"would contain 1 row with .*The first is crystal b: target 0\.0, prediction nan"
    ):
        write_predictions(tmp_path / "p.csv", table)
    assert not (tmp_path / "p.csv").exists()


def test_a_crystal_twice_is_refused_by_id(tmp_path):
    table = Predictions(["a", "b", "b"], ["C"] * 3, np.ones(3, np.int64), np.zeros(3), np.zeros(3))
    with pytest.raises(ResultsError, match="Crystal b appears twice"):
        write_predictions(tmp_path / "p.csv", table)


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ResultsError, match="differ in length"):
        Predictions(["a"], ["C"], np.ones(2, np.int64), np.zeros(1), np.zeros(1))


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.99])
def test_a_truncated_table_is_refused(tmp_path, predictions, keep):
    path = tmp_path / "p.csv"
    write_predictions(path, predictions(30))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ResultsError, match=r"p\.csv"):
        read_predictions(path)


def test_a_table_with_a_word_for_a_number_is_refused_with_its_line(tmp_path, predictions):
    path = tmp_path / "p.csv"
    write_predictions(path, predictions(3))
    files.write_text(path, path.read_text() + "z,C,one,0.0,0.0,0.0\n")
    with pytest.raises(ResultsError, match="line 5"):
        read_predictions(path)


def test_a_missing_table_says_where_to_look(tmp_path):
    with pytest.raises(ResultsError, match="mbqueue status"):
        read_history(tmp_path / "history_fold_3.csv")
