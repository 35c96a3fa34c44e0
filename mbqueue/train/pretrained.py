"""CHGNet models in and out of files: the pretrained ones, and files that `CHGNet.from_file` reads."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from chgnet.model import CHGNet

from mbqueue.errors import CheckpointError, UsageError
from mbqueue.files import write_bytes
from mbqueue.train.forward import check_architecture

_FILES = {
    "0.3.0": "0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar",
    "r2scan": "r2scan/chgnet_r2scan_transfer_learning_e15f36s161m23.pth.tar",
}


def load_pretrained(version: str) -> CHGNet:
    """CHGNet's own pretrained weights, on the CPU; the same as `CHGNet.load(model_name=version)`, but silent.

    Raises:
        UsageError: for a version other than 0.3.0 and r2scan.
        CheckpointError: when chgnet's file cannot be read.
    """
    if version not in _FILES:
        raise UsageError(f"There are no pretrained weights {version!r}. Use one of {', '.join(_FILES)}.")
    path = Path(str(resources.files("chgnet"))) / "pretrained" / _FILES[version]
    content = _read(path)
    # What CHGNet.load passes too: the weights were trained without that bias, and are named by their version.
    return _build(content, path, mlp_out_bias=False, version=version)


def load_chgnet(path: Path) -> CHGNet:
    """A model from a file written by `save_chgnet` or by CHGNet's trainer, on the CPU; nothing in it is executed.

    Raises:
        CheckpointError: when the file is missing, damaged or no CHGNet.
        TrainingError: when the model is built unlike the pretrained ones.
    """
    model = _build(_read(path), path)
    check_architecture(model)
    return model


def model_bytes(model: CHGNet) -> bytes:
    """The content of a file that `CHGNet.from_file` reads; equal models give equal bytes."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({"model": {"model_args": dict(model.model_args), "state_dict": state}}, buffer)
    return buffer.getvalue()


def save_chgnet(model: CHGNet, path: Path) -> None:
    """Durably write ``model`` so that `CHGNet.from_file` loads it, element references included."""
    write_bytes(path, model_bytes(model))


def copy_of(model: CHGNet) -> CHGNet:
    """An independent model of the same architecture and weights, on the CPU."""
    twin = _construct(model.model_args)
    twin.load_state_dict(model.state_dict())
    return twin


def weights_hash(model: CHGNet) -> str:
    """Hex SHA-256 over the names, shapes and values of the weights, element references left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("composition_model."):
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no model file {path}.") from error
    except Exception as error:
        # torch.load has no error of its own: a damaged file gives RuntimeError, UnpicklingError, EOFError and more.
        raise CheckpointError(f"{path} cannot be read as a model file: {error}. Copy it again or retrain.") from error
    if not isinstance(content, dict) or not {"model_args", "state_dict"} <= set(content.get("model", ())):
        raise CheckpointError(f"{path} holds no CHGNet model: model.model_args and model.state_dict are missing.")
    return content


def _build(content: Mapping[str, Any], path: Path, **overrides: Any) -> CHGNet:
    try:
        model = _construct({**content["model"]["model_args"], **overrides})
        model.load_state_dict(content["model"]["state_dict"])
    except (RuntimeError, TypeError, KeyError) as error:
        raise CheckpointError(f"The weights in {path} do not fit the model that it describes: {error}.") from error
    return model


def _construct(model_args: Mapping[str, Any]) -> CHGNet:
    # CHGNet prints its size whenever it is made; standard output is for data.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CHGNet(**model_args)
