"""Commands that make new experiments from recorded ones: blend, predict-again."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from mbqueue.cli.console import print_json, print_line, say
from mbqueue.cli.options import JsonOption, open_project
from mbqueue.cli.queueing import enqueued

if TYPE_CHECKING:
    from mbqueue.queue.enqueueing import EnqueueOutcome


class BlendWeights(StrEnum):
    """How a blend weights its members: equally, or with fitted weights."""

    MEAN = "mean"
    FITTED = "fitted"


def blend(
    context: typer.Context,
    experiments: Annotated[list[str], typer.Argument(metavar="NAME…", help="Two or more recorded experiments.")],
    name: Annotated[str, typer.Option(help="Name of the blend.")],
    weights: Annotated[
        BlendWeights,
        typer.Option(help="mean: equal weights; fitted: weights fitted on the validation sets of each fold."),
    ] = BlendWeights.MEAN,
    priority: Annotated[int, typer.Option(help="Experiments with a higher priority run first.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Add an experiment that averages the predictions of recorded experiments.

    All members must have the same crystals, target and folds. The next session computes the blend in seconds, without
    the dataset.

    Example: mbqueue blend full.seed0 full.seed1 full.seed2 --name full.blend
    """
    outcome = open_project(context).blend(experiments, name=name, weights=weights.value, priority=priority)
    _tell(outcome, as_json=as_json)


def predict_again(
    context: typer.Context,
    experiment: Annotated[str, typer.Argument(metavar="NAME", help="A recorded experiment.")],
    name: Annotated[str, typer.Option(help="Name of the new experiment.")],
    test_strains: Annotated[
        int,
        typer.Option(
            "--test-strains", help="Number of pairs of opposite small strains for each crystal.", min=1, max=100
        ),
    ],
    priority: Annotated[int, typer.Option(help="Experiments with a higher priority run first.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Repeat the test predictions of a recorded experiment, averaged over small strains, without training.

    This command adds a new experiment, which uses the recorded experiment's models.

    Example: mbqueue predict-again full_finetune --test-strains 8 --name full.strained
    """
    outcome = open_project(context).predict_again(experiment, test_strains=test_strains, name=name, priority=priority)
    _tell(outcome, as_json=as_json)


def _tell(outcome: EnqueueOutcome, *, as_json: bool) -> None:
    made = outcome.experiment
    if as_json:
        members = [member["experiment"] for member in made.spec["made_from"]["members"]]
        print_json(
            {
                "experiment": made.name,
                "outcome": outcome.outcome.value,
                "jobs": outcome.n_jobs,
                "members": members,
                "weights": made.spec["made_from"]["weights"],
                "results": made.results_dir,
            }
        )
        return
    print_line(enqueued(outcome))
    if outcome.outcome != "unchanged":
        say(f"{made.spec['description']}. Start a session with: mbqueue work")
