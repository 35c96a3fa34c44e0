"""Send notifications with a command, a webhook or both (``[notify]`` in mbqueue.toml).

A separate thread sends notifications one at a time, each with a time limit. If a notification fails or hangs, the
session prints a note and continues. If too many notifications are waiting, new ones are dropped.
"""

from __future__ import annotations

import json
import queue
import threading
import urllib.request
from collections.abc import Callable
from typing import Any, Self

from mbqueue.errors import counted, first_line, next_step
from mbqueue.queue.jobs import Job, Kind
from mbqueue.session.outcome import SessionOutcome
from mbqueue.session.report import Report
from mbqueue.session.shell import run_shell
from mbqueue.settings import NotifyEvent, NotifySettings

_WAITING_AT_MOST = 100


class Notifier(Report):
    """Sends a notification for each event that the settings name.

    Args:
        project: the project's folder, which the notification names.
        on_trouble: called from another thread with a sentence if a notification could not be sent.
    """

    def __init__(self, settings: NotifySettings, *, project: str, on_trouble: Callable[[str], None]) -> None:
        self._settings = settings
        self._project = project
        self._on_trouble = on_trouble
        self._session = ""
        self._open: queue.Queue[dict[str, Any] | None] = queue.Queue(_WAITING_AT_MOST)
        self._thread = threading.Thread(target=self._send_all, name="mbqueue-notify", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        """Wait until the remaining notifications are sent, for at most twice the time limit of one notification."""
        try:
            self._open.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(2 * self._settings.timeout_seconds + 1)

    def session_started(self, session: str, device: str, seconds: float | None) -> None:  # noqa: ARG002
        self._session = session

    def job_finished(self, job: Job, summary: str) -> None:
        if job.kind is Kind.PREDICT:
            self._tell("fold done", f"{job.experiment} fold {job.fold}: {summary}", job)
        elif job.kind is Kind.RECORD:
            self._tell("experiment done", f"{job.experiment}: {summary}", job)

    def job_failed(self, job: Job, error: BaseException, retry_at: float | None) -> None:
        what = "mbqueue will retry it" if retry_at else next_step(str(error), job.experiment)
        self._tell("job failed", f"{job.label} failed: {first_line(error)}; {what}", job)

    def session_ended(self, outcome: SessionOutcome | Exception) -> None:
        if isinstance(outcome, Exception):
            why = f"{type(outcome).__name__}: {outcome}"
        else:
            why = f"{counted(outcome.jobs_done, 'job')} done; {outcome.reason}"
        self._tell("session ended", f"session {self._session} ended: {why}")

    def _tell(self, event: NotifyEvent, text: str, job: Job | None = None) -> None:
        if event not in self._settings.events:
            return
        message = {
            "event": event,
            # Slack shows "text"; Discord shows "content".
            "text": f"mbqueue: {text}",
            "content": f"mbqueue: {text}",
            "project": self._project,
            "session": self._session,
            "experiment": job and job.experiment,
            "fold": job and job.fold,
            "epoch": job and job.epoch,
        }
        try:
            self._open.put_nowait(message)
        except queue.Full:
            self._on_trouble(f"A notification was dropped because {_WAITING_AT_MOST} are already waiting: {text}")

    def _send_all(self) -> None:
        while (message := self._open.get()) is not None:
            settings = self._settings
            for name, hook, send in (
                ("notify.command", settings.command, self._run),
                ("notify.webhook", settings.webhook, self._post),
            ):
                if not hook:
                    continue
                try:
                    send(hook, message)
                except Exception as error:  # noqa: BLE001 - a notification must never harm the work
                    # Commands and webhook addresses often contain secrets. An OSError's message contains no command and
                    # no address. Other messages may contain the address, so report only the type of the error.
                    why = error if isinstance(error, OSError) else type(error).__name__
                    self._on_trouble(f"{name} could not send the '{message['event']}' notification: {why}")

    def _run(self, command: str, message: dict[str, Any]) -> None:
        run_shell(
            command,
            timeout_seconds=self._settings.timeout_seconds,
            given=json.dumps(message).encode(),
            variables={"MBQUEUE_EVENT": message["event"], "MBQUEUE_TEXT": message["text"]},
        )

    def _post(self, url: str, message: dict[str, Any]) -> None:
        # The settings allow http and https only.
        request = urllib.request.Request(  # noqa: S310
            url, data=json.dumps(message).encode(), headers={"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=self._settings.timeout_seconds) as answer:  # noqa: S310
            answer.read(1)
