"""Run several sessions on one machine, one process for each device. This module does not import torch.

Each process runs `mbqueue work --json` on its own device, in its own process group. So Ctrl-C in a terminal reaches
only the parent process, which forwards the signal once. If the parent process dies, the sessions cannot write their
events any more, so they end gracefully (see `mbqueue.session.messages`).
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mbqueue.clock import Clock
from mbqueue.errors import QueueError, SessionError, UsageError
from mbqueue.project import ProjectFolder
from mbqueue.queue.opening import open_queue
from mbqueue.session.ending import end_command_after
from mbqueue.session.messages import read_message, retell
from mbqueue.session.options import WorkOptions
from mbqueue.session.outcome import Ending, SessionOutcome
from mbqueue.session.report import Report
from mbqueue.session.stop import StopRequest

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
#: How often to check for a stop request.
_POLL_SECONDS = 0.2
#: How long to wait for the last output of an ended process. Children of an ended process may keep its standard error
#: open.
_LAST_WORDS_SECONDS = 5.0
_TAIL_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device of one session.

    Attributes:
        label: the device's name in messages, unique within one call.
        name: the value of `mbqueue work --device` for the session's process.
        visible: value of CUDA_VISIBLE_DEVICES for the process; None leaves the variable unchanged.
    """

    label: str
    name: str
    visible: str | None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A session whose process ended without reporting an outcome.

    Attributes:
        device: the label of the session's device.
        code: exit code of the session's process; negative if a signal ended it.
        said: the last lines that the session wrote to standard error.
    """

    device: str
    code: int
    said: str

    @property
    def why(self) -> str:
        """How the session's process ended, in words."""
        if self.code < 0:
            return f"was terminated by {signal.Signals(-self.code).name}"
        return f"exited with code {self.code}"


@dataclass(frozen=True, kw_only=True)
class DevicesOutcome:
    """The combined outcome of all sessions.

    Attributes:
        ending: the combined ending, which is DONE or BLOCKED if a session found no job left to run, else STOPPED.
        sessions: the outcomes that sessions reported.
        failures: the sessions that reported no outcome, in the order in which they ended.
    """

    ending: Ending
    sessions: tuple[SessionOutcome, ...]
    failures: tuple[Failure, ...]

    @property
    def jobs_done(self) -> int:
        return sum(session.jobs_done for session in self.sessions)


def parse_devices(names: Sequence[str]) -> tuple[Device, ...]:
    """Parse devices such as ``0``, ``cuda:1``, ``cpu`` or a GPU's UUID; a device named twice gets two sessions.

    A number is an index among the GPUs visible to this process, as in CUDA.

    Raises:
        UsageError: if a name is not a device, or CUDA_VISIBLE_DEVICES lists too few GPUs.
    """
    names = [name.strip() for name in names]
    if not any(names):
        raise UsageError("--devices does not name a device. Give, for example, 0,1,2 or cuda:0,cuda:1 or cpu,cpu.")
    found: list[Device] = []
    for position, name in enumerate(names):
        if name == "cpu":
            label, visible = "cpu", None
        elif match := re.fullmatch(r"(?:cuda:)?(\d+)", name):
            label, visible = f"cuda:{match[1]}", _visible(int(match[1]))
        elif re.fullmatch(r"(GPU|MIG)-[\w/-]+", name):
            label = visible = name
        else:
            raise UsageError(
                f"{name!r} is not a device. Give, for example, 0,1,2 or cuda:0,cuda:1 or cpu,cpu. You can also use a "
                "GPU's UUID."
            )
        if names.count(name) > 1:
            label += f"/{names[: position + 1].count(name)}"
        found.append(Device(label=label, name="cpu" if name == "cpu" else "cuda", visible=visible))
    return tuple(found)


def _visible(number: int) -> str:
    given = os.environ.get(VISIBLE_GPUS)
    if given is None:
        return str(number)
    entries = [entry.strip() for entry in given.split(",") if entry.strip()]
    if number >= len(entries):
        raise UsageError(
            f"There is no GPU {number}: {VISIBLE_GPUS} is {given!r}, and mbqueue counts the GPUs in this list from 0."
        )
    return entries[number]


@dataclass(eq=False)
class _Worker:
    device: Device
    process: subprocess.Popen[bytes]
    report: Report
    has_begun: bool = False
    outcome: SessionOutcome | None = None
    said: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))


