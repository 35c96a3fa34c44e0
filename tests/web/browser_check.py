"""Open the board in a real headless browser during a training, click its buttons, and check for errors.

pytest does not collect this file, because not every machine has a browser. Continuous integration installs a browser
and runs the check:

    python tests/web/browser_check.py [--screenshots DIR]

Each function below checks one claim. The first false claim ends the check with exit code 1. Exit code 2 means that
there is no Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import http.client
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from mbqueue.api import Project
from mbqueue.queue.opening import open_queue
from mbqueue.web.serving import listening_server

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
#: CI machines may be busy.
PATIENCE_MS = 240_000
WIDTHS, SCHEMES = (1250, 390), ("light", "dark")
HOSTILE = "<img src=x onerror=document.title='taken'>"
#: Console messages that this check causes on purpose.
EXPECTED = ("net::ERR_CONNECTION_REFUSED", "Failed to load resource: the server responded with a status of 400")


@dataclass
class Watched:
    """Watches the requests and errors of the board's pages."""

    port: int
    complaints: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> Page:
        """Record each console message, each error and each request that leaves the board."""
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(f"error in the page: {error}"))
        page.on("request", self._asked)
        return page

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(known in message.text for known in EXPECTED):
            self.complaints.append(f"console: {message.text}")

    def _asked(self, request: Request) -> None:
        own = f"http://127.0.0.1:{self.port}/"
        if not request.url.startswith((own, "data:", "blob:")):
            self.complaints.append(f"a request left the board: {request.url}")


@contextmanager
def serving(project: Project, port: int = 0) -> Iterator[int]:
    """Run a board in a thread."""
    server, listener, _token = listening_server(project, "127.0.0.1", port, read_only=False, is_embedded=False)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def made_project(root: Path) -> Project:
    """A project with two experiments on the sample, and one whose job failed with markup in its error."""
    project = Project.create(root)
    small = {"data.limit": 60, "train.batch_size": 16}
    # Train all weights, so that an epoch takes longer than the time between two requests of the page.
    project.enqueue("full_finetune", dataset="sample", folds=[0], name="learner", settings=small | {"train.epochs": 6})
    project.enqueue("head_finetune", dataset="sample", folds=[0], name="other", settings=small | {"train.epochs": 2})
    project.enqueue("full_finetune", dataset="sample", folds=[1], name="failing", settings=small | {"train.epochs": 2})
    project.set_priority("failing", 1)  # so that the claim below gets a job of this experiment
    now = time.time()
    with open_queue(project.folder) as queue:
        session = queue.start_session(device="cpu", now=now, alive_seconds=60)
        lease = queue.claim(session, now=now, lease_seconds=60)
        assert lease is not None
        assert lease.job.experiment == "failing"
        queue.fail(lease, error=f"Traceback\nValueError: {HOSTILE}", now=now, final=True)
        queue.end_session(session, reason="a job has failed", now=now)
    return project


def working(project: Project) -> threading.Thread:
    """Start a real session in a process, which will exit with code 1, because one of its jobs has failed."""
    command = [sys.executable, "-m", "mbqueue", "--project", str(project.folder.root), "work", "--session", "none"]
    thread = threading.Thread(target=lambda: subprocess.run(command, check=False, capture_output=True))
    thread.start()
    return thread


def acts_are_done_by_clicking(page: Page, project: Project) -> None:
    page.goto("./")
    learner = page.locator("#experiment-learner")
    learner.get_by_role("button", name="Pause learner", exact=True).click()
    expect(learner.get_by_role("button", name="Resume learner", exact=True)).to_be_visible()
    assert project.status("learner").overview["experiments"][0]["paused"]
    learner.get_by_role("button", name="Resume learner", exact=True).click()
    expect(learner.get_by_role("button", name="Pause learner", exact=True)).to_be_visible()

    other = page.locator("#experiment-other")
    other.get_by_role("button", name="Cancel other", exact=True).click()
    expect(page.get_by_role("dialog")).to_contain_text("Cancel the remaining work of other?")
    page.get_by_role("button", name="Keep it").click()
    assert project.status("other").overview["experiments"][0]["state"] == "ready"
    other.get_by_role("button", name="Cancel other", exact=True).click()
    page.get_by_role("button", name="Cancel it").click()
    expect(other.locator(".head .state")).to_have_text("cancelled")
    other.get_by_role("button", name="Retry other", exact=True).click()
    expect(other.locator(".head .state")).to_have_text("ready")

    priority = learner.get_by_label("Priority")
    priority.fill("5")
    priority.press("Enter")
    expect(page.locator("#said")).to_contain_text("learner now has priority 5.")


