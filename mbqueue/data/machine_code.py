"""How the numerical kernels become machine code."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, **options: Any) -> Function:
    """``function`` as machine code, made at its first call, kept on disk, and run without the GIL.

    Numba keeps it beside the source or, where that cannot be written, in the user's cache folder, and makes it again
    when the source file has changed. It does not see changes in other files: see ``compiled_with``. ``options`` are
    further ones of ``numba.njit``.
    """
    make = partial(numba.njit, nogil=True, error_model="numpy", **options)
    try:
        return make(cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        _tell_that_nothing_is_kept()
        return make()(function)  # type: ignore[no-any-return]


@cache
def _tell_that_nothing_is_kept() -> None:
    logging.getLogger("mbqueue").warning(
        "There is no folder for compiled code: neither %s nor the user's cache folder can be written, so every process "
        "compiles anew, which takes about 20 s. Set NUMBA_CACHE_DIR to a folder that can be written.",
        Path(__file__).parent,
    )


def compiled_with(*modules: ModuleType, **options: Any) -> Callable[[Function], Function]:
    """``compiled`` with ``options``, for functions that call compiled functions of other ``modules``.

    The code on disk is named after the content of those too, so that none with old parts in it is ever run.
    """
    digest = 0
    for module in modules:
        assert module.__file__ is not None
        digest = zlib.crc32(Path(module.__file__).read_bytes(), digest)

    def decorate(function: Function) -> Function:
        function.__qualname__ = f"{function.__qualname__}_{digest:08x}"
        return compiled(function, **options)

    return decorate
