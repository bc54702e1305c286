"""Budget windows: from when to when a budget counts.

Pure calendar arithmetic over ``zoneinfo``. Windows of one kind and zone tile time: each instant
lies in exactly one, also where a clock is put forward or back, and where a zone skips a day.

- ``hour``: a full hour of UTC, whatever the zone: an hour that is repeated in autumn would
  otherwise be two, or one of two hours' length.
- ``day``, ``week`` (from Monday), ``month``: from local midnight to local midnight, so that a day
  has 23 or 25 hours when the clock changes. A midnight that does not exist begins at the change.
- ``fiscal-month``: a month that begins on another day than the first, up to the 28th.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from zoneinfo import ZoneInfo

HOUR_US = 3_600_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class WindowKind(StrEnum):
    """Length of a budget window."""

    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    FISCAL_MONTH = "fiscal-month"


def window_at(kind: str, tz: str, now_us: int, first_day: int = 1) -> tuple[int, int]:
    """The window that an instant lies in.

    Args:
        kind: A ``WindowKind``.
        tz: Name of a time zone (IANA).
        now_us: Microseconds since 1970 UTC.
        first_day: Day on which a fiscal month begins, 1 to 28.

    Returns:
        First microsecond of the window, and first microsecond after it.

    Raises:
        ValueError: Unknown kind, or a year outside 1 to 9999.
        zoneinfo.ZoneInfoNotFoundError: Unknown zone.
    """
    kind = WindowKind(kind)
    if kind is WindowKind.HOUR:
        start = now_us - now_us % HOUR_US
        return start, start + HOUR_US
    zone = ZoneInfo(tz)
    today = (_EPOCH + timedelta(microseconds=now_us)).astimezone(zone).date()
    if kind is WindowKind.DAY:
        first, after = today, today + timedelta(days=1)
    elif kind is WindowKind.WEEK:
        first = today - timedelta(days=today.weekday())
        after = first + timedelta(days=7)
    else:
        day = first_day if kind is WindowKind.FISCAL_MONTH else 1
        first = today.replace(day=day)
        if first > today:
            first = (first.replace(day=1) - timedelta(days=1)).replace(day=day)
        after = (first.replace(day=1) + timedelta(days=32)).replace(day=day)
    return _midnight_us(first, zone), _midnight_us(after, zone)


def _midnight_us(day: date, zone: ZoneInfo) -> int:
    """First instant of a local day.

    ``fold=0`` takes the first of two midnights; for one in a gap it takes the offset from before
    the gap, which names the instant of the change.
    """
    local = datetime(day.year, day.month, day.day, tzinfo=zone)
    return (local.astimezone(UTC) - _EPOCH) // timedelta(microseconds=1)


_MOST: dict[tuple[WindowKind, WindowKind], int] = {
    (WindowKind.HOUR, WindowKind.DAY): 25,
    (WindowKind.HOUR, WindowKind.WEEK): 169,
    (WindowKind.HOUR, WindowKind.MONTH): 745,
    (WindowKind.HOUR, WindowKind.FISCAL_MONTH): 745,
    (WindowKind.DAY, WindowKind.WEEK): 7,
    (WindowKind.DAY, WindowKind.MONTH): 31,
    (WindowKind.DAY, WindowKind.FISCAL_MONTH): 31,
}


def most_windows(inner: tuple[str, str, int], outer: tuple[str, str, int]) -> int | None:
    """How many windows of one span can touch one window of another; ``None`` where it is longer.

    Args:
        inner: Kind, time zone and first day.
        outer: The same, of the window that shall hold them.
    """
    if inner == outer:
        return 1
    kinds = WindowKind(inner[0]), WindowKind(outer[0])
    months = {WindowKind.MONTH, WindowKind.FISCAL_MONTH}
    if kinds[0] is kinds[1] or set(kinds) <= months:
        return 2  # they begin at other times
    if kinds[0] is WindowKind.WEEK and kinds[1] in months:
        return 6
    most = _MOST.get(kinds)
    if most is None:
        return None
    return most if inner[1] == outer[1] else most + 1
