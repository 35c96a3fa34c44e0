"""Boards that show a new project."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from web_board import Board, MakeBoard

from mbqueue.api import Project
from mbqueue.project import ProjectFolder
from mbqueue.web.serving import listening_server


@pytest.fixture
def make_board(project: ProjectFolder) -> Iterator[MakeBoard]:
    """A function that starts a board of the new project."""
    stopping = []

    def make(*, host: str = "127.0.0.1", read_only: bool = False, is_embedded: bool = False) -> Board:
        own = Project(project.root)
        server, listener, token = listening_server(own, host, 0, read_only=read_only, is_embedded=is_embedded)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        stopping.append((server, thread, listener))
        return Board(own, listener.getsockname()[1], token)

    yield make
    for server, thread, listener in stopping:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture
def board(make_board: MakeBoard) -> Board:
    """A board with one experiment enqueued."""
    found = make_board()
    found.project.enqueue("full_finetune", dataset="sample", folds=[0, 1], epochs=2, name="first")
    return found
