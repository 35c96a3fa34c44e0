"""Commands for data: prepare, tasks and the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbqueue.cli.console import print_json, print_line, say
from mbqueue.cli.options import (
    DropInvalidOption,
    IdColumnOption,
    JsonOption,
    TargetColumnOption,
    current_project,
    open_project,
)
from mbqueue.clock import format_duration, utc_text
from mbqueue.errors import CacheError, counted
from mbqueue.experiment import OFFICIAL_DATASET, DataSpec

if TYPE_CHECKING:
    from mbqueue.api.tasks import TaskEntry

#: Seconds between progress lines in a log.
_LINE_SECONDS = 15.0

cache = typer.Typer(
    name="cache",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="List, verify or prune the project's cache of converted data. mbqueue can rebuild all converted data.",
)


def prepare(
    context: typer.Context,
    dataset: Annotated[str, typer.Argument(metavar="[DATASET]", help="Name or path of a dataset.")] = OFFICIAL_DATASET,
    limit: Annotated[int, typer.Option(help="Use at most this many random crystals; 0 uses all.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Random seed for --limit.", min=0)] = 0,
    drop_invalid: DropInvalidOption = False,
    id_column: IdColumnOption = "",
    target_column: TargetColumnOption = "",
) -> None:
    """Read a dataset and convert it to graphs in the project's cache, on all CPU cores.

    `mbqueue work` also prepares data when needed. You can stop the command at any time; the next call resumes.

    Example: mbqueue prepare sample
    """
    project = open_project(context)
    wanted = DataSpec(dataset=dataset, limit=limit, drop_invalid=drop_invalid, id_column=id_column)
    say(f"preparing {dataset} …")  # print this before the imports, which are slow on a new machine
    with progress_bars() as progress:
        data = project.prepare(wanted, target_column=target_column, seed=seed, progress=progress)
    for crystal_id, reason in data.dropped:
        say(f"dropped {crystal_id}: {reason}")
    widened = data.graphs.widened()
    print_line(f"{counted(len(data.crystals), 'crystal')} in {data.graphs.folder}")
    print_line(f"{len(data.dropped)} dropped, {len(widened)} with a larger cut-off so that no atom is isolated")


def tasks(as_json: JsonOption = False) -> None:
    """List the matbench tasks with their size, target and unit, and the best published score.

    Each task is a dataset. mbqueue downloads the dataset's file when it is first needed.

    Example: mbqueue tasks --json
    """
    from mbqueue.api.tasks import list_tasks

    found = list_tasks()
    if as_json:
        print_json([_task_row(entry) for entry in found])
        return
    for entry in found:
        task, best = entry.task, entry.best
        score = "" if best is None else f"{entry.measure} {task.target.with_unit(f'{best.score:g}')} by {best.name}"
        where = "on this machine" if entry.is_here else "not downloaded yet"
        print_line(f"{task.dataset:<22} {task.n:>7,} crystals  {task.target.axis}, {task.target.kind}")
        print_line(f"{'':<22} {where}; best published: {score or 'unknown'}")


def _task_row(entry: TaskEntry) -> dict[str, Any]:
    task, best = entry.task, entry.best
    return {
        "dataset": task.dataset,
        "crystals": task.n,
        "target": {"name": task.target.name, "unit": task.target.unit, "kind": task.target.kind},
        "is_here": entry.is_here,
        "measure": entry.measure,
        "best": None if best is None else {"name": best.name, "score": best.score},
    }


@cache.command("list")
def cache_list(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the caches, most recently changed first.

    Example: mbqueue cache list
    """
    from mbqueue.data.cache_folder import stored_caches

    found = stored_caches(current_project(context).cache_dir)
    if as_json:
        print_json([{**asdict(entry), "folder": str(entry.folder)} for entry in found])
        return
    for entry in found:
        what = f"{counted(entry.n_crystals, 'crystal')} of {entry.source}" if entry.n_crystals else entry.kind
        state = "" if entry.current else "  (unusable, from an older version)"
        if entry.is_unfinished:
            state = f"  ({entry.how_far})"
        print_line(f"{entry.folder.name:<34} {entry.size / 1e6:>9.1f} MB  {utc_text(entry.used_at)}  {what}{state}")
    print_line(f"{counted(len(found), 'cache')}, {sum(entry.size for entry in found) / 1e6:.1f} MB in all")


