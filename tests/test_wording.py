"""No document, message, docstring, comment or test name has a phrase that reads like a translation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Phrase → what to write instead. In a phrase, a space also matches a line break, `#` and quotation marks.
PHRASES = {
    "whoever": "you, the session, the command",
    "somebody": "you, another session",
    r"nobody(?!\")": "no session; the quoted word is a user of Unix",
    "(go|goes|going|went|gone) on": "resumes, continues, keeps running",
    "so (many|much|few|long) at most": "at most",
    "at most so (many|much|few|long)": "at most",
    "for so long": "for this long, until",
    "so long as": "as long as",
    "but (on the|for)": "except on, except for",
    "tells (of|its|it|which|how|what|whether|where|who|why|that)": "shows, prints, says",
    "told of": "shown, reported",
    "(is|are|was|were|be) at work": "runs",
    "(lies|lie|lay|lain) in": "is in, stores",
    "(look|looks|looked|looking) whether": "checks",
    "(take|takes|taken|taking|took) up(?! to)": "resumes, continues",
    "says? of": "shows, prints",
    "to be had": "available",
    "in the midst": "in the middle, during",
}
SUFFIXES = {".py", ".md", ".toml", ".ipynb", ".html", ".js", ".css", ".yml", ".sh", ""}
#: Folders that builds and mbqueue itself create in the root of the repository.
MADE = {"site", "results", "state"}


def places(folder: Path) -> Iterator[Path]:
    """List every file with text that people read."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            made = path.name in MADE and folder == ROOT
            if path.name == ".ci" or not (made or path.name.startswith((".", "__")) or path.suffix == ".egg-info"):
                yield from places(path)
        elif path.suffix in SUFFIXES and path != Path(__file__):
            yield path


def found(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, phrase, what to write instead) for each phrase in a text."""
    text = re.sub(r"(?m)^ *(?:async )?def test_\w+", lambda name: name[0].replace("_", " "), text)
    for phrase, instead in PHRASES.items():
        pattern = r"\b" + phrase.replace(" ", r"""[\s#"'>*]+""") + r"\b"
        for match in re.finditer(pattern, text, re.IGNORECASE):
            yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), instead


def texts() -> Iterator[tuple[str, str]]:
    for path in places(ROOT):
        name = str(path.relative_to(ROOT))
        try:
            yield name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def test_no_text_has_a_phrase_that_reads_like_a_translation() -> None:
    odd = [f"{name}:{line}: {phrase!r}: {instead}" for name, text in texts() for line, phrase, instead in found(text)]
    assert not odd, "\n".join(["Say it as you would to a colleague:", *odd])


@pytest.mark.parametrize(
    "text",
    ["It goes\n    # on.", '"the work goes "\n    "on"', "Whoever reads", "def test_nobody_reads() -> None:"],
)
def test_a_phrase_is_found_across_lines_and_in_names(text: str) -> None:
    assert len([*found(text)]) == 1
