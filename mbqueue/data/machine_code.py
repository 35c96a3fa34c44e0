"""Compile the numerical kernels to machine code."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import llvmlite  # type: ignore[import-untyped]
import numba
from numba.core import event
from numba.core.dispatcher import Dispatcher
from numba.core.serialize import dumps

from mbqueue.files import write_bytes

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, *, calls: tuple[ModuleType, ...] = (), **options: Any) -> Function:
    """Compile ``function`` on its first call, cache the code on disk, and run it without the GIL.

    Numba chooses the folder: next to the source or, if that folder is read-only, the user's cache folder. ``options``
    are passed to ``numba.njit``.

    Args:
        calls: the other modules whose compiled functions ``function`` calls. Its code contains theirs.
    """
    make = partial(numba.njit, nogil=True, error_model="numpy", **options)
    try:
        kernel = make(cache=True)(function)
    except RuntimeError:
        _tell_that_nothing_is_kept()
        return make()(function)  # type: ignore[no-any-return]
    if isinstance(kernel, Dispatcher):  # with NUMBA_DISABLE_JIT, it is the function itself
        own = Path(function.__code__.co_filename)
        sources = [own, *(Path(str(module.__file__)) for module in calls)]
        digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
        versions = (sys.version, numba.__version__, llvmlite.__version__)
        name = f"{own.stem}.{function.__name__.strip('<>')}"
        files: Any = kernel._cache  # type: ignore[attr-defined]
        files._cache_file = _CodeOnDisk(Path(files.cache_path), name, f"{digest} {versions}")
    return kernel  # type: ignore[no-any-return]


def compiled_with(*modules: ModuleType, **options: Any) -> Callable[[Function], Function]:
    """Return a decorator like ``compiled``, for functions that call compiled functions of other ``modules``."""
    return partial(compiled, calls=modules, **options)


class _CodeOnDisk:
    """The machine code of one function, in one file for each source, version, processor and signature.

    Numba's own files can give a function the code of another version or signature: Numba writes an index, and then the
    code to which it refers. Between the two, other processes load the previous code; if the process dies there, all
    later ones do. Two processes that compile two signatures at once can give both the same file.
    """

    def __init__(self, folder: Path, name: str, made_from: str) -> None:
        self._folder = folder
        self._name = name
        self._made_from = made_from

    def load(self, key: Any) -> Any:
        """Return the code saved with ``key``; None if there is none, or its file is damaged."""
        try:
            saved = self._file(key).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(saved[32:]).digest() != saved[:32]:
            return None
        return pickle.loads(saved[32:])  # noqa: S301  only ``save`` writes in this folder, as Numba does

    def save(self, key: Any, code: Any) -> None:
        content = dumps(code)
        try:
            write_bytes(self._file(key), hashlib.sha256(content).digest() + content)
        except OSError:
            _tell_that_nothing_is_kept()

    def flush(self) -> None:
        """Do nothing: Numba flushes before it recompiles all signatures, and ``save`` replaces their files."""

    def _file(self, key: Any) -> Path:
        digest = hashlib.sha256(f"{self._made_from} {key}".encode()).hexdigest()
        return self._folder / f"{self._name}-{digest[:32]}.code"


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
        "The compiled numerical code cannot be saved in %s or your cache folder, so every process must compile it "
        "again, which can take a minute. Set NUMBA_CACHE_DIR to a writable folder with free space.",
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