@cache.command("verify")
def cache_verify(
    context: typer.Context,
    repair: Annotated[bool, typer.Option("--repair", help="Rebuild damaged and missing shards.")] = False,
) -> None:
    """Verify the checksums of all cached graphs. The exit code is 1 if damage remains.

    Example: mbqueue cache verify --repair
    """
    from mbqueue.data.cache_folder import stored_caches, verify_graphs

    left: list[str] = []
    for entry in stored_caches(current_project(context).cache_dir):
        if entry.kind != "graphs" or not entry.current:
            continue
        verdict = verify_graphs(entry, repair=repair)
        left += verdict.left
        if verdict.left:
            state = "DAMAGED"
        elif repair and (verdict.wrong or entry.is_unfinished):
            state = "repaired" if verdict.wrong else "completed"
        else:
            state = entry.how_far if entry.is_unfinished else "sound"
        print_line(f"{entry.folder.name}: {state}")
        for problem in verdict.wrong:
            say(problem)
    if left and repair:
        raise CacheError(f"This machine could not repair {len(left)} of the problems above.")
    if left:
        raise CacheError(
            "mbqueue rebuilds damaged shards when it next uses them. To rebuild them now: mbqueue cache verify --repair"
        )


@cache.command("prune")
def cache_prune(
    context: typer.Context,
    everything: Annotated[
        bool, typer.Option("--all", help="Also remove data that experiments in the queue still need.")
    ] = False,
) -> None:
    """Remove caches, except those that unfinished experiments need or that a session is building.

    Example: mbqueue cache prune
    """
    removed = open_project(context).prune_cache(everything=everything)
    for entry in removed:
        print_line(f"removed {entry.folder.name}, {entry.size / 1e6:.1f} MB")
    print_line(f"{counted(len(removed), 'cache')} removed, {sum(entry.size for entry in removed) / 1e6:.1f} MB freed")


@contextmanager
def progress_bars() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Show progress on standard error: bars in a terminal, and occasional lines in a log or notebook.

    Yields:
        A function that takes a label and returns a callback. The callback takes the work done and the total work.
    """
    # Import rich here, so that the other commands in this module start faster.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from mbqueue.session.narration import amount_of

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_line
        return
    amount, rate = TextColumn("{task.fields[amount]}"), TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), amount, rate, TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:

        def start(what: str) -> Callable[[int, int], None]:
            task = bars.add_task(what, amount="", rate="")

            def advanced(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total, amount=amount_of(what, done, total))
                speed = bars.tasks[task].speed
                bars.update(task, rate=f"{speed:,.3g}/s" if speed and what != "reading" else "")

            return advanced

        yield start


def _progress_line(what: str) -> Callable[[int, int], None]:
    from mbqueue.session.narration import amount_of

    said = float("-inf")
    begin: tuple[float, int] | None = None  # when progress was first reported, and the work done by then

    def advanced(done: int, total: int) -> None:
        nonlocal said, begin
        now = time.monotonic()
        if begin is None and done:
            begin = now, done
        if now - said >= _LINE_SECONDS or done >= total:
            said = now
            left = ""
            if begin is not None and begin[1] < done < total:
                seconds = (now - begin[0]) / (done - begin[1]) * (total - done)
                rate = (done - begin[1]) / (now - begin[0])
                speed = "" if what == "reading" else f", {rate:,.3g}/s"
                left = f"{speed}, {format_duration(seconds)} left"
            say(f"{what} {amount_of(what, done, total)}{left}")

    return advanced
