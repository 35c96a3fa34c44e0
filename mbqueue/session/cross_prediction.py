"""Predict rows of the dataset with another experiment's recorded model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mbqueue.experiment import Spec
from mbqueue.queue.jobs import Experiment, Job
from mbqueue.session.session import Session
from mbqueue.session.working_set import WorkingSet
from mbqueue.train.backbone import kinds_needed
from mbqueue.train.conditions import Conditions
from mbqueue.train.family import family_of
from mbqueue.train.feeds import Rows, feed_of
from mbqueue.train.inference import Inference


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request to predict rows of the dataset with one model.

    Attributes:
        spec: the spec that determines the model's input and batches.
        rows: rows of the dataset to predict.
        keep_in: folder for partial predictions, which the next session reuses.
        what: how progress reports name this work.
    """

    model: Path
    spec: Spec
    rows: Rows
    keep_in: Path
    what: str


def ask(
    session: Session, working_set: WorkingSet, job: Job, experiment: Experiment, question: Question
) -> NDArray[np.float64]:
    """Predict the requested rows; return an array of shape [N] in the target's unit.

    Args:
        experiment: the job's experiment, which names the dataset.

    Raises:
        Stopped: if the session is asked to stop; the next session reuses finished predictions.
        CheckpointError: if ``question.model`` is not a model file.
        DeviceTooSmall, DeviceBusy, NonFiniteLoss: for the same reasons as in `Inference.predict`.
    """
    spec, family = question.spec, family_of(question.spec.model.pretrained)
    data = working_set.data_for(job, experiment, spec)
    frozen = working_set.frozen_for(job, spec, data) if spec.model.trainable == "head" else None
    working_set.await_kernels()
    feed = feed_of(spec, family, data.crystals, data.graphs, frozen)
    extra = {**data.fingerprint, "frozen": None if frozen is None else frozen.digest(kinds_needed(spec))}
    memory_file = session.project.device_limits
    conditions = Conditions(spec, working_set.device, memory_file=memory_file, extra=extra, on_note=session.note_once)
    assert job.fold is not None
    inference = Inference(
        spec,
        job.fold,
        family,
        feed,
        data.crystals,
        conditions=conditions,
        device=working_set.device,
        clock=session.clock,
        on_note=session.note_once,
    )
    inference.check_kernels(question.rows)
    found = inference.predict(
        family.load_model(question.model),
        question.rows,
        strains=spec.train.test_strains,
        should_stop=session.should_stop,
        on_progress=session.progress_of(job, question.what),
        keep_in=question.keep_in,
    )
    if found is None:
        raise session.stopped()
    return found
