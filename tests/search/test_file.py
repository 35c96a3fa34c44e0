"""Search files: what they may contain, and one clear error for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from mbqueue import Project
from mbqueue.errors import ExperimentExists, SpecError, UsageError
from mbqueue.project import ProjectFolder
from mbqueue.queue.opening import open_queue
from mbqueue.search.file import Search

BASE = '[data]\ndataset = "sample"\n[train]\nepochs = 4\n'
SEARCH = """
description = "which rate"
[search]
base = "small"
trials = 3
[search.space]
"train.lr" = { low = 1e-4, high = 1e-2, log = true }
"train.batch_size" = { choices = [8, 16] }
"""


@pytest.fixture
def write(project: ProjectFolder):
    (project.jobs_dir / "small.toml").write_text(BASE, encoding="utf-8")

    def write(text: str = SEARCH, name: str = "hunt") -> Path:
        path = project.jobs_dir / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_enqueueing_a_search_begins_its_first_trial_with_all_of_the_search_in_its_spec(project, write):
    write()
    outcome = Project(project.root).enqueue("hunt", priority=3)
    with open_queue(project) as queue:
        (experiment,) = queue.experiments()
    assert (experiment.name, experiment.priority) == ("hunt.000", 3)
    assert outcome.experiment == experiment
    spec = experiment.spec
    assert (spec["folds"], spec["train"]["epochs"]) == ([0], 4)
    assert 1e-4 <= spec["train"]["lr"] <= 1e-2
    trial = spec["trial"]
    assert trial["settings"] == {"train.lr": spec["train"]["lr"], "train.batch_size": spec["train"]["batch_size"]}
    assert Search.model_validate(trial["search"]).description == "which rate"


def test_a_trial_has_the_hash_of_the_separate_experiment(project, write):
    write()
    found = Project(project.root)
    trial = found.enqueue("hunt").experiment
    alone = found.enqueue("small", folds=[0], settings=trial.spec["trial"]["settings"], name="alone").experiment
    assert alone.spec_hash == trial.spec_hash
    assert "trial" not in alone.spec


def test_the_same_search_again_changes_nothing_and_another_under_its_name_is_refused(project, write):
    write()
    found = Project(project.root)
    found.enqueue("hunt")
    assert found.enqueue("hunt").outcome == "unchanged"
    write(SEARCH.replace("trials = 3", "trials = 4"))
    with pytest.raises(ExperimentExists, match=r"contains a search named hunt, with a different .*--name hunt-2"):
        found.enqueue("hunt")
    assert found.enqueue("hunt", name="hunt-2").experiment.name == "hunt-2.000"
    with pytest.raises(ExperimentExists, match="contains a search named hunt"):
        found.enqueue("small", name="hunt")
    found.enqueue("small", name="taken")
    with pytest.raises(ExperimentExists, match="contains an experiment named taken"):
        found.enqueue("hunt", name="taken")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"train.lr"', '"train.rate"', r"space\.train\.rate: an experiment has no such setting"),
        ('"train.lr"', '"lr"', r"space\.lr: .* Did you mean train\.lr\?"),
        ('"train.lr"', '"folds"', r"space\.folds: an experiment has no such setting"),
        ("high = 1e-2", "high = 1e-4", r"space\.train\.lr: the range from 0\.0001 to 0\.0001 is empty"),
        ("low = 1e-4", "low = 0.0", "a logarithmic range must start above 0"),
        ("high = 1e-2, log = true", "high = 2.0", r"cannot have the value 2\.0: train\.lr = 2\.0: .*or equal to 1"),
        ("choices = [8, 16]", "choices = []", r"space\.train\.batch_size: choices is empty"),
        ("choices = [8, 16]", "choices = [8, 8]", "choices must differ"),
        ("choices = [8, 16]", "choices = [0, 8]", r"space\.train\.batch_size: the experiment cannot have the value 0:"),
        ("choices = [8, 16]", "low = 1.5, high = 3.0", r"train\.batch_size is an integer"),
        ("choices = [8, 16]", "low = 8", "give low and high, or choices"),
        ("{ low = 1e-4, high = 1e-2, log = true }", "0.1", r"space\.train\.lr = 0\.1: write { low = .* { choices = "),
        ("{ choices = [8, 16] }", "[8, 16]", r"space\.train\.batch_size = \[8, 16\]: write { low = .*"),
        ("choices = [8, 16]", 'choices = [8, 16], when = { "train.ema_decay" = [0.5] }', r"must come before"),
        ("low = 1e-4", "low = nan", r"space\.train\.lr\.low = nan: must be a finite number"),
        ("high = 1e-2", 'high = "much"', r"space\.train\.lr\.high = 'much': must be a finite number"),
        ("low = 1e-4", "low = true", r"space\.train\.lr\.low = True: must be a finite number"),
        ("log = true", "step = 1.0", r"space\.train\.lr: the step of 1\.0 is larger than the range from 0\.0001"),
        ('"train.lr" = { low = 1e-4, high = 1e-2, log = true }', '"train.schedule" = { low = 0, high = 1 }',
         r"space\.train\.schedule: train\.schedule is not a number, so it needs choices"),
        ('"train.lr" = { low = 1e-4, high = 1e-2, log = true }', '"data.limit" = { choices = [40, 80] }',
         r"space\.data\.limit: trials are compared by validation MAE, so all must have the base's data and target"),
        ("choices = [8, 16]", 'choices = [8], when = { "train.lr" = [] }',
         r"space\.train\.batch_size: `when` must list at least one value"),
        ('"train.lr" = { low = 1e-4, high = 1e-2, log = true }\n"train.batch_size" = { choices = [8, 16] }\n', "",
         "space: is empty; name at least one key"),
        ("trials = 3", "trials = 3\nmin_epochs = 5", r"min_epochs = 5: trials have 4 epochs, so none would be pruned"),
        ("trials = 3", "trials = 3\nbase_spec = {}", "base_spec: there is no such key"),
        ("trials = 3", "trials = 3\ngpu_hours = nan", "gpu_hours = nan: .*finite"),
        ('base = "small"', 'base = "hunt"', "base = 'hunt': this is a search; name an experiment instead"),
        ("[search]", "[[search]]", r"search: must be a table"),
        ("trials = 3", "", "give trials, gpu_hours or both"),
        ("trials = 3", "trials = -1", r"trials = -1: .*greater than or equal to 0"),
        ("trials = 3", "trials = 3\nfolds = [7]", r"folds = \[7\]: give .* distinct numbers from 0 to 4"),
        ("trials = 3", 'trials = 3\npruner = "wilcoxon"', "give at least three"),
        ("trials = 3", 'trials = 3\nsampler = "grid"', r'space\.train\.lr: sampler = "grid" needs choices, or a step'),
        ("trials = 3", 'trials = 3\nsampler = "magic"', r"sampler = 'magic': .*'tpe'"),
        ("trials = 3", "trial = 3", "trial: there is no such key. Allowed keys: .*trials"),
        ("log = true", "logarithmic = true", r"space\.train\.lr\.logarithmic: there is no such key. Allowed keys: low"),
        ("[search.space]", "[train]\nlr = 1.0\n[search.space]", "besides the table .search., .* name and description"),
        ('base = "small"', "", "base: is missing"),
    ],
)  # fmt: skip
def test_an_impossible_search_is_one_error_with_its_place_and_nothing_is_enqueued(project, write, old, new, says):
    write(SEARCH.replace(old, new))
    with pytest.raises(SpecError, match=rf"(?s)hunt\.toml is not a valid search:.*{says}") as caught:
        Project(project.root).enqueue("hunt")
    assert len(str(caught.value).splitlines()) == 3
    assert not project.queue_db.exists()


@pytest.mark.parametrize("trials", ["trials = 100", "gpu_hours = 5.0"])
def test_a_grid_has_as_many_trials_as_settings_that_the_experiment_takes(project, write, trials):
    space = """
