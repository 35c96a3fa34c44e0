"""Check requests to the board: the token, the host names it answers to, and the origin of clicks.

This prevents three attacks. A page of another site sends a form or a fetch to the board (CSRF): every act requires a
secret that only the board's own page has, in a header that no form can send, and an origin header of the board. A host
name is made to point to this machine (DNS rebinding): without a token, the board answers only to the names of the
loopback interface. A stranger on the network: on any other interface every request requires a token.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.requests import Request

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
#: In a URL and, after the first visit, in a cookie.
TOKEN = "token"  # noqa: S105 - the name of a parameter
CSRF_HEADER = "x-mbqueue-csrf"


class Refused(Exception):
    """A request that is refused; the message is for the person who made it."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """The rules of one running board.

    Attributes:
        token: required with every request; None on the loopback interface, which needs none.
        is_embedded: whether pages are shown inside a notebook, through its proxy. There, cookies are unreliable, so
            each link carries the token, and the proxy may have changed the Host header.
        csrf: required with every act; each process has another.
    """

    token: str | None
    is_embedded: bool = False
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    def check(self, request: Request, *, cookie: str) -> None:
        """Refuse a request that may not see anything.

        Raises:
            Refused: without a required token; or if the page was requested under another host name.
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
        """Refuse an act that does not come from the board's own page.

        Raises:
            Refused: if it comes from another site, or lacks the page's secret.
        """
        if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise Refused("The act came from another site.")
        origin = request.headers.get("origin")
        if origin is not None and not self.is_embedded and _netloc(origin) != request.headers.get("host"):
            raise Refused("The act came from another site.")
        if not _equal(request.headers.get(CSRF_HEADER, ""), self.csrf):
            raise Refused("The page is from an earlier run of the board. Reload it.")


def _host(request: Request) -> str:
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:  # brackets that are not an IPv6 address
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _equal(given: str, secret: str) -> bool:
    """Compare in constant time, which reveals nothing about the secret."""
    return hmac.compare_digest(given.encode(), secret.encode())
