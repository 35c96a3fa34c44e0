"""Making experiments from recorded ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from mbqueue.api.queueing import Queueing
from mbqueue.api.results import Results
from mbqueue.errors import ResultsError, UsageError
from mbqueue.queue.jobs import State
from mbqueue.queue.opening import open_queue

if TYPE_CHECKING:
    from mbqueue.queue.enqueue import EnqueueOutcome
    from mbqueue.results.folder import Recorded

Weights = Literal["mean", "fitted"]


class Blending(Queueing, Results):
    """blend."""

    def blend(
        self, experiments: Sequence[str], *, name: str, weights: Weights = "mean", priority: int = 0
    ) -> EnqueueOutcome:
        """Enqueue a blend of recorded experiments: on each fold, the weighted mean of their predictions.

        It is an experiment like any other, whose jobs take seconds and need no data. Of a class, probabilities are
        averaged.

        Args:
            experiments: two or more, of the same crystals, target and folds.
            name: of the blend.
            weights: ``"mean"`` weighs all alike.
            priority: higher is worked on first.

        Raises:
            UsageError: for fewer than two experiments, one that is given twice, is not in the queue or is a blend
                itself; and when they differ in crystals, target or folds.
            ResultsError: when one is not recorded, or its files are damaged.
            ExperimentExists: when the name is taken by another spec.
        """
        from mbqueue.experiment import parse_spec  # noqa: PLC0415 - reading commands need not wait for pydantic
        from mbqueue.results.blending import enumerated  # noqa: PLC0415

        if len(experiments) < 2:
            raise UsageError("A blend is made of two experiments or more. Name them: mbqueue blend A B --name AB")
        if twice := [one for one in experiments if experiments.count(one) > 1]:
            raise UsageError(f"{twice[0]} is there twice. Give different experiments.")
        found = [self._recorded_member(one) for one in experiments]
        for one in found[1:]:
            _require_alike(found[0], one)
        first = found[0].content["spec"]
        spec = {
            "name": name,
            "description": f"{weights.capitalize()} blend of {enumerated([one.name for one in found])}",
            "folds": list(found[0].folds),
            "data": first["data"],
            "target": first["target"],
            "model": {"pretrained": first["model"]["pretrained"], "trainable": "none"},
            "train": {"epochs": 0},
            "made_from": {"members": [_member(one) for one in found], "weights": weights},
        }
        return self._put(parse_spec(spec, source=f"the blend {name}"), priority=priority)

    def _recorded_member(self, name: str) -> Recorded:
        """The verified results of an experiment of the queue that others may be made from.

        Raises:
            UsageError: when it is not in the queue, or is a blend itself.
            ResultsError: when it is not recorded, or its files are damaged.
        """
        from mbqueue.results.tables import is_blend  # noqa: PLC0415

        with open_queue(self.folder, read_only=True) as queue:
            spec = queue.experiment(name).spec
            is_recorded = all(job.state in {State.COMMITTED, State.SKIPPED} for job in queue.jobs(experiment=name))
        if is_blend(spec):
            raise UsageError(f"{name} is a blend itself. Name its members instead.")
        if not is_recorded:
            raise ResultsError(f"{name} is not recorded yet. Let sessions finish it first: mbqueue status {name}")
        return self.results(name)


def _member(recorded: Recorded) -> dict[str, Any]:
    """What the spec of an experiment that is made from it keeps; that it was a trial of a search is not of it."""
    spec = {key: value for key, value in recorded.content["spec"].items() if key != "trial"}
    return {"experiment": recorded.name, "spec": spec}


def _require_alike(first: Recorded, other: Recorded) -> None:
    """Refuse experiments whose predictions cannot be averaged.

    Raises:
        UsageError: saying in what they differ.
    """
    ours, theirs = first.target, other.target
    if (ours.name, ours.unit, ours.kind) != (theirs.name, theirs.unit, theirs.kind):
        what = f"{first.name} predicts the {ours.axis}, and {other.name} the {theirs.axis}"
    elif first.content["dataset"]["hash"] != other.content["dataset"]["hash"]:
        what = f"{first.name} and {other.name} are of different crystals or targets (the hash of the data differs)"
    elif first.folds != other.folds:
        folds = [", ".join(map(str, one.folds)) for one in (first, other)]
        what = f"{first.name} has the folds {folds[0]}, and {other.name} {folds[1]}"
    else:
        return
    raise UsageError(f"{what}, so they make no blend. Nothing was changed.")
