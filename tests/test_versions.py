"""The tests also run with the oldest versions that the package accepts."""

from __future__ import annotations

import re
import tomllib
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: The extras that users install, except `gpu`, whose package torch installs anyway. All other extras are for
#: developers.
EXTRAS = ("postgresql", "objects", "slurm", "search", "board")


def lower_bounds() -> dict[str, str]:
    """Package → the oldest version that pyproject.toml accepts."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(one for extra in EXTRAS for one in project["optional-dependencies"][extra])]
    found = [re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement) for requirement in named]
    assert all(found), named
    return {match[1]: match[2] for match in found if match}


def pinned(name: str) -> dict[str, str]:
    """Return the version of each package in a constraints file."""
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def is_same(one: str, other: str) -> bool:
    return all(int(a) == int(b) for a, b in zip_longest(one.split("."), other.split("."), fillvalue="0"))


def test_each_lower_bound_is_the_version_that_the_oldest_environment_has() -> None:
    oldest = pinned("constraints-oldest.txt")
    bounds = lower_bounds()
    del bounds["torch"]  # only one build of torch is available on the test machines
    wrong = {
        name: (bound, oldest.get(name)) for name, bound in bounds.items() if not is_same(bound, oldest.get(name, "0"))
    }
    assert wrong == {}
