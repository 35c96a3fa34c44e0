"""Atomic numbers by symbol, and the elements that CHGNet supports."""

from __future__ import annotations

#: CHGNet has an embedding for each of the first 94 elements, H to Pu.
MAX_ATOMIC_NUMBER = 94

SYMBOLS = tuple(
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb "  # noqa: SIM905
    "Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au "
    "Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts "
    "Og".split()
)

#: Deuterium and tritium count as hydrogen, as in pymatgen and CHGNet.
ATOMIC_NUMBERS = {symbol: number for number, symbol in enumerate(SYMBOLS, 1)} | {"D": 1, "T": 1}


def symbol_of(atomic_number: int) -> str:
    """The symbol of an element, such as ``Fe`` for 26."""
    return SYMBOLS[atomic_number - 1]
