"""Run the board in a terminal until Ctrl-C, or in a thread of a notebook."""

from __future__ import annotations

import html
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mbqueue.api import Project
from mbqueue.errors import UsageError

if TYPE_CHECKING:
    import uvicorn

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8321
#: Number of ports that a board in a notebook tries, beginning with the default port.
_PORTS_TRIED = 20
_START_SECONDS = 10.0
_ALL_INTERFACES = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with, not listened on
_NO_NOTEBOOK = "mbqueue.board() works only in notebooks. In a terminal, run: mbqueue board"


def serve(
    project: Project,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    read_only: bool = False,
    on_address: Callable[[str], None] = lambda _url: None,
) -> None:
    """Serve the board until SIGINT or SIGTERM.

    Args:
        host: the address to listen on. Unless ``host`` is localhost, the board makes a token and adds it to the URL.
        port: the port to listen on; 0 chooses a free port.
        read_only: serve the pages without buttons.
        on_address: called with the URL as soon as browsers can open it.

    Raises:
        UsageError: if the port is in use, ``host`` is not an address of this machine, or `mbqueue[board]` is not
            installed.
    """
    server, listener, token = listening_server(project, host, port, read_only=read_only, is_embedded=False)
    on_address(_url(host, listener.getsockname()[1], token))
    server.run(sockets=[listener])


def board(path: str | Path | None = None, *, height: int = 720, read_only: bool = False) -> None:
    """Show a project's board in the output of a notebook cell (Colab and Jupyter).

    The server runs in a thread of the notebook's kernel, and ends when the kernel ends.

    Args:
        path: the project's folder; by default the nearest project at or above the working directory.
        height: height of the frame, in pixels.
        read_only: show the pages without buttons.

    Raises:
        UsageError: if the program does not run in a notebook, or `mbqueue[board]` is not installed.
    """
    try:
        from IPython import get_ipython  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415
        from IPython.display import HTML, IFrame, display  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(_NO_NOTEBOOK) from error
    if get_ipython() is None:  # type: ignore[no-untyped-call, unused-ignore]
        raise UsageError(_NO_NOTEBOOK)
    server, listener, token = listening_server(Project(path), DEFAULT_HOST, None, read_only=read_only, is_embedded=True)
    port = listener.getsockname()[1]
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="mbqueue-board", daemon=True).start()
    deadline = time.monotonic() + _START_SECONDS
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        from google.colab import output  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: PLC0415
    except ImportError:
        # With jupyter-server-proxy, the notebook's server forwards this path to the board.
        prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX", "/")
        url = html.escape(_url(DEFAULT_HOST, port, token))
        hint = (
            "If the frame stays empty, install jupyter-server-proxy and restart the notebook server. If your browser "
            f'runs on this machine, you can also open <a href="{url}" target="_blank">{url}</a>.'
        )
        display(IFrame(f"{prefix}proxy/{port}/?token={token}", width="100%", height=height), HTML(hint))  # type: ignore[no-untyped-call, unused-ignore]
    else:
        output.serve_kernel_port_as_iframe(port, path=f"/?token={token}", height=str(height))


def listening_server(
    project: Project, host: str, port: int | None, *, read_only: bool, is_embedded: bool
) -> tuple[uvicorn.Server, socket.socket, str | None]:
    """Create a server for the board, without starting it.

    Args:
        port: 0 chooses a free port; None chooses the first free port, beginning with the default port.
        is_embedded: whether the board appears in a notebook, where it always requires a token.

    Returns:
        The server, a listening socket, and the token (None if requests need no token).

    Raises:
        UsageError: if the port is in use, ``host`` is not an address of this machine, or `mbqueue[board]` is not
            installed.
    """
    try:
        import uvicorn  # noqa: PLC0415 - an extra

        from mbqueue.web.access import LOOPBACK_NAMES, Access  # noqa: PLC0415
        from mbqueue.web.pages import application  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(f"The board needs {error.name}. Install it with: pip install 'mbqueue[board]'") from error
    needs_token = is_embedded or host not in LOOPBACK_NAMES
    access = Access(token=secrets.token_urlsafe(24) if needs_token else None, is_embedded=is_embedded)
    app = application(project, access, read_only=read_only)
    # Log only warnings and errors, because a line per request would push the board's address out of sight.
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off")
    return uvicorn.Server(config), _listener(host, port), access.token


def _listener(host: str, port: int | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    tried = range(DEFAULT_PORT, DEFAULT_PORT + _PORTS_TRIED) if port is None else [port]
    error: OSError | None = None
    for number in tried:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
            listener.listen()  # from now on, a browser can connect and wait for an answer
        except OSError as failed:
            listener.close()
            error = failed
        else:
            return listener
    raise UsageError(
        f"The board cannot listen on {host}, port {tried[-1]}: {error}. Choose another port with --port, or any free "
        "port with --port 0."
    ) from error


def _url(host: str, port: int, token: str | None) -> str:
    # A browser on another machine cannot open an address such as 0.0.0.0, so show the host's name.
    name = socket.gethostname() if host in _ALL_INTERFACES else host
    shown = f"[{name}]" if ":" in name else name
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
