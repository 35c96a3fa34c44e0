"""Commands that enqueue and steer experiments."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbqueue.cli.console import print_json, print_line, say
from mbqueue.cli.options import (
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
from mbqueue.task import Kind, target_of

if TYPE_CHECKING:
    from mbqueue.queue.enqueue import EnqueueOutcome

_AS: dict[Kind, str] = {"energy": "an energy", "scalar": "a number", "class": "a class"}

FoldOption = Annotated[int | None, typer.Option(help="Only this fold.", min=0, max=4)]


def enqueue(
    context: typer.Context,
    experiment: Annotated[str, typer.Argument(metavar="NAME|FILE", help="An experiment in jobs/, or a TOML file.")],
    folds: Annotated[str | None, typer.Option(help="Folds to run, like 0,1 or 0-4.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of every fold.", min=0)] = None,
    dataset: Annotated[str | None, typer.Option(help="matbench_mp_e_form, sample, or a path.")] = None,
    priority: Annotated[int | None, typer.Option(help="Higher runs first; 0 by default.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one key, like train.lr=3e-4.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name in the queue and of the results folder.")] = None,
    drop_invalid: Annotated[
        bool, typer.Option("--drop-invalid", help="Leave out unusable entries, and report them.")
    ] = False,
    seeds: Annotated[
        str | None, typer.Option(help="Enqueue once for each of these seeds, like 0-4, as NAME.seed0 and so on.")
    ] = None,
    id_column: IdColumnOption = "",
    target_column: TargetColumnOption = "",
) -> None:
    """Add an experiment or a search to the queue.

    Enqueueing the same spec again changes nothing. New folds are added. A changed spec needs a new name (--name).

    With --seeds 0-4 the experiment is enqueued five times, as NAME.seed0 to NAME.seed4.

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
        what = f"its first trial is {first.name}; sessions begin the others" if is_new else "already in the queue"
        print_line(f"{search}: {what}. See: mbqueue status {search}")
        return
    for outcome in outcomes:
        print_line(_enqueued(outcome))
    target = target_of(first.spec)
    column = f", column {target.column}" if target.column else ""
    say(f"Predicts the {target.axis} as {_AS[target.kind]}: {first.dataset}{column}.")
    if target.kind != "energy" and experiment == "head_finetune":
        made = f"{target.kind}_head"
        say(f"The settings of {experiment} were chosen for energies. For {_AS[target.kind]}, {made} fits better.")
    for experiment_now in (outcome.experiment for outcome in outcomes):
        if priority not in (None, experiment_now.priority):
            label = experiment_now.name
            say(f"The priority stays {experiment_now.priority}. To change it: mbqueue priority {label} {priority}")
    say("Start a session with: mbqueue work")


def _enqueued(outcome: EnqueueOutcome) -> str:
    """One line that describes the action."""
    label, results = outcome.experiment.name, outcome.experiment.results_dir
    return {
        "created": f"{label}: enqueued, {counted(outcome.n_jobs, 'job')}. Results will be in {results}",
        "unchanged": f"{label}: already in the queue with this spec; nothing was changed.",
        "folds added": f"{label}: folds {', '.join(map(str, outcome.folds))} added, {counted(outcome.n_jobs, 'job')}.",
    }[outcome.outcome]


def promote(
    context: typer.Context,
    search: SearchArgument,
    name: Annotated[str | None, typer.Option(help="Name of the experiment; SEARCH-best unless given.")] = None,
    priority: Annotated[int, typer.Option(help="Higher runs first.")] = 0,
) -> None:
    """Enqueue the best settings of a search as an experiment on all five folds.

    The description names the trial and the folds that chose it, and the results mark these folds.

    Example: mbqueue promote lr_search --name tuned
    """
    outcome = open_project(context).promote(search, name=name, priority=priority)
    label = outcome.experiment.name
    if outcome.outcome == "unchanged":
        print_line(f"{label}: already in the queue with this spec; nothing was changed.")
        return
    print_line(f"{label}: enqueued, {counted(outcome.n_jobs, 'job')}. {outcome.experiment.spec['description']}.")
    say("Start a session with: mbqueue work")


def events(
    context: typer.Context,
    experiment: Annotated[str | None, typer.Argument(help="Only this experiment.")] = None,
    since: Annotated[str | None, typer.Option(help="Show only events from the last 2h, or any other duration.")] = None,
    limit: Annotated[int, typer.Option(help="Show at most this many of the newest.", min=1, max=10**9)] = 50,
    as_json: JsonOption = False,
) -> None:
    """List every change of a job's state, with its session and reason, oldest first.

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
    """Stop handing out jobs of an experiment or fold; a running epoch writes a checkpoint and is released.

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
    """Drop the remaining jobs of an experiment or fold; committed epochs stay. `retry` restores the jobs.

    Example: mbqueue cancel full_finetune --yes
    """
    project = open_project(context)
    project.status(experiment)  # raises errors before the command asks, not after
    if not yes:
        typer.confirm(f"Cancel the unfinished jobs of {_place(experiment, fold)}?", abort=True, err=True)
    changed = project.cancel(experiment, fold=fold)
    print_line(
        f"{_place(experiment, fold)}: {counted(changed, 'job')} cancelled. "
        f"Restore the jobs with: mbqueue retry {experiment}"
    )


def retry(context: typer.Context, experiment: ExperimentArgument, fold: FoldOption = None) -> None:
    """Retry failed and cancelled jobs with all their attempts, and end the wait of jobs that failed recently.

    Missing or damaged result files are rebuilt from the checkpoints.

    Example: mbqueue retry full_finetune --fold 3
    """
    changed = open_project(context).retry(experiment, fold=fold)
    print_line(f"{_place(experiment, fold)}: {counted(changed, 'job')} will be retried.")


def priority(
    context: typer.Context,
    experiment: ExperimentArgument,
    value: Annotated[int, typer.Argument(help="Higher runs first; 0 is the default.")],
    fold: FoldOption = None,
) -> None:
    """Set the priority of an experiment or fold, from the next claim on.

    Example: mbqueue priority head_finetune 10 (a negative one after two dashes: -- -5)
    """
    changed = open_project(context).set_priority(experiment, value, fold=fold)
    print_line(f"{_place(experiment, fold)}: priority {value} ({counted(changed, 'job')} changed).")


def _label(event: Event) -> str:
    fold = "" if event.fold is None else f" fold {event.fold}"
    epoch = "" if event.epoch is None else f" epoch {event.epoch}"
    return f"{event.experiment or ''}{fold}{epoch or (f' {event.kind}' if event.kind else '')}"


def _place(experiment: str, fold: int | None) -> str:
    return experiment if fold is None else f"{experiment} fold {fold}"
