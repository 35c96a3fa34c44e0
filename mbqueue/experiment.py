"""Experiment specs: the content of files in jobs/, checked before anything is enqueued.

A spec is immutable and complete (defaults are filled in), and it has a hash. The hash covers everything that changes
the result of a fold, so it excludes, for example, the name and the list of folds. Adding folds to an experiment does
not change its hash.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticKnownError

from mbqueue.errors import SpecError, counted
from mbqueue.experiment_file import laid_over, read_toml
from mbqueue.families import pretrained_names
from mbqueue.files import sha256_of_json
from mbqueue.project import NAME_PATTERN
from mbqueue.provenance import KEPT_BY_COMMANDS, Choice, MadeFrom, TrialOf
from mbqueue.section import Section
from mbqueue.task import BAND_GAP, ENERGY_COLUMNS, FORMATION_ENERGY, KINDS, N_FOLDS, TASKS, Kind, Target, options_for

OFFICIAL_DATASET = FORMATION_ENERGY.dataset
SAMPLE_DATASET = "sample"

#: The lowest CUDA compute capability with hardware for each reduced precision. Older GPUs emulate bf16 and fp16 slowly,
#: and ignore tf32.
NEEDED_CAPABILITY = {"tf32": 8, "bf16": 8, "fp16": 7}


#: The pattern of a target's name and unit. This pattern excludes characters that would break tables and web pages.
_PLAIN = r"^[^<>|`&\\\x00-\x1f\x7f]*$"

_NAME_RULE = "use up to 64 letters, digits, dots, dashes or underscores, beginning with a letter or digit"


def _folds(folds: tuple[int, ...]) -> tuple[int, ...]:
    if not folds:
        raise ValueError("must list at least one fold")
    if sorted(set(folds)) != sorted(folds) or min(folds) < 0 or max(folds) >= N_FOLDS:
        raise ValueError(f"must be distinct numbers from 0 to {N_FOLDS - 1}")
    return tuple(sorted(folds))


def _pretrained(value: Any) -> Any:
    names = [repr(name) for name in pretrained_names()]
    if repr(value) not in names:
        raise PydanticKnownError(
            "literal_error", {"expected": " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))}
        )
    return value


class DataSpec(Section):
    """[data]: the crystals to train on and to predict."""

    dataset: str = Field(
        OFFICIAL_DATASET,
        min_length=1,
        description="A matbench task (`mbqueue tasks` lists them), `sample` (included in mbqueue), or the path of your "
        "own file or folder.",
    )
    limit: int = Field(
        0, ge=0, description="Use at most this many crystals, chosen at random with `seed`; 0 uses all crystals."
    )
    drop_invalid: bool = Field(False, description="Leave out entries that cannot be used, and list them in the report.")
    id_column: str = Field(
        "",
        description="Name of the id column in your own table; by default `id`, `material_id`, `mbid` or `jid`.",
    )


class TargetSpec(Section):
    """[target]: the property to predict."""

    name: str = Field(
        min_length=1,
        max_length=80,
        pattern=_PLAIN,
        description="Name of the property in reports, for example `band gap`.",
    )
    unit: str = Field(
        "",
        max_length=40,
        pattern=_PLAIN,
        description="Unit of targets, predictions and errors; empty if there is none.",
    )
    kind: Kind = Field(description="; ".join(f"`{kind}`: {text}" for kind, text in KINDS.items()) + ".")
    column: str = Field(
        "",
        description="Name of the target column in your own table; by default `target`. For energies, mbqueue uses the "
        f"first of these that exists: {', '.join(ENERGY_COLUMNS)}.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> TargetSpec:
        if self.kind == "class" and self.unit:
            raise ValueError(f'a target of kind "class" is a probability and has no unit, but unit = "{self.unit}"')
        return self


class ModelSpec(Section):
    """[model]: the pretrained weights, and which of them are trained."""

    pretrained: Annotated[str, BeforeValidator(_pretrained)] = Field(
        "0.3.0",
        description="Version of CHGNet's pretrained weights.",
        json_schema_extra={"enum": [*pretrained_names()]},
    )
    trainable: Literal["none", "head", "all"] = Field(
        "all",
        description="Which weights to train. `none` only fits the element references. `head` trains `mlp`, "
        "`readout_norm` and the element references on frozen atom features. `all` trains everything.",
    )


class TrainSpec(Section):
    """[train]: the settings of training."""

    epochs: int = Field(20, ge=0, le=10_000, description="Number of epochs per fold; 0 only predicts.")
    batch_size: int = Field(64, ge=1, le=65_536, description="Crystals per optimizer step.")
    lr: float = Field(1e-3, gt=0, le=1, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(
        1e-5, ge=0, le=1, description="Decoupled weight decay of AdamW; not applied to the element references."
    )
    loss: Literal["huber", "l1", "l2"] = Field(
        "huber", description="Loss function; a target of kind `class` always uses binary cross-entropy."
    )
    huber_delta: float = Field(
        0.1,
        gt=0,
        description="Error above which the Huber loss becomes linear. For an energy, the value is in eV/atom. For a "
        "scalar, the value is a fraction of the spread of the composition model's residuals.",
    )
    warmup: float = Field(
        0.05, ge=0, lt=1, description="Fraction of all steps during which the learning rate rises linearly."
    )
    schedule: Literal["cosine", "constant"] = Field("cosine", description="Learning rate schedule after the warm-up.")
    final_lr: float = Field(
        0.01, ge=0, le=1, description="Final learning rate of the cosine schedule, as a fraction of `lr`."
    )
    clip_norm: float = Field(1.0, ge=0, description="Maximum gradient norm; 0 turns clipping off.")
    validation: float = Field(
        0.05, gt=0, le=0.5, description="Fraction of a fold's training set that is held out to choose the best epoch."
    )
    validation_seed: int = Field(
        -1,
        ge=-1,
        lt=2**31,
        description="Seed of the validation split; -1 uses `seed`. Experiments with the same validation seed can be "
        "blended with fitted weights.",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay per step of an exponential moving average (EMA) of the weights. Validation and the saved "
        "model use the average. 0 turns averaging off.",
    )
    soup: int = Field(
        0,
        ge=0,
        le=100,
        description="Number of epochs whose final weights are averaged (a weight soup). Validation and the saved model "
        "use the average. Each commit contains this many copies of the trained weights. 0 turns the soup off.",
    )
    soup_of: Literal["last", "best"] = Field(
        "last",
        description="Which epochs to average in the soup: the last ones, or those with the lowest validation MAE so "
        "far (measured without averaging).",
    )
    patience: int = Field(
        0,
        ge=0,
        description="Stop training a fold after this many epochs without a lower validation MAE; 0 turns early "
        "stopping off.",
    )
    layer_lr_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Factor by which the learning rate decreases per block, counted from the read-out; 1 turns the "
        "decay off.",
    )
    unfreeze_epochs: int = Field(
        0,
        ge=0,
        description="Train only the head for this many epochs, then all weights (gradual unfreezing); 0 trains all "
        "weights from the start.",
    )
    strain: float = Field(
        0.0,
        ge=0,
        le=0.1,
        description="Standard deviation of the random strain applied to each training cell; 0 applies none.",
    )
    jitter: float = Field(
        0.0,
        ge=0,
        le=0.2,
        description="Standard deviation in Å of the random shift of each atom in training; 0 shifts no atoms.",
    )
    max_bonds: int = Field(
        0,
        ge=0,
        description="Maximum number of directed bonds on the device at once. A larger batch is split, and its "
        "gradient is accumulated. 0 means no limit.",
    )
    group_by_size: bool = Field(
        False,
        description="Put crystals of similar size into the same batch, which evens out memory use and step times. The "
        "batches are still in random order, but a batch is no longer a random sample.",
    )
    test_strains: int = Field(
        0,
        ge=0,
        le=100,
        description="Average each test prediction over the crystal and this many pairs of opposite small strains; "
        "0 predicts without strain.",
    )
    precision: Literal["float32", "tf32", "bf16", "fp16"] = Field(
        "float32",
        description="Precision of matrix products in training. Devices that do not support the chosen precision use "
        "float32. `tf32` and `bf16` need an Ampere GPU or newer; `fp16` needs a Volta GPU, a T4 or newer. `bf16` "
        "rounds the inputs, outputs and gradients of the message products. `fp16` rounds only the inputs, and sums in "
        "float32. Weights, message aggregation, validation and predictions always use float32.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> TrainSpec:
        if self.unfreeze_epochs and self.unfreeze_epochs >= self.epochs:
            raise ValueError(f"unfreeze_epochs = {self.unfreeze_epochs} must be below epochs = {self.epochs}")
        if self.soup and self.ema_decay:
            raise ValueError("soup and ema_decay both average the weights: one of them must be 0")
        if self.soup_of != "last" and not self.soup:
            raise ValueError(f"soup_of = {self.soup_of!r} also requires soup, the number of epochs to average")
        return self


#: Spec keys that do not affect a fold's result.
_NOT_HASHED = {"name", "results_name", "description", "folds", "trial", "chosen"}
#: Keys that are missing from the specs of earlier versions, and the values that those versions used. The spec hash
#: ignores a key with this value, so experiments from earlier versions keep their hash and can resume.
_YOUNGER: dict[str, dict[str, Any]] = {
    "data": {"id_column": ""},
    "train": {"group_by_size": False, "test_strains": 0, "validation_seed": -1, "soup": 0, "soup_of": "last"},
}
#: The target of specs without a [target] section. The spec hash leaves this target out, so older specs keep their hash.
_FIRST_TARGET = asdict(FORMATION_ENERGY.target)


class Spec(Section):
    """All sections of one experiment, with the defaults filled in."""

    name: str = Field(pattern=NAME_PATTERN, description="Name in the queue; by default the name of the file.")
    results_name: str = Field(
        "", pattern=r"^$|" + NAME_PATTERN, description="Name of the results folder; by default `name`."
    )
    description: str = Field("", description="One-line description for reports.")
    folds: Annotated[tuple[int, ...], AfterValidator(_folds)] = Field(
        tuple(range(N_FOLDS)), strict=False, description="Which of the five folds to run."
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="Random seed of the validation split, the sample order and augmentation."
    )
    data: DataSpec = DataSpec()
    target: TargetSpec = TargetSpec.model_validate(_FIRST_TARGET)
    model: ModelSpec = ModelSpec()
    train: TrainSpec = TrainSpec()
    trial: TrialOf | None = None
    chosen: Choice | None = None
    made_from: MadeFrom | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_target(cls, content: Any) -> Any:
        """Fill in the [target] that a matbench task or a column of formation energies implies."""
        if not isinstance(content, Mapping):
            return content
        said, data = content.get("target", {}), content.get("data", {})
        task = TASKS.get(data.get("dataset", OFFICIAL_DATASET)) if isinstance(data, Mapping) else None
        if said == {} and task is not None:
            return {**content, "target": asdict(task.target)}
        if isinstance(said, Mapping) and said.keys() <= {"column"} and said.get("column", "e_form") in ENERGY_COLUMNS:
            return {**content, "target": {**_FIRST_TARGET, **said}}
        if isinstance(said, Mapping) and said.keys() == {"column"}:
            column = str(said["column"])
            energy = options_for(column, FORMATION_ENERGY.target)
            gap = options_for(column, BAND_GAP)
            raise ValueError(
                f"The target column {column!r} needs a description of its property, because mbqueue knows only the "
                f"energy columns {', '.join(ENERGY_COLUMNS)}. Describe the property under [target] or with --set. For "
                f"energies per atom: {energy}. For a different property, such as a band gap: {gap}"
            )
        return content

    @model_validator(mode="after")
    def _fits_together(self) -> Spec:
        task = TASKS.get(self.data.dataset)
        if task is not None and task.target != self.predicts:
            raise ValueError(
                f"[target] contradicts {task.dataset}, whose target is the {task.target.axis}: remove [target]"
            )
        trains = self.model.trainable != "none"
        if trains != (self.train.epochs > 0):
            raise ValueError(
                f'model.trainable = "{self.model.trainable}" contradicts train.epochs = {self.train.epochs}: '
                'trainable = "none" needs epochs = 0, and all other values need at least one epoch'
            )
        if self.model.trainable == "head" and (self.train.strain or self.train.jitter or self.train.test_strains):
            raise ValueError(
                'model.trainable = "head" uses stored atom features, so strain, jitter and test_strains must be 0'
            )
        if 0 < self.data.limit < N_FOLDS:
            raise ValueError(f"data.limit = {counted(self.data.limit, 'crystal')} cannot be split into {N_FOLDS} folds")
        return self

    @property
    def predicts(self) -> Target:
        """The target as a `Target` object, which other modules use."""
        return Target(**self.target.model_dump())

    @property
    def folder_name(self) -> str:
        """Name of the experiment's folder in results/daily/DATE/."""
        return self.results_name or self.name

    @property
    def hash(self) -> str:
        """Hex SHA-256 of all keys that change a fold's result."""
        return hash_of_spec(self.to_json())

    def to_json(self) -> dict[str, Any]:
        content = self.model_dump(mode="json")
        for key in KEPT_BY_COMMANDS:
            if content[key] is None:
                del content[key]
        return content


