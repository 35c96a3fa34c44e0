"""The command ``mbqueue init``, which creates a project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mbqueue.cli.console import print_line, say
from mbqueue.project import init_project


def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="The project's folder.")] = Path(),
) -> None:
    """Create a project: jobs/ with five experiments, state/, results/ and mbqueue.toml.

    Existing files stay unchanged.

    Example: mbqueue init my-project
    """
    project, written = init_project(folder)
    for path in written:
        print_line(str(path))
    say(f"The project in {project.root} is ready. Next, run mbqueue enqueue full_finetune, then mbqueue work")
