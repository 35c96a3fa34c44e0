from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

from mbqueue.errors import ProjectNotFound, UsageError
from mbqueue.experiment import load_spec
from mbqueue.project import ENVIRONMENT_VARIABLE, ProjectFolder, find_project, init_project

ROOT = Path(__file__).parent.parent


def test_init_makes_a_project_with_the_five_experiments(tmp_path: Path) -> None:
    project, written = init_project(tmp_path / "new")
    assert {p.name for p in written} == {
        "class_head.toml",
        "full_finetune.toml",
        "head_finetune.toml",
        "pretrained_infer.toml",
        "scalar_head.toml",
        "mbqueue.toml",
    }
    names = {p.stem: load_spec(p).folder_name for p in project.jobs_dir.iterdir()}
    assert names == {
        "pretrained_infer": "chgnet_pretrained_infer",
        "head_finetune": "chgnet_head_finetune_freeze",
        "full_finetune": "chgnet_full_finetune",
        "scalar_head": "chgnet_scalar_head",
        "class_head": "chgnet_class_head",
    }


def test_init_leaves_existing_files_alone(tmp_path: Path) -> None:
    init_project(tmp_path)
    (tmp_path / "jobs" / "full_finetune.toml").write_text("seed = 7\n")
    assert init_project(tmp_path)[1] == []
    assert (tmp_path / "jobs" / "full_finetune.toml").read_text() == "seed = 7\n"


def test_the_repository_is_a_project_with_the_shipped_files() -> None:
    for template in (resources.files("mbqueue") / "templates").iterdir():
        path = ROOT / template.name if template.name == "mbqueue.toml" else ROOT / "jobs" / template.name
        assert path.read_text() == template.read_text(), f"{path} differs from the template in the package"


def test_a_project_is_found_by_option_then_environment_then_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        init_project(tmp_path / name)
    below = tmp_path / "c" / "results" / "daily"
    below.mkdir()
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert find_project(start=below).root == tmp_path / "c"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "b"))
    assert find_project(start=below).root == tmp_path / "b"
    assert find_project(tmp_path / "a", start=below).root == tmp_path / "a"


@pytest.mark.parametrize("given", ["missing", "."])
def test_a_folder_that_is_no_project_says_how_to_make_one(
    tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    with pytest.raises(ProjectNotFound, match="mbqueue init"):
        find_project(tmp_path / given)
    with pytest.raises(ProjectNotFound, match="mbqueue init"):
        find_project(start=tmp_path)


def test_a_subfolder_belongs_to_its_project(project: ProjectFolder) -> None:
    with pytest.raises(ProjectNotFound, match=re.escape(f"Use the enclosing project: {project.root}")) as caught:
        find_project(project.jobs_dir)
    assert "init" not in str(caught.value)


def test_an_unknown_experiment_lists_the_known_ones(project: ProjectFolder) -> None:
    with pytest.raises(UsageError, match="full_finetune, head_finetune, pretrained_infer"):
        project.experiment_file("ful_finetune")