def hash_of_spec(content: Mapping[str, Any]) -> str:
    """Compute `Spec.hash` from plain JSON values, as returned by `Spec.to_json`."""
    told_apart_by = {key: value for key, value in content.items() if key not in _NOT_HASHED}
    if told_apart_by.get("target") == _FIRST_TARGET:
        del told_apart_by["target"]
    if "made_from" in told_apart_by:
        made_from = told_apart_by["made_from"]
        members = [hash_of_spec(member["spec"]) for member in made_from["members"]]  # ignore the members' names
        told_apart_by["made_from"] = {"members": members, "weights": made_from["weights"]}
    for name, young in _YOUNGER.items():
        section = told_apart_by.get(name)
        if isinstance(section, Mapping):
            told_apart_by[name] = {key: value for key, value in section.items() if (key, value) not in young.items()}
    return sha256_of_json(told_apart_by)


def parse_spec(content: Mapping[str, Any], *, source: str, advice: str = "Fix the file or the --set options.") -> Spec:
    """Make a spec from nested dictionaries, and check it.

    Args:
        content: sections and keys, as in an experiment file.
        source: where the values come from, for error messages.
        advice: what to do if the values are wrong; the last line of the error.

    Raises:
        SpecError: if values are wrong; the error lists each wrong key, its value and what is allowed.
    """
    try:
        return Spec.model_validate(dict(content))
    except ValidationError as error:
        raise SpecError(_explain(error, source, advice)) from None  # pydantic's own message would not help a user


