"""The server's time in a message that begins a transaction, and so is written before that time is known."""

from __future__ import annotations

from psycopg.adapt import Dumper

#: When the transaction began, in seconds since the epoch.
TRANSACTION_TIME = "CAST(extract(epoch FROM transaction_timestamp()) AS double precision)"
#: When the server was started.
SERVER_START_TIME = "CAST(extract(epoch FROM pg_postmaster_start_time()) AS double precision)"


class ServerTime:
    """The time at which a transaction began, in a statement that begins it and so cannot know."""


NOW = ServerTime()


class ServerTimeDumper(Dumper):
    """Writes it into a statement."""

    def dump(self, _obj: ServerTime) -> bytes:
        return TRANSACTION_TIME.encode()

    def quote(self, obj: ServerTime) -> bytes:
        return self.dump(obj)
