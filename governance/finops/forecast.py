"""What will be spent until a window ends, and when its limit is reached, with an interval.

**Level by hour of week.** What an account used in each past hour is averaged by hour of the week in
its own time zone, a week counting ``WEEK_DECAY`` times the one after it. An hour of the week that
was seen seldom leans on the same hour of other working days (or weekend days), and that on the mean
of all hours: with a few days on record this is a profile by hour of day, with a few hours a flat
rate. The profile is scaled to the last seven days, by ``LEVEL_TRUST`` of the way on a logarithmic
scale.

**Damped trend.** With three weeks on record, the mean logarithmic growth of the last two weeks,
``TREND_TRUST`` of it believed and bounded, goes on and fades with ``DAMPING`` a week (Gardner and
McKenzie, Management Science 31, 1985).

**Interval.** The same forecast is made for each of the last 28 days from what was known before it,
and for the seven days from it on; the ratios of what was spent to what was forecast are the errors
that this account has given rise to. Each path takes blocks of three successive days for its shape
(moving-block bootstrap, Kuensch, Annals of Statistics 17, 1989), and a level that is drawn
log-normal, with the variance of the logarithms of the ratios of seven days. Ratios of overlapping
weeks are few facts, so the variance leans on a prior (``PRIOR_SPREAD``), and it grows with the
weeks ahead. With less than ten days on record ratios of single hours stand in for those of days,
and each day that is missing widens the level. ``benchmarks/forecast`` measures how often the
interval holds.

Figures are amounts of one quantity. Nothing here reads a clock; randomness comes from ``seed``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

from governance.finops.burn import HOUR_US

Floats = NDArray[np.float64]

WEEK: Final = 168
DAY: Final = 24
WEEK_DECAY: Final = 0.7
LEVEL_TRUST: Final = 0.7
DAMPING: Final = 0.7
TREND_TRUST: Final = 0.5
MAX_TREND: Final = 0.3
"""Most that a week may differ from the one before, on a logarithmic scale: 35 %."""
BLOCK_DAYS: Final = 3
PRIOR_SPREAD: Final = 0.25
"""Standard deviation of the level of a week ahead, on a logarithmic scale, before anything is known
of it; counts like ``PRIOR_WEIGHT`` weeks."""
PRIOR_WEIGHT: Final = 2.0
DAY_SPREAD: Final = 0.7
"""The same that one day on record leaves open; of several it falls with their root."""
LONGEST_HOURS: Final = 13 * WEEK
"""Older hours are not looked at."""
LOW, HIGH = 0.1, 0.9
"""Bounds of the interval: eight of ten outcomes should lie in it."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class History:
    """What an account used in each full hour of the past."""

    start_us: int
    """When the first hour began; a full hour of UTC."""
    amounts: tuple[int, ...]
    """By hour, without a gap: an hour in which nothing was used is 0."""
    zone: str = "UTC"
    """Time zone whose hours of the week the account follows."""

    @property
    def end_us(self) -> int:
        """When the last hour ended."""
        return self.start_us + len(self.amounts) * HOUR_US


@dataclass(frozen=True, slots=True)
class Span:
    """The window that is forecast."""

    end_us: int
    spent: int
    """So far."""
    limit: int | None
    """``None``: there is nothing to run out of."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is to be expected; amounts are of the whole window, what was spent so far included."""

    method: str
    """``hour-of-week``, ``hour-of-day`` or ``flat``, by how much is on record."""
    per_hour: float
    """Rate of the last 24 full hours, or of as many as there are."""
    spent: float
    """At the end of the window, if nothing were refused."""
    low: float
    """One of ten outcomes is below this."""
    high: float
    """One of ten outcomes is above this."""
    exhausted_us: int | None
    """When the limit is reached; ``None`` where the window ends first."""
    earliest_us: int | None
    """One of ten outcomes is earlier; ``None`` where fewer reach the limit at all."""
    latest_us: int | None
    """One of ten outcomes is later or never; ``None`` where more than that never reach it."""
    risk: float
    """Share of outcomes that reach the limit before the window ends, 0 to 1."""


