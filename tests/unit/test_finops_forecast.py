"""Burn rates and forecasts: known answers, honesty of the interval, better than going on as is."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.forecast.run import HOURS, START_US, judge, series
from governance.finops.burn import HOUR_US, SPARKS, exhaustion_us, since_start, sparkline
from governance.finops.forecast import (
    DAY,
    WEEK,
    History,
    Span,
    flat,
    forecast,
    hours_of_week,
    predict,
)

MONDAY_US = START_US
END_US = MONDAY_US + 2 * WEEK * HOUR_US


def office(weeks: int, level: int = 1000, growth: float = 1.0) -> tuple[int, ...]:
    """Working hours alone."""
    return tuple(
        round(level * growth ** (hour // WEEK)) if 9 <= hour % DAY < 17 and hour % WEEK < 5 * DAY
        else 0
        for hour in range(weeks * WEEK)
    )  # fmt: skip


def test_a_rate_and_when_it_uses_up_what_is_left() -> None:
    assert since_start(500, 0, HOUR_US // 2) == 1000.0
    assert since_start(500, 0, 0) == 500 * 60, "the first minute is a whole one"
    assert exhaustion_us(100, 100.0, 5, HOUR_US + 6) == HOUR_US + 5
    assert exhaustion_us(100, 100.0, 5, HOUR_US + 5) is None, "the window ends first"
    assert exhaustion_us(0, 0.0, 5, 6) == 5
    assert exhaustion_us(-3, 1.0, 5, 6) == 5
    assert exhaustion_us(1, 0.0, 5, 6) is None
    assert exhaustion_us(None, 1e9, 5, 6) is None


@pytest.mark.parametrize(
    ("values", "width", "text"),
    [
        ([], 8, ""), ([0, 0], 8, "▁▁"), ([0, 7], 8, "▁█"), ([1, 1, 1, 1], 2, "██"),
        ([0, 0, 0, 8], 2, "▁█"), (range(8), 8, SPARKS), ([5], 8, "█"), ([0, 1e-9], 2, "▁█"),
        ([-5, 5], 2, "▁█"),
    ],
)  # fmt: skip
def test_sparklines(values: list[float], width: int, text: str) -> None:
    assert sparkline(list(values), width) == text


def test_no_peak_falls_between_two_groups() -> None:
    for peak in range(31):
        values = [0.0] * 31
        values[peak] = 9.0
        assert sparkline(values, 7).count("█") == 1
        assert len(sparkline(values, 7)) == 7


def test_hours_are_those_of_the_zone() -> None:
    assert list(hours_of_week(MONDAY_US, 2, "UTC")) == [0, 1]
    assert list(hours_of_week(MONDAY_US, 2, "Europe/Berlin")) == [1, 2]
    change_us = 1_774_746_000_000_000  # 29 March 2026, 01:00 UTC: Berlin goes from 2 to 3
    assert list(hours_of_week(change_us - HOUR_US, 3, "Europe/Berlin")) == [145, 147, 148]


def test_a_pattern_that_repeats_is_foretold() -> None:
    history = History(MONDAY_US, office(6))
    now_us = MONDAY_US + 6 * WEEK * HOUR_US
    found = forecast(history, Span(now_us + WEEK * HOUR_US, 0, 45_000), now_us)
    assert found.method == "hour-of-week"
    assert found.spent == pytest.approx(40_000, rel=0.05)
    assert found.low < 40_000 < found.high
    assert found.exhausted_us is None
    assert 0 < found.risk < 0.5
    naive = flat(history, Span(now_us + WEEK * HOUR_US, 0, None), now_us)
    assert naive == 0, "going on as on Sunday"


def test_exhaustion_falls_into_working_hours() -> None:
    history = History(MONDAY_US, office(6))
    now_us = MONDAY_US + 6 * WEEK * HOUR_US
    found = forecast(history, Span(now_us + WEEK * HOUR_US, 0, 12_000), now_us)
    assert found.exhausted_us is not None
    assert found.earliest_us is not None
    hour = (found.exhausted_us - now_us) // HOUR_US
    assert DAY + 9 <= hour < DAY + 17, "on Tuesday"
    assert now_us < found.earliest_us <= found.exhausted_us
    assert found.risk > 0.9


def test_growth_goes_on_and_fades() -> None:
    past = np.asarray(office(6, growth=1.2), dtype=float)
    slots = hours_of_week(MONDAY_US, len(past), "UTC")
    coming = hours_of_week(MONDAY_US + len(past) * HOUR_US, 8 * WEEK, "UTC")
    weeks = predict(past, slots, coming).reshape(8, WEEK).sum(axis=1)
    last = past[-WEEK:].sum()
    assert weeks[0] > 0.95 * last
    steps = weeks[1:] / weeks[:-1]
    assert all(steps > 1)
    assert all(steps[1:] < steps[:-1])
    assert weeks[-1] < last * 1.5, "believed in part, and not for ever"


@pytest.mark.parametrize("amounts", [(), (0,), (0,) * 500])
def test_nothing_comes_of_nothing(amounts: tuple[int, ...]) -> None:
    now_us = MONDAY_US + len(amounts) * HOUR_US
    found = forecast(History(MONDAY_US, amounts), Span(now_us + WEEK * HOUR_US, 7, 100), now_us)
    assert (found.spent, found.low, found.high, found.per_hour) == (7, 7, 7, 0)
    assert (found.exhausted_us, found.earliest_us, found.latest_us, found.risk) == (
        None, None, None, 0,
    )  # fmt: skip


def test_what_is_used_up_is_used_up_now() -> None:
    found = forecast(History(MONDAY_US, (5,)), Span(END_US, 100, 100), MONDAY_US + HOUR_US)
    now_us = MONDAY_US + HOUR_US
    assert (found.exhausted_us, found.earliest_us, found.latest_us) == (now_us, now_us, now_us)
    assert found.risk == 1


def test_of_a_running_hour_only_the_rest_is_to_come() -> None:
    history = History(MONDAY_US, (3600,) * 24)
    at_us = MONDAY_US + 24 * HOUR_US + HOUR_US // 2
    found = forecast(history, Span(MONDAY_US + 25 * HOUR_US, 1000, None), at_us)
    assert found.spent == pytest.approx(1000 + 1800)
    assert found.per_hour == 3600
    assert found.risk == 0
    late = forecast(history, Span(MONDAY_US + 25 * HOUR_US, 1000, 1900), at_us)
    assert late.exhausted_us == pytest.approx(at_us + HOUR_US // 4, abs=HOUR_US / 100)


def test_it_is_the_same_each_time() -> None:
    history = History(MONDAY_US, office(5))
    now_us = MONDAY_US + 5 * WEEK * HOUR_US
    span = Span(now_us + 100 * HOUR_US, 0, 9_000)
    assert forecast(history, span, now_us) == forecast(history, span, now_us)
    assert forecast(history, span, now_us, seed=1) != forecast(history, span, now_us)


def test_it_beats_going_on_as_before_and_its_interval_holds() -> None:
    """A small run of ``benchmarks/forecast``; there are the figures."""
    random = np.random.default_rng(11)
    made = [series(kind, random) for kind in ("office", "nights", "steady", "launch")] * 2
    assert all(len(amounts) == HOURS for amounts in made)
    for record in (4 * DAY, 2 * WEEK, 6 * WEEK):
        found = judge(made, record, WEEK, np.random.default_rng(record))
        assert found["forecast"] < 0.8 * min(found["flat"], found["since start"])
        assert found["coverage"] > 0.6
