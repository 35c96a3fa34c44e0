"""Run sessions here or in the background, and stop them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

from mbqueue.api.base import LOADING, OpenedProject, tell
from mbqueue.project import working_folder
from mbqueue.session.options import shows_arguments

if TYPE_CHECKING:
    from mbqueue.session.background import BackgroundSession, StoppedSession
    from mbqueue.session.devices import DevicesOutcome
    from mbqueue.session.options import WorkArguments, WorkOptions
    from mbqueue.session.outcome import SessionOutcome
    from mbqueue.session.report import Report
    from mbqueue.session.stop import StopRequest


class Working(OpenedProject):
    @shows_arguments
    def work(
        self,
        *,
        device: str | None = None,
        end_command: bool = True,
        report: Report | None = None,
        stop: StopRequest | None = None,
        **arguments: Unpack[WorkArguments],
    ) -> SessionOutcome:
        """Run a session in this process until no job is left or the session's time is up.

        You can kill the session at any instant; the next session resumes. If `work` runs in the main thread, SIGTERM,
        SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 make the session finish its step, write a checkpoint and end. A second
        SIGINT ends the process at once.

        Args:
            session: length of the session, such as ``1h50m``, or ``none``; by default the length in mbqueue.toml.
            max_jobs: stop after this many jobs.
            forever: wait for new jobs when no job is left, without a deadline.
            device: cpu, cuda or cuda:1; by default the first GPU, or the CPU if there is no GPU.
            max_idle: end after finding nothing to claim for this long, such as ``10m``; by default, no limit.
            tensorboard: write TensorBoard event files to state/logs/tensorboard.
            end_command: whether to run the end command of mbqueue.toml.
            report: receives the events (see `mbqueue.session.report`); by default they are dropped.
            stop: lets another thread stop the session.

        Raises:
            UsageError: if an argument is wrong, or nothing has been enqueued yet.
            QueueError: if the queue cannot be read or written.
            ProjectNotFound: if the working directory no longer exists.
        """
        working_folder()
        began = self._clock.monotonic()
        options = self._options(arguments, device=device, end_command=end_command)

        from mbqueue.session.notify import Notifier  # noqa: PLC0415
        from mbqueue.session.report import Relay, Report  # noqa: PLC0415
        from mbqueue.session.stop import StopRequest, graceful_signals  # noqa: PLC0415
        from mbqueue.session.tensorboard import TensorBoardReport  # noqa: PLC0415

        stop = StopRequest() if stop is None else stop
        report = Report() if report is None else report
        # Handle signals before the slow imports, so that a session that is stopped while starting ends gracefully.
        with graceful_signals(stop), ExitStack() as listeners:
            report.starting(LOADING)
            notifier = Notifier(
                self.folder.settings.notify, project=str(self.folder.root), on_trouble=Relay(report).note
            )
            heard: list[Report] = [report, listeners.enter_context(notifier)]
            if options.tensorboard:
                heard.append(listeners.enter_context(TensorBoardReport(self.folder.logs_dir / "tensorboard")))

            from mbqueue.session.worker import work  # noqa: PLC0415

            if options.session_seconds is not None:
                # The slow imports count as part of the session, because a batch system's time limit includes them.
                spent = self._clock.monotonic() - began
                options = replace(options, session_seconds=max(1.0, options.session_seconds - spent))
            everyone = Relay(*heard)
            try:
                outcome = work(self.folder, options, report=everyone, stop=stop)
            except Exception as error:
                everyone.session_ended(error)
                raise
            everyone.session_ended(outcome)
            return outcome

    @shows_arguments
    def work_on_devices(
        self,
        devices: Sequence[str],
        *,
        report_for: Callable[[str], Report] | None = None,
        stop: StopRequest | None = None,
        **arguments: Unpack[WorkArguments],
    ) -> DevicesOutcome:
        """Run one session on each device, all at the same time and in separate processes; return when all have ended.

        Results are byte-for-byte identical to a single session's if all sessions use the same number of threads.
        Signals are forwarded to all sessions; a second SIGINT ends all sessions at once. If a session dies, its report
        shows a note and the other sessions keep running. The other arguments are the same as in `work`, and apply to
        each session.

        Args:
            devices: names such as ``["0", "1"]``, ``["cuda:0", "cuda:1"]`` or ``["cpu", "cpu"]``.
            report_for: called with a device's label; returns the report for this device's session.

        Raises:
            UsageError: if an argument is wrong, or nothing has been enqueued yet.
        """
        from mbqueue.session.devices import Crew, parse_devices  # noqa: PLC0415
        from mbqueue.session.report import Report  # noqa: PLC0415
        from mbqueue.session.stop import StopRequest, graceful_signals  # noqa: PLC0415

        crew = Crew(
            self.folder,
            parse_devices(devices),
            self._options(arguments),
            report_for=report_for or (lambda _label: Report()),
            clock=self._clock,
        )
        stop = StopRequest() if stop is None else stop
        with graceful_signals(stop, at_once=crew.kill):
            return crew.run(stop)

    @shows_arguments
    def work_in_background(
        self,
        *,
        device: str | None = None,
        devices: Sequence[str] | None = None,
        **arguments: Unpack[WorkArguments],
    ) -> BackgroundSession:
        """Start a session in a process that outlives this one; return once the session is running.

        The log is in state/logs (`mbqueue logs -f`); `stop` ends the session. The arguments are the same as in `work`
        or, with ``devices``, in `work_on_devices`.

        Raises:
            UsageError: if a session is already running in the background, or an argument is wrong.
            SessionError: if the process ended before the session ran; the message includes the end of the log.
        """
        from mbqueue.session import background  # noqa: PLC0415

        options = self._options(arguments, device=device, devices=None if devices is None else tuple(devices))
        return background.start(self.folder, options, clock=self._clock)

    def _options(self, arguments: WorkArguments, **others: Any) -> WorkOptions:
        from mbqueue.session.options import WorkOptions  # noqa: PLC0415

        return replace(WorkOptions.of(self.folder.settings, **arguments), **others)

    def stop(self, *, session: str | None = None, wait_seconds: float = 60.0) -> list[StoppedSession]:
        """Ask this project's sessions on this machine to save their work and end; wait until they have ended.

        Args:
            session: the id of a session, as in `status`; by default all sessions.

        Returns:
            One outcome per session; empty if none of the requested sessions is running on this machine.
        """
        from mbqueue.session import background  # noqa: PLC0415

        return background.stop(self.folder, wait_seconds=wait_seconds, clock=self._clock, session=session)

    def log(self, *, lines: int = 50, follow: bool = False) -> Iterator[str]:
        """Yield the last lines of the newest background session's log.

        With ``follow``, also yield new lines until the session ends.

        Raises:
            UsageError: if no session has been started in the background.
        """
        from mbqueue.session import background  # noqa: PLC0415

        if background.came_with_a_copy(self.folder):
            tell(
                f"{self.folder.root} was copied or moved, and this log is from the original folder. To start a session "
                "here: mbqueue work --background"
            )
        return background.follow(self.folder, lines=lines, keep_on=follow, clock=self._clock)
