"""The queue's statements as PostgreSQL reads them.

They are written in what SQLite and PostgreSQL share. Translated are: named and positional parameters, ``IS`` with a
parameter, the two-argument ``max``, ``ifnull``, ``json_extract`` of a number, and ``/*pg … */``, which becomes its
content. Text in quotes stays as it is.
"""

from __future__ import annotations

import re
from functools import cache

_ONLY_POSTGRESQL = re.compile(r"/\*pg(.*?)\*/", re.DOTALL)
_JSON_NUMBER = re.compile(r"\bjson_extract\(([^,()]+), '\$\.(\w+)'\)")
_QUOTED = re.compile(r"('(?:[^']|'')*')")
_WORDS = (
    (re.compile(r"\bIS NOT (?=[:?])"), "IS DISTINCT FROM "),
    (re.compile(r"\bIS (?=[:?])"), "IS NOT DISTINCT FROM "),
    (re.compile(r"\bmax\((?=\w+,)"), "greatest("),
    (re.compile(r"\bifnull\("), "coalesce("),
    (re.compile(r"(?<![:\w]):([a-z_]+)"), r"%(\1)s"),
    (re.compile(r"\?"), "%s"),
)


@cache
def translate(statement: str) -> bytes:
    """The statement for psycopg, which fills in ``%(name)s`` and ``%s``."""
    statement = _ONLY_POSTGRESQL.sub(r"\1", statement)
    statement = _JSON_NUMBER.sub(r"CAST(CAST(\1 AS json) ->> '\2' AS double precision)", statement)
    parts = _QUOTED.split(statement.replace("%", "%%"))
    for number in range(0, len(parts), 2):
        for pattern, replacement in _WORDS:
            parts[number] = pattern.sub(replacement, parts[number])
    return "".join(parts).encode()
