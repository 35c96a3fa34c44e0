"""`ModelFamily`, the interface that each kind of model implements for training.

`mbqueue.train.chgnet` is the first module that implements `ModelFamily`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mbqueue import families
from mbqueue.data.batch import Batch
from mbqueue.data.batches import Distortion
from mbqueue.data.graph_cache import GraphCache
from mbqueue.errors import CheckpointError
from mbqueue.families import Family, family_with
from mbqueue.task import Target
from mbqueue.train.references import References


class ModelFamily(Protocol):
    """The functions that a module must implement to support one kind of model.

    Models are opaque to other modules, except for their parameters and ``state_dict``. Values for B crystals have the
    shape [B] and the unit of the target; features of A atoms have the shape [A, F].
    """

    # -- model files ---------------------------------------------------------------------------------------------

    def load_pretrained(self, version: str, /) -> Any:
        """Load a model with the pretrained weights called ``version``, on the CPU."""

    def load_model(self, path: Path, /) -> Any:
        """Load a saved model on the CPU."""

    def model_bytes(self, model: Any, target: Target, /) -> bytes:
        """Return the bytes of a model file. Identical models produce identical bytes.

        Both ``load_model`` and the family's library can read the file.
        """

    def target_of_model(self, path: Path, /) -> Target:
        """Return the target that a saved model predicts."""

    def copy_of(self, model: Any, /) -> Any:
        """Copy a model to the CPU, with the same architecture and weights."""

    def weights_hash(self, model: Any, /) -> str:
        """Return the hex SHA-256 of the weights that the outputs of ``frozen`` depend on."""

    # -- parameters ----------------------------------------------------------------------------------------------

    def trained_parameters(self, model: Any, trainable: str, /) -> dict[str, nn.Parameter]:
        """Return the parameters to train, by name, in the model's order; ``trainable`` is none, head or all."""

    def is_head(self, name: str, /) -> bool:
        """Whether a parameter belongs to the head, whose input is the frozen backbone's features."""

    def depth(self, model: Any, name: str, /) -> int:
        """Count the blocks between a parameter and the read-out; 0 for the head."""

    def decays(self, name: str, /) -> bool:
        """Whether weight decay applies to a parameter."""

    def set_references(self, model: Any, references: References, /) -> None:
        """Copy the element references into the model, in place."""

    def reset_read_out(self, model: Any, /) -> None:
        """Change the model in place, so that before training it predicts only the element references."""

    def scale_output(self, model: Any, factor: float, /) -> None:
        """Change the model in place to scale its predictions by ``factor``."""

    # -- batches and predictions ---------------------------------------------------------------------------------

    def make_batch(self, cache: GraphCache, rows: NDArray[np.int64], distortion: Distortion | None, /) -> Batch:
        """Make one batch in host memory from the graphs of the crystals in ``rows``."""

    def predict(self, model: Any, batch: Batch, /) -> Tensor:
        """Predict the target of each crystal, including element references; return [B]."""

    def frozen(self, model: Any, batch: Batch, /) -> tuple[Tensor, Tensor]:
        """Compute the features of each atom, [A, F], and predictions without element references, [B]."""

    def predict_from_features(self, model: Any, features: Tensor, atoms: Any, /) -> Tensor:
        """Predict the target of each crystal, [B], from the features of its atoms, [A, F].

        ``atoms`` is a batch with atomic_numbers, atom_crystal and n_atoms.
        """


def family_of(pretrained: str) -> ModelFamily:
    """Return the family to which the pretrained weights of this name belong.

    Raises:
        UsageError: if no family has weights of this name.
    """
    return implementation(family_with(pretrained))


def family_of_file(path: Path) -> ModelFamily:
    """Return the family that can read a model file.

    Raises:
        CheckpointError: from the first family, if no family can read the file.
    """
    errors = []
    for each in families.FAMILIES:
        family = implementation(each)
        try:
            family.target_of_model(path)
        except CheckpointError as error:
            errors.append(error)
        else:
            return family
    raise errors[0]


def implementation(family: Family) -> ModelFamily:
    return cast(ModelFamily, import_module(family.module))
