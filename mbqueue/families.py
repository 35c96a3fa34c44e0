"""The families of models: their modules, the names of their pretrained weights, and what results say about them.

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
        name: the family's name in messages and results.
        module: the module that implements `mbqueue.train.family.ModelFamily`.
        package: the package on PyPI that contains the family's library.
        pretrained: name of pretrained weights in experiment files → the file where the module finds these weights.
        description: what kind of model this is and how it was pretrained; follows the name in a submission to matbench.
        citation: the BibTeX entry of the family's paper.
        loader: the function of the family's library that loads a model file, as Markdown.
        pretraining: a sentence that names the pretraining data.
        labels: the properties that the pretraining data contain, as "with their …".
        seen: matbench task → a sentence about which crystals of this task the pretraining data contain.
    """

    name: str
    module: str
    package: str
    pretrained: Mapping[str, str]
    description: str
    citation: str
    loader: str
    pretraining: str
    labels: str
    seen: Mapping[str, str]


CHGNET = Family(
    name="CHGNet",
    module="mbqueue.train.chgnet",
    package="chgnet",
    pretrained={
        "0.3.0": "0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar",
        "r2scan": "r2scan/chgnet_r2scan_transfer_learning_e15f36s161m23.pth.tar",
    },
    description="a graph neural network potential pretrained on MPtrj",
    citation="@article{deng2023chgnet, title={CHGNet as a pretrained universal neural network potential for "
    "charge-informed atomistic modelling}, author={Deng, Bowen and Zhong, Peichen and Jun, KyuJung and Riebesell, "
    "Janosh and Han, Kevin and Bartel, Christopher J. and Ceder, Gerbrand}, journal={Nature Machine Intelligence}, "
    "volume={5}, pages={1031--1041}, year={2023}, doi={10.1038/s42256-023-00716-3}}",
    loader="`CHGNet.from_file`",
    pretraining="CHGNet was pretrained on MPtrj, relaxation trajectories from the Materials Project.",
    labels="with their energies, forces, stresses and magnetic moments",
    seen={
        "matbench_mp_e_form": "So CHGNet has seen most crystals of this benchmark, including the test sets, with DFT "
        "energies closely related to the target."
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