def load_spec(path: Path, *, overrides: Mapping[str, Any] | None = None) -> Spec:
    """Read a spec from a TOML file, and apply ``overrides`` such as ``{"train.lr": 3e-4}``.

    Raises:
        SpecError: if the file cannot be read, is not TOML, or is not a valid experiment.
    """
    content = read_toml(path)
    for key in KEPT_BY_COMMANDS:
        if key in content:
            raise SpecError(f"{path} has the key {key}, which only mbqueue's commands may write. Remove this key.")
    content.setdefault("name", path.stem)
    given = {key: value for key, value in (overrides or {}).items() if key not in {"name", "results_name"}}
    options = ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False, default=str)}" for key, value in given.items())
    source = f"{path} with {options}" if options else str(path)
    return parse_spec(laid_over(content, overrides or {}), source=source)


def _explain(error: ValidationError, source: str, advice: str) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {key}: there is no such key. {_meant(problem['loc'])}{_allowed_keys(problem['loc'][:-1])}")
        elif problem["type"] == "missing":
            lines.append(f"  {key}: is missing. {_description(problem['loc'])}".rstrip())
        else:
            said = _NAME_RULE if _is_name(problem) else problem["msg"].removeprefix("Value error, ")
            given = f" = {problem['input']!r}" if key and not isinstance(problem["input"], Mapping) else ""
            lines.append(f"  {key}{given}: {said[:1].lower()}{said[1:]}" if key else f"  {said}")
    return f"{source} is not a valid experiment:\n" + "\n".join([*lines, advice])


