"""The experiments whose models made an experiment's predictions, and the families of these models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mbqueue.families import Family, family_with, pretrained_names


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

    Leaves out models with weights that this version of mbqueue does not know (`unknown_weights`).

    Args:
        specs: the experiments' specs, as plain JSON values.
    """
    known = [family_with(name) for name in _weights_in(specs) if name in pretrained_names()]
    return [family for position, family in enumerate(known) if family not in known[:position]]


def unknown_weights(*specs: Mapping[str, Any]) -> list[str]:
    """The names of the models' pretrained weights that this version of mbqueue does not know."""
    return [name for name in _weights_in(specs) if name not in pretrained_names()]


def family_names(*specs: Mapping[str, Any]) -> str:
    """The names of the models' families, for example ``CHGNet``, and of unknown weights."""
    return enumerated([*(family.name for family in families_of(*specs)), *unknown_weights(*specs)])


def _weights_in(specs: Sequence[Mapping[str, Any]]) -> list[str]:
    trained = [one for spec in specs for one in trained_specs(spec)]
    return list(dict.fromkeys(one["model"]["pretrained"] for one in trained))


def enumerated(names: Sequence[str]) -> str:
    """Join names with commas and a final "and", for example ``A, B and C``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
