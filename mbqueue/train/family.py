"""The interface that a kind of model implements for training, `ModelFamily`. `mbqueue.train.chgnet` is the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mbqueue.data.batch import Batch
from mbqueue.data.batches import Distortion
from mbqueue.data.graph_cache import GraphCache
from mbqueue.errors import UsageError
from mbqueue.task import Target
from mbqueue.train import chgnet
from mbqueue.train.references import References


class ModelFamily(Protocol):
    """The functions of a module that knows one kind of model.

    Models are opaque to other modules, except for their parameters and ``state_dict``. Values of B crystals are [B],
    in the unit of the target; features of A atoms are [A, F].
    """

    #: Names of pretrained weights → path of their file.
    PRETRAINED: dict[str, str]

    # -- model files ---------------------------------------------------------------------------------------------

    def load_pretrained(self, version: str, /) -> Any:
        """One of ``PRETRAINED``, on the CPU."""

    def load_model(self, path: Path, /) -> Any:
        """A saved model, on the CPU."""

    def model_bytes(self, model: Any, target: Target, /) -> bytes:
        """The bytes of a model file for ``load_model`` and the family's own library; equal models give equal bytes."""

    def target_of_model(self, path: Path, /) -> Target:
        """The target that a saved model predicts."""

    def copy_of(self, model: Any, /) -> Any:
        """An independent model of the same architecture and weights, on the CPU."""

    def weights_hash(self, model: Any, /) -> str:
        """Hex SHA-256 of the weights that ``frozen`` depends on."""

    # -- parameters ----------------------------------------------------------------------------------------------

    def trained_parameters(self, model: Any, trainable: str, /) -> dict[str, nn.Parameter]:
        """The parameters that ``none``, ``head`` or ``all`` trains, by name, in the model's order."""

    def is_head(self, name: str, /) -> bool:
        """Whether a parameter belongs to the head, which takes the frozen backbone's features."""

    def depth(self, model: Any, name: str, /) -> int:
        """The number of blocks between a parameter and the read-out; 0 for the head."""

    def decays(self, name: str, /) -> bool:
        """Whether weight decay applies to a parameter."""

    def set_references(self, model: Any, references: References, /) -> None:
        """Copy the element references into the model, in place."""

    def reset_read_out(self, model: Any, /) -> None:
        """Change the model in place to predict its references alone, so that training starts from them."""

    def scale_output(self, model: Any, factor: float, /) -> None:
        """Multiply the model's predictions, in place."""

    # -- batches and predictions ---------------------------------------------------------------------------------

    def make_batch(self, cache: GraphCache, rows: NDArray[np.int64], distortion: Distortion | None, /) -> Batch:
        """The graphs of some crystals as one batch in host memory."""

    def predict(self, model: Any, batch: Batch, /) -> Tensor:
        """Predict each crystal, element references included, [B]."""

    def frozen(self, model: Any, batch: Batch, /) -> tuple[Tensor, Tensor]:
        """Features of each atom, [A, F], and the prediction without element references, [B]."""

    def predict_from_features(self, model: Any, features: Tensor, atoms: Any, /) -> Tensor:
        """The predictions of ``predict``, [B], from features [A, F] and a batch's atomic_numbers, atom_crystal and
        n_atoms."""


FAMILIES: tuple[ModelFamily, ...] = (chgnet,)


def family_of(pretrained: str) -> ModelFamily:
    """The family that pretrained weights belong to.

    Raises:
        UsageError: if no family has these weights.
    """
    for family in FAMILIES:
        if pretrained in family.PRETRAINED:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.PRETRAINED)
    raise UsageError(f"No pretrained weights are named {pretrained!r}. Use one of {known}.")
