"""Check requests to the board: the token, the host names it answers to, and the origin of clicks.

This prevents three attacks:

* A page of another site sends a form or a fetch to the board (CSRF). Every action requires the board's own origin. It
  also requires a secret that only the board's page knows, in a header that no form can send.
* An attacker makes a host name point to this machine (DNS rebinding). Without a token, the board answers only to the
  names of the loopback interface.
* A stranger on the network opens the board. On every interface except loopback, all requests require a token.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.requests import Request

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
#: The URL parameter that contains the token; after the first visit, a cookie contains the token.
TOKEN = "token"  # noqa: S105 - the name of a parameter
CSRF_HEADER = "x-mbqueue-csrf"


class Refused(Exception):
    """The board refuses a request; the message is for the person who made it."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """The rules of one running board.

    Attributes:
        token: the token that every request must have; None on the loopback interface, where none is needed.
        is_embedded: whether a notebook shows the pages, through its proxy. In a notebook, cookies are unreliable, so
            each link has the token, and the proxy may have changed the Host header.
        csrf: the secret that every action must have; each process makes a new one.
    """

    token: str | None
    is_embedded: bool = False
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    def check(self, request: Request, *, cookie: str) -> None:
        """Refuse a request that lacks the token or uses another host name.

        Raises:
            Refused: if a required token is missing, or the host name is not a name of the loopback interface.
        """
        if self.token is None:
            if _host(request) not in LOOPBACK_NAMES:
                raise Refused(
                    "This board only answers to localhost. To open it from elsewhere, start it with --host, or forward "
                    "its port by ssh and open http://localhost."
                )
        elif not any(_equal(given, self.token) for given in (request.query_params.get(TOKEN), cookie) if given):
            raise Refused("This board requires the token that `mbqueue board` printed with its address.")

    def check_act(self, request: Request) -> None:
        """Refuse an action that does not come from the board's own page.

        Raises:
            Refused: if the action comes from another site, or lacks the page's secret.
        """
        if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise Refused("The board refused this action, because another site sent it.")
        origin = request.headers.get("origin")
        if origin is not None and not self.is_embedded and _netloc(origin) != request.headers.get("host"):
            raise Refused("The board refused this action, because another site sent it.")
        if not _equal(request.headers.get(CSRF_HEADER, ""), self.csrf):
            raise Refused("This page is from an earlier run of the board. Reload the page.")


def _host(request: Request) -> str:
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:  # the brackets do not contain an IPv6 address
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _equal(given: str, secret: str) -> bool:
    """Compare two texts in constant time, which reveals nothing about the secret."""
    return hmac.compare_digest(given.encode(), secret.encode())
