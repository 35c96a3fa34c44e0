"""The URL of a queue: what libpq needs of it, which schema it names, and what of it may be shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from mbqueue.errors import UsageError

#: Where the tables are when the URL has no ``schema=``.
DEFAULT_SCHEMA = "mbqueue"
_SCHEMA = "schema="
#: PostgreSQL cuts longer names off without a word, so that two of them could be one.
LONGEST_NAME_BYTES = 63

#: A connection that hangs is given up: after 60 s without an answer to what was sent, or without a sign of life.
_PATIENCE = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
    "fallback_application_name": "mbqueue",
}

#: A name, or an address; that of IPv6 has at least two colons.
_HOST = re.compile(r"[^@/:]*|[0-9A-Fa-f.]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(%\w+)?")


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
        UsageError: when it is no such URL, or may be meant otherwise than libpq reads it: of a password with @ or / in
            it, libpq takes the end for a host. It is not repeated in the message, since it may hold a password.
    """
    from psycopg import Error  # noqa: PLC0415 - optional package
    from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415

    base, _, query = url.partition("?")
    given = [option for option in query.split("&") if option]
    ours = [option for option in given if option.startswith(_SCHEMA)]
    schema = unquote(ours[-1].removeprefix(_SCHEMA)) if ours else DEFAULT_SCHEMA
    rest = "&".join(option for option in given if option not in ours)  # as it was written: to libpq a + is no blank
    try:
        options = conninfo_to_dict(f"{base}?{rest}" if rest else base)
    except (Error, ValueError):
        options = {}
    is_name = bool(schema) and schema.isprintable() and "\ufffd" not in schema
    if not is_name or not all("=" in option for option in given) or not _is_plain(base) or not _is_sound(options):
        # Without the cause: libpq repeats the part that it could not read.
        raise UsageError(
            "The URL of the queue cannot be read. It looks like postgresql://USER@HOST:5432/DATABASE?sslmode=verify-full"
            " (special characters are written as %40 for @, %2F for / and so on). A password is better kept in "
            "~/.pgpass or PGPASSWORD."
        ) from None
    if len(schema.encode()) > LONGEST_NAME_BYTES:
        raise UsageError(
            f"schema={schema} in the URL of the queue is longer than the {LONGEST_NAME_BYTES} bytes that PostgreSQL "
            "keeps of a name. Give a shorter one."
        )
    user = f"{options['user']}@" if "user" in options else ""
    port = f":{options['port']}" if "port" in options else ""
    shown = f"postgresql://{user}{options.get('host', '')}{port}/{options.get('dbname', '')}?schema={schema}"
    return Address(options={**_PATIENCE, **options}, schema=schema, shown=shown)


def _is_plain(base: str) -> bool:
    """Whether there is only one way to read a URL up to its options: one @ at most, and none in the database's name."""
    place, _, database = base.partition("//")[2].partition("/")
    return place.count("@") <= 1 and "@" not in database


def _is_sound(options: Mapping[str, Any]) -> bool:
    """Whether what libpq read looks like what it is taken for, and not like a piece of a password."""
    hosts = str(options.get("host", "")).split(",")
    ports = str(options.get("port", "")).split(",")
    return (
        bool(options)
        and all(host.startswith("/") or _HOST.fullmatch(host) for host in hosts)
        and all(not port or (port.isascii() and port.isdigit()) for port in ports)
        and not re.search("[@/:]", str(options.get("dbname", "")))
        and not re.search("[/:]", str(options.get("user", "")))  # some providers' names have an @, written %40
    )
