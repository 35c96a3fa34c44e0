"""Start the board in a terminal and in a notebook."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import types
import urllib.error
import urllib.request
from typing import Any

import pytest

import mbqueue
from mbqueue.errors import UsageError
from mbqueue.project import ProjectFolder


def test_the_command_prints_its_address_and_ends_on_ctrl_c(project: ProjectFolder) -> None:
    command = [sys.executable, "-m", "mbqueue", "--project", str(project.root), "board", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        assert "token" not in url
        with urllib.request.urlopen(url) as answer:
            assert b"mbqueue" in answer.read()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait() == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_a_port_that_is_taken_is_an_error_that_names_the_option(project: ProjectFolder) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "mbqueue", "--project", str(project.root), "board", "--port", port]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "--port 0" in ended.stderr


def test_without_the_extra_the_error_names_it(project: ProjectFolder) -> None:
    hidden = "import sys; sys.modules['uvicorn'] = None; from mbqueue.cli import main; main()"
    command = [sys.executable, "-c", hidden, "--project", str(project.root), "board"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "pip install 'mbqueue[board]'" in ended.stderr


def test_outside_of_a_notebook_the_error_names_the_command(project: ProjectFolder) -> None:
    with pytest.raises(UsageError, match="mbqueue board"):
        mbqueue.board(project.root)


def _notebook(monkeypatch: pytest.MonkeyPatch, displayed: list[Any]) -> None:
    shell, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    shell.get_ipython = object  # type: ignore[attr-defined]
    display.HTML = lambda text: ("html", text)  # type: ignore[attr-defined]
    display.IFrame = lambda src, **_size: ("frame", src)  # type: ignore[attr-defined]
    display.display = lambda *things: displayed.extend(things)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", display)


def test_in_jupyter_the_frame_goes_through_the_proxy_of_the_server(
    project: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    displayed: list[Any] = []
    _notebook(monkeypatch, displayed)
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/me/")
    mbqueue.board(project.root)
    (_, address), (_, hint) = displayed
    assert address.startswith("/user/me/proxy/")
    _, _, port_and_rest = address.partition("/proxy/")
    with urllib.request.urlopen(f"http://127.0.0.1:{port_and_rest}") as answer:
        assert b"mbqueue" in answer.read()
    assert "jupyter-server-proxy" in hint


def test_in_colab_the_frame_is_an_iframe_of_colab(project: ProjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    framed: list[tuple[int, str, str]] = []
    _notebook(monkeypatch, [])
    output = types.ModuleType("google.colab.output")
    output.serve_kernel_port_as_iframe = lambda port, path, height: framed.append((port, path, height))  # type: ignore[attr-defined]
    colab = types.ModuleType("google.colab")
    colab.output = output  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setitem(sys.modules, "google.colab.output", output)
    mbqueue.board(project.root, height=500)
    ((port, path, height),) = framed
    assert height == "500"
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
        assert b"mbqueue" in answer.read()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/")


def test_an_address_on_all_interfaces_is_shown_with_the_host_name(project: ProjectFolder) -> None:
    command = [sys.executable, "-m", "mbqueue", "--project", str(project.root), "board", "--port", "0"]
    with subprocess.Popen([*command, "--host", "0.0.0.0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline()
        process.kill()
    assert url.startswith(f"http://{socket.gethostname()}:")
    assert "?token=" in url
