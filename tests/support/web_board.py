"""A board that listens on the loopback interface, and a client that can send any header."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mbqueue.api import Project
from mbqueue.web.access import CSRF_HEADER


@dataclass(frozen=True)
class Answer:
    """The board's answer to a request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Board:
    """A running board."""

    project: Project
    port: int
    token: str | None

    def get(self, path: str, **headers: str) -> Answer:
        """Request a path, with ``headers`` whose names have underscores instead of hyphens."""
        return self._ask("GET", path, None, headers)

    def act(self, given: Any, **headers: str) -> Answer:
        """Post an action as the board's own page does."""
        csrf = self.get("/part?part=overview").json["csrf"]
        own = {"Content-Type": "application/json", CSRF_HEADER: csrf, "Sec-Fetch-Site": "same-origin"}
        return self._ask(
            "POST", "/act", given if isinstance(given, bytes) else json.dumps(given).encode(), own | headers
        )

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body=body, headers=named)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()


MakeBoard = Callable[..., Board]
