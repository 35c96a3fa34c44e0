"""Write a page in docs/reference/commands/ for each command, from its help text and options.

    python tools/command_pages.py

Run this script after you change a command. A test compares the pages with the commands.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mbqueue.cli.app import SECTIONS, app

FOLDER = Path(__file__).parent.parent / "docs" / "reference" / "commands"
_MADE = "<!-- Made by tools/command_pages.py from the commands in mbqueue/cli; change those, not this page. -->"
_INDEX_HEAD = """\
`mbqueue COMMAND --help` prints the text of a command's page. The options in this table go before the command:
`mbqueue --debug work`. See also the [exit codes](../status-json.md#exit-codes).
"""


def pages() -> dict[str, str]:
    """Return the text of each page, by file name."""
    root = typer.main.get_command(app)
    commands: dict[str, Any] = root.commands  # type: ignore[attr-defined]
    texts = {f"{name}.md": "\n".join(_page(f"mbqueue {name}", commands[name], "#")) for name in commands}
    return texts | {"index.md": "\n".join(_index(root))}


def _index(root: Any) -> Iterator[str]:
    yield from ("# Commands\n", f"{_MADE}\n", _INDEX_HEAD)
    yield from _parameters(root)
    for title, commands in SECTIONS.items():
        yield from (f"## {title}\n", "| command | what it does |", "|---|---|")
        yield from (f"| [`{name}`]({name}.md) | {_cell(summary)} |" for name, (_, summary) in commands.items())
        yield ""


def _page(name: str, command: Any, level: str) -> Iterator[str]:
    yield f"{level} `{name}`\n"
    if level == "#":
        yield f"{_MADE}\n"
    text, _, example = inspect.cleandoc(command.help or "").partition("Example:")
    yield f"{_prose(text)}\n"
    below = getattr(command, "commands", {})
    if not below:
        yield f"```text\n{_usage(name, command)}\n```\n"
    if example:
        yield f"Example:\n\n```text\n{' '.join(example.split())}\n```\n"
    yield from _parameters(command)
    for subcommand, its in below.items():
        yield from _page(f"{name} {subcommand}", its, level + "#")


def _prose(text: str) -> str:
    """Format paragraphs, and set options and environment variables as code."""
    joined = "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())
    return re.sub(r"(?<![`\w-])(--[a-z][\w-]*|\$[A-Z_]+)(?![`\w])", r"`\1`", joined).replace("<", "&lt;")


def _usage(name: str, command: Any) -> str:
    arguments = [_argument(parameter) for parameter in command.params if parameter.param_type_name == "argument"]
    return " ".join([name, "[OPTIONS]", *arguments])


def _argument(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name.upper()).strip("[].") + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _parameters(command: Any) -> Iterator[str]:
    rows = [_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
    if rows:
        yield from ("| argument or option | value | default | meaning |", "|---|---|---|---|", *rows, "")


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names = f"`{_argument(parameter)}`"
    else:
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    default = "required" if parameter.required else _default(parameter)
    return f"| {names} | {_value(parameter)} | {default} | {_cell(_prose(parameter.help or ''))} |"


def _value(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return ""
    kind = parameter.type
    if choices := getattr(kind, "choices", None):
        return " or ".join(f"`{choice}`" for choice in choices)
    limits = (("≥", getattr(kind, "min", None)), ("≤", getattr(kind, "max", None)))
    bounds = [f"{sign} {limit}" for sign, limit in limits if limit is not None]
    name = {"str": "text", "int": "integer", "float": "number"}.get(kind.name.split()[0], kind.name.split()[0])
    return ", ".join([name, *bounds, *["repeatable"] * getattr(parameter, "multiple", False)])


def _default(parameter: Any) -> str:
    value = parameter.default
    if value in (None, False, "", (), []) or callable(value):
        return ""
    if value is True:
        return f"`{parameter.opts[0]}`"
    return f"`{getattr(value, 'value', value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n\n", " ")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
