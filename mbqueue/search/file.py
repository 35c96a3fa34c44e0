"""Read search files: the table [search] in a file of jobs/, checked against the experiment that the search varies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from mbqueue.errors import SpecError, counted
from mbqueue.experiment import Spec, parse_spec
from mbqueue.experiment_file import laid_over, read_toml
from mbqueue.provenance import KEPT_BY_COMMANDS
from mbqueue.section import Section
from mbqueue.task import N_FOLDS

#: The pattern of a search's name. A trial's name is the search's name followed by ``.000``, ``.001`` and so on.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,58}$"
MOST_TRIALS = 1000

#: The part of an error message that explains which values a key in [search.space] may have.
FORMS = (
    "write { low = 1e-4, high = 1e-2 }, optionally with log = true or a step, or { choices = [32, 64] }. If all trials "
    "share a value, set it in the base experiment"
)

Value = bool | int | float | str
#: Keys of a spec that are not settings, so a search cannot vary them.
_FIXED = {"name", "results_name", "description", "folds", *KEPT_BY_COMMANDS}
#: Sections that must be the same in all trials, so that their validation MAEs are comparable.
_COMPARED_BY = {"data", "target"}


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Number = Annotated[int | float, BeforeValidator(_number)]


class Setting(Section):
    """One key of [search.space]: a range, or choices.

    Attributes:
        low, high: the inclusive ends of the range; both are integers if the experiment's value is an integer.
        log: whether to search the range on a logarithmic scale.
        step: distance between two values; None for a continuous range.
        choices: the values to try; None for a range.
        when: conditions for varying this key, as a mapping from other keys to lists of values. A trial varies this key
            only if every key in ``when`` has a listed value in the trial; otherwise, the trial uses the base
            experiment's value.
    """

    low: Number | None = None
    high: Number | None = None
    log: bool = False
    step: Annotated[Number, Field(gt=0)] | None = None
    choices: list[Value] | None = None
    when: dict[str, list[Value]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> Setting:
        if [] in self.when.values():
            raise ValueError("`when` must list at least one value")
        if self.choices is not None:
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError("give either choices, or low and high")
            if not self.choices:
                raise ValueError("choices is empty")
            if any(self.choices.count(value) > 1 for value in self.choices):
                raise ValueError("choices must differ")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"the range from {self.low} to {self.high} is empty: low must be below high")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a logarithmic range must start above 0, and cannot have a step")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"the step of {self.step} is larger than the range from {self.low} to {self.high}")
        return self

    @property
    def corners(self) -> list[Value]:
        """The values to check against the base: all choices, or only the two ends of a range."""
        if self.choices is not None:
            return self.choices
        assert self.low is not None
        assert self.high is not None
        return [self.low, self.high]


def _folds(folds: list[int]) -> list[int]:
    if not folds or sorted(set(folds)) != sorted(folds) or min(folds) < 0 or max(folds) >= N_FOLDS:
        raise ValueError(f"give at least one fold, as distinct numbers from 0 to {N_FOLDS - 1}")
    return sorted(folds)


class Search(Section):
    """The table [search] of a search file, with defaults for missing keys.

    Attributes:
        base_spec: the base experiment's spec at the time the search was enqueued.
    """

    name: str = Field(pattern=NAME_PATTERN, description="Name in the queue; by default the file's name.")
    description: str = Field("", description="One-line description for reports.")
    base: str = Field(min_length=1, description="The experiment to vary: its name in jobs/, or a TOML file.")
    base_spec: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Setting] = Field(min_length=1, description="The values to try for each key.")
    trials: int = Field(0, ge=0, le=MOST_TRIALS, description="Number of trials; 0 for as many as `gpu_hours` allows.")
    gpu_hours: float = Field(
        0.0, ge=0, strict=False, description="Start no more trials after this many GPU-hours; 0 means no limit."
    )
    folds: Annotated[list[int], AfterValidator(_folds)] = Field([0], description="The folds that each trial runs on.")
    sampler: Literal["tpe", "qmc", "grid", "random", "cmaes"] = Field(
        "tpe", description="How Optuna chooses the next settings."
    )
    pruner: Literal["none", "halving", "hyperband", "wilcoxon"] = Field(
        "halving",
        description="How Optuna chooses which trials to prune: by successive halving or Hyperband over epochs, or "
        "by the Wilcoxon test over folds.",
    )
    min_epochs: int = Field(1, ge=1, description="`halving` and `hyperband` never prune a trial before this epoch.")
    reduction: int = Field(
        3,
        ge=2,
        description="`halving` and `hyperband` keep the best 1/n of the trials, and train them for n times as many "
        "epochs.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="The sampler's seed.")

    @model_validator(mode="after")
    def _fits_together(self) -> Search:
        if not self.trials and not self.gpu_hours:
            raise ValueError("the search would never end; give trials, gpu_hours or both")
        if self.pruner == "wilcoxon" and len(self.folds) < 3:
            raise ValueError('pruner = "wilcoxon" compares folds; give at least three folds')
        for key, setting in self.space.items():
            for other, values in setting.when.items():
                before = list(self.space)[: list(self.space).index(key)]
                choices = self.space[other].choices if other in before else None
                if choices is None or any(value not in choices for value in values):
                    raise ValueError(
                        f"space.{key}.when: {other} must come before {key} in the space, and the choices of "
                        f"{other} must contain {values}"
                    )
        return self

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def spec_with(self, settings: Mapping[str, Value], **others: Any) -> Spec:
        """Return the base experiment's spec with ``settings``; ``others`` are values for more keys, such as ``name``.

        Raises:
            SpecError: if the resulting spec is invalid.
        """
        shown = ", ".join(f"{key} = {value}" for key, value in settings.items())
        content = laid_over(self.base_spec, settings) | others
        return parse_spec(content, source=f"{self.base} with {shown or 'its own settings'}")

    def base_value(self, key: str) -> Any:
        return _at(self.base_spec, key)

    def is_integer(self, key: str) -> bool:
        """Whether the base experiment's value for ``key`` is an integer; if so, a range contains only integers."""
        value = self.base_value(key)
        return isinstance(value, int) and not isinstance(value, bool)


