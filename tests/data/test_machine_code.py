"""Compiled code on disk never comes from another source or version."""

from __future__ import annotations

import errno
import importlib
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from mbqueue.data import machine_code

HELPER = """
from steps.constants import FIRST, STEP
from mbqueue.data.machine_code import compiled
@compiled
def step(x):
    return x + STEP
"""
CALLER = """
from steps.helper import FIRST, step
from mbqueue.data.machine_code import compiled
@compiled
def two_steps(x):
    return step(step(x)) + FIRST
"""


@pytest.fixture
def two_steps(tmp_path, monkeypatch):
    """Return a function that writes a package and returns its ``two_steps``, as a new process imports it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "code"))
    folder = tmp_path / "steps"

    def imported(step: int, first: int = 0):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "constants.py").write_text(f"STEP, FIRST = {step}, {first}\n")
        (folder / "helper.py").write_text(HELPER)
        (folder / "caller.py").write_text(CALLER)
        for name in ("steps", "steps.constants", "steps.helper", "steps.caller"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        for cached in (machine_code._hash_of_sources, machine_code._imported):
            cached.cache_clear()
        return importlib.import_module("steps.caller").two_steps

    return imported


def from_disk(kernel) -> int:
    """How many signatures of ``kernel`` were loaded from disk instead of being compiled."""
    return sum(kernel.stats.cache_hits.values())


def test_code_is_loaded_for_every_signature_until_an_imported_module_changes(two_steps):
    first = two_steps(step=1)
    assert (first(0), first(0.5), from_disk(first)) == (2, 2.5, 0)
    again = two_steps(step=1)
    assert (again(0), again(0.5), from_disk(again)) == (2, 2.5, 2)
    changed = two_steps(step=2)
    assert (changed(0), changed(0.5), from_disk(changed)) == (4, 4.5, 0)
    other = two_steps(step=2, first=1)
    assert (other(0), other(0.5), from_disk(other)) == (5, 5.5, 0)
    back = two_steps(step=1)
    assert (back(0), from_disk(back)) == (2, 1)


def test_code_of_another_version_of_numba_is_not_loaded(two_steps, monkeypatch):
    assert two_steps(step=1)(0) == 2
    monkeypatch.setattr(numba, "__version__", "0.0.1")
    other = two_steps(step=1)
    assert (other(0), from_disk(other)) == (2, 0)


@pytest.mark.parametrize("renames", [0, 1])
def test_a_process_that_dies_while_it_saves_code_leaves_no_older_code(two_steps, monkeypatch, renames):
    assert two_steps(step=1)(0) == 2
    count = itertools.count()

    def die(replace):
        def replace_or_die(*args, **options):
            if next(count) == renames:
                raise KeyboardInterrupt
            return replace(*args, **options)

        return replace_or_die

    changed = two_steps(step=2)
    with monkeypatch.context() as dying:
        for module, name in ((os, "replace"), (os, "rename"), (Path, "replace"), (Path, "rename")):
            dying.setattr(module, name, die(getattr(module, name)))
        with pytest.raises(KeyboardInterrupt):
            changed(0)
    assert two_steps(step=2)(0) == 4


def test_damaged_code_is_compiled_again(two_steps, tmp_path):
    assert two_steps(step=1)(0) == 2
    files = list(tmp_path.rglob("*.code"))
    assert len(files) == 2
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    again = two_steps(step=1)
    assert (again(0), from_disk(again)) == (2, 0)
    later = two_steps(step=1)
    assert (later(0), from_disk(later)) == (2, 1)


def test_on_a_full_disk_code_is_compiled_with_one_note(two_steps, monkeypatch, caplog, tmp_path):
    def no_space(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    machine_code._tell_that_nothing_is_kept.cache_clear()
    with monkeypatch.context() as full:
        full.setattr(machine_code, "write_bytes", no_space)
        assert two_steps(step=1)(0) == 2
    kernel = two_steps(step=1)
    shutil.rmtree(tmp_path / "code")
    (tmp_path / "code").write_text("no folder")
    assert kernel(0) == 2
    assert [record.getMessage().count("NUMBA_CACHE_DIR") for record in caplog.records] == [1]
    machine_code._tell_that_nothing_is_kept.cache_clear()


REFUSING = """
import numba.core.caching
def refuse(self, function):
    raise RuntimeError('cannot cache function: no locator available')
numba.core.caching.FunctionCache.__init__ = refuse
"""


def test_without_a_writable_folder_code_is_compiled_anyway_with_one_note(tmp_path):
    script = tmp_path / "kernel.py"
    script.write_text(
        f"{REFUSING}\n"
        "import mbqueue.data.assembly, mbqueue.data.conversion, mbqueue.train.kernels\n"
        "from mbqueue.data import machine_code\n"
        "print(machine_code.compiled(lambda x: x + 1)(1))\n"
    )
    answer = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert answer.stdout == "2\n"
    assert answer.stderr.count("NUMBA_CACHE_DIR") == 1


def test_two_functions_of_one_name_do_not_share_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = [f"@compiled\ndef step(x):\n    return x + {n}\nstep_{n} = step\n" for n in (1, 2)]
    (tmp_path / "twice.py").write_text("from mbqueue.data.machine_code import compiled\n" + "".join(lines))
    for _ in range(2):
        monkeypatch.delitem(sys.modules, "twice", raising=False)
        twice = importlib.import_module("twice")
        assert (twice.step_1(0), twice.step_2(0)) == (1, 2)


def test_options_are_part_of_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    x, y, z = 1e30, -1e30, 1.0

    def total(x, y, z):
        return (x + y) + z

    exact = machine_code.compiled(total)
    assert exact(x, y, z) == 1.0
    fast = machine_code.compiled(total, fastmath={"reassoc", "nsz"})
    fast(x, y, z)
    assert (from_disk(fast), len(list(tmp_path.rglob("*.code")))) == (0, 2)


def test_recompiling_does_not_load_the_code_again(two_steps):
    kernel = two_steps(step=1)
    assert kernel(0) == 2
    kernel.py_func.__globals__["FIRST"] = 5
    kernel.recompile()
    assert (kernel(0), from_disk(kernel)) == (7, 0)


@pytest.mark.parametrize(
    "module", ["assembly", "conversion", "distortion", "geometry", "json_stream", "json_values", "neighbors"]
)
def test_importing_a_kernel_compiles_nothing(module):
    code = (
        f"import mbqueue.data.{module} as m, numba.core.dispatcher as d;"
        "print(sum(len(f.signatures) for f in vars(m).values() if isinstance(f, d.Dispatcher)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "0\n"
