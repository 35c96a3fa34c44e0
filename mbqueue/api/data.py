"""Convert crystals ahead of time, predict their properties with trained models, and prune their cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mbqueue.api.base import OpenedProject, tell
from mbqueue.errors import MbqueueError
from mbqueue.project import working_folder
from mbqueue.queue.opening import anything, open_queue, queue_exists
from mbqueue.task import FORMATION_ENERGY

if TYPE_CHECKING:
    from mbqueue.data.cache_folder import StoredCache
    from mbqueue.experiment import DataSpec
    from mbqueue.session.ensemble import EnsembleTable
    from mbqueue.session.loading import LoadedData, Progress


class Data(OpenedProject):
    def prepare(
        self, data: DataSpec, *, target_column: str = "", seed: int = 0, progress: Progress | None = None
    ) -> LoadedData:
        """Read a dataset and convert it to graphs in the project's cache, on all cores. Sessions also prepare data.

        You can kill the process at any time; the next call resumes. If the dataset is not on this machine, the crystals
        can come from a queued experiment that was prepared with this dataset.

        Args:
            data: the crystals to prepare, such as ``DataSpec(dataset="sample", limit=40)``.
            target_column: the target's column in your own table; by default a column with a known name.
            seed: the random seed for choosing crystals if ``data`` has a limit.

        Raises:
            DataError: if the dataset cannot be used.
            UsageError: if the dataset does not exist.
            ProjectNotFound: if the working directory no longer exists.
        """
        working_folder()
        from mbqueue.data.machine_code import telling  # noqa: PLC0415
        from mbqueue.session.loading import load_data  # noqa: PLC0415
        from mbqueue.session.sources import DataRequest  # noqa: PLC0415

        with telling(tell):
            loaded = load_data(
                self.folder,
                DataRequest(data=data, seed=seed, target=replace(FORMATION_ENERGY.target, column=target_column)),
                dataset_hash=self._prepared_hash(data, target_column, seed),
                progress=progress or _silent,
                note=tell,
            )
        assert loaded is not None, "no request to stop"
        return loaded

    def predict(
        self,
        dataset: DataSpec | str | Path,
        models: Sequence[str | Path],
        *,
        target_column: str = "",
        strains: int = 0,
        device: str | None = None,
        progress: Progress | None = None,
    ) -> EnsembleTable:
        """Predict crystals, with or without targets, with the given model files.

        Args:
            dataset: the dataset's name or path, or a ``DataSpec``, which can also set the id column or drop unusable
                entries.
            models: model_fold_*.pth files; several files make an ensemble.
            target_column: column of the dataset's table with the true values; by default, a column with a name that
                mbqueue recognises.
            strains: number of pairs of small opposite strains over which each prediction is averaged.
            device: cpu, cuda or cuda:1; by default the first GPU, or the CPU if there is no GPU.

        Raises:
            DataError: if the dataset cannot be used.
            CheckpointError: if a file is not a model.
            UsageError: if the device does not exist.
            ProjectNotFound: if the working directory no longer exists.
        """
        working_folder()
        from mbqueue.data.machine_code import telling  # noqa: PLC0415
        from mbqueue.experiment import DataSpec  # noqa: PLC0415
        from mbqueue.session.ensemble import predict_dataset  # noqa: PLC0415

        with telling(tell):
            return predict_dataset(
                self.folder,
                dataset if isinstance(dataset, DataSpec) else DataSpec(dataset=str(dataset)),
                models,
                target_column=target_column,
                strains=strains,
                device=device,
                progress=progress or _silent,
                note=tell,
            )

    def prune_cache(self, *, everything: bool = False) -> list[StoredCache]:
        """Remove caches that no unfinished experiment in the queue needs, or all caches; return the removed caches.

        This method keeps caches that are still being built, and logs a note about them.
        """
        from mbqueue.data.cache_folder import prune_caches  # noqa: PLC0415

        needed: set[str] = set()
        unprepared: set[str] = set()
        if queue_exists(self.folder) and not everything:
            with open_queue(self.folder, read_only=True, refuses=anything) as queue:
                states = {entry["name"]: entry["state"] for entry in queue.overview(now=0.0)["experiments"]}
                unfinished = [experiment for experiment in queue.experiments() if states[experiment.name] != "done"]
            needed = {experiment.dataset_hash for experiment in unfinished if experiment.dataset_hash is not None}
            unprepared = {experiment.dataset for experiment in unfinished if experiment.dataset_hash is None}
        return list(prune_caches(self.folder.cache_dir, keep=needed, keep_sources=unprepared, note=tell))

    def _prepared_hash(self, data: DataSpec, target_column: str, seed: int) -> str | None:
        """Find the dataset's hash in an experiment that was prepared with it; None if the dataset is on this machine.

        A dataset on this machine may have changed, so its old hash is not used.
        """
        from mbqueue.data.datasets import is_at_hand  # noqa: PLC0415
        from mbqueue.experiment import parse_spec  # noqa: PLC0415

        if is_at_hand(data.dataset, project_root=self.folder.root):
            return None
        try:
            if not queue_exists(self.folder):
                return None
            with open_queue(self.folder, read_only=True) as queue:
                for experiment in reversed(queue.experiments()):
                    spec = parse_spec(experiment.spec, source=f"the spec of {experiment.name} in the queue")
                    is_same = spec.data == data and target_column in ("", spec.target.column)
                    if experiment.dataset_hash and is_same and (not data.limit or spec.seed == seed):
                        tell(f"{data.dataset} is not on this machine; using the crystals of {experiment.name}.")
                        return experiment.dataset_hash
        except MbqueueError as error:
            tell(f"{error} mbqueue reads the dataset from its source instead.")
        return None


def _silent(_what: str) -> Callable[[int, int], None]:
    return lambda _done, _total: None
