"""Budget windows: from when to when a budget counts.

Pure calendar arithmetic over ``zoneinfo``. Windows of one kind and zone tile time: each instant
lies in exactly one, also where a clock is put forward or back, and where a zone skips a day.

- ``hour``: a full hour of UTC, whatever the zone: an hour that is repeated in autumn would
  otherwise be two, or one of two hours' length.
- ``day``, ``week`` (from Monday), ``month``: from local midnight to local midnight, so that a day
  has 23 or 25 hours when the clock changes. A midnight that does not exist begins at the change.
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


def window_at(kind: str, tz: str, now_us: int) -> tuple[int, int]:
    """The window that an instant lies in.

    Args:
        kind: A ``WindowKind``.
        tz: Name of a time zone (IANA).
        now_us: Microseconds since 1970 UTC.

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
        first = today.replace(day=1)
        after = (first + timedelta(days=32)).replace(day=1)
    return _midnight_us(first, zone), _midnight_us(after, zone)


def _midnight_us(day: date, zone: ZoneInfo) -> int:
    """First instant of a local day.

    ``fold=0`` takes the first of two midnights; for one in a gap it takes the offset from before
    the gap, which names the instant of the change.
    """
    local = datetime(day.year, day.month, day.day, tzinfo=zone)
    return (local.astimezone(UTC) - _EPOCH) // timedelta(microseconds=1)
