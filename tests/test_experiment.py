from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mbqueue import families
from mbqueue.errors import SpecError
from mbqueue.experiment import Spec, hash_of_spec, load_spec, parse_spec
from mbqueue.experiment_file import parse_overrides
from mbqueue.files import sha256_of_json
from mbqueue.task import FORMATION_ENERGY, TASKS, Task, target_of


def spec(**content: Any) -> Spec:
    return parse_spec({"name": "x", **content}, source="jobs/x.toml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"train": {"lr": -1.0}}, ["train.lr = -1.0", "greater than 0"]),
        ({"train": {"lr": "fast"}}, ["train.lr = 'fast'", "valid number"]),
        ({"train": {"epochs": 2.5}}, ["train.epochs = 2.5", "valid integer"]),
        ({"train": {"loss": "mae"}}, ["train.loss = 'mae'", "'huber', 'l1' or 'l2'"]),
        ({"train": {"learning_rate": 1e-3}}, ["train.learning_rate", "no such key", "lr", "weight_decay"]),
        ({"model": {"pretrained": "9"}}, ["model.pretrained = '9'", "'0.3.0' or 'r2scan'"]),
        ({"data": {"dataset": ""}}, ["data.dataset", "at least 1 character"]),
        ({"epochs": 3}, ["epochs: there is no such key. Did you mean train.epochs?"]),
        ({"train": {"seed": 3}}, ["train.seed: there is no such key. Did you mean seed?"]),
        ({"folds": [0, 5]}, ["folds", "0 to 4"]),
        ({"target": {"column": "gap"}}, ["column 'gap'", "e_form", "target.kind=scalar"]),
        ({"folds": [1, 1]}, ["folds", "distinct"]),
        ({"folds": []}, ["folds", "at least one"]),
        ({"model": {"trainable": "none"}}, ["trainable", "epochs = 20"]),
        ({"train": {"epochs": 0}}, ["trainable", "epochs = 0"]),
        ({"train": {"epochs": 2, "unfreeze_epochs": 2}}, ["unfreeze_epochs = 2", "below"]),
        ({"model": {"trainable": "head"}, "train": {"jitter": 0.01}}, ["jitter"]),
        ({"name": "a b/c"}, ["name = 'a b/c': use up to 64 letters, digits, dots"]),
        ({"results_name": "a/b"}, ["results_name = 'a/b': use up to 64 letters"]),
        ({"train": {"lr": float("nan")}}, ["train.lr"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(content: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        spec(**content)
    for text in ["jobs/x.toml", *said]:
        assert text in str(caught.value)
    assert caught.value.__suppress_context__  # hide pydantic's error, because it does not help a user


@pytest.mark.parametrize("value", ["0.2.0", 3, None, ["0.3.0"]])
def test_an_unknown_model_is_refused_as_by_a_list_of_literals(value: Any) -> None:
    with pytest.raises(SpecError) as caught:
        spec(model={"pretrained": value})
    assert f"  model.pretrained = {value!r}: input should be '0.3.0' or 'r2scan'\n" in str(caught.value)


def test_a_spec_accepts_the_weights_of_every_registered_family(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(families.CHGNET, name="Other", module="other", pretrained={"large": "", "small": ""})
    monkeypatch.setattr(families, "FAMILIES", (families.CHGNET, other))
    assert spec(model={"pretrained": "large"}).to_json()["model"]["pretrained"] == "large"
    with pytest.raises(SpecError, match=r"'0\.3\.0', 'r2scan', 'large' or 'small'"):
        spec(model={"pretrained": "9"})


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        spec(train={"lr": -1.0, "epochs": -1})
    assert "train.lr" in str(caught.value)
    assert "train.epochs" in str(caught.value)


def test_the_hash_ignores_what_does_not_change_a_fold() -> None:
    assert spec().hash == spec(folds=[2], description="other", results_name="other").hash
    assert spec().hash == parse_spec({"name": "other"}, source="").hash


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"train": {"lr": 3e-4}}, {"data": {"limit": 5}}, {"model": {"pretrained": "r2scan"}}]
)
def test_the_hash_changes_with_what_changes_a_fold(change: dict[str, Any]) -> None:
    assert spec(**change).hash != spec().hash


def test_a_spec_of_before_a_key_existed_has_the_same_hash_and_means_what_it_meant() -> None:
    content = spec().to_json()
    for younger in ("group_by_size", "test_strains", "validation_seed", "soup", "soup_of"):
        del content["train"][younger]
    del content["data"]["id_column"]
    assert hash_of_spec(content) == spec().hash
    hashed_then = {key: content[key] for key in ("seed", "data", "model", "train")}
    assert spec().hash == sha256_of_json(hashed_then)
    assert parse_spec(content, source="the queue") == spec()
    assert spec(train={"group_by_size": True}).hash != spec().hash
    assert spec(train={"test_strains": 1}).hash != spec().hash
    assert spec(train={"validation_seed": 0}).hash != spec().hash
    assert spec(train={"soup": 2}).hash != spec().hash
    assert spec(train={"soup": 2, "soup_of": "best"}).hash != spec(train={"soup": 2}).hash
    assert spec(train={"precision": "fp16"}).hash != spec(train={"precision": "bf16"}).hash


def test_a_spec_survives_json() -> None:
    original = spec(folds=[3, 1], train={"lr": 1e-3})
    assert parse_spec(original.to_json(), source="the queue") == original


def test_overrides_are_laid_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[train]\nlr = 1e-3\nepochs = 5\n")
    found = load_spec(path, overrides=parse_overrides(["train.lr=3e-4", "data.dataset=sample", "folds=[1]"]))
    assert (found.name, found.train.lr, found.train.epochs) == ("mine", 3e-4, 5)
    assert (found.data.dataset, found.folds) == ("sample", (1,))


@pytest.mark.parametrize("assignment", ["train.lr", "=3", "train.lr=", ""])
def test_an_override_that_is_no_assignment_is_refused(assignment: str) -> None:
    with pytest.raises(SpecError, match="KEY=VALUE"):
        parse_overrides([assignment])


def test_an_override_cannot_go_below_a_single_value(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("seed = 1\n")
    with pytest.raises(SpecError, match="seed is a single value"):
        load_spec(tmp_path / "x.toml", overrides={"seed.deep": 1})


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"seed = \n", "not valid TOML"), (b"\xff\xfe", "cannot be read"), (None, "no experiment file")],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=said):
        load_spec(path)