def a_hostile_name_is_text(page: Page) -> None:
    page.goto("./")
    expect(page.locator(".errors pre").first).to_contain_text(HOSTILE)
    page.goto(f"experiment?name={HOSTILE}")
    expect(page.locator("main")).to_contain_text(HOSTILE)
    assert page.title() != "taken"
    assert page.locator("img").count() == 0


def the_form_enqueues(page: Page, project: Project) -> None:
    page.goto("./")
    page.get_by_text("Enqueue an experiment").click()
    form = page.locator("#enqueue-form")
    form.get_by_label("Experiment").select_option("pretrained_infer")
    form.get_by_label("Dataset").fill("sample")
    form.get_by_label("Name").fill("typed")
    form.get_by_label("Changed settings").fill("train.lr=-1")
    page.wait_for_timeout(5000)  # meanwhile, the page updates twice and must keep the typed text
    expect(form.get_by_label("Name")).to_have_value("typed")
    form.get_by_role("button", name="Enqueue").click()
    expect(page.locator("#said.bad")).to_contain_text("train.lr")
    form.get_by_label("Changed settings").fill("data.limit=60\nfolds=[0]")
    form.get_by_role("button", name="Enqueue").click()
    expect(page.locator("#experiment-typed")).to_be_visible()
    assert project.spec("typed")["folds"] == [0]


def a_run_is_seen_without_reloading(page: Page, second: Page, project: Project) -> None:
    for one in (page, second):
        one.goto("experiment?name=learner")
        expect(one.locator("#fold-learner-0 .state")).to_be_visible()
        one.evaluate("window.neverReloaded = true")
    expect(page.locator("#figure-learning-curves")).to_have_count(0)
    session = working(project)
    seen = []
    while session.is_alive():
        epochs = page.locator("#fold-learner-0 .bar > span").inner_text()
        points = page.evaluate("document.getElementById('figure-learning-curves')?.data?.[0]?.y?.length ?? 0")
        seen.append((epochs, points))
        time.sleep(0.2)
    session.join()
    for one in (page, second):
        expect(one.locator("#fold-learner-0 .state")).to_have_text("done")
        expect(one.locator("#fold-learner-0 .bar")).to_contain_text("6/6")
        for name in ("learning-curves", "parity", "periodic-table", "timeline"):
            expect(one.locator(f"#figure-{name} .main-svg").first).to_be_visible()
        assert one.evaluate("window.neverReloaded")
    lengths = [points for _, points in seen]
    assert lengths == sorted(lengths), f"the curve shrank: {lengths}"
    assert len({epochs for epochs, _ in seen}) > 2, f"progress did not move: {seen}"
    page.wait_for_function("document.getElementById('figure-learning-curves').data[0].y.length === 6")
    assert page.locator("#fold-learner-0").text_content() == second.locator("#fold-learner-0").text_content()


def it_compares(page: Page, project: Project) -> None:
    assert project.status("other").overview["experiments"][0]["record"] == "committed"
    page.goto("compare")
    page.get_by_label("learner").check()
    page.get_by_label("other").check()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#figure-paired .main-svg").first).to_be_visible()
    expect(page.locator(".report")).to_contain_text("Differences paired by crystal")


