"""Parse the URL of a queue into the options for libpq, the schema, and a form without secrets."""

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
#: PostgreSQL silently truncates longer names, so two long names could become the same.
LONGEST_NAME_BYTES = 63

#: Options that close a connection if the server has not answered for 60 s, not even to keepalives.
_PATIENCE = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
    "fallback_application_name": "mbqueue",
}

#: Matches a host name or an IP address; an IPv6 address has at least two colons.
_HOST = re.compile(r"[^@/:]*|[0-9A-Fa-f.]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(%\w+)?")


@dataclass(frozen=True, kw_only=True)
class Address:
    """The address of a queue on a server.

    Attributes:
        options: the options for libpq, which may include a password; never show them.
        shown: the URL without password and options.
    """

    options: dict[str, Any]
    schema: str
    shown: str

    def __repr__(self) -> str:
        return f"Address({self.shown})"


def parse_address(url: str) -> Address:
    """Parse ``postgresql://[USER@]HOST[:PORT]/DATABASE[?schema=NAME&…]``. libpq gets all options except ``schema``.

    Raises:
        UsageError: if the text is not a valid URL of a queue, or if libpq could misread the URL. For example, if a
            password contains @ or /, libpq mistakes the end of the password for a host. The message does not repeat the
            URL, because the URL may contain a password.
    """
    from psycopg import Error  # noqa: PLC0415 - optional package
    from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415

    base, _, query = url.partition("?")
    given = [option for option in query.split("&") if option]
    ours = [option for option in given if option.startswith(_SCHEMA)]
    schema = unquote(ours[-1].removeprefix(_SCHEMA)) if ours else DEFAULT_SCHEMA
    rest = "&".join(option for option in given if option not in ours)  # keep +, which libpq does not decode as a space
    try:
        options = conninfo_to_dict(f"{base}?{rest}" if rest else base)
    except (Error, ValueError):
        options = {}
    is_name = bool(schema) and schema.isprintable() and "\ufffd" not in schema
    if not is_name or not all("=" in option for option in given) or not _is_plain(base) or not _is_sound(options):
        # This error hides its cause, because libpq's error repeats the unreadable part, which may be a password.
        raise UsageError(
            "The URL of the queue cannot be read. Use this form: "
            "postgresql://USER@HOST:5432/DATABASE?sslmode=verify-full (in names, write @ as %40, / as %2F and so on). "
            "Keep the password in ~/.pgpass or PGPASSWORD."
        ) from None
    if len(schema.encode()) > LONGEST_NAME_BYTES:
        raise UsageError(
            f"schema={schema} in the URL of the queue is longer than {LONGEST_NAME_BYTES} bytes, PostgreSQL's limit. "
            "Use a shorter name."
        )
    user = f"{options['user']}@" if "user" in options else ""
    port = f":{options['port']}" if "port" in options else ""
    shown = f"postgresql://{user}{options.get('host', '')}{port}/{options.get('dbname', '')}?schema={schema}"
    return Address(options={**_PATIENCE, **options}, schema=schema, shown=shown)


def _is_plain(base: str) -> bool:
    """Whether a URL without its options is unambiguous: it has at most one @, and none in the database's name."""
    server, _, database = base.partition("//")[2].partition("/")
    return server.count("@") <= 1 and "@" not in database


def _is_sound(options: Mapping[str, Any]) -> bool:
    """Whether the host and port that libpq found look valid, and not like parts of a password."""
    hosts = str(options.get("host", "")).split(",")
    ports = str(options.get("port", "")).split(",")
    return (
        bool(options)
        and all(host.startswith("/") or _HOST.fullmatch(host) for host in hosts)
        and all(not port or (port.isascii() and port.isdigit()) for port in ports)
        and not re.search("[@/:]", str(options.get("dbname", "")))
        and not re.search("[/:]", str(options.get("user", "")))  # @ is allowed: some providers use it in user names
    )
