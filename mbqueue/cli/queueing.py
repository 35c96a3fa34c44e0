"""Commands that enqueue and control experiments."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbqueue.cli.console import print_json, print_line, say
from mbqueue.cli.options import (
    DropInvalidOption,
    ExperimentArgument,
    IdColumnOption,
    JsonOption,
    SearchArgument,
    TargetColumnOption,
    open_project,
    parse_folds,
    parse_seeds,
)
from mbqueue.clock import SystemClock, parse_duration, utc_text
from mbqueue.errors import counted
from mbqueue.queue.jobs import Event
from mbqueue.task import target_of

if TYPE_CHECKING:
    from mbqueue.queue.enqueueing import EnqueueOutcome

FoldOption = Annotated[int | None, typer.Option(help="Only this fold.", min=0, max=4)]


def enqueue(
    context: typer.Context,
    experiment: Annotated[
        str, typer.Argument(metavar="NAME|FILE", help="Name of an experiment in jobs/, or a TOML file.")
    ],
    folds: Annotated[str | None, typer.Option(help="Folds to run, for example 0,1 or 0-4.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Number of epochs per fold.", min=0)] = None,
    dataset: Annotated[str | None, typer.Option(help="A matbench task, `sample`, or the path of your data.")] = None,
    priority: Annotated[
        int | None, typer.Option(help="Experiments with a higher priority run first; 0 by default.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key, for example train.lr=3e-4."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the experiment in the queue, and of its results folder.")
    ] = None,
    drop_invalid: DropInvalidOption = False,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, for example 0-4; enqueues NAME.seed0, NAME.seed1 and so on.")
    ] = None,
    id_column: IdColumnOption = "",
    target_column: TargetColumnOption = "",
) -> None:
    """Add an experiment or a search to the queue.

    If the experiment is already in the queue, only new folds are added. If you changed the experiment's file, give a
    new name with --name.

    --seeds 0-4 enqueues the experiment five times, as NAME.seed0 to NAME.seed4.

    Example: mbqueue enqueue full_finetune --folds 0,1 --set train.lr=3e-4 --name trial
    """
    from mbqueue.experiment_file import parse_overrides

    chosen = {"data.id_column": id_column, "target.column": target_column}
    columns = {key: column for key, column in chosen.items() if column}
    given: dict[str, Any] = {
        "folds": None if folds is None else parse_folds(folds),
        "epochs": epochs,
        "dataset": dataset,
        "priority": priority or 0,
        "settings": parse_overrides(settings or []) | columns,
        "name": name,
        "drop_invalid": drop_invalid,
    }
    project = open_project(context)
    if seeds is None:
        outcomes: tuple[EnqueueOutcome, ...] = (project.enqueue(experiment, **given),)
    else:
        outcomes = project.enqueue_seeds(experiment, parse_seeds(seeds), **given)
    first = outcomes[0].experiment
    trial = first.spec.get("trial")
    if trial is not None:
        search = trial["search"]["name"]
        is_new = outcomes[0].outcome == "created"
        what = f"its first trial is {first.name}; sessions start the other trials" if is_new else "already in the queue"
        print_line(f"{search}: {what}. See: mbqueue status {search}")
        return
    for outcome in outcomes:
        print_line(enqueued(outcome))
    target = target_of(first.spec)
    column = f", column {target.column}" if target.column else ""
    say(f"Target: {target.axis}, of kind {target.kind}. Dataset: {first.dataset}{column}.")
    if target.kind != "energy" and experiment == "head_finetune":
        made = f"{target.kind}_head"
        say(f"{experiment} is meant for energies. For a target of kind {target.kind}, use {made} instead.")
    for experiment_now in (outcome.experiment for outcome in outcomes):
        if priority not in (None, experiment_now.priority):
            label = experiment_now.name
            say(f"The priority is still {experiment_now.priority}. To change it: mbqueue priority {label} {priority}")
    say("Start a session with: mbqueue work")


def enqueued(outcome: EnqueueOutcome) -> str:
    """Describe in one line what enqueueing an experiment changed."""
    label, results = outcome.experiment.name, outcome.experiment.results_dir
    return {
        "created": f"{label}: enqueued, {counted(outcome.n_jobs, 'job')}. Results will be in {results}",
        "unchanged": f"{label}: already in the queue with this spec; nothing was changed.",
        "folds added": f"{label}: folds {', '.join(map(str, outcome.folds))} added, {counted(outcome.n_jobs, 'job')}.",
    }[outcome.outcome]


def promote(
    context: typer.Context,
    search: SearchArgument,
    name: Annotated[str | None, typer.Option(help="Name of the experiment; by default SEARCH-best.")] = None,
    priority: Annotated[int, typer.Option(help="Experiments with a higher priority run first.")] = 0,
) -> None:
    """Enqueue the best settings of a search as an experiment on all five folds.

    The experiment's description names the best trial. The description and the results show the folds on which the
    search compared its trials.

    Example: mbqueue promote lr_search --name tuned
    """
    outcome = open_project(context).promote(search, name=name, priority=priority)
    print_line(enqueued(outcome))
    if outcome.outcome == "unchanged":
        return
    say(f"{outcome.experiment.spec['description']}.")
    say("Start a session with: mbqueue work")


def events(
    context: typer.Context,
    experiment: Annotated[str | None, typer.Argument(help="Only this experiment.")] = None,
    since: Annotated[str | None, typer.Option(help="Age of the oldest event to show, for example 2h.")] = None,
    limit: Annotated[int, typer.Option(help="Show at most this many events, the newest ones.", min=1, max=10**9)] = 50,
    as_json: JsonOption = False,
) -> None:
    """List all changes of job states, oldest first, with the session and reason of each.

    Example: mbqueue events full_finetune --since 2h
    """
    after = 0.0 if since is None else SystemClock().now() - parse_duration(since)
    rows = open_project(context).events(experiment, since=after, limit=limit)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    for row in rows:
        change = f"{row.from_state or 'new'} → {row.to_state}" if row.to_state else "note"
        print_line(f"{utc_text(row.at)}  {_label(row):<34}  {change:<22}  {row.why}  [{row.by}]")


def pause(context: typer.Context, experiment: ExperimentArgument, fold: FoldOption = None) -> None:
    """Pause an experiment or fold. A session that is training a paused fold writes a checkpoint, then releases the job.

    Example: mbqueue pause full_finetune --fold 2
    """
    changed = open_project(context).pause(experiment, fold=fold)
    print_line(
        f"{_place(experiment, fold)}: paused ({counted(changed, 'job')}). Resume with: mbqueue resume {experiment}"
    )


def resume(context: typer.Context, experiment: ExperimentArgument, fold: FoldOption = None) -> None:
    """Resume a paused experiment or fold.

    Example: mbqueue resume full_finetune
    """
    changed = open_project(context).resume(experiment, fold=fold)
    print_line(f"{_place(experiment, fold)}: resumed ({counted(changed, 'job')}).")


def cancel(
    context: typer.Context,
    experiment: ExperimentArgument,
    fold: FoldOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Cancel the remaining jobs of an experiment or fold, but keep committed epochs. `retry` restores cancelled jobs.

    Example: mbqueue cancel full_finetune --yes
    """
    project = open_project(context)
    project.status(experiment)  # reject an unknown name before asking for confirmation
    if not yes:
        typer.confirm(f"Cancel the unfinished jobs of {_place(experiment, fold)}?", abort=True, err=True)
    changed = project.cancel(experiment, fold=fold)
    print_line(
        f"{_place(experiment, fold)}: {counted(changed, 'job')} cancelled. "
        f"Restore the jobs with: mbqueue retry {experiment}"
    )