def is_search(path: Path) -> bool:
    """Whether a file in jobs/ describes a search.

    Raises:
        SpecError: if the file cannot be read or is not TOML.
    """
    return "search" in read_toml(path)


def load_search(path: Path, *, base: Any, name: str | None = None) -> Search:
    """Read and check the search in a TOML file.

    Args:
        base: a function that takes an experiment's name or file, and returns the experiment's spec.
        name: replaces the search's name from the file.

    Raises:
        SpecError: if the search is invalid; the error lists every wrong key, its value and the allowed values.
    """
    content = read_toml(path)
    search = content.pop("search")
    top = {key: content.pop(key) for key in ("name", "description") if key in content}
    if not isinstance(search, Mapping):
        raise wrong_search(path, ["search: must be a table, [search]"])
    if content:
        wrong = ", ".join(content)
        raise wrong_search(
            path, [f"{wrong}: besides the table [search], a search file may contain only name and description"]
        )
    if "base_spec" in search:
        raise wrong_search(path, ['base_spec: there is no such key. Use the key "base" to name the experiment to vary'])
    try:
        found = Search.model_validate({"name": path.stem, **top, **search} | ({"name": name} if name else {}))
    except ValidationError as error:
        raise wrong_search(path, list(_lines(error))) from None
    search_of_base = found.model_copy(update={"base_spec": base(found.base).to_json()})
    problems = list(_problems(search_of_base))
    if problems:
        raise wrong_search(path, problems)
    if (size := _grid_size(search_of_base)) is None:
        return search_of_base
    return search_of_base.model_copy(update={"trials": min(found.trials or size, size)})


def _grid_size(search: Search) -> int | None:
    """Count the valid points of a grid; None if there is no grid or no valid point, or if the grid is very large."""
    if search.sampler != "grid":
        return None
    points: list[dict[str, Value]] = [{}]
    for key, setting in search.space.items():
        varied = [all(point.get(other) in values for other, values in setting.when.items()) for point in points]
        points = [
            changed
            for point, is_varied in zip(points, varied, strict=True)
            for changed in (
                [{**point, key: _as_in(search, key, value)} for value in _grid_values(setting)]
                if is_varied
                else [point]
            )
        ]
        if len(points) > MOST_TRIALS:
            return None
    return sum(_is_taken(search, point) for point in points) or None


