"""Jobs of experiments that are made from recorded ones: blends, and models that predict again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbqueue.errors import MembersNotRecorded, ResultsError
from mbqueue.experiment import Member, Spec, hash_of_spec
from mbqueue.queue.jobs import Job, Kind, Lease, State
from mbqueue.results.blending import blended
from mbqueue.results.folder import Recorded, read_recorded
from mbqueue.results.record import RESULTS_FILE
from mbqueue.results.tables import predictions_file
from mbqueue.session.fold_results import FoldResults
from mbqueue.session.shared_results import fetch_results
from mbqueue.session.workplace import Workplace


@dataclass(frozen=True)
class _Found:
    """A member's recorded results, verified, with the results of its jobs."""

    recorded: Recorded
    jobs: tuple[Job, ...]

    @property
    def prepared(self) -> Mapping[str, Any]:
        """The result of its `prepare` job."""
        return next(job.result for job in self.jobs if job.kind is Kind.PREPARE and job.result is not None)

    def predicted(self, fold: int) -> Mapping[str, Any]:
        """The result of a fold's `predict` job."""
        of_fold = (job for job in self.jobs if job.kind is Kind.PREDICT and job.fold == fold)
        return next(job.result for job in of_fold if job.result is not None)


def prepare(place: Workplace, spec: Spec) -> dict[str, Any]:
    """The result of the `prepare` job: what that of the members is, since they have the same crystals.

    Raises:
        MembersNotRecorded: when one is not recorded just now; a later attempt may succeed.
        ResultsError: when results of one are damaged, or they are of different crystals.
    """
    found = _members(place, spec)
    first, *others = (dict(one.prepared) for one in found)
    for one, other in zip(found[1:], others, strict=True):
        if other["dataset_hash"] != first["dataset_hash"]:
            raise ResultsError(
                f"{found[0].recorded.name} and {one.recorded.name} are of different crystals, so nothing can be made "
                "from both."
            )
    return {key: first[key] for key in ("dataset_hash", "source", "official", "n", "widened", "dropped")}


def predict(place: Workplace, lease: Lease, spec: Spec) -> FoldResults:
    """A fold's results.

    Raises:
        MembersNotRecorded, ResultsError: as `prepare`.
    """
    fold = lease.job.fold
    assert fold is not None
    found = _members(place, spec)
    return _blend(fold, found)


def _blend(fold: int, found: list[_Found]) -> FoldResults:
    tables = {one.recorded.name: one.recorded.predictions[fold] for one in found}
    weights = dict.fromkeys(tables, 1 / len(tables))
    absent = {number for one in found for number in one.predicted(fold)["absent_elements"]}
    made_from = {one.recorded.name: _sha256(one.recorded, predictions_file(Path(), fold).name) for one in found}
    return FoldResults(
        table=blended(tables, weights),
        model=None,
        history=[],
        absent_elements=sorted(absent),
        more={"blend": {"weights": weights, "n_validation": 0, "made_from": made_from}},
    )


def _sha256(recorded: Recorded, name: str) -> str:
    return str(recorded.content["run"]["files"][name]["sha256"])


def _members(place: Workplace, spec: Spec) -> list[_Found]:
    assert spec.made_from is not None
    return [_member(place, member, spec) for member in spec.made_from.members]


def _member(place: Workplace, member: Member, spec: Spec) -> _Found:
    name = member.experiment
    entry = next((one for one in place.queue.experiments() if one.name == name), None)
    if entry is None or entry.spec_hash != hash_of_spec(member.spec):
        what = "is not in the queue" if entry is None else "has another spec in the queue"
        raise MembersNotRecorded(f"{name}, which {spec.name} is made from, {what}. Enqueue it as it was.")
    jobs = place.queue.jobs(experiment=name)
    if not all(job.state in {State.COMMITTED, State.SKIPPED} for job in jobs):
        raise MembersNotRecorded(
            f"{name}, which {spec.name} is made from, is not recorded just now. Let sessions finish it, then: "
            f"mbqueue retry {spec.name}"
        )
    working = place.project.working_results(entry.results_dir)
    if place.store is not None:
        fetch_results(place.store, entry, jobs, working)
    is_here = (working / RESULTS_FILE).exists()
    try:
        recorded = read_recorded(working if is_here else place.project.root / entry.results_dir)
    except ResultsError as error:
        again = f"Make it again, then {spec.name}: mbqueue retry {name}, mbqueue work, mbqueue retry {spec.name}"
        raise ResultsError(f"{error} {again}") from error
    if missing := set(spec.folds) - set(recorded.folds):
        raise ResultsError(f"{name} has no recorded fold {min(missing)}, which {spec.name} is made from.")
    return _Found(recorded, jobs)
