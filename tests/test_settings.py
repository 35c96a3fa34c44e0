"""The settings that mbqueue.toml may contain."""

from __future__ import annotations

from pathlib import Path

import pytest

from mbqueue.errors import SpecError
from mbqueue.settings import NotifySettings, Settings, load_settings


def test_without_a_file_every_setting_has_its_default(tmp_path: Path) -> None:
    assert load_settings(tmp_path) == Settings()


def test_what_the_file_says_is_taken_and_the_rest_has_its_default(tmp_path: Path) -> None:
    (tmp_path / "mbqueue.toml").write_text("lease_seconds = 30\n[notify]\nevents = ['job failed']\n")
    settings = load_settings(tmp_path)
    assert settings == Settings(lease_seconds=30.0, notify=NotifySettings(events=("job failed",)))
    assert isinstance(settings.lease_seconds, float)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sesion = '1h'", "sesion: there is no such key"),
        ("session = '1x'", "1h50m"),
        ("session = 90", "session = 90: must be text in quotes"),
        ("lease_seconds = 0.0", "lease_seconds = 0.0: must be at least 1"),
        ("lease_seconds = true", "lease_seconds = True: must be a number"),
        ("checkpoint_minutes = nan", "checkpoint_minutes = nan: must be a number"),
        ("checkpoint_minutes = 0", "checkpoint_minutes = 0: must be above 0"),
        ("end_command_seconds = 1e6", "must be at most 3600"),
        (
            "queue = 'postgresql://me:s3cr3t@host/db'",
            "queue: must not contain a password: put the password into ~/.pgpass",
        ),
        ("queue = 'postgresql://me:s3?c=r3t@host:5432/db'", "queue: must not contain a password"),
        ("queue = 'postgresql://me:s3/cr3t@host/db'", "queue: must not contain a password"),
        ("queue = 'postgresql://me:s3@cr3t@host/db'", "queue: must not contain a password"),
        ("queue = 'postgresql://me@host/db?passwor%64=s3cr3t'", "queue: must not contain a password"),
        ("queue = 'postgresql://me@host/db?sslmode=require&password=s3cr3t'", "queue: must not contain a password"),
        ("notify = 'x'", r"write \[notify\]"),
        ("[notify]\nwebhok = 'x'", "notify.webhok: there is no such key. Allowed keys: command, webhook"),
        ("[notify]\nwebhook = 'ftp://x'", "notify.webhook: must look like"),
        ("[notify]\nevents = ['fold don']", "notify.events: must be a list; its items can be 'fold done'"),
        ("=", "TOML"),
    ],
)
def test_wrong_settings_are_named_with_what_is_allowed(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mbqueue.toml").write_text(text)
    with pytest.raises(SpecError, match=said):
        load_settings(tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql:///db?passfile=/home/me/.pgpass",
        "postgres://me@one:5432,two:5433/db?application_name=a@b",
        "postgresql://host:5432?application_name=a@b",
        "postgresql://me@host:5432?application_name=a@b",
        "postgresql://me@[2001:db8::1]:5432/db?sslmode=verify-full&schema=mine",
    ],
)
def test_the_url_of_a_queue_may_have_all_but_a_password(tmp_path: Path, url: str) -> None:
    (tmp_path / "mbqueue.toml").write_text(f'queue = "{url}"\n')
    assert load_settings(tmp_path).queue == url


def test_all_wrong_settings_are_told_at_once_and_no_text_is_repeated(tmp_path: Path) -> None:
    (tmp_path / "mbqueue.toml").write_text("lease_seconds = 0\n[notify]\nwebhook = 'secret'\n")
    with pytest.raises(SpecError) as error:
        load_settings(tmp_path)
    assert "lease_seconds" in str(error.value)
    assert "notify.webhook" in str(error.value)
    assert "secret" not in str(error.value)