def _grid_values(setting: Setting) -> list[Value]:
    if setting.choices is not None:
        return setting.choices
    assert setting.low is not None
    assert setting.high is not None
    assert setting.step is not None
    steps = int((setting.high - setting.low) / setting.step * (1 + 1e-9))
    return [setting.low + step * setting.step for step in range(steps + 1)]


def _is_taken(search: Search, point: Mapping[str, Value]) -> bool:
    try:
        search.spec_with(point, name="trial")
    except SpecError:
        return False
    return True


def _problems(search: Search) -> Iterator[str]:
    if not search.base_spec["train"]["epochs"] and search.pruner != "none":
        yield f"pruner = {search.pruner!r}: {search.base} trains no epochs, so there is nothing to prune"
    elif search.pruner in {"halving", "hyperband"} and search.min_epochs > (most := _most_epochs(search)):
        yield f"min_epochs = {search.min_epochs}: trials have {counted(int(most), 'epoch')}, so none would be pruned"
    for key, setting in search.space.items():
        if key.split(".")[0] in _FIXED or _at(search.base_spec, key) is None:
            known = [name for name in _keys(search.base_spec) if name.rpartition(".")[2] == key.rpartition(".")[2]]
            meant = f" Did you mean {' or '.join(known)}?" if known and known != [key] else ""
            keys = "docs/reference/experiment-file.md lists all keys."
            yield f"space.{key}: an experiment has no such setting.{meant} {keys}"
            continue
        if key.split(".")[0] in _COMPARED_BY:
            yield f"space.{key}: trials are compared by validation MAE, so all must have the base's data and target"
            continue
        is_number = isinstance(search.base_value(key), int | float) and not isinstance(search.base_value(key), bool)
        if setting.choices is None and not is_number:
            yield f"space.{key}: {key} is not a number, so it needs choices"
            continue
        whole = [value for value in (*setting.corners, setting.step) if value is not None]
        if setting.choices is None and search.is_integer(key) and not all(isinstance(value, int) for value in whole):
            yield f"space.{key}: {key} is an integer, so low, high and step must be integers"
            continue
        if search.sampler == "grid" and setting.choices is None and setting.step is None:
            yield f'space.{key}: sampler = "grid" needs choices, or a step'
        with_it = {other: values[0] for other, values in setting.when.items()}
        for value in setting.corners:
            try:
                search.spec_with({**with_it, key: _as_in(search, key, value)}, name="trial")
            except SpecError as error:
                yield f"space.{key}: the experiment cannot have the value {value!r}: {reasons(error)}"


def _most_epochs(search: Search) -> float:
    varied = search.space.get("train.epochs")
    corners = [search.base_spec["train"]["epochs"]] if varied is None else varied.corners
    return max((value for value in corners if isinstance(value, int | float)), default=0)


def _as_in(search: Search, key: str, value: Value) -> Value:
    """Convert a value to the type of its key, because a file may give an integer for a float key."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_number and isinstance(_at(search.base_spec, key), float) else value


def _at(content: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key; None if the key is missing or is a section."""
    found: Any = content
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return None if isinstance(found, Mapping) else found


def _keys(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _lines(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = Setting if problem["loc"][0] == "space" else Search
            keys = [name for name in known.model_fields if name != "base_spec"]
            yield f"{key}: there is no such key. Allowed keys: {', '.join(keys)}."
        elif problem["type"] == "missing":
            yield f"{key}: is missing"
        elif problem["type"] == "model_type":
            yield f"{key} = {problem['input']!r}: {FORMS}"
        elif key == "space" and problem["type"] == "too_short":
            yield "space: is empty; name at least one key of the experiment"
        else:
            said = problem["msg"].removeprefix("Value error, ")
            given = "" if isinstance(problem["input"], Mapping) else f" = {problem['input']!r}"
            yield f"{key}{given}: {said[:1].lower()}{said[1:]}" if key else said


def reasons(error: SpecError) -> str:
    """Join the problems that an error about an invalid experiment lists between its first and its last line."""
    return "; ".join(line.strip() for line in str(error).splitlines()[1:-1])


def wrong_search(path: Path, problems: list[str]) -> SpecError:
    """Return an error that lists a search file's ``problems``, each of which starts with the name of the key."""
    lines = "\n".join(f"  {problem}" for problem in problems)
    return SpecError(f"{path} is not a valid search:\n{lines}\nNothing was enqueued. Fix the file.")
