"""Where a fold's training starts: the pretrained model, with what its target needs fitted on the training part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbqueue.data.crystals import Crystals
from mbqueue.experiment import Spec
from mbqueue.train.family import ModelFamily
from mbqueue.train.frozen import FrozenBackbone
from mbqueue.train.objective import Objective
from mbqueue.train.references import References, compositions, fit_classes, fit_composition, fit_references, spread_of


@dataclass(frozen=True)
class Start:
    """A model that predicts the target already, from compositions at least.

    Attributes:
        model: on the CPU; its output is that of the objective.
        objective: what is trained from here.
        absent: atomic numbers of the elements that the training part lacks, ascending.
    """

    model: Any
    objective: Objective
    absent: tuple[int, ...]


def start_of(
    spec: Spec, family: ModelFamily, crystals: Crystals, frozen: FrozenBackbone, rows: NDArray[np.int64]
) -> Start:
    """The start of an experiment, fitted in closed form on the training ``rows``.

    For an energy, references of the elements around the pretrained energies. For a scalar or a class, the composition
    alone: the read-out's last layer is reset to zero, so that training begins at that fit.
    """
    model = family.load_pretrained(spec.model.pretrained)
    shares = compositions(crystals.atomic_numbers, crystals.atom_offsets)[rows]
    targets, kind = crystals.targets[rows], spec.target.kind
    scale = 1.0
    if kind == "energy":
        references = fit_references(shares, targets, frozen.energies()[rows])
    else:
        family.reset_read_out(model)
        references = fit_classes(shares, targets) if kind == "class" else fit_composition(shares, targets)
    if kind == "scalar":
        scale = spread_of(targets - references.predict(shares))
        references = References(values=references.values / scale, absent=references.absent)
    family.set_references(model, references)
    return Start(model, Objective(spec.train, kind, scale), references.absent)
