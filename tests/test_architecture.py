"""The structure in ARCHITECTURE.md, compared with the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from imported import imported

from mbqueue.queue.transitions import mermaid

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mbqueue"

#: The rooms of the architecture, from top to bottom. A room may import itself and rooms in lower rows.
ROWS = [
    {"__main__"},
    {"cli"},
    {"web"},
    {"api"},
    {"dashboard", "session"},
    {"drive", "search"},
    {"queue", "train", "results"},
    {"data", "storage"},
    {
        "experiment",
        "experiment_file",
        "families",
        "provenance",
        "section",
        "history",
        "task",
        "settings",
        "project",
        "belonging",
        "mounts",
        "buckets",
        "files",
    }
    | {"errors", "clock", "limits", "outputs", "topology"},
]
#: Modules in the lowest row may import each other.
GROUND = ROWS[-1]
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}


def trees(folder: Path = PACKAGE) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(folder.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imports(folder: Path = PACKAGE) -> list[tuple[str, str, str]]:
    """Return (file, importing room, imported name) for every import below a folder of mbqueue."""
    found = []
    for path, tree in trees(folder):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        package = ".".join(("mbqueue", *parts[:-1]))
        found += [(str(path.relative_to(ROOT)), parts[0], name) for name in set(imported(tree, package))]
    return found


def upward(room: str, name: str) -> bool:
    """Return whether the import of ``name`` breaks the rules for ``room``."""
    parts = name.split(".")
    if parts[0] != "mbqueue" or parts[1:2] == ["__version__"]:
        return False
    target = parts[1] if len(parts) > 1 else ""
    if target == room or {room, target} <= GROUND:
        return False
    return target not in ROW_OF or ROW_OF[room] >= ROW_OF[target]


def test_rooms_import_only_lower_rooms() -> None:
    wrong = [
        f"{file} imports {name}, which is not below {room}"
        for file, room, name in imports()
        # No module may import the top-level package, because that package imports the API.
        if room != "__init__" and upward(room, name)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "source",
    [
        "import mbqueue.session.worker",
        "import os, mbqueue.session.worker as w",
        "from mbqueue import session",
        "from mbqueue import errors, session",
        "from mbqueue.session import worker",
        "from mbqueue.session.worker import work",
        "from ..session import worker",
        "from ..session.worker import work",
        "from .. import session",
        "import importlib; importlib.import_module('mbqueue.session.worker')",
        "from importlib import import_module as load, import_module; import_module(f'mbqueue.session.{name}')",
        "import importlib; importlib.import_module('..session', __package__)",
        "__import__('mbqueue.session')",
        "if TYPE_CHECKING:\n    from mbqueue.session.worker import WorkOptions",
        "def f():\n    from mbqueue.session import worker",
        "from mbqueue import Project",
        "import mbqueue",
        "from mbqueue import *",
    ],
)
def test_every_way_of_importing_from_above_is_noticed(source: str) -> None:
    assert any(upward("queue", name) for name in imported(ast.parse(source), "mbqueue.queue"))


@pytest.mark.parametrize(
    "source", ["from mbqueue.errors import QueueError", "from . import jobs", "from .. import files", "import sqlite3"]
)
def test_imports_from_below_and_beside_in_one_room_are_allowed(source: str) -> None:
    assert not any(upward("queue", name) for name in imported(ast.parse(source), "mbqueue.queue"))


def test_every_module_has_a_room() -> None:
    rooms = {
        p.stem if p.is_file() else p.name
        for p in PACKAGE.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert rooms - set(ROW_OF) == {"__init__"}


def test_the_table_of_rooms_lists_every_room() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text[text.index("## Rooms") : text.index("## The path of the data")]
    rows = [line.split(" | ", 2) for line in table.splitlines() if re.match(r"\| \d", line)]
    level_of = {room: int(level.strip("| ")) for level, rooms, _ in rows for room in re.findall(r"`(\w+)/?`", rooms)}
    rooms = [{room for room in row if room != "__main__"} for row in ROWS]
    expected = {room: number for number, row in enumerate(reversed([row for row in rooms if row]), 1) for room in row}
    assert level_of == expected


def test_the_diagram_of_states_matches_the_table_of_transitions() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", text, flags=re.DOTALL)
    assert diagram.strip() == mermaid().strip()


#: Room → packages that the room must not import.
FORBIDDEN = {
    "train": {"sqlite3", "sqlite_utils", "psycopg"},
    "queue": {"torch", "chgnet"},
    "results": {"torch", "chgnet", "sqlite3", "sqlite_utils", "psycopg"},
}


def test_training_never_sees_the_database_and_the_queue_never_sees_torch() -> None:
    found = {room: list(imports(PACKAGE / room)) for room in FORBIDDEN}
    assert all(found.values()), "a room has moved"
    seen = [
        f"{file} imports {name}"
        for room, packages in FORBIDDEN.items()
        for file, _, name in found[room]
        if name.split(".")[0] in packages
    ]
    assert seen == []


def test_only_compiled_code_is_pickled_and_torch_loads_only_weights() -> None:
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    found = [f"{file}: {name}" for file, _, name in imports() if name.split(".")[0] in unsafe]
    # Numba's code has no other form. Its folder contains the code that Python runs anyway, as `*.pyc` files.
    assert found == ["mbqueue/data/machine_code.py: pickle"]
    loads = 0
    for path, tree in trees():
        assert not any(name.startswith("torch.load") for name in imported(tree, "")), f"{path}: write torch.load(…)"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                loads += 1
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                loads -= 1
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", f"{path}: {ast.unparse(node)}"
    assert loads == 0, "torch.load is used other than by calling it at once"


def folders_of_the_state(source: str) -> list[str]:
    """Find strings such as "state/cache", and the string "state" as a part of a path."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and re.fullmatch(r"state/[\w/.-]*", str(node.value)):
            found.append(ast.unparse(node))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = (node.left, node.right)
            found += [ast.unparse(node) for part in parts if isinstance(part, ast.Constant) and part.value == "state"]
    return found


