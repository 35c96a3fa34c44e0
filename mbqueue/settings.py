"""The settings in mbqueue.toml: how sessions behave. No setting affects the results.

Each setting is one field with a name, type, default, bounds and description. docs/reference/experiment-file.md is
generated from these fields. Settings are plain dataclasses, which this module checks, because every command reads the
settings, and importing pydantic would slow down short commands such as `mbqueue status`. `mbqueue.experiment` can
afford pydantic, because few commands read experiments. msgspec loads quickly, but version 0.23 reports only the first
invalid key, and not its value.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args, get_origin, get_type_hints
from urllib.parse import unquote

from mbqueue.buckets import wrong_address
from mbqueue.clock import parse_duration
from mbqueue.errors import SpecError, UsageError
from mbqueue.files import read_small_text

SETTINGS_FILE = "mbqueue.toml"

NotifyEvent = Literal["fold done", "experiment done", "job failed", "session ended"]


def _duration(text: str) -> str | None:
    try:
        parse_duration(text)
    except UsageError as error:
        return str(error)
    return None


def wrong_queue_url(text: str) -> str | None:
    """Describe what is wrong with a queue's URL, or return None. The description never repeats the URL, which may
    contain a password."""
    fits = not text or text.startswith(("postgresql://", "postgres://"))
    return None if fits else "must have the form postgresql://USER@HOST/DATABASE"


#: Matches USER:PASSWORD@ after the slashes, even if the password contains a question mark. The pattern does not match
#: HOST:PORT, even if an option after it contains an @.
_PASSWORD = re.compile(r"//[^/@]*:[^@?]*@|//[^/@:?]*:(?!\d+[?,])[^/@]*@")


def _wrong_shared_url(text: str) -> str | None:
    """Like `wrong_queue_url`, but also refuse a password, because the settings file may be shared or backed up."""
    names = {unquote(option.partition("=")[0]) for option in text.partition("?")[2].split("&")}
    if _PASSWORD.search(text) or names & {"password", "sslpassword"}:
        return (
            "must not contain a password: put the password into ~/.pgpass or PGPASSWORD, or the whole URL into "
            "MBQUEUE_QUEUE"
        )
    return wrong_queue_url(text)


def _setting(
    default: Any,
    description: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    le: float | None = None,
    pattern: str | None = None,
    check: Callable[[Any], str | None] | None = None,
    is_secret: bool = False,
) -> Any:
    """Define a setting as a dataclass field.

    Args:
        check: a function that returns what is wrong with a value of the right type, or None if it is valid.
        is_secret: whether to leave the value out of the repr, so that it never appears in logs or tracebacks.
    """
    metadata = {"description": description, "gt": gt, "ge": ge, "le": le, "pattern": pattern, "check": check}
    return dataclasses.field(default=default, metadata=metadata, repr=not is_secret)


@dataclass(frozen=True, kw_only=True)
class NotifySettings:
    """[notify]: how and when a session sends notifications."""

    command: str = _setting(
        "",
        "Shell command to run for each event, with MBQUEUE_EVENT and MBQUEUE_TEXT set and JSON on standard input.",
        is_secret=True,
    )
    webhook: str = _setting(
        "",
        "URL to which the session posts the JSON, in a form that Slack and Discord accept.",
        pattern=r"|https?://\S+",
        is_secret=True,
    )
    events: tuple[NotifyEvent, ...] = _setting(get_args(NotifyEvent), "Which events trigger a notification.")
    timeout_seconds: float = _setting(10.0, "Time limit of one notification, in seconds.", gt=0, le=300)


@dataclass(frozen=True, kw_only=True)
class Settings:
    session: str = _setting(
        "1h50m", "Length of a session. The option `--session` of `mbqueue work` takes precedence.", check=_duration
    )
    checkpoint_minutes: float = _setting(5.0, "Minutes between checkpoints within an epoch.", gt=0)
    pruned_hours: float = _setting(24.0, "Hours to keep the checkpoints of pruned trials.", ge=0)
    lease_seconds: float = _setting(
        120.0, "A session that sends no heartbeat for this many seconds loses its job.", ge=1
    )
    live_dir: str = _setting(
        "", "Local folder for the live state of a project on a drive; the default is a folder in ~/.cache."
    )
    queue: str = _setting(
        "",
        "URL of a queue that several machines share: postgresql://USER@HOST/DATABASE. Put the password in ~/.pgpass, "
        "PGPASSWORD or MBQUEUE_QUEUE. By default, the queue is a SQLite file in state/. MBQUEUE_QUEUE takes "
        "precedence.",
        check=_wrong_shared_url,
        is_secret=True,
    )
    store: str = _setting(
        "",
        "Object store in which several machines share checkpoints, results and caches: s3://bucket/prefix, gs://, "
        "az:// or file:///folder. Never include keys. MBQUEUE_STORE takes precedence.",
        check=wrong_address,
    )
    end_command: str = _setting(
        "",
        "Shell command to run when a session has ended and published everything, for example to unmount a drive.",
        is_secret=True,
    )
    end_command_seconds: float = _setting(120.0, "Time limit of the end command, in seconds.", gt=0, le=3600)
    notify: NotifySettings = NotifySettings()

    @property
    def session_seconds(self) -> float:
        return parse_duration(self.session)


def load_settings(root: Path) -> Settings:
    """Read the settings in ``root``/mbqueue.toml; return the defaults if the file does not exist.

    Raises:
        SpecError: if settings are wrong; the error lists each wrong key, its value and what is allowed.
    """
    path = root / SETTINGS_FILE
    try:
        content = tomllib.loads(read_small_text(path))
    except FileNotFoundError:
        return Settings()
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not valid TOML: {error}.") from error
    return parse_settings(content, source=str(path))


def parse_settings(content: Mapping[str, Any], *, source: str) -> Settings:
    """Make settings from nested dictionaries, and check them.

    Raises:
        SpecError: if settings are wrong; the error lists each wrong key, its value and what is allowed.
    """
    if wrong := list(_wrong(Settings, content)):
        lines = "".join(f"\n  {line}" for line in wrong)
        raise SpecError(f"{source} has invalid settings:{lines}\nFix the file. To use a default, delete the line.")
    settings: Settings = _made(Settings, content)
    return settings


def fields_of(section: type) -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Map the name of each setting in a section to its type and its field."""
    types = get_type_hints(section)
    return {field.name: (types[field.name], field) for field in dataclasses.fields(section)}


