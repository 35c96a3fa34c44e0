"""Where mbqueue writes a project's report and comparison, and which places it refuses."""

from __future__ import annotations

import dataclasses

import pytest

from mbqueue import Project
from mbqueue.errors import UsageError
from mbqueue.project import init_project
from mbqueue.results.record import record_experiment


@pytest.fixture
def project(tmp_path, fill, inputs):
    """A project with two recorded experiments."""
    root = tmp_path / "project"
    init_project(root)
    for seed, name in enumerate(("small", "later")):
        folder = root / "results" / "daily" / "2026-11-20" / name
        record_experiment(fill(folder, seed=seed), dataclasses.replace(inputs, experiment=name))
    return Project(root)


def test_a_report_for_a_folder_is_written_into_it(project, tmp_path):
    assert project.report("small", output=tmp_path) == [tmp_path / "report.html"]
    assert (tmp_path / "report.html").is_file()


def test_a_report_for_a_folder_that_is_not_there_is_refused_and_makes_none(project, tmp_path):
    with pytest.raises(UsageError, match=r"There is no folder .*mistyped, so r\.html cannot be written"):
        project.report("small", output=tmp_path / "mistyped" / "r.html")
    assert not (tmp_path / "mistyped").exists()


def test_a_comparison_page_for_a_folder_that_is_not_there_is_refused(project, tmp_path):
    with pytest.raises(UsageError, match="There is no folder"):
        project.compare(["small", "later"], html=tmp_path / "mistyped" / "c.html")


def test_a_comparison_page_that_is_a_folder_is_refused_with_a_name_to_take(project, tmp_path):
    with pytest.raises(UsageError, match=r"is a folder.*comparison\.html"):
        project.compare(["small", "later"], html=tmp_path)


def test_an_experiment_is_not_compared_with_itself(project):
    with pytest.raises(UsageError, match="small is given twice"):
        project.compare(["small", "later", "small"])
