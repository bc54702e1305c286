"""A small audit trail with known answers: written record by record, sealed where a test says so.

Parquet is written here, from ``COLUMNS``, and not by the sealer: readers are held against the
layout that is promised, whoever wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from governance.audit.canonical import NO_HASH, canonical_bytes, complete, leaf_hash
from governance.audit.record import check_record
from governance.audit.schema import COLUMNS, FINDING_FIELDS, PART_FIELDS, Kind
from governance.audit.ulid import new_ulid

Record = dict[str, Any]

_ARROW = {
    Kind.U16: pa.uint16(),
    Kind.U32: pa.uint32(),
    Kind.U64: pa.uint64(),
    Kind.I16: pa.int16(),
    Kind.I32: pa.int32(),
    Kind.I64: pa.int64(),
    Kind.BOOL: pa.bool_(),
    Kind.TEXT: pa.string(),
    Kind.ENUM: pa.dictionary(pa.int32(), pa.string()),
    Kind.HEX32: pa.binary(32),
    Kind.TEXTS: pa.list_(pa.string()),
}
for _kind, _fields in ((Kind.PARTS, PART_FIELDS), (Kind.FINDINGS, FINDING_FIELDS)):
    _ARROW[_kind] = pa.list_(pa.struct([(name, _ARROW[inner]) for name, inner, _ in _fields]))
SCHEMA = pa.schema([pa.field(c.name, _ARROW[c.kind], nullable=not c.required) for c in COLUMNS])


def us(text: str) -> int:
    """A time in UTC as microseconds."""
    moment = datetime.fromisoformat(text).replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    return moment.days * 86_400_000_000 + moment.seconds * 1_000_000 + moment.microseconds


def packed(column: Kind, value: Any) -> Any:
    """A value of a record as Parquet has it."""
    if value is None:
        return None
    if column is Kind.HEX32:
        return bytes.fromhex(value)
    if column is Kind.PARTS:
        return [{**part, "commit": bytes.fromhex(part["commit"])} for part in value]
    return value


class Trail:
    """Writers, their records, and what of them is sealed.

    Args:
        root: Folder for ``evidence`` and ``state``.
    """

    def __init__(self, root: Path) -> None:
        self.evidence = root / "evidence"
        self.state = root / "state"
        (self.evidence / "audit").mkdir(parents=True)
        (self.state / "wal").mkdir(parents=True)
        self.records: list[Record] = []
        self._open: list[Record] = []

    def write(self, event_type: str, at: str, *, writer: str = "gw-1", **values: Any) -> Record:
        """Add a record to the chain of a writer."""
        before = [r for r in self.records if r["writer_id"] == writer]
        record = complete(
            {
                "schema_version": 1,
                "event_id": new_ulid(us(at)),
                "event_type": event_type,
                "ts_us": us(at),
                "writer_id": writer,
                "writer_epoch": 1,
                "writer_seq": len(before) + 1,
                "prev_hash": before[-1]["leaf_hash"] if before else NO_HASH,
                **values,
            }
        )
        record["leaf_hash"] = leaf_hash(canonical_bytes(record))
        check_record(record)
        self.records.append(record)
        self._open.append(record)
        return record

    def unsealed(self) -> Iterator[Record]:
        """What the logs would give."""
        return iter([*self._open])

    def seal(self, *, delete: bool = True, columns: list[str] | None = None) -> list[Path]:
        """Put what is not sealed into files: a segment a writer, a file each of its days.

        Args:
            delete: Whether the logs then lose it.
            columns: Columns to write, for files of an older version.
        """
        paths = []
        ordered = sorted(self._open, key=lambda r: (r["writer_id"], r["writer_seq"]))
        for writer, records in groupby(ordered, key=lambda r: r["writer_id"]):
            segment = list(records)
            first, last = segment[0]["writer_seq"], segment[-1]["writer_seq"]
            for day in sorted({_day(record) for record in segment}):
                rows = [record for record in segment if _day(record) == day]
                folder = self.evidence / "audit" / f"dt={day}"
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{writer}-1-{first}-{last}.parquet"
                pq.write_table(_table(rows).select(columns or SCHEMA.names), path)
                paths.append(path)
        if delete:
            self._open.clear()
        return paths


def _table(rows: list[Record]) -> pa.Table:
    arrays = [
        pa.array([packed(c.kind, row[c.name]) for row in rows], _value_type(c.kind))
        for c in COLUMNS
    ]
    cast = [array.cast(field.type) for array, field in zip(arrays, SCHEMA, strict=True)]
    return pa.table(cast, schema=SCHEMA)


def _day(record: Record) -> str:
    return f"{datetime.fromtimestamp(record['ts_us'] // 1_000_000, UTC):%Y-%m-%d}"


def _value_type(kind: Kind) -> pa.DataType:
    return pa.string() if kind is Kind.ENUM else _ARROW[kind]


def sample(trail: Trail) -> None:
    """Two days of a small house; answers to it are worked out by hand in ``test_audit_views``."""
    hr: dict[str, Any] = {
        "subject_key": "s-anna",
        "principal_kind": "user",
        "department": "hr",
        "auth_method": "oidc",
        "roles": ["analyst"],
        "operation": "chat",
    }
    research = {**hr, "subject_key": "s-ben", "department": "research", "roles": ["scientist"]}
    trail.write("writer.started", "2026-11-24 09:00:00", principal_kind="system")

    def admit(request: str, at: str, who: dict[str, Any], model: str) -> str:
        made = trail.write(
            "inference.decided",
            at,
            **who,
            request_id=request,
            decision_id=f"dec-{request}",
            reservation_id=f"rsv-{request}",
            budget_account=who["department"],
            request_model=model,
            route_target="internal",
            decision="allow",
            rule_ids=["staff"],
            policy_digest="ab" * 32,
            prompt_commit="cd" * 32,
            prompt_bytes=420,
        )
        return str(made["event_id"])

    def end(request: str, at: str, who: dict[str, Any], model: str, **values: Any) -> None:
        trail.write(
            "inference.completed",
            at,
            **who,
            request_id=request,
            reservation_id=f"rsv-{request}",
            budget_account=who["department"],
            request_model=model,
            response_model=model,
            **values,
        )

    # r1: as it should be.
    parent = admit("r1", "2026-11-24 10:00:00", hr, "small")
    end(
        "r1", "2026-11-24 10:00:00", hr, "small", parent_event_id=parent,
        ts_end_us=us("2026-11-24 10:00:02"), outcome="completed", status=200, finish_reason="stop",
        input_tokens=100, cached_tokens=20, output_tokens=30, ttft_us=500_000, latency_us=2_000_000,
        queue_us=10_000, gpu_us=400_000, charged_us=400_000, gpu_us_method="step_split",
        response_commit="ef" * 32, response_bytes=130, replica_id="rep-a",
        model_revision="sha256:" + "12" * 32,
    )  # fmt: skip
    # r2: its gateway died; the sealer ended it, the ledger settled it.
    parent = admit("r2", "2026-11-24 10:30:00", hr, "large")
    trail.write(
        "inference.aborted", "2026-11-24 10:30:00", writer="sealer-1", **hr, request_id="r2",
        reservation_id="rsv-r2", budget_account="hr", request_model="large", outcome="aborted",
        parent_event_id=parent, ts_end_us=us("2026-11-24 10:30:40"),
    )  # fmt: skip
    trail.write(
        "usage.settled", "2026-11-24 10:31:00", writer="ledger-1", principal_kind="system",
        request_id="r2", reservation_id="rsv-r2", department="hr", budget_account="hr",
        response_model="large", input_tokens=200, output_tokens=50, gpu_us=3_000_000,
        charged_us=6_000_000, gpu_us_method="step_split", replica_id="rep-b",
    )  # fmt: skip
    # r3: its client hung up; the engine knew more, and its account was written twice.
    admit("r3", "2026-11-24 11:00:00", research, "small")
    end(
        "r3", "2026-11-24 11:00:00", research, "small", ts_end_us=us("2026-11-24 11:00:05"),
        outcome="aborted", status=499, input_tokens=60, output_tokens=10, ttft_us=1_000_000,
        latency_us=5_000_000, charged_us=1_000_000, gpu_us=1_000_000, gpu_us_method="pending",
    )  # fmt: skip
    for _ in range(2):
        trail.write(
            "usage.settled", "2026-11-24 11:00:06", writer="ledger-1", principal_kind="system",
            request_id="r3", reservation_id="rsv-r3", department="research",
            budget_account="research", response_model="small", input_tokens=60, output_tokens=40,
            gpu_us=2_000_000, charged_us=2_500_000, gpu_us_method="step_split",
        )  # fmt: skip
    # Refused: by two rules, by the budget although rules allowed it, and before anybody was known.
    for request, at in (("r4", "2026-11-24 12:00:00"), ("r5", "2026-11-24 12:01:00")):
        trail.write(
            "inference.refused", at, **hr, request_id=request, request_model="large",
            decision="block", rule_ids=["no-large", "no-hr"], outcome="refused", status=403,
            error_code="blocked_by_policy", ts_end_us=us(at) + 1000,
        )  # fmt: skip
    trail.write(
        "inference.refused", "2026-11-24 12:02:00", **research, request_id="r6",
        request_model="small", decision="allow", rule_ids=["staff"], outcome="refused", status=429,
        error_code="budget_exhausted", ts_end_us=us("2026-11-24 12:02:00") + 1000,
    )  # fmt: skip
    trail.write(
        "inference.refused", "2026-11-24 12:03:00", request_id="r7", outcome="refused", status=401,
        error_code="invalid_credential", ts_end_us=us("2026-11-24 12:03:00") + 1000,
    )  # fmt: skip
    # r11: admitted, and cut short by the budget.
    admit("r11", "2026-11-24 13:00:00", research, "small")
    end(
        "r11", "2026-11-24 13:00:00", research, "small", ts_end_us=us("2026-11-24 13:00:01"),
        outcome="refused", status=429, error_code="budget_exhausted", input_tokens=10,
        output_tokens=10, ttft_us=500_000, latency_us=1_000_000, gpu_us=50_000, charged_us=50_000,
        gpu_us_method="step_split", decision="allow", rule_ids=["staff"],
    )  # fmt: skip
    # r8: over midnight, on an engine that does not meter.
    admit("r8", "2026-11-24 23:59:58", hr, "small")
    trail.write(
        "meter.interval", "2026-11-24 09:00:00", writer="ledger-1", principal_kind="system",
        **meter("rep-a", "2026-11-24 09:00:10", elapsed_us=10_000_000, busy_us=6_000_000,
                attributed_us=5_500_000, unattributed_us=500_000, idle_us=4_000_000),
    )  # fmt: skip
    for at, writer in (("2026-11-24 09:00:10", "ledger-1"), ("2026-11-24 09:00:10", "ledger-2")):
        # Written again by the ledger's next start, which could not know.
        trail.write(
            "meter.interval", at, writer=writer, principal_kind="system",
            **meter("rep-a", "2026-11-24 09:00:20", elapsed_us=10_000_000, busy_us=2_000_000,
                    attributed_us=2_000_000, unattributed_us=0, idle_us=8_000_000),
        )  # fmt: skip
    trail.write(
        "engine.lost", "2026-11-24 09:00:20", writer="ledger-1", principal_kind="system",
        response_model="small-base", replica_id="rep-a", entity_type="replica", entity_id="rep-a",
        reason_code="dead", detail='{"running":1,"unattributed_us":500000}',
    )  # fmt: skip
    trail.write(
        "budget.loaded", "2026-11-24 09:00:00", writer="ledger-1", principal_kind="system",
        entity_type="budgets", entity_id="d" * 64, detail="{}",
    )  # fmt: skip


def today(trail: Trail) -> None:
    """The second day; usually what is not sealed yet."""
    hr = {"principal_kind": "user", "department": "hr", "subject_key": "s-anna"}
    trail.write(
        "inference.completed", "2026-11-24 23:59:58", **hr, request_id="r8",
        reservation_id="rsv-r8", budget_account="hr", request_model="small",
        response_model="small", ts_end_us=us("2026-11-25 00:00:03"), outcome="completed",
        status=200, input_tokens=10, output_tokens=5, ttft_us=100_000, latency_us=5_000_000,
        gpu_us_method="none",
    )  # fmt: skip
    research = {"principal_kind": "user", "department": "research", "subject_key": "s-ben"}
    for request in ("r9", "r10"):
        trail.write(
            "inference.decided", "2026-11-25 09:00:00", **research, request_id=request,
            reservation_id=f"rsv-{request}", budget_account="research", request_model="large",
            decision="allow", rule_ids=["staff"],
        )  # fmt: skip
    trail.write(
        "inference.completed", "2026-11-25 09:00:00", **research, request_id="r9",
        reservation_id="rsv-r9", budget_account="research", request_model="large",
        response_model="large", ts_end_us=us("2026-11-25 09:00:01"), outcome="failed", status=500,
        error_code="engine_failed", input_tokens=10, latency_us=1_000_000, gpu_us=100_000,
        charged_us=200_000, gpu_us_method="step_split",
    )  # fmt: skip
    trail.write(
        "engine.lost", "2026-11-25 09:00:01", writer="ledger-1", principal_kind="system",
        response_model="large-base", replica_id="rep-b", entity_type="replica", entity_id="rep-b",
        reason_code="silent",
        detail=json.dumps({"accelerator": "H100", "unattributed_us": 1_500_000, "running": 2}),
    )  # fmt: skip
    trail.write(
        "meter.interval", "2026-11-25 09:00:00", writer="ledger-1", principal_kind="system",
        response_model="large-base", replica_id="rep-b", entity_type="replica", entity_id="rep-b",
        detail="{", ts_end_us=us("2026-11-25 09:00:10"),
    )  # fmt: skip
    for _ in range(2):
        trail.write(
            "budget.set", "2026-11-25 10:00:00", writer="ledger-1", subject_key="s-olga",
            operation="budget.set", entity_type="budget", entity_id="hr", state="set",
            reason_code="quarter end", due_us=us("2026-11-26 10:00:00"),
            detail='{"gpu_us":90000000,"tokens":null}',
        )  # fmt: skip


def meter(replica: str, end: str, **figures: int) -> dict[str, Any]:
    """Columns of a metering interval."""
    return {
        "replica_id": replica,
        "response_model": "small-base",
        "entity_type": "replica",
        "entity_id": replica,
        "ts_end_us": us(end),
        "detail": json.dumps({"accelerator": "H100", "devices": 1, **figures}, sort_keys=True),
    }
