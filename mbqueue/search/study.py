"""Ask Optuna for the settings of a search's next trial, and whether a trial is worth more epochs.

Every call builds a new study from the trials in the queue, so Optuna's answers depend only on the search, its seed, the
trial's number and the commits. The first call imports Optuna.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mbqueue.errors import SearchUnavailable, SpecError
from mbqueue.search.file import Search, Setting, Value, reasons
from mbqueue.search.trials import Trial, TrialState

if TYPE_CHECKING:
    import optuna

#: The number of random trials before TPE learns from results: a third of all trials, at most ten.
_STARTUP_TRIALS, _STARTUP_SHARE = 10, 3
#: The maximum number of draws for one trial while the experiment keeps rejecting the settings. After `_STUBBORN_DRAWS`
#: draws, settings are drawn at random, because a sampler with few results may repeat rejected settings. A grid sampler
#: never repeats settings.
_MOST_DRAWS, _STUBBORN_DRAWS = 50, 25
#: Samplers whose draws depend on the number of earlier draws, so that the study must repeat all draws in order.
_COUNTING = {"qmc", "cmaes"}


def next_settings(search: Search, trials: Sequence[Trial]) -> dict[str, Value] | None:
    """Choose the settings of the next trial; return None if no settings are left to try.

    Raises:
        SearchUnavailable: if Optuna is not installed.
        SpecError: if the spec rejects all sampled settings.
    """
    refused = ""
    with imported_optuna() as optuna:
        for draw in range(_MOST_DRAWS):
            settings = _drawn(optuna, search, trials, draw)
            if search.sampler == "grid" and any(trial.settings == settings for trial in trials):
                return None
            try:
                search.spec_with(settings, name="trial")
            except SpecError as error:
                shown = ", ".join(f"{key} = {value}" for key, value in settings.items())
                refused = f"such as {shown}: {reasons(error)}"
                continue
            return settings
    raise SpecError(
        f"the experiment rejects all {_MOST_DRAWS} settings drawn from the space of {search.name}, {refused}"
    )


def is_unpromising(search: Search, trials: Sequence[Trial], number: int, fold: int) -> bool:
    """Whether the pruner would prune a trial after the newest epoch of a fold.

    The pruners "halving" and "hyperband" compare the same epoch of the same fold across all trials. At the end of a
    fold, the pruner "wilcoxon" compares the best epoch of each fold with the best trial's.

    Args:
        trials: all trials of the search. The curves of trial ``number`` include the newest epoch.

    Raises:
        SearchUnavailable: if Optuna is not installed.
    """
    with imported_optuna() as optuna:
        study = optuna.create_study(
            study_name=search.name,
            sampler=optuna.samplers.RandomSampler(seed=0),
            pruner=_pruner(optuna, search, trials),
        )
        judged = False
        # Report the trial under evaluation last, but keep its number: Hyperband derives the bracket from it.
        replayed = [study.ask() for _ in trials]
        for trial, replay in sorted(zip(trials, replayed, strict=True), key=lambda pair: pair[0].number == number):
            for step, value in _steps(search, trial, fold):
                replay.report(value, step)
                judged = replay.should_prune()
            if trial.number != number and trial.is_trained and trial.value is not None:
                study.tell(replay, trial.value)
        return judged


def _steps(search: Search, trial: Trial, fold: int) -> Iterator[tuple[int, float]]:
    if search.pruner == "wilcoxon":
        for of, curve in sorted(trial.curves.items()):
            if len(curve) == trial.epochs or trial.is_trained:
                yield of, min(curve)
    else:
        yield from enumerate(trial.curves.get(fold, ()), start=1)


def _drawn(optuna: Any, search: Search, trials: Sequence[Trial], draw: int) -> dict[str, Value]:
    seed = _seed(search, trials[-1].number + 1 if trials else 0, draw)
    study = optuna.create_study(study_name=search.name, sampler=_sampler(optuna, search, seed))
    for trial in trials:
        _add(optuna, study, search, trial)
    if draw >= _STUBBORN_DRAWS and search.sampler != "grid":
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
    asked = study.ask()
    settings: dict[str, Value] = {}
    for key, setting in search.space.items():
        if all(settings.get(other) in values for other, values in setting.when.items()):
            settings[key] = _suggested(asked, key, distribution(optuna, search, key, setting))
    return settings


def _suggested(asked: Any, key: str, values: Any) -> Value:
    if hasattr(values, "choices"):
        chosen: Value = asked.suggest_categorical(key, values.choices)
        return chosen
    suggest = asked.suggest_int if isinstance(values.low, int) else asked.suggest_float
    number: int | float = suggest(key, values.low, values.high, step=values.step, log=values.log)
    return number


def _add(optuna: Any, study: optuna.Study, search: Search, trial: Trial) -> None:
    states = optuna.trial.TrialState
    distributions = {key: distribution(optuna, search, key, search.space[key]) for key in trial.settings}
    values = dict(enumerate(trial.curves[min(trial.curves)], start=1)) if trial.curves else {}
    state = states.RUNNING if trial.state is TrialState.OPEN else states.FAIL
    if trial.state is TrialState.PRUNED:
        state = states.PRUNED
    elif trial.is_trained and trial.value is not None:
        state = states.COMPLETE
    value = trial.value if state is states.COMPLETE else None
    if search.sampler not in _COUNTING:
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=value,
                params=dict(trial.settings),
                distributions=distributions,
                intermediate_values=values,
            )
        )
        return
    study.enqueue_trial(dict(trial.settings))
    asked = study.ask()
    asked.relative_params  # noqa: B018 - makes the sampler repeat its draw for this trial, so that it is counted
    for key, values_of_key in distributions.items():
        _suggested(asked, key, values_of_key)
    for step, reported in values.items():
        asked.report(reported, step)
    if state is states.COMPLETE:
        study.tell(asked, value)
    elif state is not states.RUNNING:
        study.tell(asked, state=state)


def distribution(optuna: Any, search: Search, key: str, setting: Setting) -> Any:
    """Describe a setting's values as an Optuna distribution."""
    if setting.choices is not None:
        return optuna.distributions.CategoricalDistribution(tuple(setting.choices))
    assert setting.low is not None
    assert setting.high is not None
    if search.is_integer(key):
        step = 1 if setting.step is None else int(setting.step)
        return optuna.distributions.IntDistribution(int(setting.low), int(setting.high), log=setting.log, step=step)
    step_or_none = None if setting.step is None else float(setting.step)
    return optuna.distributions.FloatDistribution(
        float(setting.low), float(setting.high), log=setting.log, step=step_or_none
    )


