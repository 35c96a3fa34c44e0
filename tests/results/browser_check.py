"""Open a report and a comparison of 132,752 artificial crystals in a real headless browser, and check for errors.

pytest does not collect this file, because not every machine has a browser. Continuous integration installs a browser
and runs the check:

    python tests/results/browser_check.py [--screenshots DIR]

Exit code 1 means a message in the browser's console, a blocked request, a blank screenshot, or a plot that is missing,
empty, wider than the page or squeezed on a phone. Exit code 2 means that there is no Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from conftest import made_up_history, made_up_inputs, made_up_predictions

from mbqueue.results.compare import compare
from mbqueue.results.folder import Recorded, read_recorded
from mbqueue.results.record import record_experiment
from mbqueue.results.report.comparison import write_comparison
from mbqueue.results.report.elements import POSITIONS
from mbqueue.results.report.page import write_report
from mbqueue.results.report.sessions import PUBLISH, Span
from mbqueue.results.tables import history_file, model_file, predictions_file, write_history, write_predictions
from mbqueue.task import FORMATION_ENERGY

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
REPORT_PLOTS = (
    "leaderboard", "learning-curves", "parity", "errors", "by-atoms", "by-target", "by-elements", "periodic-table",
    "timeline", "sessions",
)  # fmt: skip
IN_A_ROW = ("parity", "errors", "by-atoms", "by-target", "by-elements")
WIDTH = 1250
#: The narrowest window that headless Chromium allows.
PHONE_WIDTH = 500
#: The minimum size, in bytes, of a screenshot that shows plots. A screenshot without plots is much smaller.
SMALLEST_SCREENSHOT = 40_000
FOLDS = range(5)
#: The spans of each session, as (kind, minutes). The `publish` span overlaps the span before it.
SESSION = (
    ("idle", 1), ("load", 2), ("train", 50), ("checkpoint", 1), ("publish", 3), ("train", 40), ("predict", 6),
    ("repeated", 4),
)  # fmt: skip


def compositions(n: int, fold: int) -> list[str]:
    """Draw the formulas of ``n`` oxides and halides, each with two metals, mostly light ones."""
    rng = np.random.default_rng(fold)
    metals = [symbol for symbol in POSITIONS if symbol not in ("O", "F", "Cl", "He", "Ne", "Ar", "Kr", "Xe")]
    shares = np.exp(-np.arange(len(metals)) / 30)
    first, second = rng.choice(metals, (2, n), p=shares / shares.sum())
    return [f"{a}2{b}{anion}" for a, b, anion in zip(first, second, rng.choice(["O4", "F6", "Cl"], n), strict=True)]


def spans() -> list[Span]:
    """A timeline of five sessions, two hours apart."""
    found = []
    for fold in FOLDS:
        at = 1.795e9 + 7200 * fold
        for kind, minutes in SESSION:
            start = at - 60 * minutes if kind == PUBLISH else at
            end = start + 60 * minutes
            found.append(Span(session=f"s{fold}", device="NVIDIA L4", start=start, end=end, kind=kind))
            at = max(at, end)
    return found


def make_recorded(folder: Path, name: str, seed: int) -> Recorded:
    """A recorded experiment as large as the official task; every seed has the same crystals."""
    for fold in FOLDS:
        n = FORMATION_ENERGY.n // 5 + (fold < FORMATION_ENERGY.n % 5)
        write_history(
            history_file(folder, fold), made_up_history(20, seed=seed + fold, session=f"s{fold}", device="L4")
        )
        tested = made_up_predictions(n, fold=fold, seed=seed)
        tested = dataclasses.replace(tested, compositions=compositions(n, fold))
        write_predictions(predictions_file(folder, fold), tested)
        model_file(folder, fold).write_bytes(b"weights")
    inputs = made_up_inputs()
    official = dataclasses.replace(inputs.dataset, name=FORMATION_ENERGY.dataset, n=FORMATION_ENERGY.n, official=True)
    record_experiment(folder, dataclasses.replace(inputs, experiment=name, folds=FOLDS, dataset=official))
    return read_recorded(folder)


def browse(browser: str, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the browser on a page until the page's scripts are done."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=20000", *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)


def troubles_on_a_phone(browser: str, page: Path) -> list[str]:
    """Report wide figures that a narrow page squeezes instead of scrolling; figures in a row may be narrow."""
    seen = browse(browser, page, f"--window-size={PHONE_WIDTH},900", "--dump-dom").stdout
    found = []
    for name, section in re.findall(r'id="plot-([a-z-]+)"(.*?)(?=id="plot-|\Z)', seen, flags=re.DOTALL):
        widths = [float(width) for width in re.findall(r'class="main-svg"[^>]* width="([\d.]+)"', section)]
        if name not in IN_A_ROW and max(widths, default=0.0) < 640:
            found.append(f"plot {name} is {max(widths, default=0.0):.0f} pixels wide on a phone")
    return found


def troubles(browser: str, page: Path, plots: tuple[str, ...]) -> list[str]:
    """Open a page in the browser; return a sentence for each problem."""
    seen = browse(browser, page, f"--window-size={WIDTH},900", "--dump-dom")
    found = [f"console: {line}" for line in re.findall(r":CONSOLE[^\]]*\] (.*)", seen.stderr)]
    sections = dict(re.findall(r'id="plot-([a-z-]+)"(.*?)(?=id="plot-|\Z)', seen.stdout, flags=re.DOTALL))
    found += [f"plot {name} is not on the page" for name in plots if name not in sections]
    for name, section in sections.items():
        widths = [float(width) for width in re.findall(r'class="main-svg"[^>]* width="([\d.]+)"', section)]
        if not widths:
            found.append(f"plot {name} is not drawn")
        elif not 200 <= max(widths) <= WIDTH:
            found.append(f"plot {name} is {max(widths):.0f} pixels wide on a page of {WIDTH}")
        marks = re.findall(r'class="(?:point|js-line|js-fill)"|<image ', section)
        if widths and not marks:
            found.append(f"plot {name} is empty")
    return found


def screenshot(browser: str, page: Path, target: Path) -> list[str]:
    """Take a screenshot of the whole page; return a complaint if it is blank."""
    browse(browser, page, f"--window-size={WIDTH},7200", "--hide-scrollbars", f"--screenshot={target}")
    size = target.stat().st_size
    return [] if size > SMALLEST_SCREENSHOT else [f"{target.name} has only {size} bytes: the page looks blank"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--screenshots", type=Path, help="keep the pictures (and pages) in this folder")
    options = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        sys.stderr.write("There is no Chromium or Chrome here. Install one, for example: apt-get install chromium\n")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.screenshots or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        broken = Path(scratch) / "broken.html"
        broken.write_text('<div id="plot-parity"></div><script>console.error("seen")</script>', encoding="utf-8")
        if len(troubles(browser, broken, REPORT_PLOTS)) < len(REPORT_PLOTS):
            sys.stderr.write("This check does not notice a broken page: the browser's log has another form.\n")
            return 1
        first = make_recorded(Path(scratch) / "first", "first", 0)
        second = make_recorded(Path(scratch) / "second", "second", 1)
        pages = {
            write_report(first, folder / "report.html", timeline=spans()): REPORT_PLOTS,
            write_comparison(compare([first, second]), folder / "comparison.html"): ("paired",),
        }
        found = []
        for page, plots in pages.items():
            found += [f"{page.name}: {trouble}" for trouble in troubles(browser, page, plots)]
            found += [f"{page.name}: {trouble}" for trouble in troubles_on_a_phone(browser, page)]
            found += screenshot(browser, page, folder / f"{page.stem}.png")
    sys.stdout.write("".join(f"{line}\n" for line in found) or "The pages are drawn whole, without a message.\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
