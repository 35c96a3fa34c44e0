"""Write matbench_results.json.gz with matbench's own classes, which record, score and validate a task.

``MatbenchTask`` expects the dataset's frame with Structure objects, but ``record`` and ``scores`` use only ids and
targets. So mbqueue builds a data frame of ids and targets from the predictions, and does not download the dataset.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mbqueue import files
from mbqueue.errors import ResultsError
from mbqueue.results.scores import CLASS_THRESHOLD
from mbqueue.results.tables import RESTORE, Predictions
from mbqueue.task import Task

#: A log level above all levels that matbench uses, to silence matbench.
_SILENT = logging.CRITICAL + 1


def write_matbench_file(
    path: Path, predictions: Mapping[int, Predictions], task: Task, *, models: str, parameters: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Validate all five official folds with matbench, and write them gzipped, as ``MatbenchBenchmark.to_file`` does.

    The bytes depend only on the inputs and on matbench's date stamp, which matbench's hash includes.

    Args:
        path: the .json.gz file.
        predictions: fold → predictions of its test set, with rows in any order.
        task: the matbench task of the folds.
        models: the names of the models' families, for example ``CHGNet``.
        parameters: plain values that matbench stores with each fold.

    Returns:
        matbench's scores, as score → {mean, max, min, std}.

    Raises:
        ResultsError: if matbench is missing, the official folds have different ids, or matbench's validation fails.
    """
    with _quiet_matbench() as benchmark_class:
        import pandas as pd  # noqa: PLC0415 - only this file needs it, and recording is rare

        benchmark = benchmark_class(autoload=False, subset=[task.dataset])
        theirs = next(iter(benchmark.tasks))
        index = [crystal_id for table in predictions.values() for crystal_id in table.ids]
        targets = [value for table in predictions.values() for value in table.y_true.tolist()]
        if task.target.is_class:
            targets = [value > CLASS_THRESHOLD for value in targets]  # matbench represents classes as true and false
        theirs.df = pd.DataFrame({theirs.metadata.input_type: None, theirs.metadata.target: targets}, index=index)
        for fold, key in theirs.folds_map.items():
            official_ids = theirs.validation[key].test
            theirs.record(fold, _in_order(predictions, fold, official_ids, task), params=dict(parameters))
        benchmark.add_metadata({"algorithm": f"{models} through mbqueue"})
        if errors := benchmark.validate():
            raise ResultsError(f"matbench rejected the results for {path}:\n{errors[task.dataset]}")
        scores = _plain_scores(theirs)
        _write(path, benchmark)
    return scores


def merge_matbench_files(path: Path, parts: Sequence[Path], *, models: str) -> None:
    """Validate several files of ``write_matbench_file`` with matbench, and merge them into one.

    Args:
        models: the names of the models' families in all files.

    Raises:
        ResultsError: if a file is missing or damaged, two files have the same task, or matbench rejects a file.
    """
    with _quiet_matbench() as benchmark_class:
        tasks: dict[str, Any] = {}
        for part in parts:
            for task in benchmark_class.from_dict(_content(part)).tasks:
                if task.dataset_name in tasks:
                    raise ResultsError(
                        f"{task.dataset_name} occurs twice, the second time in {part}. Export only one of them."
                    )
                tasks[task.dataset_name] = task
        merged = benchmark_class(autoload=False, subset=list(tasks))
        merged.tasks_map.update(tasks)
        merged.add_metadata({"algorithm": f"{models} through mbqueue"})
        if errors := merged.validate():
            raise ResultsError(f"matbench rejected the results for {path}:\n" + "\n".join(errors.values()))
        _write(path, merged)


def read_matbench_scores(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return each task's scores, if the file passes the checks of matbench's ``from_file`` (hash, ids, types).

    Raises:
        ResultsError: if the file is missing or damaged, or matbench is missing or rejects the content.
    """
    content = _content(path)
    with _quiet_matbench() as benchmark_class:
        try:
            benchmark = benchmark_class.from_dict(content)
        except Exception as error:
            raise ResultsError(f"matbench rejected {path}: {error}") from error
        return {task.dataset_name: _plain_scores(task) for task in benchmark.tasks}


def _content(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    except FileNotFoundError as error:
        raise ResultsError(
            f"There is no file {path}. mbqueue writes it when all five official folds are recorded."
        ) from error
    except (OSError, EOFError, ValueError) as error:
        raise ResultsError(f"{path} is damaged: {error}. {RESTORE}") from error
    return content


def _write(path: Path, benchmark: Any) -> None:
    """Write a benchmark as ``MatbenchBenchmark.to_file`` does, but gzipped."""
    plain = files.temp_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        benchmark.to_file(plain)
        text = plain.read_bytes()
    finally:
        plain.unlink(missing_ok=True)
    files.write_bytes(path, gzip.compress(text, compresslevel=6, mtime=0))


@contextlib.contextmanager
def _quiet_matbench() -> Iterator[Any]:
    """Import matbench's MatbenchBenchmark class, and keep matbench's log off standard output in the ``with`` block.

    On import, matbench attaches a log handler to ``sys.stdout``, and every call logs something.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # matbench 0.6 and matminer use deprecated calls
        try:
            from matbench.bench import MatbenchBenchmark  # noqa: PLC0415 - heavy, and optional
        except ImportError as error:
            raise ResultsError(
                f"The official task needs matbench ({error}). Install it without its outdated pins:\n"
                "  pip install --no-deps matbench==0.6\n"
                "then, if a record job failed, run: mbqueue retry NAME"
            ) from error
        logger = logging.getLogger("matbench")
        level = logger.level
        logger.setLevel(_SILENT)
        try:
            yield MatbenchBenchmark
        finally:
            logger.setLevel(level)


def _in_order(predictions: Mapping[int, Predictions], fold: int, official_ids: list[str], task: Task) -> list[float]:
    if fold not in predictions:
        raise ResultsError(f"Fold {fold} is missing: matbench needs all five folds.")
    table = predictions[fold]
    by_id = dict(zip(table.ids, table.y_pred.tolist(), strict=True))
    if by_id.keys() != set(official_ids):
        odd = sorted(by_id.keys() ^ set(official_ids))
        told = "1 id differs" if len(odd) == 1 else f"{len(odd):,} ids differ"
        raise ResultsError(
            f"The test set of fold {fold} is not the official one: {told}, such as {odd[0]}. "
            f"A matbench file needs the whole official file of {task.dataset}."
        )
    return [by_id[crystal_id] for crystal_id in official_ids]


def _plain_scores(task: Any) -> dict[str, dict[str, float]]:
    return {name: {kind: float(value) for kind, value in values.items()} for name, values in task.scores.items()}
