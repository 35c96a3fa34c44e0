"""Triton's interpreter, made fast enough for tests, with a chosen order of programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from triton.runtime import interpreter


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Speed up Triton's interpreter more than tenfold.

    Prepare each module once per launch instead of at every call, do not check integers for overflow (a GPU does not
    either), and look up each NumPy type once.
    """
    prepared: set[str] = set()
    numpy_types: dict[str, Any] = {}
    look_up = interpreter._get_np_dtype
    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.clear()
        return launch(self, *args, **kwargs)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    def numpy_type(dtype: Any) -> Any:
        if dtype.name not in numpy_types:
            numpy_types[dtype.name] = look_up(dtype)
        return numpy_types[dtype.name]

    builder = interpreter.interpreter_builder
    patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
    patch.setattr(interpreter, "_get_np_dtype", numpy_type)
    patch.setattr(interpreter.GridExecutor, "__call__", launched)
    patch.setattr(interpreter.InterpretedFunction, "__call__", called)


@contextmanager
def backwards() -> Iterator[None]:
    """Run the programs of each launch in reverse order within a ``with`` block."""
    builder = interpreter.interpreter_builder
    forwards = builder.set_grid_idx
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", lambda x, y, z: forwards(builder.grid_dim[0] - 1 - x, y, z))
        yield
