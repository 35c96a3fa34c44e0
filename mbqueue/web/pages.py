"""The board as a Starlette application: pages, their parts, figures, files and actions.

A visible page requests its changing part every two seconds. As long as nothing changes, the board answers "not
modified". Polling works with any number of tabs and through any proxy, because it does not keep connections open
(browsers allow six per address). All links are relative and one level deep, because a notebook's proxy may add any path
before them.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import orjson
from jinja2 import Environment, PackageLoader
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mbqueue import __version__
from mbqueue.api import Project
from mbqueue.clock import SystemClock, format_duration, format_hours, utc_text
from mbqueue.dashboard.experiments import by_interest
from mbqueue.dashboard.failures import job_label
from mbqueue.dashboard.searches import settings_text
from mbqueue.dashboard.status import no_session, time_text
from mbqueue.errors import MbqueueError, UsageError, counted, remedy
from mbqueue.queue.processes import this_process
from mbqueue.results.cells import number
from mbqueue.web.access import TOKEN, Access, Refused
from mbqueue.web.acts import act
from mbqueue.web.figures import Figures
from mbqueue.web.reading import Reader

#: The Content-Security-Policy: scripts and styles come only from the board. plotly's styles need 'unsafe-inline'.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors "
)
_COLAB = "https://colab.research.google.com https://*.googleusercontent.com"
#: Maximum number of experiments on the overview page; active ones come first.
_SHOWN = 40
_EVENTS_SHOWN = 60
_LARGEST_ACT = 64 << 10

_TITLES = {
    "learning-curves": "Learning curves",
    "parity": "Predictions against targets",
    "errors": "Distribution of errors",
    "periodic-table": "Error by element",
    "timeline": "Sessions",
}


def application(project: Project, access: Access, *, read_only: bool) -> ASGIApp:
    """Make the web application that serves a project's board.

    Args:
        access: the rules that decide which requests the board accepts.
        read_only: serve the pages without buttons.
    """
    board = _Board(project, access, read_only=read_only)
    routes = [
        Route("/", board.overview),
        Route("/experiment", board.experiment),
        Route("/compare", board.compare),
        Route("/part", board.part),
        Route("/figures", board.figures),
        Route("/file", board.file),
        Route("/plotly.js", _plotly),
        Mount("/static", StaticFiles(packages=[("mbqueue.web", "static")])),
    ]
    if not read_only:
        routes.append(Route("/act", board.act, methods=["POST"]))
    app = Starlette(routes=routes, exception_handlers={MbqueueError: _told, Refused: _refused})
    return _Guarded(app, access)


class _Guarded:
    """Middleware that checks every request, and adds security headers to every response."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access
        self._ancestors = f"'self' {_COLAB}" if access.is_embedded else "'none'"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        # Browsers send a cookie to all ports of a host. The cookie's name contains the port, so that two boards do not
        # share a cookie.
        cookie_name = f"mbqueue_board_{(scope.get('server') or ('', 0))[1]}"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY + self._ancestors
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"  # the address may contain the token
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            self._access.check(request, cookie=request.cookies.get(cookie_name, ""))
        except Refused as error:
            await PlainTextResponse(str(error), status_code=403)(scope, receive, send_with_headers)
            return
        given = request.query_params.get(TOKEN)
        if given is not None and not self._access.is_embedded and request.method == "GET":
            # Remove the token from the address, so that screenshots, bookmarks and the browser's history do not contain
            # it.
            rest = [(key, value) for key, value in request.query_params.multi_items() if key != TOKEN]
            # Redirect only to a query, because a path such as //other.example/ would lead to another site.
            answer = RedirectResponse("?" + urlencode(rest), status_code=303)
            answer.set_cookie(cookie_name, given, httponly=True, samesite="strict")
            await answer(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


class _Board:
    def __init__(self, project: Project, access: Access, *, read_only: bool) -> None:
        self._project, self._access, self._read_only = project, access, read_only
        self._reader = Reader(project, SystemClock())
        self._figures = Figures(project)
        self._templates = Environment(loader=PackageLoader("mbqueue.web"), autoescape=True, trim_blocks=True)
        self._templates.filters |= {
            "counted": counted,
            "duration": format_duration,
            "hours": format_hours,
            "number": number,
            "utc": utc_text,
            "label": job_label,
            "spark": _spark,
            "part_done": _part_done,
            "preparing_done": lambda entry: _part_done({"progress": entry["preparing"]}),
            "settings": settings_text,
            "mean": _mean,
        }

    # -- page frames -------------------------------------------------------------------------------------------------

    def overview(self, request: Request) -> Response:
        every = {"all": "1"} if request.query_params.get("all") else {}
        return self._page(title="Overview", part="overview", **every)

    def experiment(self, request: Request) -> Response:
        name = request.query_params.get("name", "")
        return self._page(title=name, part="experiment", name=[name])

    def compare(self, request: Request) -> Response:
        return self._page(title="Compare", part="compare", name=request.query_params.getlist("name"))

    def _page(self, *, title: str, **query: Any) -> Response:
        html = self._templates.get_template("page.html").render(
            title=title,
            project=str(self._project.folder.root),
            version=__version__,
            part="part?" + urlencode({**query, **self._token()}, doseq=True),
            link=self._link,
            read_only=self._read_only,
            token=self._token().get(TOKEN, ""),
        )
        return Response(html, media_type="text/html")

    # -- page content ------------------------------------------------------------------------------------------------

    def part(self, request: Request) -> Response:
        """Serve a page's changing part as JSON, with its HTML, any problem with the queue, and the action secret."""
        reading = self._reader.read()
        content: dict[str, Any] = {"trouble": reading.trouble, "csrf": self._access.csrf, "html": "", "figures": None}
        if reading.status is not None:
            try:
                content |= self._filled(request, reading.status.overview, reading.status.session_seconds)
            except (MbqueueError, OSError) as error:  # the browser keeps showing the page's previous content
                content["trouble"] = reading.trouble or str(error) or type(error).__name__
        # The browser computes ages with its own clock, so the board sends nothing new when only ages change.
        tag = f'"{hashlib.sha256(orjson.dumps(content)).hexdigest()[:32]}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"ETag": tag})
        return Response(orjson.dumps(content), media_type="application/json", headers={"ETag": tag})

    def _filled(self, request: Request, overview: Mapping[str, Any], session_seconds: float) -> dict[str, Any]:
        which = request.query_params.get("part")
        names = request.query_params.getlist("name")
        shared = {
            "overview": overview,
            "link": self._link,
            "read_only": self._read_only,
            "titles": _TITLES,
            "trials": _trials_by_search(overview),
        }
        if which == "overview":
            experiments = [entry for entry in overview["experiments"] if not entry["trial"]]
            at_most = len(experiments) if request.query_params.get("all") else _SHOWN
            shown = sorted(by_interest(experiments)[:at_most])
            jobs_dir = self._project.folder.jobs_dir
            html = self._templates.get_template("overview.html").render(
                **shared,
                shown=[experiments[position] for position in shown],
                not_shown=len(experiments) - len(shown),
                here=this_process().host,
                no_session=no_session(overview),
                times={entry["name"]: time_text([entry], session_seconds) for entry in experiments},
                time=time_text(overview["experiments"], session_seconds, searches=overview["searches"]),
                files=sorted(path.stem for path in jobs_dir.glob("*.toml")),
            )
            return {"html": html}
        if which == "compare":
            return {"html": self._compared(shared, names), "figures": self._link("figures", name=names, paired="1")}
        entry = next((one for one in overview["experiments"] if one["name"] in names), None)
        if entry is None:
            search = next((one for one in overview["searches"] if one["name"] in names), None)
            if search is not None:
                return {"html": self._templates.get_template("search.html").render(**shared, found=search)}
            return {"html": self._templates.get_template("unknown.html").render(**shared, names=names)}
        name = entry["name"]
        with contextlib.suppress(OSError):
            shared["result_files"] = self._files(name)
        html = self._templates.get_template("experiment.html").render(
            **shared,
            entry=entry,
            time=time_text([entry], session_seconds),
            errors=self._project.errors(name),  # the overview has only the newest errors of all
            events=reversed(self._project.events(name, limit=_EVENTS_SHOWN)),
            target=self._project.target(name),
            spec=_flat(self._project.spec(name)),
        )
        done = [[fold["epochs_done"], fold["state"]] for fold in entry["folds"]]
        version = hashlib.sha256(orjson.dumps([done, entry["record"], entry["state"]])).hexdigest()[:16]
        return {"html": html, "figures": self._link("figures", name=name, version=version)}

    def _compared(self, shared: Mapping[str, Any], names: list[str]) -> str:
        body, trouble = "", None
        if len(names) > 1:
            try:
                body = self._figures.paired(names)[0]
            except MbqueueError as error:
                trouble = str(error)
        return self._templates.get_template("compare.html").render(**shared, names=names, body=body, trouble=trouble)

    def figures(self, request: Request) -> Response:
        names = request.query_params.getlist("name")
        reading = self._reader.read()
        if request.query_params.get("paired"):
            content = self._figures.paired(names)[1] if len(names) > 1 else b"{}"
        else:
            entries = reading.status.overview["experiments"] if reading.status else []
            entry = next((one for one in entries if one["name"] in names), None)
            content = b"{}" if entry is None else self._figures.of(entry)
        return Response(content, media_type="application/json")

    # -- files -------------------------------------------------------------------------------------------------------

    def file(self, request: Request) -> Response:
        """Serve a result file. A request can only choose one of the existing files, because the requested name is not
        used as a path."""
        wanted, name = request.query_params.get("file"), request.query_params.get("name", "")
        for path in self._files(name):
            if path.name == wanted:
                return FileResponse(path, filename=path.name, media_type="application/octet-stream")
        return PlainTextResponse("This file does not exist.", status_code=404)

    def _files(self, name: str) -> list[Path]:
        folder = self._project.results_folder(name)
        if not folder.is_dir():
            return []
        return sorted(
            path for path in folder.iterdir() if path.is_file() and not path.is_symlink() and _is_utf8(path.name)
        )

    # -- actions -----------------------------------------------------------------------------------------------------

    async def act(self, request: Request) -> Response:
        from starlette.concurrency import run_in_threadpool  # noqa: PLC0415

        self._access.check_act(request)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _LARGEST_ACT:
                raise Refused(f"The request is larger than {_LARGEST_ACT:,} bytes. Send fewer settings at once.")
        try:
            given = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise UsageError("The request is not valid JSON.") from error
        if not isinstance(given, dict) or not isinstance(given.get("act"), str):
            raise UsageError("The request does not name an action. Reload the page.")
        said = await run_in_threadpool(act, self._project, given["act"], given)
        self._reader.expire()
        return Response(orjson.dumps({"said": said}), media_type="application/json")

    # -- links -------------------------------------------------------------------------------------------------------

    def _link(self, page: str, **query: Any) -> str:
        everything = {**query, **self._token()}
        return page + ("?" + urlencode(everything, doseq=True, quote_via=quote) if everything else "")

    def _token(self) -> dict[str, str]:
        """The query parameter with the token, which every link in a notebook needs because cookies may be blocked."""
        return {TOKEN: self._access.token} if self._access.is_embedded and self._access.token else {}


def _is_utf8(name: str) -> bool:
    """Whether a file's name is valid UTF-8, so that pages and addresses can contain it."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _plotly(_request: Request) -> Response:
    return Response(_plotly_source(), media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})


@cache
def _plotly_source() -> str:
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped, unused-ignore]  # noqa: PLC0415

    return str(get_plotlyjs())


async def _told(_request: Request, error: Exception) -> Response:
    text = str(error) or type(error).__name__
    what_to_do = remedy(error)
    content = {"error": f"{text} {what_to_do}" if what_to_do else text}
    return Response(orjson.dumps(content), status_code=400, media_type="application/json")


async def _refused(_request: Request, error: Exception) -> Response:
    return Response(orjson.dumps({"error": str(error)}), status_code=403, media_type="application/json")


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _part_done(job: Mapping[str, Any] | None) -> float:
    progress = job and job["progress"]
    return min(1.0, progress["done"] / progress["total"]) if progress and progress.get("total") else 0.0


def _spark(values: list[float | None]) -> str:
    """Convert a curve to the points of an SVG polyline, 100 wide and 24 high, with a logarithmic vertical axis.

    Return an empty text if the curve has fewer than two positive values.
    """
    known = [(position, math.log(value)) for position, value in enumerate(values) if value is not None and value > 0]
    if len(known) < 2:
        return ""
    low, high = min(y for _, y in known), max(y for _, y in known)
    span, last = (high - low) or 1.0, known[-1][0]
    return " ".join(f"{100 * position / last:.1f},{22 - 20 * (y - low) / span:.1f}" for position, y in known)


def _trials_by_search(overview: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {search["name"]: [] for search in overview["searches"]}
    for entry in overview["experiments"]:
        if entry["trial"]:
            found[entry["trial"]["search"]].append(entry)
    return found


def _flat(spec: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in spec.items() if not isinstance(value, Mapping)}
    for section, values in spec.items():
        if isinstance(values, Mapping):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
    return {key: value for key, value in flat.items() if value not in ("", None)}
