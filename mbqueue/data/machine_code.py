"""Compile the numerical kernels to machine code."""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite  # type: ignore[import-untyped]
import numba
from numba.core import event
from numba.core.caching import FunctionCache
from numba.core.dispatcher import Dispatcher
from numba.core.serialize import dumps

from mbqueue.files import sha256_of_file, sha256_of_json, write_bytes

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, **options: Any) -> Function:
    """Compile ``function`` on its first call, cache the code on disk, and run it without the GIL.

    Numba chooses the folder: next to the source or, if that folder is read-only, the user's cache folder. ``options``
    are passed to ``numba.njit``.
    """
    kernel = numba.njit(nogil=True, error_model="numpy", **options)(function)
    if isinstance(kernel, Dispatcher):  # with NUMBA_DISABLE_JIT, it is the function itself
        try:
            kernel._cache = _CodeOnDisk(function, options)  # type: ignore[attr-defined]
        except RuntimeError:  # Numba finds no writable folder
            _tell_that_nothing_is_kept()
    return kernel  # type: ignore[no-any-return]


class _CodeOnDisk(FunctionCache):  # type: ignore[misc]
    """The machine code of one function, in one file for each source, version, processor and signature.

    Numba's own files can give a function the code of another version or signature: Numba writes an index, and then the
    code to which it refers. Between the two, other processes load the previous code; if the process dies there, all
    later ones do. Two processes that compile two signatures at once can give both the same file. Numba also does not
    notice changes in other modules whose functions and constants are part of the code.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        super().__init__(function)
        source = Path(function.__code__.co_filename)
        self._name = f"{source.stem}.{function.__name__.strip('<>')}"
        self._made_from = (
            _hash_of_sources(source),
            function.__qualname__,
            function.__code__.co_firstlineno,
            # A set has another order in each process.
            [(name, sorted(value) if isinstance(value, set) else value) for name, value in sorted(options.items())],
            (sys.version, numba.__version__, llvmlite.__version__),
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Load the code for the signature ``sig``; return None if there is none, or its file is damaged."""
        target_context.refresh()
        try:
            saved = self._file(sig, target_context.codegen()).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(saved[32:]).digest() != saved[:32]:
            return None
        code = pickle.loads(saved[32:])  # noqa: S301  Numba's own files are pickles too
        return self._impl.rebuild(target_context, code)

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save compiled code for the signature ``sig``."""
        if not self._impl.check_cachable(data):
            return
        content = dumps(self._impl.reduce(data))
        try:
            write_bytes(self._file(sig, data.codegen), hashlib.sha256(content).digest() + content)
        except OSError:
            _tell_that_nothing_is_kept()

    def flush(self) -> None:
        """Remove all saved code of the function, as Numba asks before it recompiles all signatures."""
        for file in Path(self.cache_path).glob(f"{self._name}-*.code"):
            file.unlink(missing_ok=True)

    def _file(self, sig: Any, codegen: Any) -> Path:
        made_from = f"{self._made_from} {self._index_key(sig, codegen)}"
        digest = hashlib.sha256(made_from.encode()).hexdigest()
        return Path(self.cache_path) / f"{self._name}-{digest[:32]}.code"


@cache
def _hash_of_sources(source: Path) -> str:
    """Hash ``source`` and all modules that it imports from its own package, directly or through other modules."""
    found: set[Path] = set()
    left = [source, Path(__file__)]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += _imported(path)
    return sha256_of_json(sorted((path.name, sha256_of_file(path)) for path in found))


@cache
def _imported(source: Path) -> list[Path]:
    """The modules that ``source`` imports from its own package by their full names."""
    names = []
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    folders = {folder.name: folder for folder in reversed(source.parents)}
    split = [name.split(".") for name in names]
    modules = [folders[package].joinpath(*below) for package, *below in split if package in folders and below]
    candidates = [path for module in modules for path in (module.with_suffix(".py"), module / "__init__.py")]
    return [path for path in candidates if path.is_file()]


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
