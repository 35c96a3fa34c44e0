"""Read the data blocks of a CIF by the format's rules, independently of the parser that builds the crystal.

The rules come from Hall, Allen & Brown (Acta Crystallographica A47, 655, 1991) and the IUCr's CIF 1.1 syntax.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

from mbqueue.data.entries import Unusable
from mbqueue.errors import counted

_TOKEN = re.compile(
    r"""^;(?P<text>.*?)\n;(?=\s|\Z)      # a text field, between lines that begin with a semicolon
      | \#[^\n]*                         # a comment
      | '(?P<single>[^\n]*?)'(?=\s|\Z)
      | "(?P<double>[^\n]*?)"(?=\s|\Z)
      | (?P<word>\S+)""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)


#: CIF values that mean "unknown" or "not applicable".
_UNKNOWN = ("", "?", ".")
#: The spelling of tags that pymatgen requires, by lower-case tag. Tags in a CIF are not case-sensitive.
_SPELLINGS = {
    tag.lower(): tag
    for tag in (
        *(f"_cell_{name}" for name in ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")),
        *(f"_atom_site_{name}" for name in ("label", "type_symbol", "fract_x", "fract_y", "fract_z", "occupancy")),
        *("_atom_site_symmetry_multiplicity", "_atom_site_attached_hydrogens", "_cell_volume", "_cell_formula_units_Z"),
        *("_atom_type_symbol", "_atom_type_oxidation_number", "_chemical_formula_sum", "_chemical_formula_structural"),
        *("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz"),
        *("_symmetry_Int_Tables_number", "_space_group_IT_number"),
        *("_symmetry_space_group_name_H-M", "_space_group_name_H-M_alt"),
    )
}


@dataclass
class CifBlock:
    """One data block of a CIF.

    Attributes:
        name: the text after ``data_``.
        text: the source, from ``data_`` to the start of the next block, with tags and keywords in pymatgen's spelling.
        items: values of tags outside loops; tags are in lower case.
        columns: values of tags in loops, one per row.
    """

    name: str
    text: str = ""
    items: dict[str, str] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)

    @property
    def has_atoms(self) -> bool:
        """Whether the block lists atoms."""
        return any(tag.startswith("_atom_site_fract_") for tag in (*self.columns, *self.items))

    def value(self, *tags: str) -> str | None:
        """The value of the first tag in ``tags`` that has a value outside loops; None if no tag has a value.

        ``?`` (unknown) and ``.`` (inapplicable) do not count as values.
        """
        for tag in tags:
            if self.items.get(tag, "?").strip() not in _UNKNOWN:
                return self.items[tag].strip()
        return None

    def statements(self, *tags: str) -> list[tuple[str, str]]:
        """A (tag, value) pair for each known value of any of ``tags``, inside or outside loops.

        A dot in a tag counts as an underscore, because newer CIF dictionaries use dots.
        """
        given = [(tag, [value]) for tag, value in self.items.items()] + list(self.columns.items())
        return [
            (tag, value.strip())
            for wanted in tags
            for tag, values in given
            if tag.replace(".", "_") == wanted
            for value in dict.fromkeys(values)
            if value.strip() not in _UNKNOWN
        ]

    def listed(self, tag: str) -> list[str]:
        """The values of a tag inside or outside a loop; empty if the tag is missing."""
        return self.columns.get(tag, [self.items[tag]] if tag in self.items else [])


def blocks_of(text: str) -> list[CifBlock]:
    """The data blocks of a CIF, in order.

    Raises:
        Unusable: if the text breaks the format's rules, so that a parser would skip part of the text.
    """
    blocks: list[CifBlock] = []
    begins: list[int] = []
    tokens = _Tokens(text)
    for begin, token, quoted in tokens:
        word = "" if quoted else token.lower()
        if word.startswith("data_"):
            blocks.append(CifBlock(token[5:]))
            begins.append(begin)
        elif not blocks:
            raise Unusable(f"{token[:40]!r} comes before the first data_ line")
        elif word == "loop_":
            _read_loop(blocks[-1], tokens)
        elif word.startswith("_"):
            _check_new(blocks[-1], word)
            blocks[-1].items[word] = tokens.value(token)
        else:
            raise Unusable(f"the value {token[:40]!r} has no tag before it")
    for block, begin, end in zip(blocks, begins, [*begins[1:], len(text)][: len(begins)], strict=True):
        block.text = _TOKEN.sub(_respelled, text[begin:end])
    return blocks


