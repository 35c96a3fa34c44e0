"""Make a fold's initial model: the pretrained model plus a linear fit of the training targets to the composition."""

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
    """A fold's initial model, whose predictions already depend on the composition.

    Attributes:
        model: the model, on the CPU; ``objective`` defines what its output means.
        absent: atomic numbers of the elements missing from the training set, ascending.
        outputs: the model's output for every crystal of the dataset, float64 [N].
    """

    model: Any
    objective: Objective
    absent: tuple[int, ...]
    outputs: NDArray[np.float64]


def start_of(
    spec: Spec, family: ModelFamily, crystals: Crystals, frozen: FrozenBackbone, rows: NDArray[np.int64]
) -> Start:
    """Make a fold's initial model, fitted to the training ``rows``.

    For an energy, fit element references on top of the pretrained energies. For a scalar or a class, fit the
    composition alone, and reset the read-out's last layer to zero, so that training starts from the fit.
    """
    model = family.load_pretrained(spec.model.pretrained)
    all_shares = compositions(crystals.atomic_numbers, crystals.atom_offsets)
    shares, targets, kind = all_shares[rows], crystals.targets[rows], spec.target.kind
    scale = 1.0
    interaction = np.zeros(len(crystals), np.float32)
    if kind == "energy":
        interaction = frozen.energies()
        references = fit_references(shares, targets, interaction[rows])
    else:
        family.reset_read_out(model)
        references = fit_classes(shares, targets) if kind == "class" else fit_composition(shares, targets)
    if kind == "scalar":
        scale = spread_of(targets - references.predict(shares))
        references = References(values=references.values / scale, absent=references.absent)
    family.set_references(model, references)
    # Round the references to float32 as in the model, so that `outputs` equals the model's predictions.
    outputs = interaction + all_shares @ references.values.astype(np.float32).astype(np.float64)
    return Start(model, Objective(spec.train, kind, scale), references.absent, outputs)