"train.epochs" = { choices = [2, 4] }
"train.unfreeze_epochs" = { low = 0, high = 3, step = 1 }
"train.ema_decay" = { choices = [0.0, 0.9], when = { "train.epochs" = [4] } }
"""
    search = SEARCH[: SEARCH.index('"train.lr"')].replace("trials = 3", f'{trials}\nsampler = "grid"')
    write(search + space)
    trial = Project(project.root).enqueue("hunt").experiment.spec["trial"]
    # With 2 epochs, unfreeze_epochs may be 0 or 1. With 4 epochs, unfreeze_epochs may be 0 to 3, each with two values
    # of ema_decay.
    assert trial["search"]["trials"] == 2 + 4 * 2


def test_a_missing_base_is_an_error_that_lists_the_experiments(project, write):
    write(SEARCH.replace('base = "small"', 'base = "smal"'))
    with pytest.raises(
        SpecError, match=r"hunt\.toml is not a valid search:\n  base = 'smal': .* Experiments in .*: .*small"
    ) as caught:
        Project(project.root).enqueue("hunt")
    assert "hunt" not in str(caught.value).split("Experiments in ")[1].split(": ")[1], "searches are no experiments"


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_a_space_that_the_experiment_always_refuses_is_an_error_with_file_and_reason(project, write, sampler):
    space = '"train.epochs" = { choices = [2, 4] }\n"train.unfreeze_epochs" = { choices = [3] }\n'
    # An experiment with 4 epochs accepts unfreeze_epochs = 3, but no experiment accepts `soup` with `ema_decay`.
    space += '"train.soup" = { choices = [2] }\n"train.ema_decay" = { choices = [0.5] }\n'
    write(SEARCH[: SEARCH.index('"train.lr"')].replace("trials = 3", f'trials = 3\nsampler = "{sampler}"') + space)
    with pytest.raises(
        SpecError, match=r"(?s)hunt\.toml is not a valid search:.*space: .* rejects all 50 .*soup"
    ) as caught:
        Project(project.root).enqueue("hunt")
    assert len(str(caught.value).splitlines()) == 3
    assert not list(project.notes_dir.glob("*"))


def test_options_that_a_search_does_not_take_are_refused(project, write):
    write()
    with pytest.raises(
        UsageError, match=r"describes a search.*The only options for a search are --name and --priority"
    ):
        Project(project.root).enqueue("hunt", epochs=3)


def test_an_experiment_file_cannot_say_that_it_is_a_trial(project, write):
    write('[trial]\nnumber = 3\n[data]\ndataset = "sample"\n', name="fake")
    with pytest.raises(SpecError, match="which only mbqueue's commands may write"):
        Project(project.root).enqueue("fake")
