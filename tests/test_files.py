from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from mbqueue import files


def test_a_replaced_file_has_the_new_bytes_and_leaves_no_temp_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    files.write_bytes(path, b"old")
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_an_error_while_writing_leaves_the_old_bytes_and_no_temp_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")

    def die_in_the_middle() -> None:
        with files.replacing(path) as stream:
            stream.write(b"half of the ne")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        die_in_the_middle()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_content_is_synced_before_the_name_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    monkeypatch.setattr(files.os, "fsync", lambda _fd: steps.append("fsync"))
    rename = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: steps.append("rename") or rename(self, target))
    files.write_bytes(tmp_path / "file", b"bytes")
    assert steps == ["fsync", "rename", "fsync"]


def test_values_that_json_cannot_represent_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_json_is_written_readable_and_in_utf8(tmp_path: Path) -> None:
    files.write_json(tmp_path / "file.json", {"unit": "Å"})
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"unit": "Å"}
    assert "Å" in text
    assert text.endswith("\n")


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # more than `sha256_of_file` reads at once
    files.write_bytes(tmp_path / "file", content)
    assert files.sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_the_hash_of_json_does_not_depend_on_the_order_of_keys() -> None:
    assert files.sha256_of_json({"a": 1, "b": [2]}) == files.sha256_of_json({"b": [2], "a": 1})
    assert files.sha256_of_json({"a": 1}) != files.sha256_of_json({"a": 2})


def test_leftovers_of_dead_processes_are_removed_and_files_of_live_ones_are_not(tmp_path: Path) -> None:
    old, new, other = (tmp_path / f"{files.TEMP_PREFIX}{name}" for name in ("aa-f.json", "bb-f.json", "cc-g.json"))
    for path in (old, new, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 2 * files.LEFT_OVER_SECONDS))
    files.write_json(tmp_path / "f.json", {})
    assert not old.exists()
    assert new.exists(), "it may be of a process that is still writing"
    assert other.exists(), "it is of another file"
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "f.json"]
    files.sweep(tmp_path / "missing")


def test_a_sweep_removes_the_probe_that_an_interrupted_sweep_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temp = tmp_path / f"{files.TEMP_PREFIX}aa-f.json"
    temp.write_text("half")  # a sweep writes a probe only if there are temp files
    with monkeypatch.context() as patched:
        probes: list[str] = []
        patched.setattr(files, "_sweep", lambda probe, _pattern: probes.append(probe.name))
        files.sweep(tmp_path)
    probe = tmp_path / probes[0]
    probe.touch()
    os.utime(probe, (0, 0))
    files.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [temp]
