"""Tasks: the predicted target and its dataset. All other modules take names, units and kinds from here.

The tasks are the nine structure tasks of matbench v0.1, with formation energy first. Training, scores and reports know
a target only through `Target`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: The number of folds of every matbench task.
N_FOLDS = 5

Kind = Literal["energy", "scalar", "class"]
#: A description of each kind of target.
KINDS: dict[Kind, str] = {
    "energy": "a total energy per atom, up to a reference of each element",
    "scalar": "any other number that does not grow with the cell",
    "class": "0 or 1, predicted as a probability",
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A property that models predict.

    Attributes:
        name: the name in words, like ``formation energy``.
        unit: the unit of targets, predictions and errors, like ``eV/atom``; empty for none.
        kind: determines how a model starts, is trained and is scored.
        column: the table's column; empty if the reader should find it.
    """

    name: str
    unit: str
    kind: Kind
    column: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names that the target's column may have if `column` is empty, in order of preference."""
        return ENERGY_COLUMNS if self.kind == "energy" else ("target",)

    @property
    def is_class(self) -> bool:
        """Whether targets are 0 or 1, and predictions probabilities."""
        return self.kind == "class"

    @property
    def axis(self) -> str:
        """The target's name and unit, for the axis of a figure."""
        return self.name + self.in_unit

    @property
    def in_unit(self) -> str:
        """The unit in brackets after a space, to follow the name of a quantity; empty without a unit."""
        return f" ({self.unit})" if self.unit else ""

    def with_unit(self, number: str) -> str:
        """A formatted number with its unit."""
        return f"{number} {self.unit}" if self.unit else number

    @property
    def fine(self) -> tuple[float, Target]:
        """For small differences, a factor and this target in the scaled unit (meV/atom for eV/atom)."""
        if re.match(r"eV(?![\w²³^*])", self.unit):  # a thousandth of an eV² is not a meV²
            return 1000.0, Target(name=self.name, unit=f"m{self.unit}", kind=self.kind)
        return 1.0, self


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark's dataset with its target.

    Attributes:
        dataset: the dataset's name, also in experiment files.
        n: the number of crystals.
        target: the predicted target.
    """

    dataset: str
    n: int
    target: Target

    def id_of(self, index: int) -> str:
        """matbench's id of the crystal at ``index`` (from 0), like ``mb-mp-e-form-000001``."""
        prefix = self.dataset.replace("matbench", "mb").replace("_", "-")
        return f"{prefix}-{index + 1:0{len(str(self.n))}d}"


def _task(dataset: str, n: int, column: str, kind: Kind, name: str, unit: str = "") -> Task:
    return Task(dataset=dataset, n=n, target=Target(name=name, unit=unit, kind=kind, column=column))


#: The target names no column, so that specs of earlier versions, which had no targets, equal this one.
FORMATION_ENERGY = _task("matbench_mp_e_form", 132_752, "", "energy", "formation energy", "eV/atom")
#: Columns of formation energies or total energies per atom. If no column is named, the first one that exists is used.
ENERGY_COLUMNS = ("e_form", "target", "formation_energy_per_atom", "ef_per_atom", "energy_per_atom")

#: Sizes, columns and units as in matminer's and matbench's metadata.
TASKS: dict[str, Task] = {
    task.dataset: task
    for task in (
        FORMATION_ENERGY,
        _task("matbench_mp_gap", 106_113, "gap pbe", "scalar", "PBE band gap", "eV"),
        _task("matbench_mp_is_metal", 106_113, "is_metal", "class", "metallicity"),
        # This energy is per cell, not per atom. Every cell has five atoms, so the energy is a scalar like any other.
        _task("matbench_perovskites", 18_928, "e_form", "scalar", "heat of formation of the cell", "eV/unit cell"),
        _task("matbench_log_kvrh", 10_987, "log10(K_VRH)", "scalar", "logarithm of the bulk modulus", "log10(GPa)"),
        _task("matbench_log_gvrh", 10_987, "log10(G_VRH)", "scalar", "logarithm of the shear modulus", "log10(GPa)"),
        _task("matbench_dielectric", 4_764, "n", "scalar", "refractive index"),
        _task("matbench_phonons", 1_265, "last phdos peak", "scalar", "highest phonon frequency", "1/cm"),
        _task("matbench_jdft2d", 636, "exfoliation_en", "scalar", "exfoliation energy", "meV/atom"),
    )
}


def target_of(spec: Mapping[str, Any]) -> Target:
    """The target of a spec in plain JSON values. Specs of earlier versions have no target and predict formation
    energies."""
    section = spec.get("target")
    return FORMATION_ENERGY.target if section is None else Target(**section)
