"""What ARCHITECTURE.md says of the structure, held against the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mbqueue.queue.transitions import mermaid

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mbqueue"

#: Rooms from top to bottom; a room may import rooms of the rows below its own, and nothing of its own row but itself.
ROWS = [
    {"__main__"},
    {"cli"},
    {"api"},
    {"dashboard", "session"},
    {"drive"},
    {"queue", "train", "results"},
    {"data"},
    {"experiment", "history", "task", "settings", "project", "belonging", "mounts", "buckets", "objects", "files"}
    | {"errors", "clock"},
]
#: The ground is one floor: its modules may use each other.
GROUND = ROWS[-1]
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports() -> list[tuple[str, str, str]]:
    """(file, importing room, imported room) for every import of mbqueue in mbqueue, those in functions included."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue  # the package's own face: it hands out the API lazily
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mbqueue":
                names = [
                    f"{node.module}.{alias.name}" if node.module == "mbqueue" else node.module for alias in node.names
                ]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("mbqueue.")]
            found += [(str(path.relative_to(ROOT)), parts[0], room_of(name)) for name in set(names)]
    return found


def test_imports_go_down_only() -> None:
    upward = [
        f"{file} imports mbqueue.{imported}, which is not below {room}"
        for file, room, imported in imports()
        if room != imported
        and not {room, imported} <= GROUND
        and imported != "__version__"
        and not ROW_OF[room] < ROW_OF[imported]
    ]
    assert upward == []


def test_every_module_has_a_room() -> None:
    rooms = {
        p.stem if p.is_file() else p.name
        for p in PACKAGE.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert rooms - set(ROW_OF) == {"__init__"}


def test_every_room_stands_in_the_table_of_rooms() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text[text.index("## Rooms") : text.index("## The path of the data")]
    for room in set(ROW_OF) - {"__main__"}:
        assert re.search(rf"`{room}/?`", table), f"{room} is not in the table of rooms"


def test_the_diagram_of_states_is_that_of_the_table_of_transitions() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", text, flags=re.DOTALL)
    assert diagram.strip() == mermaid().strip()


def test_training_never_sees_the_database_and_the_queue_never_sees_torch() -> None:
    for path in (PACKAGE / "train").rglob("*.py"):
        assert "sqlite" not in path.read_text(encoding="utf-8"), path
    for path in (PACKAGE / "queue").rglob("*.py"):
        assert "import torch" not in path.read_text(encoding="utf-8"), path


def test_nothing_is_pickled_and_torch_loads_weights_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) pickle", text, flags=re.MULTILINE), path
        for call in re.findall(r"torch\.load\([^)]*\)(?:[^)]*\))?", text):
            assert "weights_only=True" in call, f"{path}: {call}"


def test_only_the_map_in_project_names_folders_of_the_state() -> None:
    named = [
        f"{path.relative_to(ROOT)}: {node.value}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "project.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"state/[\w/.-]*", node.value)
    ]
    assert named == []
