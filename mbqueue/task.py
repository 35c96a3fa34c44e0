"""What is predicted, and of which crystals: the seam `Task`. Everything else asks it for names, units and kinds.

Formation energy on ``matbench_mp_e_form`` is the first task. Training, scores and reports know of a target only what
`Target` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: ``energy`` is a total energy per atom up to references of the elements.
Kind = Literal["energy"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A property that is predicted.

    Attributes:
        name: in words, like ``formation energy``.
        unit: of targets, predictions and errors, like ``eV/atom``; empty where it has none.
        kind: how a model starts, is trained and scored.
    """

    name: str
    unit: str
    kind: Kind

    @property
    def axis(self) -> str:
        """Name and unit, for the axis of a figure."""
        return self.name + self.in_unit

    @property
    def in_unit(self) -> str:
        """The unit in brackets after a blank, to follow the name of a quantity; empty without a unit."""
        return f" ({self.unit})" if self.unit else ""

    def with_unit(self, number: str) -> str:
        """A number that is written already, with its unit."""
        return f"{number} {self.unit}" if self.unit else number

    @property
    def fine(self) -> tuple[float, Target]:
        """For small differences: a factor, and this target in the unit that it leads to (meV/atom for eV/atom)."""
        if self.unit.startswith("eV"):
            return 1000.0, Target(name=self.name, unit=f"m{self.unit}", kind=self.kind)
        return 1.0, self


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark's dataset with its target.

    Attributes:
        dataset: its name, in experiment files too.
        n: how many crystals it has.
        target: what is predicted.
    """

    dataset: str
    n: int
    target: Target

    def id_of(self, index: int) -> str:
        """The id of the crystal at ``index`` (from 0), as matbench makes it: ``mb-mp-e-form-000001``."""
        prefix = self.dataset.replace("matbench", "mb").replace("_", "-")
        return f"{prefix}-{index + 1:0{len(str(self.n))}d}"


FORMATION_ENERGY = Task(
    dataset="matbench_mp_e_form",
    n=132_752,
    target=Target(name="formation energy", unit="eV/atom", kind="energy"),
)

TASKS = {task.dataset: task for task in (FORMATION_ENERGY,)}


def target_of(spec: Mapping[str, Any]) -> Target:
    """The target of a spec in plain JSON values. Specs without one, of earlier versions, predict formation energies."""
    section = spec.get("target")
    if section is None:
        return FORMATION_ENERGY.target
    return Target(name=section["name"], unit=section["unit"], kind=section["kind"])
