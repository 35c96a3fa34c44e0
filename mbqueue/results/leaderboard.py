"""The matbench leaderboard of ``matbench_mp_e_form``, and when a score may be set beside it."""

from __future__ import annotations

from collections.abc import Collection

from mbqueue.experiment import OFFICIAL_DATASET
from mbqueue.task import FORMATION_ENERGY, N_FOLDS

#: Mean MAE over the five folds, eV/atom, best first: https://matbench.materialsproject.org (v0.1, full task page).
LEADERBOARD: tuple[tuple[str, float], ...] = (
    ("coGN", 0.0170),
    ("coNGN", 0.0178),
    ("ALIGNN", 0.0215),
    ("SchNet (kgcnn)", 0.0218),
    ("DimeNet++ (kgcnn)", 0.0235),
    ("CGCNN", 0.0337),
    ("RF-SCM/Magpie", 0.1165),
    ("Dummy", 1.0059),
)

OVERLAP_NOTE = (
    "CHGNet was pretrained on MPtrj, relaxation trajectories from the Materials Project, and so has seen most of the "
    "crystals of this benchmark, test parts included, with DFT energies closely related to the target. "
    "The other models on the leaderboard were trained on the fold's training part alone. A score from pretrained "
    "weights is therefore not evidence of better generalisation than theirs; say so wherever it is shown."
)


def reasons_against(*, official: bool, n: int, dropped: int, folds: Collection[int]) -> list[str]:
    """Why an experiment's mean score is no leaderboard score; empty when it is one."""
    reasons = []
    if not official:
        reasons.append(f"the crystals are not those of the official file of {OFFICIAL_DATASET}")
    elif n != FORMATION_ENERGY.n or dropped:
        reasons.append(f"only {n:,} of the {FORMATION_ENERGY.n:,} official crystals were used")
    missing = sorted(set(range(N_FOLDS)) - set(folds))
    if missing:
        several = len(missing) > 1
        numbers = ", ".join(map(str, missing))
        reasons.append(f"fold{'s' * several} {numbers} of the five {'are' if several else 'is'} missing")
    return reasons
