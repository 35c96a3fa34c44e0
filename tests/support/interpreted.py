"""Triton's interpreter, made fast enough for tests, with a chosen order of programs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from triton.language import core
from triton.runtime import interpreter


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Speed up Triton's interpreter more than tenfold.

    Prepare each module once per launch instead of at every call, find the functions to prepare once, do not check
    integers for overflow (a GPU does not either), and make each type of a tensor once.
    """
    prepared: set[str] = set()
    builtins: dict[int, list[tuple[str, Any]]] = {}
    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.clear()
        return launch(self, *args, **kwargs)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    def patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
        if id(owner) not in builtins:
            members = inspect.getmembers(owner)
            builtins[id(owner)] = [(name, member) for name, member in members if core.is_builtin(member)]
        for name, member in builtins[id(owner)]:
            interpreter._patch_attr(owner, name, member, builder, scope)

    builder = interpreter.interpreter_builder
    patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
    patch.setattr(interpreter.GridExecutor, "__call__", launched)
    patch.setattr(interpreter.InterpretedFunction, "__call__", called)
    patch.setattr(interpreter, "_patch_attr", _patch_attr)
    patch.setattr(interpreter, "_patch_builtin", patch_builtin)
    _remember_types(patch)


def _patch_attr(owner: Any, name: str, member: Any, _builder: Any, scope: Any) -> None:
    """Like Triton's function of this name, but without a check in each call that the semantics are there."""
    of_member, semantic = inspect.unwrap(member), interpreter.interpreter_semantic

    def called(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return of_member(*args, **kwargs)

    scope.set_attr(owner, name, called)


def _remember_types(patch: pytest.MonkeyPatch) -> None:
    """Make each type of blocks once, and look up once per type what tensors need of it."""
    numpy_types: dict[str, Any] = {}
    blocks: dict[Any, Any] = {}
    look_up, make_block, make_tensor = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__

    def numpy_type(dtype: Any) -> Any:
        if dtype.name not in numpy_types:
            numpy_types[dtype.name] = look_up(dtype)
        return numpy_types[dtype.name]

    def block(cls: Any, element: Any, shape: Any) -> Any:
        key = (element.name, *(core._unwrap_if_constexpr(size) for size in shape))
        if key not in blocks:
            blocks[key] = object.__new__(cls)
            make_block(blocks[key], element, shape)
        return blocks[key]

    def tensor(self: Any, handle: Any, type_: Any) -> None:
        if not hasattr(type_, "of_tensors"):
            make_tensor(self, handle, type_)
            type_.of_tensors = {name: value for name, value in vars(self).items() if name != "handle"}
        self.__dict__.update(type_.of_tensors)
        self.handle = handle

    patch.setattr(interpreter, "_get_np_dtype", numpy_type)
    patch.setattr(core.block_type, "__new__", block)
    patch.setattr(core.block_type, "__init__", lambda self, element, shape: None)
    patch.setattr(core.tensor, "__init__", tensor)


@contextmanager
def backwards() -> Iterator[None]:
    """Run the programs of each launch in reverse order within a ``with`` block."""
    builder = interpreter.interpreter_builder
    forwards = builder.set_grid_idx
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", lambda x, y, z: forwards(builder.grid_dim[0] - 1 - x, y, z))
        yield
