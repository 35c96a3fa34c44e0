"""Every warning of the installed parsers is in the lists below, which say whether mbqueue refuses the entry."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator

import pytest
from ase.db import core
from ase.io import extxyz, formats
from pymatgen.io import cif
from pymatgen.io.vasp import inputs

from mbqueue.data.entries import Unusable
from mbqueue.data.parser_warnings import heard, is_harmless

REFUSED, HARMLESS = "refused", "harmless"
#: The effect, in the tables below, of a warning that never occurs in mbqueue.
NOT_GIVEN = "not given"

#: How each warning from pymatgen's CIF reader (2026.10) begins → its effect. An … matches any text. Warnings
#: marked `NOT_GIVEN` never occur, because mbqueue passes primitive=False, on_error="raise" and check_cif=False, and
#: does not write CIF files.
CIF_WARNINGS = {
    "Possible issue in CIF file at line: …": REFUSED,
    "Initializing CifParser from StringIO is deprecated": NOT_GIVEN,
    "Structure has implicit hydrogens defined": REFUSED,
    "Pauling file corrections applied.": REFUSED,
    "Keys changed to match new magCIF specification.": HARMLESS,
    "… fractional coordinates rounded to ideal values": HARMLESS,
    "…": REFUSED,  # pymatgen may warn with an exception's message, for example about an unknown crystal system
    "A 1-line symmetry op P1 CIF is detected!": HARMLESS,
    "No _symmetry_equiv_pos_as_xyz type key found. Spacegroup from {} used.": HARMLESS,
    "No _symmetry_equiv_pos_as_xyz type key found. Defaulting to P1.": REFUSED,
    "No magnetic symmetry detected, using primitive symmetry.": REFUSED,
    "… parsed as …": REFUSED,
    "Some occupancies (…) sum to > 1!": REFUSED,
    "The default value of primitive was changed": NOT_GIVEN,
    "No structure parsed for section … in CIF.": REFUSED,
    "Issues encountered while parsing CIF: ": NOT_GIVEN,
    "Skipping relative stoichiometry check": NOT_GIVEN,
    "Magnetic symmetry cannot currently be detected": NOT_GIVEN,
    "Site labels are not unique": NOT_GIVEN,
}
POSCAR_WARNINGS = {
    "check_for_POTCAR is deprecated.": NOT_GIVEN,
    "Elements in POSCAR would be overwritten by": REFUSED,
    "Elements in POSCAR cannot be determined. Defaulting to false names": REFUSED,
    "Selective dynamics values must be either 'T' or 'F'.": REFUSED,
    "Selective dynamics toggled with Fluorine element detected.": HARMLESS,
    "Ignoring selective dynamics tag, as no ionic degrees of freedom were fixed.": HARMLESS,
}
#: The effect of each warning in the modules of ase 3.29 that read extended XYZ and databases. Warnings marked
#: `NOT_GIVEN` never occur in mbqueue, because they concern writing, plugins or ase's own code. mbqueue rejects an
#: entry that causes an unlisted warning.
ASE_WARNINGS = {
    "Skipping unhashable information ": NOT_GIVEN,
    "Failed to register external IO format ": NOT_GIVEN,
    "Can not parse index for path": NOT_GIVEN,
    "It is best not to use keys ({0}) that are also a chemical formula.": NOT_GIVEN,
    "Accessing the IOFormat.": NOT_GIVEN,
    "Wrong type for ": NOT_GIVEN,
    "…": REFUSED,
}


def texts(node: ast.expr, names: dict[str, ast.expr]) -> Iterator[str]:
    """Yield the possible texts of a warning, with … for the parts that vary."""
    if isinstance(node, ast.Name):
        if node.id not in names:
            yield "…"
            return
        node = names[node.id]
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.List):
        for item in node.elts:
            yield from texts(item, names)
    elif isinstance(node, ast.BinOp):
        yield from texts(node.left, names)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        yield from texts(node.func.value, names)
    else:
        yield "…"


def warnings_in(source: object) -> set[str]:
    """Yield the messages that a class or function passes to ``warnings.warn`` or ``self.warnings``."""
    found: set[str] = set()
    for function in ast.walk(ast.parse(inspect.cleandoc("\n" + inspect.getsource(source)))):
        if not isinstance(function, ast.FunctionDef):
            continue
        names: dict[str, ast.expr] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names.setdefault(node.targets[0].id, node.value)
                if node.targets[0].id.startswith("msg"):
                    found.update(texts(node.value, {**names, "msg_template": names.get("msg_template", node.value)}))
            elif isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "self.warnings":
                found.update(texts(node.value, names))
            elif (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) in ("warnings.warn", "self.warnings.append")
                and ast.unparse(node.args[0]) != "msg"
            ):
                found.update(texts(node.args[0], {}))
    return found


@pytest.mark.parametrize(
    ("sources", "known"),
    [
        ((cif.CifBlock, cif.CifFile, cif.CifParser), CIF_WARNINGS),
        ((inputs.Poscar.from_file, inputs.Poscar.from_str), POSCAR_WARNINGS),
        ((extxyz, formats, core), ASE_WARNINGS),
    ],
    ids=["cif", "poscar", "ase"],
)
def test_no_warning_of_the_installed_parser_is_unlisted(sources, known):
    given = set().union(*map(warnings_in, sources))
    assert len(given) >= len([name for name, fate in known.items() if fate != NOT_GIVEN])
    assert [
        text for text in given if not any(text.startswith(begin) for begin in known if begin != "…" or text == "…")
    ] == []


@pytest.mark.parametrize(("text", "fate"), [*CIF_WARNINGS.items(), *POSCAR_WARNINGS.items(), *ASE_WARNINGS.items()])
def test_a_warning_has_the_fate_that_the_list_says(text, fate):
    filled = text.replace("… fractional", "3 fractional").replace("{}", "_symmetry_space_group_name_H-M")
    assert is_harmless(filled) == (fate == HARMLESS)


def guess() -> None:
    with heard("the parser"):
        warnings.warn("half of the\n atoms are made up", UserWarning, stacklevel=1)


def fail() -> None:
    with heard("the parser") as kept:
        kept.append("a column is guessed")
        warnings.warn("another one", UserWarning, stacklevel=1)
        raise KeyError("x")


def test_an_unknown_warning_refuses_the_entry_with_the_parsers_sentence():
    with pytest.raises(Unusable, match="the parser says: half of the atoms are made up"):
        guess()


def test_a_failing_parsers_warnings_are_reported_with_its_error():
    with pytest.raises(Unusable, match="the parser says: KeyError: 'x'; a column is guessed; another one"):
        fail()


def test_warnings_about_code_and_harmless_ones_refuse_nothing():
    with heard("the parser"):
        warnings.warn("use another name", DeprecationWarning, stacklevel=1)
        warnings.warn("No Pauling electronegativity for He. Setting to NaN.", UserWarning, stacklevel=1)
