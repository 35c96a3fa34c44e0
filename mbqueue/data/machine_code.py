"""Compile the numerical kernels to machine code."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numba
from numba.core import event

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, **options: Any) -> Function:
    """Compile ``function`` on its first call, cache the code on disk, and run it without the GIL.

    Numba stores the code next to the source or, if that folder is read-only, in the user's cache folder. Numba
    recompiles a function when its source file has changed, but does not notice changes in other files; see
    ``compiled_with``. ``options`` are passed to ``numba.njit``.
    """
    make = partial(numba.njit, nogil=True, error_model="numpy", **options)
    try:
        return make(cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        _tell_that_nothing_is_kept()
        return make()(function)  # type: ignore[no-any-return]


def keep_gpu_code() -> Path | None:
    """Make Triton cache its compiled kernels where Numba does, unless TRITON_CACHE_DIR names another folder.

    Call this function before you import Triton.

    Returns:
        the folder; None if no folder is writable.
    """
    named = os.environ.get("TRITON_CACHE_DIR")
    if named:
        return Path(named)
    beside = os.environ.get("NUMBA_CACHE_DIR")
    own = [Path(__file__).parent / "__pycache__", Path.home() / ".cache" / "mbqueue"]
    for folder in [Path(beside)] if beside else own:
        try:
            (folder / "triton").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder / "triton"):
                os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
                return folder / "triton"
        except OSError:
            continue
    return None


@cache
def _tell_that_nothing_is_kept() -> None:
    logging.getLogger("mbqueue").warning(
        "Neither %s nor your cache folder is writable, so every process must compile the numerical code again, which "
        "can take a minute. Set NUMBA_CACHE_DIR to a writable folder.",
        Path(__file__).parent,
    )


@contextmanager
def telling(note: Callable[[str], None]) -> Iterator[None]:
    """Call ``note`` once, from any thread, when the ``with`` block compiles functions of this package.

    Loading compiled code from disk does not call ``note``.
    """
    listener = _Compiling(note)
    event.register("numba:compile", listener)
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)


class _Compiling(event.Listener):  # type: ignore[misc]
    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._first = threading.Lock()

    def on_start(self, event: Any) -> None:
        is_ours = event.data["dispatcher"].py_func.__module__.startswith("mbqueue.")
        if is_ours and self._first.acquire(blocking=False):  # the lock is never released, so the note is sent only once
            is_kept = not _tell_that_nothing_is_kept.cache_info().currsize
            later = " mbqueue keeps the code, so later commands compile only new code." if is_kept else ""
            self._note(f"Compiling the numerical code for this processor, which can take a minute.{later}")

    def on_end(self, event: Any) -> None:
        pass


def compiled_with(*modules: ModuleType, **options: Any) -> Callable[[Function], Function]:
    """Return a decorator like ``compiled``, for functions that call compiled functions of other ``modules``.

    The name of the code on disk includes a hash of ``modules``, so that outdated code is never used.
    """
    digest = 0
    for module in modules:
        assert module.__file__ is not None
        digest = zlib.crc32(Path(module.__file__).read_bytes(), digest)

    def decorate(function: Function) -> Function:
        function.__qualname__ = f"{function.__qualname__}_{digest:08x}"
        return compiled(function, **options)

    return decorate
