"""The settings in mbqueue.toml: how sessions behave. No setting changes a result.

Each setting is one field with a name, type, default, bounds and description. docs/reference/experiment-file.md is
generated from these fields. Settings are plain dataclasses, checked here, because every command reads them, and
importing pydantic alone takes longer than all the rest of `mbqueue status`. Experiments (mbqueue.experiment) use
pydantic, since few commands read them.
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
    """The problem with a queue's URL, or None; never repeats the URL, which may contain a password."""
    fits = not text or text.startswith(("postgresql://", "postgres://"))
    return None if fits else "must be a URL like postgresql://USER@HOST/DATABASE"


#: USER:PASSWORD@ after the slashes, even if the password has a ?, but not HOST:PORT before an option with an @.
_PASSWORD = re.compile(r"//[^/@]*:[^@?]*@|//[^/@:?]*:(?!\d+[?,])[^/@]*@")


def _wrong_shared_url(text: str) -> str | None:
    """The problem with a queue's URL in a file that may be shared and backed up, or None; see `wrong_queue_url`."""
    names = {unquote(option.partition("=")[0]) for option in text.partition("?")[2].split("&")}
    if _PASSWORD.search(text) or names & {"password", "sslpassword"}:
        return "must not contain a password: put it into ~/.pgpass or PGPASSWORD, or the whole URL into MBQUEUE_QUEUE"
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
    """Make a field of a section. ``check`` returns the problem with a value of the right type, or None.

    A secret field is left out of the repr, so it does not appear in logs and tracebacks.
    """
    metadata = {"description": description, "gt": gt, "ge": ge, "le": le, "pattern": pattern, "check": check}
    return dataclasses.field(default=default, metadata=metadata, repr=not is_secret)


@dataclass(frozen=True, kw_only=True)
class NotifySettings:
    """[notify]: where a session reports events."""

    command: str = _setting(
        "", "Run by /bin/sh, with MBQUEUE_EVENT and MBQUEUE_TEXT set and the JSON on standard input.", is_secret=True
    )
    webhook: str = _setting(
        "",
        "URL that gets the JSON by POST; Slack and Discord read it.",
        pattern=r"|https?://\S+",
        is_secret=True,
    )
    events: tuple[NotifyEvent, ...] = _setting(get_args(NotifyEvent), "Which events to report.")
    timeout_seconds: float = _setting(10.0, "How long one notification may take.", gt=0, le=300)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of the file."""

    session: str = _setting("1h50m", "Length of a session, unless `mbqueue work` sets another.", check=_duration)
    checkpoint_minutes: float = _setting(5.0, "Minutes between checkpoints within an epoch.", gt=0)
    pruned_hours: float = _setting(24.0, "How long the checkpoints of a pruned trial of a search are kept.", ge=0)
    lease_seconds: float = _setting(120.0, "How long a silent session keeps its job.", ge=1)
    live_dir: str = _setting(
        "", "Local folder for live state, if the project is on a drive; by default one below ~/.cache."
    )
    queue: str = _setting(
        "",
        "The queue that several machines share: postgresql://USER@HOST/DATABASE, without a password (put it in "
        "~/.pgpass, PGPASSWORD or MBQUEUE_QUEUE); by default a SQLite file in state/. MBQUEUE_QUEUE takes precedence.",
        check=_wrong_shared_url,
        is_secret=True,
    )
    store: str = _setting(
        "",
        "Object storage for checkpoints, results and caches that several machines share: s3://bucket/prefix, gs://, "
        "az:// or file:///folder. Never include keys; MBQUEUE_STORE takes precedence.",
        check=wrong_address,
    )
    end_command: str = _setting(
        "",
        "Run by /bin/sh when a session has ended and published everything (flush and unmount a drive).",
        is_secret=True,
    )
    end_command_seconds: float = _setting(120.0, "How long the end command may take.", gt=0, le=3600)
    notify: NotifySettings = NotifySettings()

    @property
    def session_seconds(self) -> float:
        """Length of a session in seconds."""
        return parse_duration(self.session)


def load_settings(root: Path) -> Settings:
    """Read the settings in ``root``/mbqueue.toml; without that file, the defaults.

    Raises:
        SpecError: naming each wrong key, its value and what is allowed.
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
    """Make settings from nested plain values, and check them.

    Raises:
        SpecError: naming each wrong key, its value and what is allowed.
    """
    if wrong := list(_wrong(Settings, content)):
        lines = "".join(f"\n  {line}" for line in wrong)
        raise SpecError(f"{source} has wrong settings:{lines}\nFix the file; a missing line has its default.")
    settings: Settings = _made(Settings, content)
    return settings


def fields_of(section: type) -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Name → (type, field) of each setting of a section."""
    types = get_type_hints(section)
    return {field.name: (types[field.name], field) for field in dataclasses.fields(section)}


def is_section(kind: Any) -> TypeGuard[type]:
    """Whether a setting of this type is a section of settings."""
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
            yield f"{prefix}{name}: there is no such key. Known here: {', '.join(fields)}."
            continue
        kind, field = fields[name]
        if is_section(kind):
            if isinstance(value, Mapping):
                yield from _wrong(kind, value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}: is a section; write [{name}] and its keys below"
        elif problem := _problem(kind, field.metadata, value):
            # The message does not repeat a text value, which may be a password or a secret address.
            yield f"{prefix}{name}{f' = {value!r}' if isinstance(value, int | float) else ''}: {problem}"


def _problem(kind: Any, allowed: Mapping[str, Any], value: Any) -> str | None:
    """The problem with a value of a setting; None if the value is valid."""
    if get_origin(kind) is tuple:
        choices = get_args(get_args(kind)[0])
        fits = isinstance(value, list) and all(one in choices for one in value)
        return None if fits else f"must be a list of {', '.join(map(repr, choices))}"
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