def _is_name(problem: Mapping[str, Any]) -> bool:
    return problem["type"] == "string_pattern_mismatch" and problem["loc"] in (("name",), ("results_name",))


def _meant(key: tuple[int | str, ...]) -> str:
    """Suggest keys with the same name in other sections; empty if there are none."""
    found = [
        ".".join([*map(str, name), str(key[-1])]) for name, section in _sections() if key[-1] in section.model_fields
    ]
    return f"Did you mean {' or '.join(found)}? " if found else ""


def _description(key: tuple[int | str, ...]) -> str:
    section = dict(_sections()).get(key[:-1])
    field = section.model_fields.get(str(key[-1])) if section is not None else None
    return (field.description or "") if field is not None else ""


def _allowed_keys(name: tuple[int | str, ...]) -> str:
    section = dict(_sections()).get(name)
    return "" if section is None else f"Allowed keys: {', '.join(_known(section))}."


def _known(section: type[Section]) -> Iterable[str]:
    return (key for key in section.model_fields if key not in KEPT_BY_COMMANDS)


def _sections() -> list[tuple[tuple[int | str, ...], type[Section]]]:
    return [
        ((), Spec),
        (("data",), DataSpec),
        (("target",), TargetSpec),
        (("model",), ModelSpec),
        (("train",), TrainSpec),
    ]
