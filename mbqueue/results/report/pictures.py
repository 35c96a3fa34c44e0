"""The report's figures as PNG files, for slides and papers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import plotly.graph_objects as go  # type: ignore[import-untyped, unused-ignore]
import plotly.io  # type: ignore[import-untyped, unused-ignore]

from mbqueue import files
from mbqueue.errors import ResultsError, UsageError, first_line, remedy

WIDTH_PIXELS = 1100
#: Widths in pixels of figures that share a row on the page, chosen so that the PNG files look about the same as the
#: page.
_NARROW_PIXELS = {"parity": 680, "errors": 680, "by-atoms": 480, "by-target": 480, "by-elements": 480} | dict.fromkeys(
    ("roc", "reliability", "confusion"), 480
)
_SCALE = 2


def require_pictures(names: Iterable[str], folder: Path, *, force: bool) -> None:
    """Check that writing figures to a folder would not replace any picture, unless ``force`` is set.

    Raises:
        UsageError: if a picture would be replaced and ``force`` is not set, or if ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file. Name a folder for the pictures.")
    there = [folder / f"{name}.png" for name in names if (folder / f"{name}.png").exists()]
    if there and not force:
        raise UsageError(f"{there[0]} already exists. Choose a different folder, or add --force to replace pictures.")


def write_pictures(figures: Mapping[str, go.Figure], folder: Path) -> list[Path]:
    """Write every figure of a report to ``folder``/NAME.png, at twice the resolution of a screen.

    Raises:
        ResultsError: if kaleido (which plotly uses to render pictures) is missing, or its browser is missing or fails.
        OSError: if a picture cannot be written, for example because the disk is full or a permission is missing.
    """
    files.make_folder(folder)
    # Render all pictures in a temporary folder first, so that an error leaves the target folder unchanged.
    with tempfile.TemporaryDirectory(prefix=files.TEMP_PREFIX, dir=folder) as scratch:
        drawn = [Path(scratch, f"{name}.png") for name in figures]
        widths = [_NARROW_PIXELS.get(name, WIDTH_PIXELS) for name in figures]
        try:
            # Render all pictures in one call, because every call starts a browser.
            plotly.io.write_images(list(figures.values()), drawn, width=widths, scale=_SCALE)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            if remedy(error):
                raise  # a full disk or a missing permission has its own advice
            raise ResultsError(
                f"mbqueue cannot save the figures as PNG files: {first_line(error)}\n"
                "PNG files require kaleido and Chrome or Chromium: pip install kaleido, then plotly_get_chrome. "
                "Without them, open the report and click the camera icon of each figure."
            ) from error
        return [picture.replace(folder / picture.name) for picture in drawn]
