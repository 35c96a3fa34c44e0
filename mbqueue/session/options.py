"""The options of a session, and their conversion to command-line arguments. This module does not import torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

from mbqueue.clock import parse_duration
from mbqueue.errors import UsageError
from mbqueue.settings import Settings

NO_DEADLINE = "none"


class WorkArguments(TypedDict, total=False):
    """The arguments that all methods for starting sessions share; see `mbqueue.Project.work`."""

    session: str | None
    max_jobs: int | None
    forever: bool
    max_idle: str | None
    tensorboard: bool


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """The options of a session.

    Attributes:
        session_seconds: length of the session; None for no deadline.
        max_jobs: stop after this many jobs; None for no limit.
        forever: wait for new jobs when none is left.
        idle_seconds: how long to wait for a job while other sessions are working; None for no limit.
        device: name of the device, such as "cuda:1"; None for the first GPU, or the CPU if there is no GPU.
        devices: run a session on each of these devices instead (`mbqueue.session.devices.parse_devices`).
        tensorboard: write event files for TensorBoard.
        end_command: whether to run the end command of mbqueue.toml. A process that starts several sessions runs the end
            command once, after all sessions have ended.
    """

    session_seconds: float | None = None
    max_jobs: int | None = None
    forever: bool = False
    idle_seconds: float | None = None
    device: str | None = None
    devices: tuple[str, ...] | None = None
    tensorboard: bool = False
    end_command: bool = True

    @classmethod
    def of(
        cls,
        settings: Settings,
        *,
        session: str | None = None,
        max_jobs: int | None = None,
        forever: bool = False,
        max_idle: str | None = None,
        tensorboard: bool = False,
    ) -> WorkOptions:
        """Convert the arguments of `Project.work` to options; by default, a session has the length in the settings.

        Raises:
            UsageError: if a text is not a duration, or a session is given both a length and ``forever``.
        """
        if forever and session not in (None, NO_DEADLINE):
            raise UsageError("--forever runs without a deadline, so leave out --session.")
        if forever or session == NO_DEADLINE:
            seconds = None
        else:
            seconds = settings.session_seconds if session is None else parse_duration(session)
        return cls(
            session_seconds=seconds,
            max_jobs=max_jobs,
            forever=forever,
            idle_seconds=None if max_idle is None else parse_duration(max_idle),
            tensorboard=tensorboard,
        )

    def arguments(self) -> list[str]:
        """The options as command-line arguments of `mbqueue work`."""
        values = {
            "--session": NO_DEADLINE if self.session_seconds is None else _duration(self.session_seconds),
            "--max-jobs": self.max_jobs,
            "--max-idle": None if self.idle_seconds is None else _duration(self.idle_seconds),
            "--device": self.device,
            "--devices": None if self.devices is None else ",".join(self.devices),
        }
        flags = {
            "--forever": self.forever,
            "--tensorboard": self.tensorboard,
            "--no-end-command": not self.end_command,
        }
        given = [text for name, value in values.items() if value is not None for text in (name, str(value))]
        return given + [name for name, wanted in flags.items() if wanted]


Method = TypeVar("Method", bound=Callable[..., Any])


def shows_arguments(method: Method) -> Method:
    """Let `help` show the arguments of `WorkOptions.of` and their defaults instead of a method's ``**arguments``."""
    own = inspect.signature(method)
    shared = [one for one in inspect.signature(WorkOptions.of).parameters.values() if one.kind is one.KEYWORD_ONLY]
    named = [one for one in own.parameters.values() if one.kind is not one.VAR_KEYWORD]
    setattr(method, "__signature__", own.replace(parameters=[*named, *shared]))  # noqa: B010
    return method


def _duration(seconds: float) -> str:
    return f"{seconds:.3f}s"