class Crew:
    """The processes of several sessions, one per device.

    Args:
        options: the options of every session; only the device differs.
        report_for: returns the report for the session on the device with the given label. The report's `note` also
            receives the lines that the process writes to standard error.
    """

    def __init__(
        self,
        project: ProjectFolder,
        devices: Sequence[Device],
        options: WorkOptions,
        *,
        report_for: Callable[[str], Report],
        clock: Clock,
    ) -> None:
        self._project = project
        self._devices = devices
        self._options = options
        self._report_for = report_for
        self._clock = clock
        self._workers: list[_Worker] = []
        self._heard: queue.SimpleQueue[tuple[_Worker, bytes | str | None]] = queue.SimpleQueue()

    def run(self, stop: StopRequest) -> DevicesOutcome:
        """Start the sessions and return when all have ended.

        A stop request in ``stop`` is forwarded to every session as a signal.
        """
        with end_command_after(self._project.settings, note=self._note):
            failures = self._run(stop)
        outcomes = tuple(worker.outcome for worker in self._workers if worker.outcome is not None)
        endings = {outcome.ending for outcome in outcomes}
        # If any session found that no job is left to run, its ending is the ending of the whole command.
        ending = next((e for e in (Ending.DONE, Ending.BLOCKED) if e in endings), Ending.STOPPED)
        return DevicesOutcome(ending=ending, sessions=outcomes, failures=tuple(failures))

    def kill(self) -> None:
        """Kill the sessions that are still running. Published commits and results stay intact."""
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.kill()

    def _run(self, stop: StopRequest) -> list[Failure]:
        """Wait until all sessions have ended; return those that reported no outcome."""
        failures: list[Failure] = []
        try:
            for device in self._devices:
                self._workers.append(self._started(device))
            living = set(self._workers)
            is_stopping = False
            while living:
                if stop.cause is not None and not is_stopping:
                    is_stopping = True
                    self._signal(stop.cause.signal or signal.SIGTERM)
                try:
                    worker, what = self._heard.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    continue
                if what is not None:
                    self._hear(worker, what)
                    continue
                living.discard(worker)
                # A stop request kills a session that is still starting, because it has no signal handlers yet. Do not
                # count this session as a failure.
                if worker.outcome is None and not (is_stopping and not worker.has_begun):
                    failures.append(self._mourn(worker, bool(living)))
        finally:
            self.kill()
        return failures

    def _note(self, text: str) -> None:
        if self._workers:
            self._workers[0].report.note(text)

    def _started(self, device: Device) -> _Worker:
        # Do not change the number of threads, because a different number would change the last bits of results on the
        # CPU.
        environment = dict(os.environ)
        if device.visible is not None:
            environment[VISIBLE_GPUS] = device.visible
        options = replace(self._options, device=device.name, devices=None, end_command=False)
        command = [sys.executable, "-m", "mbqueue", "--project", str(self._project.root), "work", "--json"]
        process = subprocess.Popen(
            [*command, *options.arguments()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        worker = _Worker(device, process, self._report_for(device.label))
        threading.Thread(target=self._listen, args=(worker,), name=f"mbqueue-{device.label}", daemon=True).start()
        return worker

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        talk = threading.Thread(target=self._listen_to_talk, args=(worker,), daemon=True)
        talk.start()
        with worker.process.stdout as stream:
            for line in stream:
                self._heard.put((worker, line))
        worker.process.wait()
        talk.join(_LAST_WORDS_SECONDS)
        self._heard.put((worker, None))

    def _listen_to_talk(self, worker: _Worker) -> None:
        assert worker.process.stderr is not None
        with worker.process.stderr as stream:
            for line in stream:
                self._heard.put((worker, line.decode(errors="replace").rstrip("\n")))

    def _hear(self, worker: _Worker, what: bytes | str) -> None:
        if isinstance(what, str):
            worker.said.append(what)
            worker.report.note(what)
            return
        message: dict[str, Any] | None = read_message(what)
        if message is None:
            worker.report.note(what.decode(errors="replace").rstrip("\n"))
            return
        worker.has_begun = True
        outcome = retell(message, worker.report)
        if outcome is not None:
            worker.outcome = outcome
            worker.report.session_ended(outcome)

    def _mourn(self, worker: _Worker, others_live: bool) -> Failure:
        failure = Failure(device=worker.device.label, code=worker.process.returncode, said="\n".join(worker.said))
        worker.report.note(f"its process {failure.why}" + ("; the other sessions continue" if others_live else ""))
        try:
            # Release the ended session's lease now, so that the other sessions need not wait until it expires.
            with open_queue(self._project) as jobs:
                jobs.reap_dead(by="mbqueue work", now=self._clock.now())
        except QueueError as error:
            worker.report.note(str(error))
        if failure.code >= 0:  # a signal killed the process otherwise
            said = [f"The session on {failure.device} {failure.why}.", *worker.said]
            worker.report.session_ended(SessionError("\n".join(said)))
        return failure

    def _signal(self, number: int) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.send_signal(number)