def forecast(
    history: History, span: Span, now_us: int, *, paths: int = 400, seed: int = 0
) -> Forecast:
    """Forecast one account and quantity.

    Args:
        history: Full hours up to ``now_us``; may be empty.
        span: The window that ``now_us`` lies in.
        now_us: Wall time.
        paths: Outcomes that are drawn for the interval.
        seed: Of the draws.
    """
    past = np.asarray(history.amounts[-LONGEST_HOURS:], dtype=np.float64)
    first_us = history.end_us - len(past) * HOUR_US
    hour_us = now_us - now_us % HOUR_US
    ahead = max(1, -(-(span.end_us - hour_us) // HOUR_US))
    slots = hours_of_week(first_us, len(past), history.zone)
    coming = hours_of_week(hour_us, ahead, history.zone)
    expected = predict(past, slots, coming)
    # Of the hour that runs only the rest is to come, and of one in which the window ends a part.
    share = np.ones(ahead)
    share[0] = (min(hour_us + HOUR_US, span.end_us) - now_us) / HOUR_US
    if ahead > 1:
        share[-1] = (span.end_us - (hour_us + (ahead - 1) * HOUR_US)) / HOUR_US
    share = np.clip(share, 0.0, 1.0)
    factors = _factors(past, slots, ahead, paths, np.random.default_rng(seed))
    outcomes = span.spent + np.cumsum(expected * share * factors, axis=1)
    middle = span.spent + np.cumsum(expected * share)
    recent = past[-DAY:]
    reached = [_reached(row, span, now_us, hour_us) for row in outcomes]
    times = np.asarray([np.inf if when is None else float(when) for when in reached])
    return Forecast(
        method=_method(len(past)),
        per_hour=float(recent.mean()) if len(recent) else 0.0,
        spent=float(middle[-1]),
        low=float(min(np.quantile(outcomes[:, -1], LOW), middle[-1])),
        high=float(max(np.quantile(outcomes[:, -1], HIGH), middle[-1])),
        exhausted_us=_reached(middle, span, now_us, hour_us),
        earliest_us=_quantile(times, LOW),
        latest_us=_quantile(times, HIGH),
        risk=float(np.isfinite(times).mean()) if span.limit is not None else 0.0,
    )


def predict(past: Floats, slots: NDArray[np.int64], coming: NDArray[np.int64]) -> Floats:
    """Expected amounts of coming hours.

    Args:
        past: Amounts of past hours, oldest first.
        slots: Hours of the week of ``past``, 0 (Monday midnight) to 167.
        coming: Hours of the week to forecast, from the hour after ``past`` on.
    """
    if not len(past):
        return np.zeros(len(coming))
    weeks = (len(past) - 1 - np.arange(len(past))) // WEEK
    profile = _profile(past, slots, WEEK_DECAY**weeks)
    expected = profile[coming]
    recent = past[-WEEK:].sum()
    fitted = profile[slots[-WEEK:]].sum()
    if recent > 0 and fitted > 0:
        expected = expected * (recent / fitted) ** LEVEL_TRUST
    growth = _growth(past)
    if growth:
        weeks_ahead = np.arange(len(coming)) / WEEK
        # Sum of DAMPING^i over the weeks up to then, as an integral.
        faded = (1 - DAMPING**weeks_ahead) / -np.log(DAMPING)
        expected = expected * np.exp(growth * faded)
    return np.asarray(expected, dtype=np.float64)


def hours_of_week(first_us: int, count: int, zone: str) -> NDArray[np.int64]:
    """Hours of the week, 0 (Monday midnight, local) to 167, of successive hours."""
    place, first = ZoneInfo(zone), _EPOCH + timedelta(microseconds=first_us)
    local = [(first + timedelta(hours=hour)).astimezone(place) for hour in range(count)]
    return np.asarray([moment.weekday() * DAY + moment.hour for moment in local], dtype=np.int64)


def _profile(past: Floats, slots: NDArray[np.int64], weights: NDArray[Any]) -> Floats:
    """Mean amount by hour of the week; what was seen seldom leans on what is like it."""
    mean = float(np.average(past, weights=weights))
    kinds = _kind(np.arange(WEEK))
    seen = np.bincount(_kind(slots), weights, 2 * DAY)
    summed = np.bincount(_kind(slots), weights * past, 2 * DAY)
    by_kind = (summed + mean) / (seen + 1.0)
    # A weekend that nobody has seen yet looks like the working days, not like the mean.
    for hour in range(DAY):
        work, off = hour, DAY + hour
        if not seen[off] and seen[work]:
            by_kind[off] = by_kind[work]
        elif not seen[work] and seen[off]:
            by_kind[work] = by_kind[off]
    seen = np.bincount(slots, weights, WEEK)
    summed = np.bincount(slots, weights * past, WEEK)
    return np.asarray((summed + 1.5 * by_kind[kinds]) / (seen + 1.5), dtype=np.float64)


def _kind(slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Hour of a working day, 0 to 23, or of a weekend day, 24 to 47."""
    return np.asarray(slots % DAY + np.where(slots >= 5 * DAY, DAY, 0), dtype=np.int64)


def _growth(past: Floats) -> float:
    """Believed growth a week on a logarithmic scale."""
    if len(past) < 3 * WEEK:
        return 0.0
    weeks = past[-3 * WEEK :].reshape(3, WEEK).sum(axis=1)
    if weeks.min() <= 0:
        return 0.0
    mean = float(np.log(weeks[2] / weeks[0])) / 2
    return float(np.clip(TREND_TRUST * mean, -MAX_TREND, MAX_TREND))


def _factors(
    past: Floats,
    slots: NDArray[np.int64],
    ahead: int,
    paths: int,
    random: np.random.Generator,
) -> Floats:
    """Errors of the past by path and coming hour, as factors."""
    days, weeks = _errors(past, slots)
    if len(days) < BLOCK_DAYS:
        return _hourly_factors(past, slots, ahead, paths, random)
    count = -(-ahead // DAY)
    blocks = -(-count // BLOCK_DAYS)
    begins = random.integers(0, len(days) - BLOCK_DAYS + 1, (paths, blocks))
    drawn = days[begins[:, :, None] + np.arange(BLOCK_DAYS)].reshape(paths, -1)[:, :count]
    drawn = drawn / max(float(days.mean()), 1e-9)
    found = np.log(weeks[weeks > 0])
    # Seven ratios of overlapping weeks say about as much as two that do not overlap.
    facts = len(found) / 3.5
    squares = float((found**2).sum()) / 3.5
    spread = np.sqrt((squares + PRIOR_WEIGHT * PRIOR_SPREAD**2) / (facts + PRIOR_WEIGHT))
    return np.repeat(drawn, DAY, axis=1)[:, :ahead] * _levels(spread, ahead, paths, random)


def _levels(spread: float, ahead: int, paths: int, random: np.random.Generator) -> Floats:
    """A level for each path with mean 1; its spread grows with the square root of the weeks."""
    growing = spread * np.sqrt(1 + np.arange(ahead) / WEEK / 2)
    drawn = random.normal(0, 1, (paths, 1))
    return np.asarray(np.exp(drawn * growing - growing**2 / 2), dtype=np.float64)


def _errors(past: Floats, slots: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """What was spent by what was forecast from before: by day, and by seven days."""
    days, weeks = [], []
    newest = len(past)
    for back in range(min(28, newest // DAY - WEEK // DAY), 0, -1):
        end = newest - back * DAY
        reach = min(WEEK, newest - end)
        expected = predict(past[:end], slots[:end], slots[end : end + reach])
        if (day := expected[:DAY].sum()) > 0:
            days.append(past[end : end + DAY].sum() / day)
        if reach == WEEK and (week := expected.sum()) > 0:
            weeks.append(past[end : end + WEEK].sum() / week)
    return np.asarray(days), np.asarray(weeks)


def _hourly_factors(
    past: Floats,
    slots: NDArray[np.int64],
    ahead: int,
    paths: int,
    random: np.random.Generator,
) -> Floats:
    """Ratios of single hours to the profile: for want of days."""
    if not len(past) or past.sum() <= 0:
        return np.ones((paths, ahead))
    fitted = np.maximum(_profile(past, slots, np.ones(len(past)))[slots], past.mean() * 0.05)
    ratios = past / fitted
    ratios = ratios / max(float(ratios.mean()), 1e-9)
    spread = np.sqrt(PRIOR_SPREAD**2 + DAY_SPREAD**2 * DAY / max(len(past), DAY))
    return random.choice(ratios, (paths, ahead)) * _levels(float(spread), ahead, paths, random)


def _reached(spent: Floats, span: Span, now_us: int, hour_us: int) -> int | None:
    """When a path reaches the limit; within an hour it is spent evenly."""
    if span.limit is None:
        return None
    if span.spent >= span.limit:
        return now_us
    places = np.flatnonzero(spent >= span.limit)
    if not len(places):
        return None
    place = int(places[0])
    before = span.spent if place == 0 else float(spent[place - 1])
    begin_us = max(now_us, hour_us + place * HOUR_US)
    end_us = min(hour_us + (place + 1) * HOUR_US, span.end_us)
    part = (span.limit - before) / max(float(spent[place]) - before, 1e-9)
    return int(begin_us + part * (end_us - begin_us))


def _quantile(times: Floats, share: float) -> int | None:
    ordered = np.sort(times)
    found = ordered[min(len(ordered) - 1, int(share * len(ordered)))]
    return int(found) if np.isfinite(found) else None


def _method(hours: int) -> str:
    if hours >= 2 * WEEK:
        return "hour-of-week"
    return "hour-of-day" if hours >= 2 * DAY else "flat"


def flat(history: History, span: Span, now_us: int) -> float:
    """The naive forecast that this one is judged against: the last 24 hours go on for ever."""
    recent = history.amounts[-DAY:]
    rate = sum(recent) / len(recent) if recent else 0.0
    return span.spent + rate * (span.end_us - now_us) / HOUR_US
