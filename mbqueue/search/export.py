"""Convert a search to an Optuna study, to write a file for optuna-dashboard or to compute importances.

An exported study is only for viewing results. To choose settings and prune trials, mbqueue uses the studies in
`mbqueue.search.study`.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbqueue import files
from mbqueue.search.file import Search
from mbqueue.search.study import distribution, imported_optuna
from mbqueue.search.trials import Trial, TrialState

#: The minimum number of trials for computing importances.
_FEWEST_TRIALS = 4
#: Optuna's names for trial states.
_STATES = {
    TrialState.OPEN: "RUNNING",
    TrialState.DONE: "COMPLETE",
    TrialState.PRUNED: "PRUNED",
    TrialState.FAILED: "FAIL",
    TrialState.CANCELLED: "FAIL",
}


def write_study(search: Search, trials: Sequence[Trial], path: Path) -> Path:
    """Write the trials of a search to an Optuna SQLite file, under the search's name, and return its path.

    Trials are written in numerical order. The value of a trained or pruned trial is the validation MAE by which the
    search compares trials. The intermediate value of an epoch is the mean validation MAE over the folds that have
    reached the epoch. Each trial's user attributes contain further details.

    Raises:
        SearchUnavailable: if Optuna is not installed.
    """
    with imported_optuna() as optuna, tempfile.TemporaryDirectory() as scratch:
        logging.getLogger("alembic").setLevel(logging.ERROR)
        file = Path(scratch, "study.db")
        storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
        try:
            study = optuna.create_study(study_name=search.name, storage=storage)
            study.set_user_attr("search", search.to_json())
            study.add_trials([_frozen(optuna, search, trial) for trial in trials])
        finally:
            storage.engine.dispose()
        files.write_bytes(path, file.read_bytes())
    return path


def importances(search: Search, trials: Sequence[Trial]) -> dict[str, float]:
    """Compute the importance of each key with Optuna's PED-ANOVA. The importances add up to 1.

    The importances are based on the current value of each trial, even if the trial has not trained all epochs. With
    fewer than four trials, or if all trials are equally good, the result is empty. Keys that only some trials vary are
    left out.

    Raises:
        SearchUnavailable: if Optuna is not installed.
    """
    rated = [trial for trial in trials if trial.value is not None and math.isfinite(trial.value)]
    keys = [key for key, setting in search.space.items() if not setting.when]
    if len(rated) < _FEWEST_TRIALS or len({trial.value for trial in rated}) == 1 or not keys:
        return {}
    with imported_optuna() as optuna:
        study = optuna.create_study()
        for trial in rated:
            study.add_trial(
                optuna.trial.create_trial(
                    value=trial.value,
                    params={key: trial.settings[key] for key in keys},
                    distributions={key: distribution(optuna, search, key, search.space[key]) for key in keys},
                )
            )
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(), params=keys
        )
    return {key: float(share) for key, share in found.items()}


def _frozen(optuna: Any, search: Search, trial: Trial) -> Any:
    distributions = {key: distribution(optuna, search, key, search.space[key]) for key in trial.settings}
    curves = {f"val_mae_fold_{fold}": list(curve) for fold, curve in trial.curves.items() if curve}
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState[_STATES[trial.state]],
        value=trial.value if trial.state in {TrialState.DONE, TrialState.PRUNED} else None,
        params=dict(trial.settings),
        distributions=distributions,
        intermediate_values=dict(enumerate(trial.mean_curve, start=1)),
        user_attrs={
            "experiment": trial.experiment,
            "state": trial.state.value,
            "gpu_hours": trial.seconds / 3600,
            **curves,
        },
    )