def _respelled(match: re.Match[str]) -> str:
    """The text of a token, with tags and keywords in pymatgen's spelling."""
    token = match[0]
    if match["word"] is None:
        return token
    keyword = next((word for word in ("data_", "loop_") if token.lower().startswith(word)), "")
    return keyword + token[len(keyword) :] if keyword else _SPELLINGS.get(token.lower(), token)


def _read_loop(block: CifBlock, tokens: _Tokens) -> None:
    tags = []
    while (tag := tokens.next_tag()) is not None:
        _check_new(block, tag.lower())
        block.columns[tag.lower()] = []
        tags.append(tag.lower())
    values = list(tokens.values())
    if not tags:
        raise Unusable("a loop_ has no tags")
    if not values or len(values) % len(tags):
        raise Unusable(
            f"the loop with {tags[0]} has {counted(len(tags), 'column')} and {counted(len(values), 'value')}, so its "
            "last row is incomplete"
        )
    for position, tag in enumerate(tags):
        block.columns[tag] = values[position :: len(tags)]


def _check_new(block: CifBlock, tag: str) -> None:
    if tag in block.items or tag in block.columns:
        raise Unusable(f"{tag} occurs twice in data block {block.name!r}")


class _Tokens:
    """Tokens of a CIF as (position, text, whether it was quoted), with one token of look-ahead."""

    def __init__(self, text: str) -> None:
        self._matches = _tokens_of(text)
        self._ahead = next(self._matches, None)

    def __iter__(self) -> Iterator[tuple[int, str, bool]]:
        while (match := self._ahead) is not None:
            self._ahead = next(self._matches, None)
            yield match.start(), *_content(match)

    def _peek(self) -> tuple[str, bool] | None:
        return None if self._ahead is None else _content(self._ahead)

    def _take(self) -> str:
        assert self._ahead is not None
        token = _content(self._ahead)[0]
        self._ahead = next(self._matches, None)
        return token

    def next_tag(self) -> str | None:
        ahead = self._peek()
        return None if ahead is None or ahead[1] or not ahead[0].startswith("_") else self._take()

    def values(self) -> Iterator[str]:
        """Take the tokens up to the next tag or keyword."""
        while (ahead := self._peek()) is not None:
            token, quoted = ahead
            if not quoted and (token.startswith("_") or token.lower().startswith(("data_", "loop_"))):
                return
            yield self._take()

    def value(self, tag: str) -> str:
        found = next(self.values(), None)
        if found is None:
            raise Unusable(f"{tag} has no value")
        return found


def _tokens_of(text: str) -> Iterator[re.Match[str]]:
    """The tokens of a CIF without its comments.

    A gap between two tokens may contain non-ASCII blanks only next to an ASCII blank, because pymatgen deletes
    non-ASCII characters.

    Raises:
        Unusable: if a gap contains only non-ASCII blanks.
    """
    before: re.Match[str] | None = None
    for match in _TOKEN.finditer(text):
        if match[0].startswith("#"):
            continue
        gap = text[before.end() : match.start()] if before else ""
        if before and gap and not gap.encode("ascii", "ignore"):
            name = unicodedata.name(gap[0], "character").lower()
            raise Unusable(
                f"line {text.count(chr(10), 0, match.start()) + 1} has {'an' if name[0] in 'aeiou' else 'a'} {name} "
                f"(U+{ord(gap[0]):04X}) between {before[0][-40:]!r} and {match[0][:40]!r}; write a plain space"
            )
        before = match
        yield match


def _content(match: re.Match[str]) -> tuple[str, bool]:
    word = match["word"]
    if word is None:
        return match["text"] or match["single"] or match["double"] or "", True
    if word[0] in "'\"":
        raise Unusable(f"the quotation mark before {word[1:40]!r} is not closed on its line")
    return word, False
