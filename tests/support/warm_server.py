"""The warm process of `tests.support.warm`, which imports everything once, then forks a child for each request.

Requests and answers are lines of JSON on standard input and output:

    {"do": "start", …}            → {"pid": …}
    {"do": "poll", "pid": …}      → {"code": …}: null while the child is running, negative if a signal ended it
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from tripwire import Fault, Tripwire, install


def _warm_up() -> None:
    """Run a small experiment, so that later processes need not import or compile anything."""
    import optuna  # noqa: F401
    import torch

    torch.set_num_threads(1)
    from mbqueue.cli import main

    with (
        tempfile.TemporaryDirectory() as folder,
        StringIO() as said,
        redirect_stdout(said),
        redirect_stderr(said),
    ):
        small = ["--dataset", "sample", "--set", "data.limit=10", "--folds", "0", "--epochs", "1"]
        for arguments in (
            ["init", folder],
            ["enqueue", "head_finetune", *small],
            ["enqueue", "full_finetune", *small],
            ["work", "--device", "cpu", "--session", "none"],
        ):
            try:
                main(["--project", folder, *arguments])
            except SystemExit as ended:
                if ended.code:
                    raise RuntimeError(said.getvalue()) from ended
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, f"a fork copies one thread only, and there are {len(threads)}"


def _child(request: dict[str, Any]) -> int:
    for stream, file in ((1, request["log"]), (2, request["errors"])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _use_standard_streams()
    os.chdir(request["folder"])
    _use_environment(request["environment"])
    subprocess.Popen = _Popen  # type: ignore[misc]
    signal.alarm(request["patience"])
    if request["retry_seconds"] is not None:
        _make_impatient(request["retry_seconds"])
    if request["trace"] or request["fault"]:
        fault = Fault(**request["fault"]) if request["fault"] else None
        install(Tripwire(Path(request["watched"]), fault, Path(request["trace"]) if request["trace"] else None))

    code = 0
    for arguments in request["commands"]:
        code = _run(["--project", request["root"], *arguments])
        if code:
            break
    return code


def _run(arguments: Sequence[str]) -> int:
    from mbqueue.cli import main

    code = 0
    try:
        main(list(arguments))
    except SystemExit as ended:
        code = int(ended.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


class _Popen(subprocess.Popen[Any]):
    """Run ``python -m mbqueue …`` in a fork of this process, which has imported everything, instead of a new Python.

    The parent's pipes, signals and process ids work as with a new Python.
    """

    def __init__(self, args: Any, **options: Any) -> None:
        if list(args[:3]) == [sys.executable, "-m", "mbqueue"]:
            options["preexec_fn"] = partial(_run_in_fork, args[3:], options.get("env"))
        super().__init__(args, **options)


def _run_in_fork(arguments: Sequence[str], environment: Mapping[str, str] | None) -> NoReturn:
    code = 70
    try:
        gc.freeze()  # or a file of the parent, once collected, would close a file of the same number
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        if environment is not None:
            _use_environment(environment)
        _use_standard_streams()
        code = _run(arguments)
    except BaseException:  # noqa: BLE001 - whatever it is, the fork must not return to the parent's code
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _use_standard_streams() -> None:
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False, buffering=1) for fd in (1, 2))  # noqa: SIM115


def _use_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _make_impatient(retry_seconds: float) -> None:
    """Shorten how long workers wait before a retry and for new jobs."""
    from mbqueue.queue import leases
    from mbqueue.session import worker

    leases.RETRY_SECONDS = leases.LONGEST_RETRY_SECONDS = retry_seconds
    worker.POLL_SECONDS = 0.02


def _serve() -> None:
    warnings.simplefilter("ignore")
    _warm_up()
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    children: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "poll":
            ended, status = os.waitpid(request["pid"], os.WNOHANG)
            children.discard(ended)
            answer.write(json.dumps({"code": os.waitstatus_to_exitcode(status) if ended else None}) + "\n")
            continue
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                answer.close()  # if the warm process dies, tests must see the end of its answers
                code = _child(request)
            except BaseException:  # noqa: BLE001 - whatever it is, the parent must not run on in the child
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        children.add(pid)
        answer.write(json.dumps({"pid": pid}) + "\n")
    for pid in children:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
