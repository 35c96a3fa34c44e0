"""Compiled code on disk never comes from older source."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from mbqueue.data import conversion, machine_code
from mbqueue.train import kernels


def module_at(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_is_named_after_the_content_of_the_modules_that_it_calls(tmp_path):
    def named_after(text: str) -> str:
        (tmp_path / "helper.py").write_text(text)
        compiled = machine_code.compiled_with(module_at(tmp_path / "helper.py"))

        def double(x: int) -> int:
            return 2 * x

        function = compiled(double)
        assert function(4) == 8
        return function.__qualname__

    first = named_after("A = 1\n")
    assert first == named_after("A = 1\n")
    assert first != named_after("A = 2\n")
    assert conversion.pack_rows.__qualname__ != "pack_rows"
    assert kernels.bonds_forward.__qualname__ != "bonds_forward"


REFUSING = """
import numba
njit = numba.njit
def refuse(*args, cache=False, **options):
    if cache:
        raise RuntimeError('cannot cache function: no locator available')
    return njit(*args, **options)
numba.njit = refuse
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
