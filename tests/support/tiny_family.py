"""A `ModelFamily` with one linear layer, so that a real training step takes only a millisecond.

The model records which worker took each training step, so a checkpoint shows its own history. The last digits of the
model's weights depend on the worker, as on different GPUs, so two lines of commits always differ.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mbqueue.data.batch import Batch
from mbqueue.data.batches import make_batch
from mbqueue.families import CHGNET
from mbqueue.task import FORMATION_ENERGY, Target
from mbqueue.train.references import References

FAMILY = replace(CHGNET, name="Tiny", module=__name__, pretrained={"tiny": ""})
WEIGHTS_HASH = "7" * 64
#: F, the number of features per atom that the frozen backbone computes.
FEATURES = 64
LONGEST_LINEAGE = 100

#: The number of the worker that is training now; the first worker is 1. `stepped_session` sets this number.
worker = 0


class TinyModel(nn.Module):
    """A model that predicts from features and element references.

    Attributes:
        lineage: worker of each training step, then zeros; int64 [LONGEST_LINEAGE].
    """

    lineage: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.read_out = nn.Linear(FEATURES, 1, bias=False)
        self.references = nn.Parameter(torch.zeros(94))
        self.register_buffer("lineage", torch.zeros(LONGEST_LINEAGE, dtype=torch.int64))
        with torch.no_grad():
            self.read_out.weight.copy_(torch.linspace(-0.1, 0.1, FEATURES)[None])


def load_pretrained(_version: str) -> TinyModel:
    return TinyModel()


def load_model(path: Path) -> TinyModel:
    model = TinyModel()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def model_bytes(model: TinyModel, _target: Target) -> bytes:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


def target_of_model(_path: Path) -> Target:
    return FORMATION_ENERGY.target


def copy_of(model: TinyModel) -> TinyModel:
    twin = TinyModel()
    twin.load_state_dict(model.state_dict())
    return twin


def weights_hash(_model: TinyModel) -> str:
    return WEIGHTS_HASH


def trained_parameters(model: TinyModel, _trainable: str) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def is_head(_name: str) -> bool:
    return True


def depth(_model: TinyModel, _name: str) -> int:
    return 0


def decays(name: str) -> bool:
    return name != "references"


def set_references(model: TinyModel, references: References) -> None:
    with torch.no_grad():
        model.references.copy_(torch.as_tensor(references.values, dtype=torch.float32))


def reset_read_out(model: TinyModel) -> None:
    with torch.no_grad():
        model.read_out.weight.zero_()


def scale_output(model: TinyModel, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def frozen(model: TinyModel, batch: Batch) -> tuple[Tensor, Tensor]:
    powers = torch.arange(1, FEATURES + 1) / FEATURES
    features = torch.sin(batch.atomic_numbers[:, None] * powers)
    return features, _means(model.read_out(features)[:, 0], batch)


def predict(model: TinyModel, batch: Batch) -> Tensor:
    return predict_from_features(model, frozen(model, batch)[0], batch)


def predict_from_features(model: TinyModel, features: Tensor, atoms: Any) -> Tensor:
    if model.training:
        model.lineage[torch.count_nonzero(model.lineage)] = worker
    by_atom = model.read_out(features)[:, 0] + model.references[atoms.atomic_numbers - 1]
    return _means(by_atom, atoms) + 1e-6 * worker


def _means(by_atom: Tensor, atoms: Any) -> Tensor:
    sums = torch.zeros(len(atoms.n_atoms)).index_add(0, atoms.atom_crystal, by_atom)
    return sums / atoms.n_atoms


__all__ = ["make_batch"]
