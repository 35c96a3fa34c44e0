"""Read experiment files as plain dictionaries, and apply ``--set`` options, without importing pydantic."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mbqueue.errors import SpecError
from mbqueue.files import read_small_text


def read_toml(path: Path) -> dict[str, Any]:
    """Read an experiment file, as a nested dictionary.

    Raises:
        SpecError: if the file cannot be read, or is not valid TOML.
    """
    try:
        return tomllib.loads(read_small_text(path))
    except FileNotFoundError as error:
        raise SpecError(f"There is no experiment file {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not valid TOML: {error}.") from error


def laid_over(content: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a nested dictionary, and apply overrides such as ``{"train.lr": 3e-4}``.

    Raises:
        SpecError: if part of a dotted key names a single value instead of a section.
    """
    copied = {key: dict(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    for key, value in overrides.items():
        _lay_over(copied, key, value)
    return copied


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Convert ``["train.lr=3e-4"]`` to ``{"train.lr": 3e-4}``.

    Values are parsed as TOML. A value that is not valid TOML, such as a bare word, becomes a string.

    Raises:
        SpecError: if an assignment does not have the form KEY=VALUE.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key, text = key.strip(), text.strip()
        if not equals or not key or not text:
            raise SpecError(f"--set {assignment!r} is not KEY=VALUE. Write, for example, --set train.lr=3e-4.")
        try:
            overrides[key] = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            overrides[key] = text
    return overrides


def _lay_over(content: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise SpecError(f"--set {dotted}: {section} is a single value, not a section, so it has no key {key}.")
    content[key] = value
