"""A project file from an untrusted author causes an immediate error that names the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mbqueue.project import ProjectFolder

from .conftest import Command


def _pipe(path: Path) -> None:
    os.mkfifo(path)


HOSTILE = {
    "deeply nested": lambda path: path.write_text("a = " + "[" * 100_000),
    "huge": lambda path: path.write_bytes(b"#" * (2 << 20)),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00" * 100),
    "a folder": lambda path: path.mkdir(),
    "a pipe without a writer": _pipe,
}


@pytest.mark.parametrize("harm", HOSTILE)
@pytest.mark.parametrize("name", ["mbqueue.toml", "jobs/full_finetune.toml"])
def test_a_hostile_file_is_an_error_with_its_name(
    mbqueue: Command, project: ProjectFolder, name: str, harm: str
) -> None:
    path = project.root / name
    path.unlink(missing_ok=True)
    HOSTILE[harm](path)
    said = mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    assert said.code in {1, 2}
    assert path.name in said.err or "full_finetune" in said.err
    assert "Traceback" not in said.err
    assert not project.queue_db.exists()


@pytest.mark.parametrize("key", ["name", "results_name"])
def test_a_name_that_leads_out_of_the_project_is_refused(mbqueue: Command, project: ProjectFolder, key: str) -> None:
    (project.jobs_dir / "evil.toml").write_text(f'{key} = "../../outside"\n[data]\ndataset = "sample"\n')
    said = mbqueue("enqueue", "evil")
    assert said.code == 2
    assert key in said.err
    assert not (project.root.parent.parent / "outside").exists()
