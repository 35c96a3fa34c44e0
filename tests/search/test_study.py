"""Optuna's suggestions and pruning decisions depend only on the search and the commits."""

from __future__ import annotations

import builtins
import itertools
from typing import Any

import pytest
from recorded_search import SPACE, make_search, val_mae

from mbqueue.errors import SearchUnavailable, SpecError
from mbqueue.search.file import Search
from mbqueue.search.study import is_unpromising, next_settings
from mbqueue.search.trials import Trial, TrialState

SAMPLERS = ["tpe", "qmc", "random", "cmaes"]


def trial(number: int, settings: dict[str, Any], *, epochs: int = 8, done: int = 8, folds=(0,), **options) -> Trial:
    state = options.pop("state", TrialState.DONE if done == epochs else TrialState.OPEN)
    curves = {fold: [val_mae(settings, fold, epoch) for epoch in range(1, done + 1)] for fold in folds}
    spent = {"seconds": 1.0 * done, "epoch_seconds": 1.0 * done}
    fields = {"experiment": f"hunt.{number:03d}", "priority": 0, "is_paused": False, **spent, **options}
    curves = fields.pop("curves", curves)
    return Trial(
        number=number, settings=settings, state=state, curves=curves, epochs=epochs, is_trained=done == epochs, **fields
    )


def suggested(search: Search, n: int) -> list[Trial]:
    """Return the first ``n`` trials of a search without pruning."""
    trials: list[Trial] = []
    for number in range(n):
        settings = next_settings(search, trials)
        assert settings is not None
        trials.append(trial(number, settings))
    return trials


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_suggestion_depends_on_the_seed_the_number_and_the_results_alone(sampler):
    first = [one.settings for one in suggested(make_search(sampler=sampler), 8)]
    assert [one.settings for one in suggested(make_search(sampler=sampler), 8)] == first
    assert [one.settings for one in suggested(make_search(sampler=sampler, seed=1), 8)] != first
    assert len({str(settings) for settings in first}) == 8


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_suggestions_are_in_the_space_and_have_conditional_keys_where_they_apply(sampler):
    for one in suggested(make_search(sampler=sampler), 12):
        settings = dict(one.settings)
        assert 1e-4 <= settings.pop("train.lr") <= 1e-2
        assert settings.pop("train.unfreeze_epochs") in {0, 2, 4}
        size = settings.pop("train.batch_size")
        assert size in {16, 32, 64}
        assert ("train.ema_decay" in settings) == (size != 64)
        assert settings.pop("train.ema_decay", 0.0) in {0.0, 0.9}
        assert not settings


@pytest.mark.parametrize(("sampler", "learns"), [("tpe", True), ("cmaes", True), ("random", False), ("qmc", False)])
def test_learning_samplers_suggest_other_settings_after_other_results(sampler, learns):
    space = {"train.lr": SPACE["train.lr"], "train.weight_decay": {"low": 1e-6, "high": 1e-2, "log": True}}
    search = make_search(sampler=sampler, space=space)
    trials = suggested(search, 10)
    turned = [
        trial(one.number, dict(one.settings), curves={0: [1.0 - value for value in one.curves[0]]}) for one in trials
    ]
    assert (next_settings(search, trials) != next_settings(search, turned)) == learns


def test_a_grid_search_tries_each_combination_once_and_ends():
    space = {"train.batch_size": {"choices": [16, 32, 64]}, "train.unfreeze_epochs": {"low": 0, "high": 4, "step": 2}}
    search = make_search(sampler="grid", space=space, trials=100)
    trials = suggested(search, 9)
    found = {(one.settings["train.batch_size"], one.settings["train.unfreeze_epochs"]) for one in trials}
    assert found == set(itertools.product([16, 32, 64], [0, 2, 4]))
    assert next_settings(search, trials) is None


def test_a_trial_that_is_still_open_is_not_suggested_again():
    search = make_search(sampler="grid", space={"train.batch_size": {"choices": [16, 32]}})
    settings = next_settings(search, [])
    following = next_settings(search, [trial(0, settings, done=1)])
    assert following not in (None, settings)


def test_refused_combinations_are_drawn_again_and_settings_always_refused_are_an_error():
    space = {"train.epochs": {"choices": [2, 8]}, "train.unfreeze_epochs": {"low": 0, "high": 4, "step": 2}}
    for one in suggested(make_search(space=space, trials=20, sampler="random"), 20):
        assert one.settings["train.unfreeze_epochs"] < one.settings["train.epochs"]
    never = make_search(space={"train.unfreeze_epochs": {"choices": [8, 9]}})
    with pytest.raises(SpecError, match="must be below epochs = 8"):
        next_settings(never, [])


def judged(search: Search, trials: list[Trial], number: int) -> bool:
    return is_unpromising(search, trials, number, 0)


GOOD, BAD = {"train.lr": 1e-3}, {"train.lr": 1e-2}


@pytest.mark.parametrize("pruner", ["halving", "hyperband"])
def test_a_trial_worse_than_others_is_pruned_and_a_better_one_continues(pruner):
    search = make_search(pruner=pruner)
    trials = [trial(number, GOOD if number % 2 else BAD) for number in range(6)]
    ended = {number: [] for number in (6, 7)}
    for number, epoch in itertools.product(ended, range(1, 8)):
        settings = BAD if number == 6 else {"train.lr": 1.1e-3, "train.batch_size": 32}
        better = {**settings, "train.lr": 1e-3} if number == 7 else settings
        others = [*trials, *([trial(6, BAD, done=1, state=TrialState.PRUNED)] if number == 7 else [])]
        if judged(search, [*others, trial(number, better, done=epoch)], number):
            ended[number].append(epoch)
    assert ended[6]
    assert not ended[7]


def test_no_trial_is_pruned_before_min_epochs():
    search = make_search(min_epochs=4)
    trials = [trial(number, GOOD) for number in range(4)]
    verdicts = [judged(search, [*trials, trial(4, BAD, done=epoch)], 4) for epoch in range(1, 6)]
    assert verdicts == [False, False, False, True, False]


def test_the_wilcoxon_pruner_compares_folds_with_those_of_the_best_trial():
    folds = (0, 1, 2, 3, 4)
    search = make_search(pruner="wilcoxon", folds=list(folds), epochs=2)
    best = trial(0, GOOD, epochs=2, done=2, folds=folds)
    bad = trial(1, BAD, epochs=2, done=0, folds=folds)
    some = {fold: best.curves[fold][:] for fold in folds}
    for n_done in (1, 4):
        worse = {fold: [value + 0.02 + 0.001 * fold for value in some[fold]] if fold < n_done else [] for fold in folds}
        found = is_unpromising(search, [best, trial(1, BAD, epochs=2, done=0, curves=worse)], 1, n_done - 1)
        assert found == (n_done == 4)
    assert not is_unpromising(search, [best, bad], 1, 0)


def test_without_optuna_the_error_says_what_to_install(monkeypatch):
    imported = builtins.__import__

    def without(name, *arguments, **options):
        if name.partition(".")[0] == "optuna":
            raise ImportError("No module named 'optuna'")
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SearchUnavailable, match=r"pip install 'mbqueue\[search\]'"):
        next_settings(make_search(), [])
