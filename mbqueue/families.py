"""The families of models: the names of their pretrained weights, and their modules.

This module does not import any model, because it is also used by specs and by commands that do not need a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mbqueue.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model that mbqueue can train.

    Attributes:
        name: the family's name in messages.
        module: the module that implements `mbqueue.train.family.ModelFamily`.
        pretrained: name of pretrained weights in experiment files → the file where the module finds these weights.
    """

    name: str
    module: str
    pretrained: Mapping[str, str]


CHGNET = Family(
    name="CHGNet",
    module="mbqueue.train.chgnet",
    pretrained={
        "0.3.0": "0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar",
        "r2scan": "r2scan/chgnet_r2scan_transfer_learning_e15f36s161m23.pth.tar",
    },
)

FAMILIES: tuple[Family, ...] = (CHGNET,)


def pretrained_names() -> list[str]:
    return [name for family in FAMILIES for name in family.pretrained]


def family_with(pretrained: str) -> Family:
    """Return the family that has pretrained weights with this name.

    Raises:
        UsageError: if no family has weights with this name.
    """
    for family in FAMILIES:
        if pretrained in family.pretrained:
            return family
    known = ", ".join(pretrained_names())
    raise UsageError(f"No pretrained weights are named {pretrained!r}. Use one of {known}.")
