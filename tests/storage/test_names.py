"""One module formats and parses the names of commits' files, and each name survives a round trip."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbqueue.files import TEMP_PREFIX
from mbqueue.storage.names import commit_file, is_stem, manifests_named, newest_plain_manifest, order_of, stem_of


@given(
    epoch=st.integers(1, 10**9 - 1),
    step=st.none() | st.integers(0, 10**9),
    fence=st.integers(0, 10**6),
    digits=st.sampled_from(["", "9f86d081884c"]),
    suffix=st.sampled_from(["json", "pt"]),
)
def test_a_name_is_parsed_into_its_parts(epoch: int, step: int | None, fence: int, digits: str, suffix: str) -> None:
    stem = stem_of(epoch=epoch, step=step, fence=fence)
    assert is_stem(stem)
    assert order_of(stem) == (epoch, step is None, step or 0, fence)
    base = f"{stem}-{digits}" if digits else stem
    file = commit_file(f"{base}.{suffix}")
    assert file is not None
    assert (file.stem, file.base, file.digits, file.suffix) == (stem, base, digits, suffix)
    assert file.finished_epochs == (epoch if step is None else epoch - 1)


def test_a_duplicate_made_by_the_drive_is_parsed_as_the_original_name() -> None:
    file = commit_file("e0012-done-f0003-9f86d081884c (1).pt")
    assert file is not None
    assert file.base == "e0012-done-f0003-9f86d081884c"


@pytest.mark.parametrize(
    "name",
    [
        "e0012-done-f0003",
        "e0012-done-f0003.json.damaged",
        "e0012-done-f0003 (1).json",
        "e0012-done-f0003-9f86.pt",
        "e12-done-f3.json",
        "aside/e0012-done-f0003.json",
        f"{TEMP_PREFIX}123-e0012-done-f0003.json",
        "e0012-done-f0003.json\n",
    ],
)
def test_other_names_do_not_parse_as_commits(name: str) -> None:
    assert commit_file(name) is None


def test_the_newest_manifest_of_a_folder_has_the_most_work_and_no_hash() -> None:
    names = ["e0002-done-f0001.json", "e0003-s000040-f0002.json", "e0003-s000004-f0009.json"]
    others = ["e0004-done-f0003.pt", "e0004-done-f0003-9f86d081884c.json", "e0005-done-f0001.json.damaged"]
    newest = newest_plain_manifest([*names, *others])
    assert newest is not None
    assert newest.stem == "e0003-s000040-f0002"
    assert newest_plain_manifest(others) is None


def test_manifests_are_found_only_in_the_folders_of_folds() -> None:
    file = "e0002-done-f0001.json"
    paths = [f"a/fold_4/{file}", f"a/fold_5/{file}", f"a/fold_1/old/{file}", f"fold_1/{file}", "b/fold_0/notes.json"]
    assert [(experiment, fold, found.stem) for experiment, fold, found in manifests_named(paths)] == [
        ("a", 4, "e0002-done-f0001")
    ]
