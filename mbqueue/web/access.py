"""Who may ask the board for what: the token, the names it answers to, and where a click may come from.

Three attacks are kept out. A page of another site that sends a form or a fetch to the board (CSRF): every act needs
a secret that only the board's own page holds, in a header that no form can send, and the browser's word that it comes
from this origin. A page whose name is made to point to this machine (DNS rebinding): without a token, the board
answers only to the names of the loopback interface. A stranger on the network: on any other interface a token is
needed for every request.
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
    """A request that is not answered; the message is for the person who made it."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """The rules of one running board.

    Attributes:
        token: needed with every request; None on the loopback interface, where none is.
        is_embedded: whether pages are shown inside a notebook, through its proxy. There, cookies are not to be relied
            on, so each link carries the token, and the proxy may have changed the Host header.
        csrf: needed with every act; another one in each process.
    """

    token: str | None
    is_embedded: bool = False
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    def check(self, request: Request, *, cookie: str) -> None:
        """Refuse who may not see anything.

        Raises:
            Refused: without the token where one is needed; else when the page was asked for by another name.
        """
        if self.token is None:
            if _host(request) not in LOOPBACK_NAMES:
                raise Refused(
                    "This board answers to localhost only. To open it from elsewhere, start it with --host, or forward "
                    "its port by ssh and open http://localhost."
                )
        elif not any(_equal(given, self.token) for given in (request.query_params.get(TOKEN), cookie) if given):
            raise Refused("This board needs the token that `mbqueue board` printed with its address.")

    def check_act(self, request: Request) -> None:
        """Refuse an act that does not come from the board's own page.

        Raises:
            Refused: when it comes from another site, or without the page's secret.
        """
        if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise Refused("The act came from another site.")
        origin = request.headers.get("origin")
        if origin is not None and not self.is_embedded and _netloc(origin) != request.headers.get("host"):
            raise Refused("The act came from another site.")
        if not _equal(request.headers.get(CSRF_HEADER, ""), self.csrf):
            raise Refused("The page is of an earlier start of the board. Reload it.")


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
    """Compare in a time that tells nothing of the secret."""
    return hmac.compare_digest(given.encode(), secret.encode())
