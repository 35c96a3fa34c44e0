"""CSV cells can be read back exactly, and no spreadsheet runs them as formulas. Markdown cells show text unchanged."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mbqueue.results.cells import csv_rows, csv_text, markdown, markdown_code
from mbqueue.results.tables import Predictions, read_predictions, write_predictions

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
@example([("a\rb", "c\r\nd"), ("'=1", "''=1"), ("\r", "'"), ("=1+1", "-1"), ('"', ",")])
def test_any_text_is_read_back_unchanged(rows):
    assert list(csv_rows(csv_text(["one", "two"], rows)))[1:] == [list(row) for row in rows]


@given(st.lists(st.tuples(TEXT, st.floats()), min_size=1, max_size=5))
@example([('=HYPERLINK("http://x")', -1.0), ("@SUM(A1)", float("-inf")), ("+1", 1e-300), ("\t=1", 0.0)])
def test_no_cell_starts_with_a_formula(rows):
    text = csv_text(["one", "two"], rows)
    for line in list(csv.reader(io.StringIO(text, newline="")))[1:]:
        for cell in line:
            try:
                float(cell)
            except ValueError:
                assert not cell.startswith(("=", "+", "-", "@", "\t", "\r")), cell


def test_a_table_that_was_written_without_a_guard_is_read_as_it_is():
    assert list(csv_rows("id,x\n=a,'b\n-1,-c\n")) == [["id", "x"], ["=a", "'b"], ["-1", "-c"]]


def test_ids_with_line_ends_and_formulas_come_back_from_a_table_of_predictions(tmp_path):
    ids = ["a\rb", "a\nb", "a\r\nb", "=1+1", "-x", "@y", "'+z", "+1"]
    n = len(ids)
    write_predictions(tmp_path / "p.csv", Predictions(ids, ["C"] * n, np.ones(n, np.int64), np.zeros(n), np.ones(n)))
    assert list(read_predictions(tmp_path / "p.csv").ids) == ids


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("a | b\n# c", r"a \| b \# c"),
        ("![x](http://y) <img src=z>", r"!\[x\](http://y) \<img src=z\>"),
        ("plain words, 1.5 (of 2)", "plain words, 1.5 (of 2)"),
    ],
)
def test_markdown_shows_a_text_as_it_is(given, written):
    assert markdown(given) == written


@pytest.mark.parametrize(("given", "written"), [("a_b", "`a_b`"), ("a`b", "``a`b``"), ("`a", "`` `a ``")])
def test_markdown_code_holds_any_backticks(given, written):
    assert markdown_code(given) == written
