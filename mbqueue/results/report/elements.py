"""The periodic table as a grid, and the elements in a formula."""

from __future__ import annotations

import re

_LAYOUT = """
H  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  He
Li Be .  .  .  .  .  .  .  .  .  .  B  C  N  O  F  Ne
Na Mg .  .  .  .  .  .  .  .  .  .  Al Si P  S  Cl Ar
K  Ca Sc Ti V  Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr
Rb Sr Y  Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I  Xe
Cs Ba .  Hf Ta W  Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn
Fr Ra .  Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og
.  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .  .
.  .  La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu .
.  .  Ac Th Pa U  Np Pu Am Cm Bk Cf Es Fm Md No Lr .
"""
_GRID = [line.split() for line in _LAYOUT.strip().splitlines()]
#: Symbol → (row, column) on the grid, from 0; lanthanides and actinides are rows 8 and 9.
POSITIONS = {symbol: (r, c) for r, row in enumerate(_GRID) for c, symbol in enumerate(row) if symbol != "."}
N_ROWS, N_COLUMNS = len(_GRID), len(_GRID[0])

_SYMBOL = re.compile(r"[A-Z][a-z]?")
_ISOTOPES = {"D": "H", "T": "H"}


def elements_of(formula: str) -> frozenset[str]:
    """The elements in a formula such as ``LiFe(PO3)4``, with deuterium and tritium counted as hydrogen."""
    return frozenset(_ISOTOPES.get(symbol, symbol) for symbol in _SYMBOL.findall(formula))
