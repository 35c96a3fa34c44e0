"""Read a file in jobs/ as plain values, and apply ``--set`` options, without pydantic."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mbqueue.errors import SpecError
from mbqueue.files import read_small_text


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a file in jobs/.

    Raises:
        SpecError: if the file cannot be read, or is not TOML.
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
    """A copy of nested values, with dotted ``overrides`` applied.

    Raises:
        SpecError: if a key goes through a value that is not a section.
    """
    copied = {key: dict(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    for key, value in overrides.items():
        _lay_over(copied, key, value)
    return copied


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """``["train.lr=3e-4"]`` as ``{"train.lr": 3e-4}``; values are read as TOML, bare words as strings.

    Raises:
        SpecError: for anything that is not KEY=VALUE.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key, text = key.strip(), text.strip()
        if not equals or not key or not text:
            raise SpecError(f"--set {assignment!r} is not KEY=VALUE. Write it like --set train.lr=3e-4.")
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
            raise SpecError(f"--set {dotted}: {section} is a single value, it has no key {key}.")
    content[key] = value