def test_only_project_names_folders_of_the_state() -> None:
    assert len(folders_of_the_state("a = 'state/cache'; b = root / 'state' / 'logs'; c = 'state' / root")) == 3
    named = {
        str(path.relative_to(ROOT)): folders_of_the_state(path.read_text(encoding="utf-8"))
        for path in PACKAGE.rglob("*.py")
        if path.name != "project.py"
    }
    assert {path: folders for path, folders in named.items() if folders} == {}


def changed_fields_of_sessions(source: str) -> list[str]:
    targets = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load)
    ]
    return [target for target in targets if re.fullmatch(r"(self\.)?_?session\.\w+", target)]


def test_only_a_session_changes_its_fields() -> None:
    assert len(changed_fields_of_sessions("session.a = self._session.b = 1; self.session.c += 1; del session.d")) == 4
    changed = {
        str(path.relative_to(ROOT)): changed_fields_of_sessions(path.read_text(encoding="utf-8"))
        for path in PACKAGE.rglob("*.py")
    }
    assert {path: fields for path, fields in changed.items() if fields} == {}


def test_every_frequent_question_is_answered_in_at_most_two_files() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text[text.index("## Frequent questions") : text.index("## Files to change")]
    rows = [line for line in table.splitlines() if re.match(r"\| .+\? \|", line)]
    assert len(rows) > 10
    for row in rows:
        named = set(re.findall(r"`([\w/]+\.py)`", row))
        assert 1 <= len(named) <= 2, row
        assert {name for name in named if not (PACKAGE / name).is_file()} == set()


def test_every_file_in_the_table_of_changes_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text[text.index("## Files to change") :]
    named = set(re.findall(r"`([\w/]+\.py|[\w/]+/)`", table))
    assert len(named) > 15
    missing = {name for name in named if not ((PACKAGE / name).exists() or (ROOT / name).exists())}
    assert missing == set()
