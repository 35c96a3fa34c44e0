"""Check requests to the board: their token, host name and origin.

These checks prevent three attacks:

* A page on a different site sends a form or a fetch request to the board (CSRF). Every action must come from the
  board's own origin. An action also requires a secret from the board's page, in a header that forms cannot send.
* An attacker makes a host name point to this machine (DNS rebinding). Without a token, the board accepts only requests
  to localhost.
* A stranger on the network opens the board. Except on localhost, all requests require a token.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.requests import Request

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
#: The URL parameter with the token. After the first visit, the browser sends a cookie with the token instead.
TOKEN = "token"  # noqa: S105 - the name of a parameter
CSRF_HEADER = "x-mbqueue-csrf"
_OTHER_SITE = "The board refused this action because another site sent it."


class Refused(Exception):
    """The board refuses a request; the browser shows the user the error's message."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """The rules that decide which requests a board accepts.

    Attributes:
        token: the token that every request must contain; None on localhost, where requests need no token.
        is_embedded: whether a notebook shows the pages through its proxy. In a notebook, each link contains the token,
            because cookies are unreliable there. A notebook's proxy may change the Host header, so an embedded board
            does not compare the origin.
        csrf: the secret that every action must contain; it changes each time the board starts.
    """

    token: str | None
    is_embedded: bool = False
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    def check(self, request: Request, *, cookie: str) -> None:
        """Check a request's token or, if the board has no token, the request's host name.

        Args:
            cookie: value of the board's cookie; empty if the request has none.

        Raises:
            Refused: if the token is missing or wrong, or the host is not localhost.
        """
        if self.token is None:
            if _host(request) not in LOOPBACK_NAMES:
                raise Refused(
                    "This board only accepts requests to localhost. To open it on another machine, start the board "
                    "with --host, or forward its port with ssh and open http://localhost."
                )
        elif not any(_equal(given, self.token) for given in (request.query_params.get(TOKEN), cookie) if given):
            raise Refused("This board requires the token that `mbqueue board` printed with its address.")

    def check_act(self, request: Request) -> None:
        """Check that an action comes from the board's own page.

        Raises:
            Refused: if another site sent the action, or the action lacks the page's secret.
        """
        if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise Refused(_OTHER_SITE)
        origin = request.headers.get("origin")
        if origin is not None and not self.is_embedded and _netloc(origin) != request.headers.get("host"):
            raise Refused(_OTHER_SITE)
        if not _equal(request.headers.get(CSRF_HEADER, ""), self.csrf):
            raise Refused("The board was restarted after this page was loaded. Reload the page.")


def _host(request: Request) -> str:
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:  # the Host header has brackets that do not contain an IPv6 address
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _equal(given: str, secret: str) -> bool:
    """Compare two texts in constant time, so that the duration reveals nothing about the secret."""
    return hmac.compare_digest(given.encode(), secret.encode())
