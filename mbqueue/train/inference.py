"""Predict rows of a dataset with an experiment's models, for validation, predictions and blends."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mbqueue.clock import Clock
from mbqueue.data.batches import Distortion
from mbqueue.data.crystals import Crystals
from mbqueue.errors import ONLY_UNDER_A_NEW_NAME, NonFiniteLoss
from mbqueue.experiment import Spec
from mbqueue.files import sha256_of_json
from mbqueue.train.arithmetic import calculating
from mbqueue.train.conditions import Conditions
from mbqueue.train.family import ModelFamily
from mbqueue.train.feeds import Feed, GraphFeed, Rows
from mbqueue.train.gpu_path import CHECKED_CRYSTALS, check_once
from mbqueue.train.objective import Objective
from mbqueue.train.partial_outputs import PartialOutputs, infer_resumably
from mbqueue.train.predict import opposite_strains
from mbqueue.train.step import infer, listed


class Inference:
    """Predicts rows of an experiment's dataset with the experiment's models, on one device.

    Args:
        fold: 0 to 4; used in messages and in the key of partial predictions.
        feed: the models' input.
        conditions: the device's limits.
        clock: measures the time between two writes of partial predictions.
        on_note: called with a message for the user.
    """

    def __init__(
        self,
        spec: Spec,
        fold: int,
        family: ModelFamily,
        feed: Feed,
        crystals: Crystals,
        *,
        conditions: Conditions,
        device: torch.device,
        clock: Clock,
        on_note: Callable[[str], None],
    ) -> None:
        self._spec, self._fold, self._family, self._feed, self._crystals = spec, fold, family, feed, crystals
        self._conditions, self._device, self._clock, self._note = conditions, device, clock, on_note

    def check_kernels(self, rows: Rows) -> None:
        """On a GPU, use the kernels if they agree with plain torch on the first crystals of ``rows``."""
        if self._device.type != "cuda" or not isinstance(self._feed, GraphFeed):
            return
        check_once(
            self._device,
            self._conditions.precision,
            self._family.load_pretrained(self._spec.model.pretrained).to(self._device),
            self._family.predict,
            self._feed.load(rows[:CHECKED_CRYSTALS]).to(self._device),
            self._note,
        )

    def predict(
        self,
        model: nn.Module,
        rows: Rows,
        *,
        strains: int = 0,
        stored: NDArray[np.float64] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
        keep_in: Path | None = None,
    ) -> NDArray[np.float64] | None:
        """Predict ``rows``, [N], in the target's unit; return None if stopped.

        Args:
            model: a model whose output is in the unit of the target (logits for a class target); it is moved to the
                device.
            strains: number of pairs of opposite strains; each prediction is a mean over the crystal and its strained
                forms.
            stored: the model's outputs for the undistorted crystals, [N], if already known.
            should_stop: called before every batch.
            on_progress: called with the number of crystals done and in total; each crystal counts once per strain.
            keep_in: folder for partial predictions, so that an interrupted prediction resumes where it stopped.

        Raises:
            DeviceTooSmall, DeviceBusy: if a single crystal does not fit on the device; the error names the crystal.
            NonFiniteLoss: if predictions are not finite; the error names their crystals.
        """
        in_unit = Objective(self._spec.train, self._spec.target.kind)
        distortions = opposite_strains(strains)
        total = np.zeros(len(rows))
        done, whole = 0, len(rows) * len(distortions)
        key = self._key_of(model) if keep_in is not None else ""

        def count(n: int) -> None:
            nonlocal done
            done += n
            on_progress(done, whole)

        count(0)
        with calculating(self._device, "float32"):
            for number, distortion in enumerate(distortions):
                if should_stop():
                    return None
                if distortion is None and stored is not None:
                    found: NDArray[np.float64] | None = self._finite(stored, rows)
                else:
                    kept = None
                    if keep_in is not None:
                        kept = PartialOutputs(keep_in / f"{number}.bin", f"{key} {distortion}", clock=self._clock)
                    found = self.outputs(
                        model.to(self._device),
                        rows,
                        should_stop=should_stop,
                        distortion=distortion,
                        on_done=count,
                        kept=kept,
                    )
                if found is None:
                    return None
                total += in_unit.prediction(torch.from_numpy(found)).numpy()
        return total / len(distortions)

    def outputs(
        self,
        model: nn.Module,
        rows: Rows,
        *,
        should_stop: Callable[[], bool],
        distortion: Distortion | None = None,
        on_done: Callable[[int], None] = lambda _more: None,
        kept: PartialOutputs | None = None,
    ) -> NDArray[np.float64] | None:
        """Compute a model's outputs for ``rows`` on the device, [N]; return None if stopped.

        Raises:
            DeviceTooSmall, DeviceBusy, NonFiniteLoss: for the same reasons as in `predict`.
        """
        model.eval()

        def compute(rows: Rows, on_part: Callable[[list[Tensor]], None]) -> list[NDArray[np.float32]] | None:
            return infer(
                self._feed,
                rows,
                lambda batch: [self._feed.predict(model, batch)],
                batch_size=self._spec.train.batch_size,
                max_bonds=self._spec.train.max_bonds,
                device=self._device,
                memory=self._conditions.inference,
                ids=self._crystals.ids,
                distortion=distortion,
                should_stop=should_stop,
                on_part=on_part,
            )

        found = infer_resumably(compute, rows, kept, on_done=on_done)
        return None if found is None else self._finite(found.astype(np.float64), rows)

    def _key_of(self, model: nn.Module) -> str:
        """Hash everything that the model's outputs depend on, except the strains."""
        return sha256_of_json(
            {
                "model": hashlib.sha256(self._family.model_bytes(model, self._spec.predicts)).hexdigest(),
                "dataset": self._crystals.hash,
                "fold": self._fold,
                "batches": [self._spec.train.batch_size, self._spec.train.max_bonds],
                "conditions": self._conditions.fingerprint(),
            }
        )

    def _finite(self, output: NDArray[np.float64], rows: Rows) -> NDArray[np.float64]:
        bad = rows[~np.isfinite(output)]
        if len(bad):
            raise NonFiniteLoss(
                f"Fold {self._fold}: the predictions of {len(bad)} of {len(rows)} crystals are not finite and were "
                f"discarded: {listed([self._crystals.ids[row] for row in bad])}. If nearly all crystals are affected, "
                "training diverged, so lower train.lr. Otherwise check these crystals' interatomic distances. "
                f"{ONLY_UNDER_A_NEW_NAME}"
            )
        return output
