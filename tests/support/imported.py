"""Find the imports of Python source, in every syntax."""

from __future__ import annotations

import ast
from collections.abc import Iterator

#: Functions whose first argument names a module to import.
_IMPORTERS = {"import_module", "__import__", "reload", "find_spec", "run_module"}


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the dotted names that a module imports, including imports in functions and imports by a string.

    ``from a import b`` counts as an import of a.b. An f-string counts as the constant text at its start.

    Args:
        package: the package of the module, such as ``mbqueue.queue``, to which relative imports refer.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node.module or "", node.level, package)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _name_of(node.func) in _IMPORTERS and node.args:
            name = _certain(node.args[0])
            if name:
                yield _absolute(name.lstrip("."), len(name) - len(name.lstrip(".")), package)


def _absolute(name: str, level: int, package: str) -> str:
    if not level:
        return name
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - level + 1], *([name] if name else [])])


def _name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _certain(argument: ast.expr) -> str:
    """The text of a string, or the beginning of an f-string."""
    if isinstance(argument, ast.JoinedStr) and argument.values:
        argument = argument.values[0]
    return argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else ""
