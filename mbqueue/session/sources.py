"""Remember which crystals a source contained, so that this machine reads a source again only if it has changed.

A source file is identified by its size and digest. A source folder is identified by the names, sizes and digests of all
its files. Modification times are ignored. After an upgrade of mbqueue or pymatgen, every source is read again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mbqueue.data import datasets
from mbqueue.errors import DataError
from mbqueue.experiment import SAMPLE_DATASET, DataSpec
from mbqueue.files import sha256_of_file, sha256_of_json, write_json
from mbqueue.task import FORMATION_ENERGY, TASKS, Target

_FOLDER = "sources"


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """Everything that determines which crystals are read from a source.

    Attributes:
        seed: the random seed for choosing crystals if the section has a limit.
        target: the kind and column of the property to predict.
        targets_required: whether a crystal without a target is an error; if False, a missing target becomes NaN.
    """

    data: DataSpec
    seed: int = 0
    target: Target = FORMATION_ENERGY.target
    targets_required: bool = True


def source_key(request: DataRequest, *, project_root: Path) -> str | None:
    """A digest of everything that determines which crystals are read; None if the source is not on this machine."""
    try:
        content = _content(request.data.dataset, project_root)
    except (OSError, DataError):
        return None  # the error is reported when the source is read
    if content is None:
        return None
    return sha256_of_json(
        {
            "content": content,
            "wanted": request.data.model_dump(mode="json"),
            "seed": request.seed if request.data.limit else None,
            "target": repr(request.target),
            "targets_required": request.targets_required,
            "reader": reader_version(),
        }
    )


def remember(cache_dir: Path, key: str, dataset_hash: str, meta: dict[str, Any]) -> None:
    """Record the hash and the metadata of the crystals that a source contains."""
    folder = cache_dir / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{key}.json", {"dataset_hash": dataset_hash, "meta": meta})


def remembered(cache_dir: Path, key: str) -> tuple[str, dict[str, Any]] | None:
    """The hash and the metadata of a source's crystals; None if this machine has not read the source."""
    try:
        kept = json.loads((cache_dir / _FOLDER / f"{key}.json").read_bytes())
        return str(kept["dataset_hash"]), dict(kept["meta"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@cache
def reader_version() -> str:
    """A digest of the source-reading code and the pymatgen version."""
    digest = hashlib.sha256(version("pymatgen").encode())
    for path in sorted(Path(datasets.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _content(dataset: str, project_root: Path) -> Any:
    """The size and digest of a file, or the name, size and digest of each file in a folder; None if neither exists."""
    if dataset in TASKS:
        from mbqueue.data.official import official_file  # noqa: PLC0415  only for a dataset of matbench

        path = official_file(TASKS[dataset].dataset).path
    else:
        path = datasets.SAMPLE_FILE if dataset == SAMPLE_DATASET else project_root / Path(dataset).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [[str(file.relative_to(path)), *_of_file(file)] for file in files]
    return _of_file(path) if path.is_file() else None


def _of_file(path: Path) -> list[Any]:
    return [path.stat().st_size, sha256_of_file(path)]
