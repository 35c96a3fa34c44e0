"""The training state and its serialisation. The state contains everything that affects the next step."""

from __future__ import annotations

import dataclasses
import io
import random
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbqueue.errors import CheckpointError

_Tensors = dict[str, Tensor]


@dataclass(kw_only=True)
class TrainState:
    """Training state of a fold between two steps.

    With the same fingerprint, training from identical states gives bit-for-bit identical results. The state contains no
    times, sessions or fences, so two runs of the same training produce identical bytes. The learning rate depends only
    on ``steps_done``, and the sample order only on seed, fold and epoch. Checkpoints therefore contain neither a
    scheduler's state nor a sampler's.

    Attributes:
        epoch: the epoch being trained, from 1.
        step: optimizer steps done in this epoch.
        complete: whether the epoch has been trained and validated.
        steps_done: optimizer steps done over all epochs.
        sums: running sums over the epoch's structures (loss, abs_error, structures) or its steps (grad_norm).
        best: epoch and val_mae of the best finished epoch, or None.
        optimizer: tensors of AdamW by parameter name.
        average: averaged weights by parameter name; empty when averaging is off.
        random: states of the random number generators of torch, the GPU, NumPy and Python. Training draws no numbers
            from these generators, but code that draws them would still resume exactly.
        ends: trained weights at the ends of earlier epochs, oldest first; empty without a weight soup.
        end_maes: validation MAE of each element of ``ends``; empty without a soup of the best epochs.
    """

    spec_hash: str
    dataset_hash: str
    fold: int
    epoch: int
    step: int
    complete: bool
    steps_done: int
    sums: dict[str, float]
    best: dict[str, Any] | None
    model: _Tensors
    optimizer: dict[str, _Tensors]
    average: _Tensors
    random: dict[str, Any]
    ends: list[_Tensors] = dataclasses.field(default_factory=list)
    end_maes: list[float] = dataclasses.field(default_factory=list)


def serialise(state: TrainState) -> bytes:
    """Convert a state to the bytes of a checkpoint file; identical states produce identical bytes."""
    buffer = io.BytesIO()  # given a path, torch.save would put the file's name into the archive
    parts = {field.name: _canonical(getattr(state, field.name)) for field in dataclasses.fields(state)}
    for younger in ("ends", "end_maes"):
        if not parts[younger]:
            del parts[younger]  # without a weight soup, a checkpoint's bytes must match earlier versions
    torch.save(parts, buffer)
    return buffer.getvalue()


def _canonical(value: Any) -> Any:
    """Copy a value so that all equal strings in the copy are the same object.

    Pickle writes a repeated object as a reference, so the bytes depend on which equal strings are the same object.
    Without this function, saving a state, loading it and saving it again could produce different bytes.
    """
    if isinstance(value, dict):
        return {sys.intern(key): _canonical(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(part) for part in value]
    return sys.intern(value) if isinstance(value, str) else value


def deserialise(content: bytes) -> TrainState:
    """Load the state in a checkpoint file, on the CPU, without executing any code in the file.

    Raises:
        CheckpointError: if the bytes are damaged or not a checkpoint.
    """
    try:
        _require_unpacked(content)
        parts = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return TrainState(**parts)
    except Exception as error:
        # For a damaged file, torch.load raises RuntimeError, UnpicklingError, EOFError, KeyError and more.
        raise CheckpointError(f"The checkpoint cannot be read: {error}.") from error


def _require_unpacked(content: bytes) -> None:
    """Reject an archive that is compressed, or larger in memory than on disk; `serialise` writes neither."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, but mbqueue never compresses checkpoints")
    if sum(entry.file_size for entry in entries) > len(content):
        raise ValueError("its contents are larger than the file")


def to_host(tensors: Mapping[str, Tensor]) -> _Tensors:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the random states of the host and of ``device``, in types that torch.load considers safe."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        # Reading a GPU's random state starts CUDA, which a CPU session must avoid.
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(words), python_gauss],
    }


def restore_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Restore the states from `random_states`; a GPU's state is restored only on a GPU."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and device.type == "cuda":
        # Earlier versions saved the random state of every GPU in the machine. The states of all GPUs are equal, because
        # all GPUs get the same seed and no code draws random numbers on a GPU.
        torch.cuda.set_rng_state(states["cuda"][0], device)
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, python_gauss = states["python"]
    random.setstate((version, tuple(words), python_gauss))


def seed_everything(seed: int) -> None:
    """Seed all random number generators, so that a fold starts identically in every process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
