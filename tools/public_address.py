"""Write the repository's public address into every place that needs it: the badges and the notebook's install cell.

    python tools/public_address.py OWNER/NAME

The script stores the address as tool.mbqueue.repository in pyproject.toml. If the address is empty, the badges open
Colab's dialog for uploading a notebook, and the install cell uses a wheel or a checkout from the drive. A test checks
that all places agree.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTEBOOK = "notebooks/mbqueue_colab.ipynb"
BADGE_PLACES = ("README.md", "docs/tutorials/first-session.md", NOTEBOOK)

_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
_BADGE = re.compile(rf"\[!\[Open in Colab\]\({re.escape(_IMAGE)}\)\]\([^)]*\)")
#: The notebook's line that sets REPOSITORY, with its quotes escaped as in the JSON file.
_INSTALLED_FROM = re.compile(r'REPOSITORY = \\"[^"]*\\"')
_KEPT = re.compile(r'(?m)^repository = "[^"]*"')
_ADDRESS = re.compile(r"[A-Za-z0-9-]+/[A-Za-z0-9._-]+")


def address() -> str:
    """Read OWNER/NAME on GitHub from pyproject.toml; empty if the repository is not public."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return str(content["tool"]["mbqueue"]["repository"])


def badge(repository: str) -> str:
    """Return the badge in Markdown."""
    there = f"github/{repository}/blob/main/{NOTEBOOK}" if repository else "#upload=true"
    return f"[![Open in Colab]({_IMAGE})](https://colab.research.google.com/{there})"


def rewritten(place: str, repository: str) -> str:
    """Return the text of a file with the new address.

    Raises:
        ValueError: if the file does not have exactly one place for the address.
    """
    text = (ROOT / place).read_text(encoding="utf-8")
    patterns = [(_BADGE, badge(repository))]
    if place == NOTEBOOK:
        patterns.append((_INSTALLED_FROM, rf"REPOSITORY = \"{repository}\""))
    for pattern, replacement in patterns:
        text, n = pattern.subn(lambda _match, new=replacement: new, text)
        if n != 1:
            raise ValueError(f"{place} must match {pattern.pattern} once, but matches {n} times. Edit the file first.")
    return text


def main() -> None:
    if len(sys.argv) != 2 or not (sys.argv[1] == "" or _ADDRESS.fullmatch(sys.argv[1])):
        sys.exit("usage: python tools/public_address.py OWNER/NAME   (or '' to remove the address)")
    repository = sys.argv[1]
    kept = ROOT / "pyproject.toml"
    kept.write_text(_KEPT.sub(f'repository = "{repository}"', kept.read_text(encoding="utf-8")), encoding="utf-8")
    for place in BADGE_PLACES:
        (ROOT / place).write_text(rewritten(place, repository), encoding="utf-8")


if __name__ == "__main__":
    main()
