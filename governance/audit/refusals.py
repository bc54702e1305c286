"""How much refused requests may write: who cannot be served must not fill the disk.

Every caller has allowances of its own, as token buckets: records, cells and bytes of content.
Without a caller there is one allowance of records for the whole gateway, and no content. What is
beyond an allowance of records is counted, and the caller's next record carries the count; what is
beyond one of content is recorded without it, and the record says so. Memory is bounded: of more
than ``CALLERS`` callers, the longest quiet one is forgotten, and its count goes to the callers
without a name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from governance.audit.schema import EventType
from governance.ports import Clock
from governance.types import Principal

ANONYMOUS_PER_S: Final = 50
"""Records a second, and at once, of all refusals without a caller."""
RECORDS_PER_S: Final = 50
"""Records of refusals a second, and at once, of one caller."""
CELLS_PER_S: Final = 10
"""Refused requests a second, and at once, whose content is kept, of one caller."""
CONTENT_BYTES_PER_S: Final = 1 << 20
CONTENT_BURST_BYTES: Final = 8 << 20
"""Content of refused requests that one caller may leave at once. A larger request is kept when the
allowance is full, and is paid off."""
CALLERS: Final = 4096
_MILLION: Final = 1_000_000


@dataclass(slots=True)
class Bucket:
    """A token bucket in whole numbers."""

    per_s: int
    burst: int
    at_us: int
    level: int = -1
    """Millionths of a token; may be negative, for what was larger than the burst."""

    def __post_init__(self) -> None:
        self.level = self.burst * _MILLION

    def has(self, amount: int, now_us: int) -> bool:
        """Whether there is enough; a full bucket is enough for anything."""
        gained = max(0, now_us - self.at_us) * self.per_s
        self.at_us = now_us
        self.level = min(self.burst * _MILLION, self.level + gained)
        return self.level >= min(amount, self.burst) * _MILLION

    def take(self, amount: int, now_us: int) -> bool:
        """Take, if there is enough."""
        if not self.has(amount, now_us):
            return False
        self.level -= amount * _MILLION
        return True


@dataclass(slots=True)
class Caller:
    """Allowances of one caller, or of all without one."""

    principal: Principal | None
    records: Bucket
    cells: Bucket
    content: Bucket
    suppressed: int = 0
    """Refusals that no record has counted yet."""

    def keeps(self, size_bytes: int, now_us: int) -> bool:
        """Take an allowance of content, if there is enough."""
        if not self.cells.has(1, now_us) or not self.content.take(size_bytes, now_us):
            return False
        return self.cells.take(1, now_us)


@dataclass(slots=True)
class Refusals:
    """All allowances of one gateway. Used from one thread."""

    clock: Clock
    _named: OrderedDict[str, Caller] = field(default_factory=OrderedDict)
    _nobody: Caller = field(init=False)

    def __post_init__(self) -> None:
        self._nobody = _caller(None, ANONYMOUS_PER_S, self.clock())

    @property
    def suppressed(self) -> int:
        """Refusals that no record has counted yet."""
        return sum(caller.suppressed for caller in self._all())

    def caller(self, principal: Principal | None) -> Caller:
        """Whose allowances a refusal uses."""
        if principal is None:
            return self._nobody
        caller = self._named.get(principal.key)
        if caller is None:
            caller = self._named[principal.key] = _caller(principal, RECORDS_PER_S, self.clock())
            if len(self._named) > CALLERS:
                _key, forgotten = self._named.popitem(last=False)
                self._nobody.suppressed += forgotten.suppressed
        else:
            self._named.move_to_end(principal.key)
        return caller

    def due(self, *, all_of_them: bool = False) -> Iterator[tuple[Caller, dict[str, Any]]]:
        """Records that only carry a count, of those whose allowance has a record again."""
        for caller in self._all():
            if caller.suppressed and (all_of_them or caller.records.take(1, self.clock())):
                yield caller, self._counted(caller)

    def _all(self) -> list[Caller]:
        return [self._nobody, *self._named.values()]

    def _counted(self, caller: Caller) -> dict[str, Any]:
        principal = caller.principal
        who: dict[str, Any] = {"auth_method": "none", "status": 401}
        if principal is not None:
            who = {
                "subject_key": principal.key,
                "principal_kind": principal.kind.value,
                "issuer": principal.issuer,
                "department": principal.department,
            }
        return {
            **who,
            "event_type": EventType.REFUSED.value,
            "ts_us": self.clock(),
            "outcome": "refused",
            "reason_code": "suppressed",
            "detail": f'{{"suppressed":{caller.suppressed}}}',
        }


def _caller(principal: Principal | None, per_s: int, now_us: int) -> Caller:
    return Caller(
        principal,
        Bucket(per_s, per_s, now_us),
        Bucket(CELLS_PER_S, CELLS_PER_S, now_us),
        Bucket(CONTENT_BYTES_PER_S, CONTENT_BURST_BYTES, now_us),
    )
