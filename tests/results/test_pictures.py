"""The report's figures as image files, which kaleido renders."""

from __future__ import annotations

import errno

import plotly.io
import pytest

from mbqueue.errors import ResultsError
from mbqueue.results.folder import read_recorded
from mbqueue.results.report.page import draw
from mbqueue.results.report.pictures import write_pictures


def test_every_figure_becomes_a_picture_of_its_name(recorded_folder, tmp_path, monkeypatch):
    def write(figures, paths, *, width, scale):
        for path, pixels in zip(paths, width, strict=True):
            path.write_text(f"{pixels} x{scale}")

    monkeypatch.setattr(plotly.io, "write_images", write)
    figures = draw(read_recorded(recorded_folder))
    written = write_pictures(figures, tmp_path / "pictures")
    assert [path.name for path in written] == [f"{name}.png" for name in figures]
    assert (tmp_path / "pictures" / "parity.png").read_bytes() == b"680 x2"


def test_without_a_drawing_engine_the_error_says_what_to_install(recorded_folder, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise ValueError("\n\nImage export requires the Kaleido package.\n\nMore text.")

    monkeypatch.setattr(plotly.io, "write_images", fail)
    with pytest.raises(ResultsError, match="pip install kaleido") as caught:
        write_pictures(draw(read_recorded(recorded_folder)), tmp_path)
    assert "PNG files: Image export requires the Kaleido package.\nPNG" in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_or_a_missing_permission_is_not_blamed_on_the_browser(
    recorded_folder, tmp_path, monkeypatch, number
):
    why = OSError(number, "refused", str(tmp_path / "parity.png"))

    def fail(*args, **options):
        raise why

    monkeypatch.setattr(plotly.io, "write_images", fail)
    with pytest.raises(OSError, match="refused") as caught:
        write_pictures(draw(read_recorded(recorded_folder)), tmp_path)
    assert caught.value is why
