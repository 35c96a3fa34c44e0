from __future__ import annotations

import pytest

from mbqueue.clock import backoff, format_duration, parse_duration, utc_text
from mbqueue.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"), [("1h50m", 6600), ("90m", 5400), ("45s", 45), ("2d", 172800), ("1.5h", 5400), ("1H 50M", 6600)]
)
def test_a_duration_is_read_as_people_write_it(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "1x", "h", "-5m", "0s", "1h50", "nan", "5m!"])
def test_an_invalid_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="1h50m"):
        parse_duration(text)


@pytest.mark.parametrize(("seconds", "text"), [(6600, "1h50m"), (245, "4m05s"), (12.4, "12s"), (-3, "0s")])
def test_a_duration_is_written_as_people_read_it(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_an_instant_is_written_in_utc() -> None:
    assert utc_text(0) == "1970-01-01T00:00:00Z"


def test_waits_double_up_to_the_maximum_even_after_a_week_of_failures() -> None:
    pauses = [backoff(tries, first=5.0, longest=300.0) for tries in (1, 2, 3, 6, 7, 8, 100_000)]
    assert pauses == [5.0, 10.0, 20.0, 160.0, 300.0, 300.0, 300.0]
