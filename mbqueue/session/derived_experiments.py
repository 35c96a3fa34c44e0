"""Run the jobs of experiments that are made from recorded experiments: blends and repeated predictions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbqueue.errors import MembersNotRecorded, ResultsError
from mbqueue.experiment import Spec, hash_of_spec, parse_spec
from mbqueue.provenance import Member
from mbqueue.queue.jobs import Job, Kind, Lease, State
from mbqueue.results.blending import blended, require_enough
from mbqueue.results.folder import Recorded, read_recorded
from mbqueue.results.record import RESULTS_FILE
from mbqueue.results.tables import Predictions, advised, model_file, predictions_file
from mbqueue.results.weights import fitted_weights
from mbqueue.session.cross_prediction import Question, ask
from mbqueue.session.fold_results import FoldResults
from mbqueue.session.session import Session
from mbqueue.session.shared_results import fetch_results
from mbqueue.session.working_set import WorkingSet
from mbqueue.train.rows import common_validation, split_rows


@dataclass(frozen=True)
class _Found:
    """A member experiment's verified results, with its jobs."""

    recorded: Recorded
    jobs: tuple[Job, ...]

    @property
    def prepared(self) -> Mapping[str, Any]:
        return next(job.result for job in self.jobs if job.kind is Kind.PREPARE and job.result is not None)

    def predicted(self, fold: int) -> Mapping[str, Any]:
        of_fold = (job for job in self.jobs if job.kind is Kind.PREDICT and job.fold == fold)
        return next(job.result for job in of_fold if job.result is not None)


def prepare(session: Session, spec: Spec) -> dict[str, Any]:
    """Return the members' `prepare` result; all members must have the same crystals.

    Raises:
        MembersNotRecorded: if a member has not been recorded yet, but sessions can finish it.
        ResultsError: if a member's results are damaged, or members have different crystals.
    """
    found = _members(session, spec)
    first, *others = (dict(one.prepared) for one in found)
    for one, other in zip(found[1:], others, strict=True):
        if other["dataset_hash"] != first["dataset_hash"]:
            raise ResultsError(
                f"{found[0].recorded.name} and {one.recorded.name} have different crystals, so they cannot be combined."
            )
    return {key: first[key] for key in ("dataset_hash", "source", "official", "n", "widened", "dropped")}


def predict(session: Session, working_set: WorkingSet, lease: Lease, spec: Spec) -> FoldResults:
    """Predict the test set of a fold, or blend the members' predictions; return the fold's results.

    Raises:
        MembersNotRecorded, ResultsError: for the same reasons as in `prepare`.
    """
    assert spec.made_from is not None
    found = _members(session, spec)
    if spec.made_from.weights is None:
        return _again(session, working_set, lease, spec, found[0])
    tables = {one.recorded.name: one.recorded.predictions[_fold_of(lease)] for one in found}
    weights, n_validation = dict.fromkeys(tables, 1 / len(tables)), 0
    if spec.made_from.weights == "fitted":
        weights, n_validation = _fitted(session, working_set, lease, spec, found)
    return _blend(_fold_of(lease), found, tables, weights, n_validation)


def _fold_of(lease: Lease) -> int:
    assert lease.job.fold is not None
    return lease.job.fold


def _again(session: Session, working_set: WorkingSet, lease: Lease, spec: Spec, member: _Found) -> FoldResults:
    """Predict the strained test set of the fold with the member's model.

    The result contains the member's history and model.
    """
    job, fold = lease.job, _fold_of(lease)
    experiment, _ = session.experiment_of(job)
    crystals = working_set.data_for(job, experiment, spec).crystals
    rows = split_rows(crystals.targets, spec, fold).test
    path = model_file(member.recorded.folder, fold)
    kept = session.project.predictions_dir(spec.name, f"fold_{fold}")
    predicted = ask(
        session,
        working_set,
        job,
        experiment,
        Question(model=path, spec=spec, rows=rows, keep_in=kept, what="crystals under strains"),
    )
    shutil.rmtree(kept, ignore_errors=True)
    tested = crystals.select(rows)
    return FoldResults(
        table=Predictions(tested.ids, tested.compositions(), tested.n_atoms, tested.targets, predicted),
        model=path.read_bytes(),
        history=member.recorded.histories[fold],
        absent_elements=member.predicted(fold)["absent_elements"],
    )


