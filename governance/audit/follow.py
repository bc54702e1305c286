"""What is new in the trail: its last events, and then those that follow.

A follower remembers, for each writer, how far it has read. Each look reads the logs first and the
sealed files after, as ``governance.audit.query`` does, so an event is given once, whether it is
found in a log or was sealed in between. Events of one look come in the order in which they ended;
an event that becomes visible later, from another writer, comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from governance.audit.reading import OnFault, read_logs, read_sealed, sealed_files
from governance.audit.record import check_record

Record = dict[str, Any]
"""Every column; hashes as hex text."""
Place = tuple[str, int, int]
"""Writer, epoch and place in the chain."""


class Follower:
    """Reads a trail as it grows.

    Args:
        evidence: Root of the evidence.
        state: Root of the state.
        wanted: Which events to give.
        on_fault: Told what cannot be read.
    """

    def __init__(
        self,
        evidence: Path,
        state: Path,
        wanted: Callable[[Record], bool] = lambda record: True,
        on_fault: OnFault = lambda said: None,
    ) -> None:
        self._evidence = evidence
        self._state = state
        self._wanted = wanted
        self._on_fault = on_fault
        self._seen: dict[tuple[str, int], int] = {}
        """Last place that was read, by writer and epoch."""
        self._told: set[str] = set()

    def last(self, count: int) -> list[Record]:
        """The last events there are; call it once, before ``new``."""
        found = self._logged()
        files = sealed_files(self._evidence)
        for file in files:
            chain = file.writer_id, file.writer_epoch
            self._seen[chain] = max(file.last_seq, self._seen.get(chain, 0))
        kept = {key: record for key, record in found.items() if self._wanted(record)}
        for _day, group in groupby(reversed(files), key=lambda file: file.day):
            if len(kept) >= count:
                break
            sealed = (record for file in group for record in read_sealed(file, 0))
            kept |= {_place(record): record for record in sealed if self._wanted(record)}
        self._mark(found)
        return sorted(kept.values(), key=_ended)[-count:] if count else []

    def new(self) -> list[Record]:
        """What came since the last look."""
        found = self._logged()
        for file in sealed_files(self._evidence):
            after = self._seen.get((file.writer_id, file.writer_epoch), 0)
            if file.last_seq > after:
                found |= {_place(record): record for record in read_sealed(file, after)}
        # NOTE: not before all were read: a segment that runs over midnight makes several files.
        self._mark(found)
        return sorted((r for r in found.values() if self._wanted(r)), key=_ended)

    def _logged(self) -> dict[Place, Record]:
        """Records of the logs that were not seen before."""
        found = {}
        for record in read_logs(self._state, self._fault):
            try:
                check_record(record)
            except (ValueError, TypeError) as error:
                self._fault(f"a record in the logs is left out: {error}")
                continue
            writer, epoch, seq = place = _place(record)
            if seq > self._seen.get((writer, epoch), 0):
                found[place] = record
        return found

    def _mark(self, found: Iterable[Place]) -> None:
        for writer, epoch, seq in found:
            self._seen[writer, epoch] = max(seq, self._seen.get((writer, epoch), 0))

    def _fault(self, said: str) -> None:
        """Each fault once: it is there at every look."""
        if said not in self._told:
            self._told.add(said)
            self._on_fault(said)


def _place(record: Record) -> Place:
    return record["writer_id"], record["writer_epoch"], record["writer_seq"]


def _ended(record: Record) -> tuple[int, str]:
    return record["ts_end_us"] or record["ts_us"], record["event_id"]
