"""CHGNet, the first `ModelFamily`: reads and writes model files, selects the trained parameters, and computes energies.

`CHGNet.from_file` can read the model files that this module writes. The message passing is in `mbqueue.train.forward`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from chgnet.model import CHGNet
from torch import Tensor, nn

from mbqueue.data import batches
from mbqueue.data.batch import Batch
from mbqueue.errors import CheckpointError
from mbqueue.families import CHGNET
from mbqueue.task import FORMATION_ENERGY, Target, target_of
from mbqueue.train.forward import (
    atom_features,
    check_architecture,
    formation_energies,
    read_out,
    reference_energies,
)
from mbqueue.train.references import References

#: The advice in an error about a file that is not a model.
_GIVE = "Use a model_fold_*.pth from a results folder, or copy the file again."
_HEAD = ("mlp.", "readout_norm.", "composition_model.")
make_batch = batches.make_batch
predict = formation_energies

_BLOCK = re.compile(r"^(?:atom_conv|bond_conv|angle)_layers\.(\d+)\.")


def load_pretrained(version: str) -> CHGNet:
    """Load CHGNet's pretrained weights on the CPU, like `CHGNet.load(model_name=version)` but without printing.

    Raises:
        CheckpointError: if chgnet's file cannot be read.
    """
    path = Path(str(resources.files("chgnet"))) / "pretrained" / CHGNET.pretrained[version]
    content = _read_pretrained(path)
    # Like CHGNet.load, pass mlp_out_bias=False, because the pretrained weights were trained without this bias.
    return _build(content, path, mlp_out_bias=False, version=version)


def load_model(path: Path) -> CHGNet:
    """Load a model file on the CPU, without executing any code in the file.

    This function loads files from `model_bytes` and from CHGNet's trainer.

    Raises:
        CheckpointError: if the file is missing, damaged or not a CHGNet model.
        TrainingError: if the model's architecture differs from that of the pretrained models.
    """
    model = _build(_read(path), path)
    check_architecture(model)
    return model


def model_bytes(model: CHGNet, target: Target = FORMATION_ENERGY.target) -> bytes:
    """Return the bytes of a model file that `CHGNet.from_file` can read.

    Identical models and targets produce identical bytes. If the target is not formation energy, the file records it in
    a key that CHGNet ignores.
    """
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    buffer = io.BytesIO()
    content: dict[str, Any] = {"model": {"model_args": dict(model.model_args), "state_dict": state}}
    if target != FORMATION_ENERGY.target:
        content["target"] = asdict(target)
    torch.save(content, buffer)
    return buffer.getvalue()


def target_of_model(path: Path) -> Target:
    """Read the target recorded in a model file, or return formation energy if no target is recorded.

    Raises:
        CheckpointError: if the file is missing, damaged or not a CHGNet model.
    """
    content = _read(path)
    try:
        return target_of(content)
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f"The target recorded in {path} cannot be read: {error}. Copy the file again, or retrain the model."
        ) from error


def copy_of(model: CHGNet) -> CHGNet:
    twin = _construct(model.model_args)
    twin.load_state_dict(model.state_dict())
    return twin


def weights_hash(model: CHGNet) -> str:
    """Return the hex SHA-256 of the weights' names, shapes, dtypes and values, without the element references."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("composition_model."):
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def trained_parameters(model: CHGNet, trainable: str) -> dict[str, nn.Parameter]:
    """Return the parameters that an experiment trains, by name, in the model's order.

    ``all`` excludes the magnetic-moment head and the last angle update, because the energy does not depend on them.
    """
    dead = ("site_wise.", f"angle_layers.{model.n_conv - 2}.")
    if trainable == "none":
        return {}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if is_head(name) or (trainable == "all" and not name.startswith(dead))
    }


def is_head(name: str) -> bool:
    """Whether a parameter belongs to the read-out, which includes the element references."""
    return name.startswith(_HEAD)


def depth(model: CHGNet, name: str) -> int:
    """Count the blocks between a parameter and the read-out: 0 for the head, ``n_conv`` + 1 for the embeddings."""
    if is_head(name):
        return 0
    block = _BLOCK.match(name)
    return int(model.n_conv) - int(block.group(1)) if block else int(model.n_conv) + 1


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter; it does not apply to the element references."""
    return not name.startswith("composition_model.")


def set_references(model: CHGNet, references: References) -> None:
    weight = model.composition_model.fc.weight
    with torch.no_grad():
        weight.copy_(torch.as_tensor(references.values, dtype=weight.dtype)[None])
    model.composition_model.fitted = True


def reset_read_out(model: CHGNet) -> None:
    """Set the read-out's last layer to zero in place; until it is trained, the model predicts only its references."""
    with torch.no_grad():
        for parameter in _last_layer(model).parameters():
            parameter.zero_()


def scale_output(model: CHGNet, factor: float) -> None:
    """Scale the model's predictions by multiplying the read-out's last layer and the references in place."""
    with torch.no_grad():
        for parameter in [*_last_layer(model).parameters(), model.composition_model.fc.weight]:
            parameter.mul_(factor)


def _last_layer(model: CHGNet) -> nn.Linear:
    return [layer for layer in model.mlp.modules() if isinstance(layer, nn.Linear)][-1]


def frozen(model: CHGNet, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute atom features after the last convolution, [A, 64], and interaction energies in eV/atom, [B]."""
    features = atom_features(model, batch)
    return features, read_out(model, features, batch.atom_crystal, batch.n_atoms)


def predict_from_features(model: CHGNet, features: Tensor, atoms: Any) -> Tensor:
    interaction = read_out(model, features, atoms.atom_crystal, atoms.n_atoms)
    return interaction + reference_energies(model, atoms.atomic_numbers, atoms.atom_crystal, atoms.n_atoms)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"There is no model file {path}.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read as a model file: {error}. {_GIVE}") from error
    except Exception:  # noqa: BLE001 - a damaged file gives RuntimeError, UnpicklingError, EOFError and more
        # Leave out PyTorch's message, because some versions advise loading untrusted files.
        raise CheckpointError(f"{path} cannot be read as a model file: it is damaged or not a model. {_GIVE}") from None
    if not isinstance(content, dict) or not {"model_args", "state_dict"} <= set(content.get("model", ())):
        raise CheckpointError(f"{path} contains no CHGNet model: model.model_args and model.state_dict are missing.")
    return content


#: A session loads the pretrained weights for each fold, but they never change.
_read_pretrained = cache(_read)


def _build(content: Mapping[str, Any], path: Path, **overrides: Any) -> CHGNet:
    try:
        model = _construct({**content["model"]["model_args"], **overrides})
        model.load_state_dict(content["model"]["state_dict"])
    except (RuntimeError, TypeError, KeyError) as error:
        raise CheckpointError(f"The weights in {path} do not fit the model that it describes: {error}.") from error
    return model


def _construct(model_args: Mapping[str, Any]) -> CHGNet:
    # CHGNet's constructor prints the model's size, but standard output is reserved for data.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CHGNet(**model_args)


if TYPE_CHECKING:  # mypy checks that this module implements the interface
    from mbqueue.train import chgnet  # noqa: PLW0406
    from mbqueue.train.family import ModelFamily

    _: ModelFamily = chgnet
