"""The files that `mbqueue predict` reads and writes, checked before PyTorch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mbqueue.data.datasets import check_dataset
from mbqueue.errors import UsageError
from mbqueue.outputs import require_writable
from mbqueue.project import ProjectFolder, from_here

#: The first columns of a table of predictions, which identify such a table.
COLUMNS = ("id", "composition", "n_atoms", "y_pred", "spread")


def require_inputs(project: ProjectFolder, dataset: str, models: Sequence[Path]) -> None:
    """Check, as far as possible without reading them, that a dataset and model files exist.

    Raises:
        UsageError: if there is no dataset with this name or path, its format is unknown, or a model is not a file.
        DataError: if the dataset is an empty file.
    """
    check_dataset(dataset, project_root=project.root, targets_required=False)
    for path in models:
        if not from_here(path).is_file():
            raise UsageError(
                f"There is no model file {path}. Give model_fold_*.pth files of an experiment's results folder."
            )


def read_files(project: ProjectFolder, dataset: str, models: Sequence[str | Path]) -> tuple[Path, ...]:
    """The files and folders that predictions must not overwrite: dataset, models and the project's state."""
    given = project.root / Path(dataset).expanduser()
    return (*([given] if given.exists() else []), *map(Path, models), *project.never_outputs)


def require_table(path: Path, made_from: Sequence[Path], *, force: bool) -> None:
    """Check that predictions may be written to a file.

    Raises:
        UsageError: if the file is in `made_from`; or if, without ``force``, it would replace a file that is not a
            table of predictions.
    """
    require_writable(path, force=force, reads=made_from, ours=",".join(COLUMNS).encode())
