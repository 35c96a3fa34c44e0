"""The URL of a queue: what libpq needs of it, which schema it names, and what of it may be shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

from mbqueue.errors import UsageError

#: Where the tables are when the URL has no ``schema=``.
DEFAULT_SCHEMA = "mbqueue"

#: A connection that hangs is given up: after 60 s without an answer to what was sent, or without a sign of life.
_PATIENCE = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
    "fallback_application_name": "mbqueue",
}


@dataclass(frozen=True, kw_only=True)
class Address:
    """One queue on one server.

    Attributes:
        options: for libpq, the password among them if the URL has one; never to be shown.
        shown: the URL without password and options.
    """

    options: dict[str, Any]
    schema: str
    shown: str

    def __repr__(self) -> str:
        return f"Address({self.shown})"


def parse_address(url: str) -> Address:
    """The parts of ``postgresql://[USER@]HOST[:PORT]/DATABASE[?schema=NAME&…]``; the other options are libpq's.

    Raises:
        UsageError: when it is no such URL. It is not repeated in the message, since it may hold a password.
    """
    from psycopg import Error  # noqa: PLC0415 - optional package
    from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415

    base, _, query = url.partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    schema = given.pop("schema", DEFAULT_SCHEMA)
    try:
        options = conninfo_to_dict(f"{base}?{urlencode(given)}" if given else base)
    except (Error, ValueError):
        options = {}
    if not schema or not options:
        # Without the cause: libpq repeats the part that it could not read.
        raise UsageError(
            "The URL of the queue cannot be read. It looks like postgresql://USER@HOST:5432/DATABASE?sslmode=verify-full"
            " (special characters are written as %40 for @ and so on). A password is better kept in ~/.pgpass or "
            "PGPASSWORD."
        ) from None
    user = f"{options['user']}@" if "user" in options else ""
    port = f":{options['port']}" if "port" in options else ""
    shown = f"postgresql://{user}{options.get('host', '')}{port}/{options.get('dbname', '')}?schema={schema}"
    return Address(options={**_PATIENCE, **options}, schema=schema, shown=shown)