def it_fits_and_has_labels(page: Page, width: int) -> None:
    for address in ("./", "experiment?name=learner", "compare"):
        page.goto(address)
        expect(page.locator("main:not([aria-busy])")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{address} is wider than {width} pixels"
        nameless = page.evaluate(
            "[...document.querySelectorAll('button, input, select, textarea, a')]"
            ".filter((e) => e.offsetParent && !e.textContent.trim() && !e.labels?.length && !e.ariaLabel).length"
        )
        assert nameless == 0, f"{address} has {nameless} controls without a name"


def the_keyboard_suffices(page: Page) -> None:
    page.goto("./")
    expect(page.locator("main:not([aria-busy])")).to_be_visible()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "learner":
            break
    page.keyboard.press("Enter")
    page.wait_for_url("**/experiment?name=learner")


def check_reconnecting(page: Page, project: Project, port: int, stop: Callable[[], None]) -> None:
    page.goto("./")
    expect(page.locator("#pulse")).to_have_text("live")
    stop()
    expect(page.locator("#pulse")).to_contain_text("no answer from the board")
    with serving(project, port):
        expect(page.locator("#pulse")).to_have_text("live")
        # The restarted board has a new secret, and the page's buttons fail until the page has fetched the secret.
        page.locator("#experiment-other").get_by_label("Priority").fill("3")
        page.keyboard.press("Enter")
        expect(page.locator("#said")).to_contain_text("priority 3")


def refuses_strangers(port: int) -> None:
    for method, path, headers in (
        ("GET", "/", {"Host": "evil.example"}),
        ("POST", "/act", {"Sec-Fetch-Site": "cross-site"}),
        ("POST", "/act", {"Origin": "https://evil.example"}),
        ("GET", "/file?name=learner&file=../../mbqueue.toml", {}),
        ("GET", "/static/..%2fpages.py", {}),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(method, path, headers=headers)
        assert connection.getresponse().status in (403, 404), (method, path)
        connection.close()


def take_screenshots(browser: Browser, port: int, folder: Path) -> None:
    """Take screenshots of the overview and an experiment, in both colour schemes and at both widths."""
    for scheme in SCHEMES:
        for width in WIDTHS:
            page = browser.new_page(
                viewport={"width": width, "height": 900}, color_scheme=scheme, base_url=f"http://127.0.0.1:{port}/"
            )
            for name, address in (("overview", "./"), ("experiment", "experiment?name=learner")):
                page.goto(address)
                expect(page.locator("main:not([aria-busy])")).to_be_visible()
                page.wait_for_timeout(4000)
                page.screenshot(path=folder / f"{name}-{scheme}-{width}.png", full_page=True)
            page.close()


def check(browser: Browser, root: Path, screenshots: Path | None) -> list[str]:
    """Run all checks; return the errors of the pages."""
    project = made_project(root)
    board = serving(project)
    port = board.__enter__()
    has_stopped = False

    def stop() -> None:
        nonlocal has_stopped
        if not has_stopped:
            has_stopped = True
            board.__exit__(None, None, None)

    watched = Watched(port)

    def new_page(width: int) -> Page:
        size = {"width": width, "height": 900}
        return watched.watch(browser.new_page(viewport=size, base_url=f"http://127.0.0.1:{port}/"))  # type: ignore[arg-type]

    try:
        page, second = new_page(WIDTHS[0]), new_page(WIDTHS[1])
        acts_are_done_by_clicking(page, project)
        a_hostile_name_is_text(page)
        the_form_enqueues(page, project)
        a_run_is_seen_without_reloading(page, second, project)
        it_compares(page, project)
        for one, width in ((page, WIDTHS[0]), (second, WIDTHS[1])):
            it_fits_and_has_labels(one, width)
        the_keyboard_suffices(page)
        refuses_strangers(port)
        if screenshots is not None:
            screenshots.mkdir(parents=True, exist_ok=True)
            take_screenshots(browser, port, screenshots)
        check_reconnecting(page, project, port, stop)
    finally:
        stop()
    return watched.complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--screenshots", type=Path, help="keep pictures in this folder")
    options = parser.parse_args()
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        sys.stderr.write("There is no Chromium or Chrome here. Install one, for example: apt-get install chromium\n")
        return 2
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        expect.set_options(timeout=PATIENCE_MS)
        complaints = check(browser, Path(scratch) / "project", options.screenshots)
        browser.close()
    sys.stdout.write(
        "".join(f"{line}\n" for line in complaints) or "The board works in a browser, without a message.\n"
    )
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
