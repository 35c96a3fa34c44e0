"""The queue on PostgreSQL: every method as it is for SQLite, and repeated when its transaction was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from mbqueue.queue.postgresql.patience import Wait
from mbqueue.queue.postgresql.server import PostgresServer
from mbqueue.queue.store import Queue


class PostgresQueue(Queue):
    """The queue in a schema of a PostgreSQL database. Arguments and errors are those of `PostgresServer`.

    Each public method is one transaction (or one for reading and one for writing, which may both be repeated). When it
    is interrupted it is done again from the start: it sees what others did meanwhile, and a fence that has become old
    is refused as ever. `publish` is called once, however often the transaction is repeated: it ran while the lease was
    held and the job's row was locked, so what it published is legitimate, also when somebody else then takes the job.
    """

    database: PostgresServer

    def __init__(
        self,
        url: str,
        *,
        read_only: bool = False,
        even_moved: bool = False,
        server_clock: bool = True,
        wait: Wait | None = None,
    ) -> None:
        super().__init__(
            PostgresServer(url, read_only=read_only, even_moved=even_moved, server_clock=server_clock, wait=wait)
        )


def _repeated(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: PostgresQueue, /, *args: Any, **options: Any) -> Any:
        if options.get("publish") is not None:
            options["publish"] = _once(options["publish"])
        return self.database.patience.attempt(partial(method, self, *args, **options))

    return call


def _once(publish: Callable[[], None]) -> Callable[[], None]:
    is_done = False

    def call() -> None:
        nonlocal is_done
        if not is_done:
            publish()
            is_done = True

    return call


for _part in Queue.__bases__:
    for _name, _method in vars(_part).items():
        if callable(_method) and not _name.startswith("_"):
            setattr(PostgresQueue, _name, _repeated(_method))
