"""Write docs/reference/experiment-file.md from the definitions of experiments and settings.

    python tools/experiment_page.py

Run this script after you change a field. A test compares the page with the definitions.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mbqueue.experiment import DataSpec, ModelSpec, Spec, TargetSpec, TrainSpec
from mbqueue.provenance import KEPT_BY_COMMANDS
from mbqueue.settings import NotifySettings, Settings, fields_of, is_section

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "experiment-file.md"

_HEAD = """\
# The experiment file

<!-- Made by tools/experiment_page.py from the definitions in mbqueue; change the definitions, not this page. -->

An experiment is a TOML file in `jobs/`. The experiment's name is the file's name without `.toml`. All keys are
optional, except two in `[target]`.

`mbqueue enqueue` freezes the file as the experiment's *spec*, so later edits do not affect the queue. To enqueue a
changed file, give the experiment a different name:

```console
$ mbqueue enqueue full_finetune --set train.lr=1e-4 --name slower
```

`--set KEY=VALUE` overrides any key for one experiment; write a key of a section as `section.key`. `--folds`,
`--epochs`, `--dataset` and `--drop-invalid` are short forms of `--set`.

The *spec hash* covers everything except `name`, `results_name`, `description` and `folds`. Training that started under
one hash never continues under another. You can add folds to an experiment later.
"""

_SETTINGS_HEAD = """\
# mbqueue.toml

These settings of the project and its sessions do not change results. A session reads the file when it starts.
"""


def page() -> str:
    """Return the text of docs/reference/experiment-file.md."""
    parts = [_HEAD, "## Top of the file\n", _table(Spec)]
    for name, section in (("data", DataSpec), ("target", TargetSpec), ("model", ModelSpec), ("train", TrainSpec)):
        parts += [f"## [{name}]\n", _table(section)]
    settings = _SETTINGS_HEAD.replace("# ", "## ", 1)
    return "\n".join([*parts, settings, _settings(Settings), "### [notify]\n", _settings(NotifySettings)])


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    rows += [
        f"| `{name}` | {_type(field)} | {_default(model, field)} | {_escaped(field.description or '')} |"
        for name, field in model.model_fields.items()
        if not _is_section(field) and name not in KEPT_BY_COMMANDS
    ]
    return "\n".join(rows) + "\n"


def _settings(section: type) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, (kind, field) in fields_of(section).items():
        if is_section(kind):
            continue
        signs = (("gt", ">"), ("ge", "≥"), ("le", "≤"))
        bounds = (f"{sign} {field.metadata[key]:g}" for key, sign in signs if field.metadata[key] is not None)
        type_text = _escaped(" ".join(filter(None, [_name(kind), ", ".join(bounds)])))
        rows.append(f"| `{name}` | {type_text} | {_value(field.default)} | {_escaped(field.metadata['description'])} |")
    return "\n".join(rows) + "\n"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _type(field: FieldInfo) -> str:
    bounds, choices = ", ".join(_bounds(field)), (field.json_schema_extra or {}).get("enum")
    name = _name(Literal[*choices] if choices else field.annotation)
    return _escaped(" ".join(filter(None, [name, bounds])))


def _name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(_name(part) for part in get_args(annotation))
    if origin is tuple:
        return f"list of {_name(get_args(annotation)[0])}"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}[annotation]


def _bounds(field: FieldInfo) -> Iterator[str]:
    signs = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
    for entry in field.metadata:
        for kind, (sign, attribute) in signs.items():
            if isinstance(entry, kind):
                yield f"{sign} {_number(getattr(entry, attribute))}"


def _default(model: type[BaseModel], field: FieldInfo) -> str:
    if model is Spec and field.is_required():
        return "the file's name"
    if field.is_required():
        return "required"
    return _value(field.default)


def _value(value: Any) -> str:
    return f"`{json.dumps(list(value))}`" if isinstance(value, tuple) else f"`{_number(value)}`"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return re.sub(r"e-0*", "e-", f"{value:g}")
    return json.dumps(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
