"""Compressed project files that the version at commit 63f7668 wrote (see tests/earlier/write.py).

A checkpoint of head_finetune contains CHGNet's own weights, which every installation has. Packing replaces each such
tensor with its SHA-256, and unpacking restores the tensor.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from importlib import resources
from pathlib import Path

import torch

PACKED = Path(__file__).parent.parent / "earlier" / "files.tar.xz"
#: Tensors with fewer bytes stay in the archive, because replacing them with hashes would save nothing.
_SHORTEST_BYTES = 1024


def _tensors() -> dict[bytes, bytes]:
    """SHA-256 → bytes of CHGNet's tensors."""
    (path,) = Path(str(resources.files("chgnet") / "pretrained" / "0.3.0")).glob("*.pth.tar")
    weights = torch.load(path, map_location="cpu", weights_only=True)["model"]["state_dict"]
    tensors = [tensor.numpy().tobytes() for tensor in weights.values()]
    return {hashlib.sha256(one).digest(): one for one in tensors if len(one) >= _SHORTEST_BYTES}


def pack(folder: Path, target: Path = PACKED) -> None:
    """Pack all files below a folder."""
    tensors = _tensors()
    with tarfile.open(target, "w:xz", preset=9) as archive:
        # Put files with the same name next to each other, because they are the most similar.
        for path in sorted(folder.rglob("*"), key=lambda path: (path.suffix, path.name, path)):
            if path.is_file():
                content = path.read_bytes()
                for digest, tensor in tensors.items():
                    content = content.replace(tensor, digest)
                member = tarfile.TarInfo(str(path.relative_to(folder)))
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def unpack(target: Path, packed: Path = PACKED) -> None:
    """Unpack the files into a folder, byte for byte."""
    tensors = _tensors()
    with tarfile.open(packed, "r:xz") as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None
            content = stream.read()
            for digest, tensor in tensors.items():
                content = content.replace(digest, tensor)
            (target / member.name).parent.mkdir(parents=True, exist_ok=True)
            (target / member.name).write_bytes(content)
