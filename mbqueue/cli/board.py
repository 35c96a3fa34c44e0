"""The command ``mbqueue board``, which serves the live dashboard."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from mbqueue.cli.console import print_line, say
from mbqueue.cli.options import open_project


def board(
    context: typer.Context,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 chooses a free port.", min=0, max=65535)] = 8321,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the page requires a token, except on localhost.")
    ] = "127.0.0.1",
    read_only: Annotated[bool, typer.Option("--read-only", help="Serve the pages without buttons.")] = False,
) -> None:
    """Serve a live dashboard of experiments, sessions, errors, curves and files, with buttons.

    The command prints the address and runs until you press Ctrl-C. Requires: pip install 'mbqueue[board]'

    Example: mbqueue board --port 8321
    """
    from mbqueue.web.serving import serve

    project = open_project(context, while_away=True)

    def on_address(url: str) -> None:
        print_line(url)
        say("Open this address in a browser. Ctrl-C stops the board, not the sessions.")

    with contextlib.suppress(KeyboardInterrupt):
        serve(project, host=host, port=port, read_only=read_only, on_address=on_address)