def _sampler(optuna: Any, search: Search, seed: int) -> Any:
    samplers = optuna.samplers
    apart = samplers.RandomSampler(seed=seed)  # draws the keys that the main sampler leaves out
    if search.sampler == "tpe":
        startup = min(_STARTUP_TRIALS, search.trials // _STARTUP_SHARE) if search.trials else _STARTUP_TRIALS
        return samplers.TPESampler(seed=seed, n_startup_trials=startup)
    if search.sampler == "qmc":
        return samplers.QMCSampler(seed=search.seed, scramble=True, independent_sampler=apart)
    if search.sampler == "cmaes":
        return samplers.CmaEsSampler(seed=search.seed, independent_sampler=apart, warn_independent_sampling=False)
    if search.sampler == "grid":
        return samplers.BruteForceSampler(seed=seed)  # GridSampler does not support conditional keys
    return apart


def _pruner(optuna: Any, search: Search, trials: Sequence[Trial]) -> Any:
    pruners = optuna.pruners
    if search.pruner == "halving":
        return pruners.SuccessiveHalvingPruner(min_resource=search.min_epochs, reduction_factor=search.reduction)
    if search.pruner == "hyperband":
        epochs = max((trial.epochs for trial in trials), default=1)
        return pruners.HyperbandPruner(
            min_resource=search.min_epochs, max_resource=epochs, reduction_factor=search.reduction
        )
    if search.pruner == "wilcoxon":
        return pruners.WilcoxonPruner()
    return pruners.NopPruner()


def _seed(search: Search, number: int, draw: int) -> int:
    text = f"{search.seed} {number} {draw}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@contextmanager
def imported_optuna() -> Iterator[Any]:
    """Import Optuna, and silence its log and warnings in the ``with`` block.

    Raises:
        SearchUnavailable: if Optuna is not installed.
    """
    try:
        import optuna  # noqa: PLC0415 - optional package, and slow to import
    except ImportError as error:
        raise SearchUnavailable(
            f"Searches need Optuna, which cannot be loaded here ({error}). Install it with: pip install "
            "'mbqueue[search]'"
        ) from error
    optuna.logging.get_logger("optuna").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns about features that it calls experimental
        yield optuna
