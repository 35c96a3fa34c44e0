"""The URL of a queue: the part for libpq, the schema that it names, and the part that may be shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from mbqueue.errors import UsageError

#: The schema of the tables if the URL has no ``schema=``.
DEFAULT_SCHEMA = "mbqueue"
_SCHEMA = "schema="
#: PostgreSQL silently truncates longer names, so two of them could become the same.
LONGEST_NAME_BYTES = 63

#: Options that give up a connection after 60 s without an answer or a sign of life.
_PATIENCE = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
    "fallback_application_name": "mbqueue",
}

#: A host name or an address; an IPv6 address has at least two colons.
_HOST = re.compile(r"[^@/:]*|[0-9A-Fa-f.]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(%\w+)?")


@dataclass(frozen=True, kw_only=True)
class Address:
    """The address of a queue on a server.

    Attributes:
        options: for libpq, with the password if the URL has one; never show them.
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
        UsageError: if the text is not such a URL, or libpq may misread it: libpq takes the end of a password that
            contains @ or / for a host. The message does not repeat the URL, since it may contain a password.
    """
    from psycopg import Error  # noqa: PLC0415 - optional package
    from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415

    base, _, query = url.partition("?")
    given = [option for option in query.split("&") if option]
    ours = [option for option in given if option.startswith(_SCHEMA)]
    schema = unquote(ours[-1].removeprefix(_SCHEMA)) if ours else DEFAULT_SCHEMA
    rest = "&".join(option for option in given if option not in ours)  # unchanged: libpq does not read + as a blank
    try:
        options = conninfo_to_dict(f"{base}?{rest}" if rest else base)
    except (Error, ValueError):
        options = {}
    is_name = bool(schema) and schema.isprintable() and "\ufffd" not in schema
    if not is_name or not all("=" in option for option in given) or not _is_plain(base) or not _is_sound(options):
        # Raised without its cause: libpq's error repeats the part that it could not read.
        raise UsageError(
            "The URL of the queue cannot be read. Write it as postgresql://USER@HOST:5432/DATABASE?sslmode=verify-full "
            "(with %40 for @, %2F for / and so on in names). Keep the password in ~/.pgpass or PGPASSWORD."
        ) from None
    if len(schema.encode()) > LONGEST_NAME_BYTES:
        raise UsageError(
            f"schema={schema} in the URL of the queue is longer than the {LONGEST_NAME_BYTES} bytes that PostgreSQL "
            "keeps. Give a shorter name."
        )
    user = f"{options['user']}@" if "user" in options else ""
    port = f":{options['port']}" if "port" in options else ""
    shown = f"postgresql://{user}{options.get('host', '')}{port}/{options.get('dbname', '')}?schema={schema}"
    return Address(options={**_PATIENCE, **options}, schema=schema, shown=shown)


def _is_plain(base: str) -> bool:
    """Whether a URL is unambiguous up to its options: at most one @, and none in the database's name."""
    server, _, database = base.partition("//")[2].partition("/")
    return server.count("@") <= 1 and "@" not in database


def _is_sound(options: Mapping[str, Any]) -> bool:
    """Whether the parts that libpq read look like a host and a port, and not like a piece of a password."""
    hosts = str(options.get("host", "")).split(",")
    ports = str(options.get("port", "")).split(",")
    return (
        bool(options)
        and all(host.startswith("/") or _HOST.fullmatch(host) for host in hosts)
        and all(not port or (port.isascii() and port.isdigit()) for port in ports)
        and not re.search("[@/:]", str(options.get("dbname", "")))
        and not re.search("[/:]", str(options.get("user", "")))  # some providers' user names contain @, as %40
    )