def _fitted(
    session: Session, working_set: WorkingSet, lease: Lease, spec: Spec, found: list[_Found]
) -> tuple[dict[str, float], int]:
    """Fit the members' weights to a fold's validation crystals; return the weights and the number of crystals.

    The job predicts the validation crystals, but not the test set, with each member's recorded model.
    """
    assert spec.made_from is not None
    job, fold = lease.job, _fold_of(lease)
    experiment, _ = session.experiment_of(job)
    members = [parse_spec(member.spec, source=member.experiment) for member in spec.made_from.members]
    targets = working_set.data_for(job, experiment, members[0]).crystals.targets
    rows = common_validation(targets, members, fold)
    require_enough(len(rows), len(members), fold=fold)
    kept = session.project.predictions_dir(spec.name, f"fold_{fold}")
    predictions = {}
    for number, (one, member) in enumerate(zip(found, members, strict=True)):
        name = one.recorded.name
        question = Question(
            model=model_file(one.recorded.folder, fold),
            spec=member,
            rows=rows,
            keep_in=kept / str(number),
            what=f"predicting validation crystals with {name}",
        )
        predictions[name] = ask(session, working_set, job, experiment, question)
    weights = fitted_weights(predictions, targets[rows], is_class=spec.predicts.is_class)
    shutil.rmtree(kept, ignore_errors=True)
    return weights, len(rows)


def _blend(
    fold: int,
    found: list[_Found],
    tables: Mapping[str, Predictions],
    weights: Mapping[str, float],
    n_validation: int,
) -> FoldResults:
    absent = {number for one in found for number in one.predicted(fold)["absent_elements"]}
    made_from = {one.recorded.name: _sha256(one.recorded, predictions_file(Path(), fold).name) for one in found}
    return FoldResults(
        table=blended(tables, weights),
        model=None,
        history=[],
        absent_elements=sorted(absent),
        more={"blend": {"weights": dict(weights), "n_validation": n_validation, "made_from": made_from}},
    )


def _sha256(recorded: Recorded, name: str) -> str:
    return str(recorded.content["run"]["files"][name]["sha256"])


def _members(session: Session, spec: Spec) -> list[_Found]:
    assert spec.made_from is not None
    return [_member(session, member, spec) for member in spec.made_from.members]


def _member(session: Session, member: Member, spec: Spec) -> _Found:
    name = member.experiment
    entry = next((one for one in session.queue.experiments() if one.name == name), None)
    if entry is None or entry.spec_hash != hash_of_spec(member.spec):
        what = "is not in the queue" if entry is None else "has a different spec in the queue"
        raise ResultsError(
            f"{spec.name} is made from {name}, which {what}. Enqueue the same experiment again, then: mbqueue retry "
            f"{spec.name}"
        )
    jobs = session.queue.jobs(experiment=name)
    left = [job for job in jobs if job.state not in {State.COMMITTED, State.SKIPPED}]
    if entry.paused or any(job.paused or job.state in {State.FAILED, State.CANCELLED} for job in left):
        raise ResultsError(
            f"{spec.name} is made from {name}, which needs your attention (see mbqueue status {name}). Once "
            f"{name} is recorded: mbqueue retry {spec.name}"
        )
    if left:
        raise MembersNotRecorded(f"{spec.name} is made from {name}, which has not been recorded yet.")
    working = session.project.working_results(entry.results_dir)
    if session.store is not None:
        fetch_results(session.store, entry, jobs, working)
    is_here = (working / RESULTS_FILE).exists()
    try:
        recorded = read_recorded(working if is_here else session.project.root / entry.results_dir)
    except ResultsError as error:
        again = f"mbqueue retry {name}, mbqueue work, mbqueue retry {spec.name}"
        raise advised(error, f"Restore {name} from a copy, or recreate both experiments: {again}") from None
    if missing := set(spec.folds) - set(recorded.folds):
        raise ResultsError(
            f"{spec.name} needs fold {min(missing)} of {name}, but the results of {name} do not contain it."
        )
    return _Found(recorded, jobs)
