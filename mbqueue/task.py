"""Targets (the properties to predict) and the matbench tasks, each of which is a dataset with a target.

The tasks are the nine structure tasks of matbench v0.1, with formation energy first. All other modules take a target's
name, unit and kind from this module.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: The number of folds of every matbench task.
N_FOLDS = 5

Kind = Literal["energy", "scalar", "class"]
KINDS: dict[Kind, str] = {
    "energy": "energy per atom, relative to arbitrary reference energies of the elements",
    "scalar": "any other number that does not depend on the size of the unit cell",
    "class": "0 or 1, predicted as a probability",
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A property that models predict.

    Attributes:
        name: name of the property, such as ``formation energy``.
        unit: unit of targets, predictions and errors, such as ``eV/atom``; empty if there is none.
        kind: determines how models are initialised, trained and scored.
        column: name of the target column in the data; empty if the data reader should choose one of `columns`.
    """

    name: str
    unit: str
    kind: Kind
    column: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Possible names of the target column, in order of preference, to try if `column` is empty."""
        return ENERGY_COLUMNS if self.kind == "energy" else ("target",)

    @property
    def is_class(self) -> bool:
        """Whether the targets are classes (0 or 1), so that models predict probabilities."""
        return self.kind == "class"

    @property
    def axis(self) -> str:
        """The label of a figure's axis: the target's name and unit, for example ``PBE band gap (eV)``."""
        return self.name + self.in_unit

    @property
    def in_unit(self) -> str:
        """A suffix for the name of a quantity, for example `` (eV)``; empty if the target has no unit."""
        return f" ({self.unit})" if self.unit else ""

    def with_unit(self, number: str) -> str:
        """Append the target's unit to a formatted number."""
        return f"{number} {self.unit}" if self.unit else number

    @property
    def fine(self) -> tuple[float, Target]:
        """A smaller unit for small differences, such as meV/atom instead of eV/atom.

        Returns:
            The factor that converts values to the smaller unit, and this target with the smaller unit. If no smaller
            unit is known, the factor is 1 and the unit stays the same.
        """
        if re.match(r"eV(?![\w²³^*])", self.unit):  # not eV², because 1 eV² is not 1000 meV²
            return 1000.0, Target(name=self.name, unit=f"m{self.unit}", kind=self.kind)
        return 1.0, self


@dataclass(frozen=True, kw_only=True)
class Task:
    """A matbench task: a dataset and its target.

    Attributes:
        dataset: name of the dataset, as in experiment files.
        n: number of crystals.
        target: the property to predict.
    """

    dataset: str
    n: int
    target: Target

    def id_of(self, index: int) -> str:
        """The id that matbench gives the crystal at ``index`` (from 0), for example ``mb-mp-e-form-000001``."""
        prefix = self.dataset.replace("matbench", "mb").replace("_", "-")
        return f"{prefix}-{index + 1:0{len(str(self.n))}d}"


def _task(dataset: str, n: int, column: str, kind: Kind, name: str, unit: str = "") -> Task:
    return Task(dataset=dataset, n=n, target=Target(name=name, unit=unit, kind=kind, column=column))


#: This target has no column name, because specs from earlier versions contain none for it.
FORMATION_ENERGY = _task("matbench_mp_e_form", 132_752, "", "energy", "formation energy", "eV/atom")
#: Names of columns with energies per atom. If the user names no column, mbqueue uses the first of these columns that
#: exists.
ENERGY_COLUMNS = ("e_form", "target", "formation_energy_per_atom", "ef_per_atom", "energy_per_atom")
#: An example for messages.
BAND_GAP = Target(name="band gap", unit="eV", kind="scalar")


def options_for(column: str, target: Target) -> str:
    """Format the options that tell `enqueue` which property a column contains."""
    described = f'--set target.name="{target.name}" --set target.unit={target.unit} --set target.kind={target.kind}'
    return f"--target-column {shlex.quote(column)} {described}"


#: The matbench tasks by dataset. Sizes, columns and units are from the metadata of matminer and matbench.
TASKS: dict[str, Task] = {
    task.dataset: task
    for task in (
        FORMATION_ENERGY,
        _task("matbench_mp_gap", 106_113, "gap pbe", "scalar", "PBE band gap", "eV"),
        _task("matbench_mp_is_metal", 106_113, "is_metal", "class", "metallicity"),
        # The kind "energy" is for energies per atom, but this energy is for a cell of five atoms.
        _task("matbench_perovskites", 18_928, "e_form", "scalar", "heat of formation of the cell", "eV/unit cell"),
        _task("matbench_log_kvrh", 10_987, "log10(K_VRH)", "scalar", "logarithm of the bulk modulus", "log10(GPa)"),
        _task("matbench_log_gvrh", 10_987, "log10(G_VRH)", "scalar", "logarithm of the shear modulus", "log10(GPa)"),
        _task("matbench_dielectric", 4_764, "n", "scalar", "refractive index"),
        _task("matbench_phonons", 1_265, "last phdos peak", "scalar", "highest phonon frequency", "1/cm"),
        _task("matbench_jdft2d", 636, "exfoliation_en", "scalar", "exfoliation energy", "meV/atom"),
    )
}


def target_of(spec: Mapping[str, Any]) -> Target:
    """Return the target of a spec in plain JSON values.

    Specs of earlier versions have no [target] section; their target is the formation energy.
    """
    section = spec.get("target")
    return FORMATION_ENERGY.target if section is None else Target(**section)
