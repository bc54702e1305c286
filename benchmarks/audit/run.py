"""What the audit trail costs: ``python -m benchmarks.audit.run``.

- ``write_rate``: durable records a second, and the time each waits, with 16, 64 and 256 callers
  that each write the next record once the last is acknowledged. Goal: 10,000 records a second with
  p99 at most 25 ms at 256.
- ``turn_cost``: CPU of the whole process, and wall time, for one request: two records, one prompt
  of 2 KiB and one answer of 4 KiB, encrypted. Goal: 100 us of CPU.
- ``seal_rate``: records a second from segments to Parquet, manifest and deletion. Goal: 20,000.

Every record has the columns of a real request. Times are of this machine as it is; the load average
stands beside them, because other work on it can only make them worse. What the disk does with a
sync decides over latency: ``sync_us`` is the median of a 4 KiB write and ``fdatasync`` of it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from governance.audit import content, keystore, seal, turns
from governance.audit.keystore import FileKeystore
from governance.audit.seal import Sealer
from governance.audit.turn_record import decided_event
from governance.audit.turns import TurnAudit
from governance.audit.ulid import new_ulid
from governance.audit.writer import AuditWriter, WalOptions
from governance.types import (
    Amount,
    Decision,
    Effect,
    InferenceRequest,
    Inspection,
    ModelInfo,
    Operation,
    Outcome,
    Principal,
    PrincipalKind,
    Reservation,
    Route,
    Turn,
    Usage,
)

RESULTS = Path(__file__).parent / "results" / "audit.json"
GOALS = {
    "records_per_s": 10_000,
    "p99_ms_at_256": 25.0,
    "turn_cpu_us": 100.0,
    "sealed_per_s": 20_000,
}
_WORDS = sorted(set(" ".join(m.__doc__ or "" for m in (content, keystore, turns, seal)).split()))
# Words in no order, not a sentence again and again: deflating prose costs eight times as much.
PROMPT = " ".join(random.Random(1).choices(_WORDS, k=500))[:2048]
EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"small",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'
)


def _now_us() -> int:
    return time.time_ns() // 1000


def _turn(index: int) -> Turn:
    """A turn as the request path hands it over."""
    turn = Turn(f"req_{index:026d}", f"dec_{index:026d}", _now_us(), Operation.CHAT)
    turn.notes["trace_id"] = f"{index:032x}"
    turn.principal = Principal(
        kind=PrincipalKind.USER,
        subject="s",
        issuer="entra",
        department=f"department-{index % 8}",
        roles=frozenset({"analyst", "employee"}),
        key=f"{index % 64:064x}",
        tenant_id="8a1f6a1e-0000-4000-8000-000000000000",
        client_id="8a1f6a1e-0000-4000-8000-000000000001",
        key_id="kid",
        token_hash="ab" * 32,
    )
    body = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0.7}
    turn.request = InferenceRequest(
        Operation.CHAT, "small", body, stream=True, include_usage=True, max_tokens=256
    )
    turn.input_inspection = Inspection("none")
    turn.decision = Decision(Effect.ALLOW, ("analysts",), "cd" * 32)
    model = ModelInfo("small", "small", frozenset({Operation.CHAT}), 8192, "small")
    turn.route = Route(model, "named")
    turn.reservation = Reservation(f"rsv_gw_{index}", "hr", Amount(90_000, 300))
    turn.body = orjson.dumps({"model": "small", **body})
    return turn


def write_rate(folder: Path, in_flight: int, records: int = 20_000) -> dict[str, Any]:
    """Durable records a second and their latency, for a number of concurrent callers."""
    return asyncio.run(_write_rate(folder, in_flight, records))


async def _write_rate(folder: Path, in_flight: int, records: int) -> dict[str, Any]:
    writer = AuditWriter.open(folder, f"bench-{in_flight}", clock=_now_us)
    template = decided_event(_turn(1), "")
    template.pop("event_id")
    waited: list[float] = []

    async def caller() -> None:
        for _ in range(records // in_flight):
            start = time.perf_counter()
            await writer.write(template)
            waited.append(time.perf_counter() - start)

    cpu, start = time.process_time(), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(in_flight)))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    await writer.close()
    return {
        "in_flight": in_flight,
        "records": len(waited),
        "records_per_s": round(len(waited) / seconds),
        "p50_ms": round(_percentile(waited, 50) * 1e3, 2),
        "p99_ms": round(_percentile(waited, 99) * 1e3, 2),
        "cpu_us_per_record": round(cpu / len(waited) * 1e6, 1),
        "records_per_sync": round(writer.stats.records / writer.stats.syncs, 1),
        "bytes_per_record": writer.stats.bytes // writer.stats.records,
    }


def turn_cost(folder: Path, in_flight: int = 64, turns: int = 5_000) -> dict[str, Any]:
    """CPU and wall time for the audit of one request: two records, two cells."""
    return asyncio.run(_turn_cost(folder, in_flight, turns))


async def _turn_cost(folder: Path, in_flight: int, turns: int) -> dict[str, Any]:
    writer = AuditWriter.open(folder / "wal", "bench-turns", clock=_now_us)
    audit = TurnAudit(writer, FileKeystore(folder / "keys", clock=_now_us), _now_us)
    answer = EVENT * (4096 // len(EVENT))
    for index in range(64):  # Keys of all subjects exist; making one is a matter of a month.
        await _run_turn(audit, _turn(index), answer)
    made = [_turn(index) for index in range(turns)]
    gc.freeze()  # They are this program's: a gateway does not have thousands of turns waiting.
    waited: list[float] = []

    async def caller() -> None:
        while made:
            start = time.perf_counter()
            await _run_turn(audit, made.pop(), answer)
            waited.append(time.perf_counter() - start)

    cpu, start = time.process_time(), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(in_flight)))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    gc.unfreeze()
    await audit.close()
    await writer.close()
    return {
        "in_flight": in_flight,
        "turns": turns,
        "turns_per_s": round(turns / seconds),
        "cpu_us_per_turn": round(cpu / turns * 1e6, 1),
        "p50_ms": round(_percentile(waited, 50) * 1e3, 2),
        "p99_ms": round(_percentile(waited, 99) * 1e3, 2),
        "wal_bytes_per_turn": writer.stats.bytes // turns,
    }


async def _run_turn(audit: TurnAudit, turn: Turn, answer: bytes) -> None:
    await audit.decided(turn)
    audit.output(turn, answer)
    turn.accepted_us = turn.first_chunk_us = turn.ended_us = _now_us()
    turn.usage, turn.gpu_us, turn.charged = Usage(400, 60, 0), 40_000, Amount(80_000, 460)
    turn.outcome, turn.status, turn.finish_reason = Outcome.COMPLETED, 200, "stop"
    turn.sent_bytes = len(answer)
    await audit.completed(turn)


def seal_rate(folder: Path, records: int = 40_000) -> dict[str, Any]:
    """Records a second from closed segments to evidence."""
    writer = AuditWriter.open(folder / "wal", "bench-seal", clock=_now_us)
    for index in range(records):
        event = decided_event(_turn(index % 500), new_ulid(_now_us()))
        event["event_type"] = "inference.refused"  # Nothing stays open.
        if index % 500 == 499:
            writer.write_blocking(event)
        else:
            writer.post(event)
    writer.close_blocking()
    sealer = Sealer(folder / "wal", folder / "evidence", _now_us, options=WalOptions())
    cpu, start = time.process_time(), time.perf_counter()
    report = sealer.seal_once()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    sealer.close()
    size = sum(path.stat().st_size for path in (folder / "evidence").rglob("*.parquet"))
    return {
        "records": report.records,
        "segments": report.segments,
        "sealed_per_s": round(report.records / seconds),
        "cpu_us_per_record": round(cpu / report.records * 1e6, 1),
        "parquet_bytes_per_record": round(size / report.records, 1),
        "faults": len(report.faults),
    }


def sync_us(folder: Path, rounds: int = 100) -> float:
    """Median microseconds of a 4 KiB write and its ``fdatasync`` into a file that is there."""
    path = folder / "sync"
    path.write_bytes(bytes(1 << 20))
    taken = []
    descriptor = os.open(path, os.O_RDWR)
    try:
        for index in range(rounds):
            start = time.perf_counter()
            os.pwrite(descriptor, bytes([index]) * 4096, index * 4096)
            os.fdatasync(descriptor)
            taken.append((time.perf_counter() - start) * 1e6)
    finally:
        os.close(descriptor)
    return round(_percentile(taken, 50), 1)


def _percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def run(folder: Path) -> dict[str, Any]:
    """All measurements in a folder of their own each."""

    def inside(name: str, measure: Callable[..., Any], *args: Any) -> Any:
        place = folder / name
        place.mkdir(parents=True)
        return measure(place, *args)

    return {
        "sync_us": inside("sync", sync_us),
        "write_rate": [inside(f"write-{n}", write_rate, n) for n in (16, 64, 256)],
        "turn_cost": inside("turns", turn_cost),
        "seal_rate": inside("seal", seal_rate),
        "goals": GOALS,
        "load_average": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("orjson", "pyarrow", "cryptography")},
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description="What the audit trail costs.")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: temporary)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = run(Path(folder))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
