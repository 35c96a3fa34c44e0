"""Take the README's screenshots of the dashboard and a report, and write them to docs/images.

    python tools/screenshots.py

The script trains on the sample, and takes the dashboard's screenshot while a session trains. The script needs Chromium
or Chrome, and takes a few minutes on two cores.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from mbqueue.api import Project
from mbqueue.web.serving import listening_server

IMAGES = Path(__file__).parent.parent / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH = 1200
#: The maximum size of a screenshot, in bytes.
LARGEST = 200_000


def main() -> None:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        sys.exit("Screenshots need Chromium or Chrome, but neither is on PATH. Install one of them.")
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        project = trained_project(Path(scratch) / "my-project")
        take_dashboard(browser, project)
        take_report(browser, project.report("head_finetune")[0])
        browser.close()


def trained_project(root: Path) -> Project:
    """Make a project with two finished experiments on the sample, and a longer experiment in the queue."""
    project = Project.create(root)
    project.enqueue("pretrained_infer", dataset="sample")
    project.enqueue("head_finetune", dataset="sample")
    project.work(session=None)
    project.enqueue("full_finetune", dataset="sample", settings={"data.limit": 200, "train.batch_size": 16})
    return project


def take_dashboard(browser: Browser, project: Project) -> None:
    command = [sys.executable, "-m", "mbqueue", "--project", str(project.folder.root), "work", "--session", "1h50m"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as session:
        while not epochs_done(project):
            time.sleep(1)
        with serving(project) as address:
            page = opened(browser, address, height=900)
            page.wait_for_timeout(5000)  # the page needs two updates before it shows the remaining time
            save(page, "dashboard.webp")
        project.stop()
        session.wait()


def epochs_done(project: Project) -> bool:
    fold = project.status("full_finetune").overview["experiments"][0]["folds"][0]
    return fold["epochs_done"] >= 2 and fold["running"] is not None


def take_report(browser: Browser, report: Path) -> None:
    page = opened(browser, report.as_uri(), height=1150)
    page.wait_for_timeout(3000)  # the page needs time to draw its figures
    save(page, "report.webp")


def opened(browser: Browser, address: str, *, height: int) -> Page:
    page = browser.new_page(viewport={"width": WIDTH, "height": height})
    page.goto(address)
    return page


def save(page: Page, name: str) -> None:
    picture = Image.open(io.BytesIO(page.screenshot()))
    IMAGES.mkdir(exist_ok=True)
    picture.save(IMAGES / name, quality=80, method=6)
    size = (IMAGES / name).stat().st_size
    if size > LARGEST:
        sys.exit(f"docs/images/{name} has {size:,} bytes, more than {LARGEST:,}. Take a smaller part of the page.")


@contextmanager
def serving(project: Project) -> Iterator[str]:
    server, listener, _token = listening_server(project, "127.0.0.1", 0, read_only=False, is_embedded=False)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


if __name__ == "__main__":
    main()
