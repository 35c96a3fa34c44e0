"""Turn warnings from the parsers of pymatgen and ase into errors about an entry, except harmless warnings."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from mbqueue.data.entries import Unusable

#: (pattern, reason): the only parser warnings after which mbqueue still accepts a crystal.
#: ``tests/data/test_parser_warnings.py`` lists every warning of the installed parsers, and fails if a new version has
#: an unlisted warning.
HARMLESS = (
    (
        r"\d+ fractional coordinates rounded to ideal values",
        "0.3333 becomes 1/3; no coordinate moves by more than 7e-5",
    ),
    (
        r"No _symmetry_equiv_pos_as_xyz type key found\. Spacegroup from \S+ used\.",
        "the symbol comes from the file; data/symmetry.py checks that it is unambiguous and fits the cell",
    ),
    (
        r"A 1-line symmetry op P1 CIF is detected!",
        "the operation comes from the file, and data/symmetry.py checks it",
    ),
    (r"Keys changed to match new magCIF specification\.", "only the spelling of tags is changed"),
    (r"No Pauling electronegativity for ", "pymatgen sorts atoms by electronegativity, which noble gases do not have"),
    (r"No data available for electronegativity for ", "as above"),
    (
        r"Ignoring selective dynamics tag, as no ionic degrees of freedom were fixed\.",
        "the flags that let VASP move atoms do not change the crystal",
    ),
    (
        r"Selective dynamics toggled with Fluorine element detected\.",
        "F can be fluorine or a flag; species come from the element line, and data/poscar.py checks the columns",
    ),
)
#: Warnings about Python code, not about a file.
_ABOUT_CODE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)


def is_harmless(message: str) -> bool:
    return any(re.match(pattern, message) for pattern, _ in HARMLESS)


def concerns(messages: Iterable[str]) -> list[str]:
    """The warnings that are not harmless, one line each, without duplicates."""
    shown = (" ".join(message.split()) for message in messages if not is_harmless(message))
    return list(dict.fromkeys(shown))


@contextmanager
def heard(parser: str) -> Iterator[list[str]]:
    """Raise ``Unusable`` if a parser in the ``with`` block fails or warns; the message quotes the warnings.

    Some parsers store warnings instead of issuing them; the caller appends such warnings to the yielded list. If the
    parser raises, the message contains both its exception and its warnings, because often only the warnings name the
    problem.

    Raises:
        Unusable: if the parser fails, or issues a warning that is not listed as harmless.
    """
    kept: list[str] = []
    failure: Exception | None = None
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            yield kept
        except Unusable:
            raise
        except Exception as error:  # noqa: BLE001  pymatgen's parsers raise exceptions of any type
            failure = error
    told = [str(one.message) for one in given if not issubclass(one.category, _ABOUT_CODE)]
    said = concerns([*kept, *told])
    if failure is not None:
        said.insert(0, " ".join(f"{type(failure).__name__}: {failure}".split()))
    if said:
        raise Unusable(f"{parser} says: {'; '.join(said)}") from failure