def retry(context: typer.Context, experiment: ExperimentArgument, fold: FoldOption = None) -> None:
    """Retry failed and cancelled jobs, which get their full number of attempts again.

    Jobs that are waiting after a failure run immediately. mbqueue rebuilds missing or damaged result files from the
    checkpoints.

    Example: mbqueue retry full_finetune --fold 3
    """
    changed = open_project(context).retry(experiment, fold=fold)
    print_line(f"{_place(experiment, fold)}: {counted(changed, 'job')} will be retried.")


def priority(
    context: typer.Context,
    experiment: ExperimentArgument,
    value: Annotated[int, typer.Argument(help="Experiments with a higher priority run first; the default is 0.")],
    fold: FoldOption = None,
) -> None:
    """Set the priority of an experiment or fold. The new priority applies when a session claims its next job.

    Write two dashes before a negative priority: -- -5

    Example: mbqueue priority head_finetune 10
    """
    changed = open_project(context).set_priority(experiment, value, fold=fold)
    print_line(f"{_place(experiment, fold)}: priority {value} ({counted(changed, 'job')} changed).")


def _label(event: Event) -> str:
    fold = "" if event.fold is None else f" fold {event.fold}"
    epoch = "" if event.epoch is None else f" epoch {event.epoch}"
    return f"{event.experiment or ''}{fold}{epoch or (f' {event.kind}' if event.kind else '')}"


def _place(experiment: str, fold: int | None) -> str:
    return experiment if fold is None else f"{experiment} fold {fold}"
