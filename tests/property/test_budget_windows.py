"""Budget windows tile time, in every zone, over every change of the clock."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from governance.budget.windows import WindowKind, window_at

ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/Havana",
    "America/Sao_Paulo",
    "Africa/Cairo",
    "Asia/Kolkata",
    "Asia/Beirut",
    "Australia/Lord_Howe",
    "Pacific/Apia",
    "Pacific/Chatham",
)


def us(*when: int) -> int:
    return int(datetime(*when, tzinfo=UTC).timestamp()) * 1_000_000  # type: ignore[misc,arg-type]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(WindowKind),
    st.sampled_from(ZONES),
    st.integers(us(1990, 1, 1), us(2060, 1, 1)),
)
@example(WindowKind.DAY, "Pacific/Apia", us(2011, 12, 30, 5))
@example(WindowKind.DAY, "Europe/Berlin", us(2026, 3, 29, 1))
@example(WindowKind.DAY, "America/Havana", us(2025, 11, 2, 5, 30))
def test_windows_tile_time(kind: WindowKind, zone: str, now_us: int) -> None:
    start, end = window_at(kind, zone, now_us)
    assert start <= now_us < end
    assert window_at(kind, zone, start) == window_at(kind, zone, end - 1) == (start, end)
    assert window_at(kind, zone, end)[0] == end
    assert window_at(kind, zone, start - 1)[1] == start


@pytest.mark.parametrize(
    ("day", "hours"), [((2026, 3, 29), 23), ((2026, 10, 25), 25), ((2026, 6, 1), 24)]
)
def test_a_day_is_as_long_as_its_clock_says(day: tuple[int, int, int], hours: int) -> None:
    noon = datetime(*day, 12, tzinfo=ZoneInfo("Europe/Berlin"))
    start, end = window_at("day", "Europe/Berlin", int(noon.timestamp()) * 1_000_000)
    assert end - start == hours * 3_600_000_000


def test_weeks_begin_on_monday_and_months_on_the_first() -> None:
    now_us = us(2026, 12, 31, 23, 30)
    assert window_at("week", "UTC", now_us) == (us(2026, 12, 28), us(2027, 1, 4))
    assert window_at("month", "UTC", now_us) == (us(2026, 12, 1), us(2027, 1, 1))
    assert window_at("month", "Europe/Berlin", now_us)[0] == us(2026, 12, 31, 23)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="year"):
        window_at("year", "UTC", 0)
