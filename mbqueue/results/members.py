"""The experiments whose models made an experiment's predictions, and the families of these models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mbqueue.families import Family, family_with


def members_in(spec: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The name and spec of each experiment whose models an experiment reuses; empty if it trains its own."""
    members: Sequence[Mapping[str, Any]] = (spec.get("made_from") or {}).get("members", ())
    return members


def members_of(spec: Mapping[str, Any]) -> list[str]:
    """The names of the experiments whose models an experiment reuses; empty if the experiment trains its own."""
    return [member["experiment"] for member in members_in(spec)]


def trained_specs(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The specs of the experiments that trained the models: the spec itself, or those of its members' experiments."""
    return [trained for member in members_in(spec) for trained in trained_specs(member["spec"])] or [spec]


def families_of(*specs: Mapping[str, Any]) -> list[Family]:
    """The families of the models that made the predictions of these experiments, each family once.

    Args:
        specs: the experiments' specs, as plain JSON values.

    Raises:
        UsageError: if a spec names pretrained weights that this version of mbqueue does not know.
    """
    trained = [one for spec in specs for one in trained_specs(spec)]
    found = [family_with(one["model"]["pretrained"]) for one in trained]
    return [family for position, family in enumerate(found) if family not in found[:position]]


def family_names(*specs: Mapping[str, Any]) -> str:
    """The names of the models' families, for example ``CHGNet``."""
    return enumerated([family.name for family in families_of(*specs)])


def enumerated(names: Sequence[str]) -> str:
    """Join names with commas and a final "and", for example ``A, B and C``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