def is_section(kind: Any) -> TypeGuard[type]:
    """Whether a setting's type is a section, such as [notify], rather than a value."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _made(section: type, content: Mapping[str, Any]) -> Any:
    fields = fields_of(section)
    return section(**{name: _converted(fields[name][0], value) for name, value in content.items()})


def _converted(kind: Any, value: Any) -> Any:
    if is_section(kind):
        return _made(kind, value)
    return float(value) if kind is float else tuple(value) if get_origin(kind) is tuple else value


def _wrong(section: type, content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    fields = fields_of(section)
    for name, value in content.items():
        if name not in fields:
            yield f"{prefix}{name}: there is no such key. Allowed keys: {', '.join(fields)}."
            continue
        kind, field = fields[name]
        if is_section(kind):
            if isinstance(value, Mapping):
                yield from _wrong(kind, value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}: is a section; write [{name}], and its keys on the lines below"
        elif problem := _problem(kind, field.metadata, value):
            # The message leaves out text values, which may be passwords or secret addresses.
            yield f"{prefix}{name}{f' = {value!r}' if isinstance(value, int | float) else ''}: {problem}"


def _problem(kind: Any, allowed: Mapping[str, Any], value: Any) -> str | None:
    if get_origin(kind) is tuple:
        choices = get_args(get_args(kind)[0])
        fits = isinstance(value, list) and all(one in choices for one in value)
        return None if fits else f"must be a list; its items can be {', '.join(map(repr, choices))}"
    if not _is_of(kind, value):
        return f"must be {_KINDS[kind]}"
    for sign, bound, within in (
        ("above", allowed["gt"], operator.gt),
        ("at least", allowed["ge"], operator.ge),
        ("at most", allowed["le"], operator.le),
    ):
        if bound is not None and not within(value, bound):
            return f"must be {sign} {bound:g}"
    if allowed["pattern"] is not None and not re.fullmatch(allowed["pattern"], value):
        return f"must look like {allowed['pattern']}"
    check: Callable[[Any], str | None] | None = allowed["check"]
    return None if check is None else check(value)


_KINDS = {float: "a number", int: "a whole number", str: "text in quotes", bool: "true or false"}


def _is_of(kind: type, value: Any) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float) and math.isfinite(value) if kind is float else isinstance(value, kind)