def test_a_spec_that_says_nothing_of_a_target_keeps_the_hash_that_it_had_before_there_were_targets() -> None:
    assert Spec(name="a").hash == "6309a31d30c12957559bfcd5469adec31d40405cdcf450c3ce7e7c5d16b3a40b"
    before = {key: value for key, value in Spec(name="a").to_json().items() if key != "target"}
    assert hash_of_spec(before) == Spec(name="a").hash
    assert parse_spec(before, source="a queue of then").predicts == FORMATION_ENERGY.target


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.dataset)
def test_a_task_brings_its_target(task: Task) -> None:
    spec = parse_spec({"name": "a", "data": {"dataset": task.dataset}}, source="a")
    assert spec.predicts == task.target
    assert target_of(spec.to_json()) == task.target
    assert parse_spec(spec.to_json(), source="the queue") == spec


def test_a_task_takes_no_other_target() -> None:
    content = {"name": "a", "data": {"dataset": "matbench_mp_gap"}, "target": {"name": "gap", "kind": "energy"}}
    with pytest.raises(SpecError, match=r"\[target\] contradicts matbench_mp_gap, .* remove \[target\]"):
        parse_spec(content, source="a")


def test_another_target_is_another_spec() -> None:
    data = {"dataset": "mine.jsonl"}
    targets = [
        {"name": "gap", "unit": "eV", "kind": "scalar", "column": "gap"},
        {"name": "gap", "unit": "meV", "kind": "scalar", "column": "gap"},
        {"name": "gap", "unit": "eV", "kind": "energy", "column": "gap"},
        {"name": "gap", "unit": "eV", "kind": "scalar", "column": "other"},
    ]
    specs = [parse_spec({"name": "a", "data": data, "target": target}, source="a") for target in targets]
    assert len({spec.hash for spec in [*specs, Spec(name="a")]}) == 5


def test_a_column_that_is_not_known_to_hold_formation_energies_has_to_be_named() -> None:
    with pytest.raises(
        SpecError, match=r"target column 'gap' needs a description.*target\.kind=energy.*target\.kind=scalar"
    ):
        parse_spec({"name": "a", "data": {"dataset": "mine.jsonl"}, "target": {"column": "gap"}}, source="a")
    with pytest.raises(SpecError, match=r"--target-column 'E gap' --set target\.name=.*--target-column 'E gap' --set"):
        parse_spec({"name": "a", "data": {"dataset": "mine.jsonl"}, "target": {"column": "E gap"}}, source="a")
    known = {"name": "a", "data": {"dataset": "mine.jsonl"}, "target": {"column": "formation_energy_per_atom"}}
    assert parse_spec(known, source="a").predicts.kind == "energy"


def test_a_class_has_no_unit() -> None:
    content = {"name": "a", "data": {"dataset": "b.csv"}, "target": {"name": "x", "kind": "class", "unit": "eV"}}
    with pytest.raises(SpecError, match="has no unit"):
        parse_spec(content, source="a")
