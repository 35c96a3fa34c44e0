"""Make new experiments from recorded experiments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from mbqueue.api.queueing import Queueing
from mbqueue.api.results import Results
from mbqueue.errors import ResultsError, UsageError, counted
from mbqueue.queue.jobs import Kind, State
from mbqueue.queue.opening import anything, open_queue

if TYPE_CHECKING:
    from mbqueue.queue.enqueueing import EnqueueOutcome
    from mbqueue.results.folder import Recorded

Weights = Literal["mean", "fitted"]


class Blending(Queueing, Results):
    def blend(
        self, experiments: Sequence[str], *, name: str, weights: Weights = "mean", priority: int = 0
    ) -> EnqueueOutcome:
        """Enqueue a blend of recorded experiments: on each fold, the weighted mean of their predictions.

        A blend is an experiment like any other, but its jobs take only seconds. Fitting weights also requires the
        dataset, and takes longer, because the validation sets must be predicted. For a classification target, a blend
        averages probabilities.

        Args:
            experiments: two or more experiments with the same crystals, target and folds.
            name: name of the blend.
            weights: ``"mean"`` weights all members equally. ``"fitted"`` chooses, for each fold, the weights with the
                smallest error on the validation crystals that all members share.

        Raises:
            UsageError: for fewer than two experiments; if one is given twice, is not in the queue or is itself a blend;
                or if the experiments differ in crystals, target or folds.
            ResultsError: if a member is not recorded, or its files are damaged; or if the members share too few
                validation crystals to fit weights.
            ExperimentExists: if an experiment with a different spec has this name.
        """
        from mbqueue.experiment import parse_spec  # noqa: PLC0415 - reading commands need not wait for pydantic
        from mbqueue.results.members import enumerated  # noqa: PLC0415

        if len(experiments) < 2:
            raise UsageError("A blend needs at least two experiments. Name them: mbqueue blend A B --name AB")
        if twice := [one for one in experiments if experiments.count(one) > 1]:
            raise UsageError(f"{twice[0]} is given twice. Give different experiments.")
        found = [self._recorded_member(one) for one in experiments]
        for one in found[1:]:
            _require_alike(found[0], one)
        if weights == "fitted":
            _require_common_validation(found)
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
            **_chosen(found),
        }
        return self._put(parse_spec(spec, source=f"the blend {name}"), priority=priority)

    def predict_again(self, experiment: str, *, test_strains: int, name: str, priority: int = 0) -> EnqueueOutcome:
        """Enqueue new predictions of a recorded experiment's test sets, averaged over small strains.

        The new experiment does not train: it copies the models and histories of the recorded experiment.

        Args:
            experiment: a recorded experiment that is not a blend.
            test_strains: number of pairs of opposite strains; each prediction is the mean over the strained crystals
                and the crystal itself.
            name: name of the new experiment.
            priority: experiments with a higher priority run first.

        Raises:
            UsageError: if the experiment is not in the queue or is a blend, or if `test_strains` is 0.
            SpecError: if there are more than 100 pairs, or the name is invalid.
            ResultsError: if the experiment is not recorded, or its files are damaged.
            ExperimentExists: if an experiment with a different spec has this name.
        """
        from mbqueue.experiment import parse_spec  # noqa: PLC0415 - reading commands need not wait for pydantic

        if test_strains < 1:
            raise UsageError("Without strains, the predictions would not change. Give, for example, --test-strains 8.")
        found = self._recorded_member(experiment)
        theirs = found.content["spec"]
        spec = {
            "name": name,
            "description": f"{found.name} again, averaged over {counted(test_strains, 'pair')} of strains",
            "folds": list(found.folds),
            "seed": theirs["seed"],
            "data": theirs["data"],
            "target": theirs["target"],
            "model": {"pretrained": theirs["model"]["pretrained"], "trainable": "none"},
            "train": {
                "epochs": 0,
                "batch_size": theirs["train"]["batch_size"],
                "max_bonds": theirs["train"]["max_bonds"],
                "test_strains": test_strains,
            },
            "made_from": {"members": [_member(found)]},
            **_chosen([found]),
        }
        return self._put(parse_spec(spec, source=f"the experiment {name}"), priority=priority)

    def _recorded_member(self, name: str) -> Recorded:
        from mbqueue.results.tables import is_blend  # noqa: PLC0415

        with open_queue(self.folder, read_only=True, refuses=anything) as queue:
            spec = queue.experiment(name).spec
            jobs = queue.jobs(experiment=name)
            is_recorded = all(job.state in {State.COMMITTED, State.SKIPPED} for job in jobs)
            is_pruned = any(job.kind is Kind.RECORD and job.state is State.SKIPPED for job in jobs)
        if is_blend(spec):
            raise UsageError(f"{name} is a blend, which has no models. Name its members instead.")
        if not is_recorded:
            raise ResultsError(f"{name} has not been recorded yet. To see what is missing: mbqueue status {name}")
        if is_pruned:
            raise ResultsError(f"{name} was pruned, so it has no results. To finish training: mbqueue retry {name}")
        return self.results(name)


def _member(recorded: Recorded) -> dict[str, Any]:
    spec = {key: value for key, value in recorded.content["spec"].items() if key != "trial"}
    return {"experiment": recorded.name, "spec": spec}


def _chosen(found: Sequence[Recorded]) -> dict[str, Any]:
    """The new spec's `chosen` entry: the folds on which searches chose the members' settings, or an empty dict."""
    marks = [one.content["spec"]["chosen"] for one in found if one.content["spec"].get("chosen")]
    if not marks:
        return {}
    return {"chosen": {**marks[0], "folds": sorted({fold for mark in marks for fold in mark["folds"]})}}


def _require_alike(first: Recorded, other: Recorded) -> None:
    ours, theirs = first.target, other.target
    if (ours.name, ours.unit, ours.kind) != (theirs.name, theirs.unit, theirs.kind):
        what = f"{first.name} predicts the {ours.axis}, and {other.name} predicts the {theirs.axis}"
    elif first.content["dataset"]["hash"] != other.content["dataset"]["hash"]:
        what = f"{first.name} and {other.name} have different crystals or targets (the hash of the data differs)"
    elif first.folds != other.folds:
        folds = [", ".join(map(str, one.folds)) for one in (first, other)]
        what = f"{first.name} has the folds {folds[0]}, and {other.name} has the folds {folds[1]}"
    else:
        return
    raise UsageError(f"{what}, so they cannot be blended. Nothing was changed.")


def _require_common_validation(found: Sequence[Recorded]) -> None:
    import numpy as np  # noqa: PLC0415 - needed only here

    from mbqueue.experiment import parse_spec  # noqa: PLC0415
    from mbqueue.results.blending import require_enough  # noqa: PLC0415
    from mbqueue.train.rows import common_validation  # noqa: PLC0415

    if found[0].target.is_class:
        return  # the split depends on the targets, and only the job reads the targets
    members = [parse_spec(one.content["spec"], source=one.name) for one in found]
    targets = np.zeros(found[0].content["dataset"]["n"])
    for fold in found[0].folds:
        require_enough(len(common_validation(targets, members, fold)), len(members), fold=fold)
