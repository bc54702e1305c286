"""One line in the log for each request that ended: what it was, how it ended, what it took.

A line through ``logging`` and Serve's filters costs 80 µs, most of it for the file. So lines are
made here, collected, and written together once a second with one write to the same file, in the
same format; the fields that Serve adds to each line of a replica are learnt once. Of a process
that is killed the last second is missing: the audit trail is the record, this is for reading along.

Never content, and no names: departments and models, not subjects.
"""

from __future__ import annotations

import logging
import logging.handlers
import time
from typing import Any

import orjson

from governance.types import Turn

log = logging.getLogger("gatehouse.access")

MESSAGE = "request completed"
MAX_LINES = 2000
"""Lines that wait; at this number they are written at once."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "request_id",
    "serve_request_id",
    "decision_id",
    "reservation_id",
    "trace_id",
    "route",
    # The actor's current task in Ray; whatever ran when the fields were learnt.
    "task_id",
    "task_name",
    "task_func_name",
    "job_id",
}


def fields(turn: Turn, model: str) -> dict[str, Any]:
    """What the line of a turn says.

    Args:
        turn: Has ended.
        model: As in metrics: a model of this platform, or ``none``.
    """
    stages = turn.stage_us
    first_us = max(0, turn.first_chunk_us - turn.started_us) if turn.first_chunk_us else None
    line: dict[str, Any] = {
        "request_id": turn.request_id,
        "decision_id": turn.decision_id,
        "operation": turn.operation,
        "model": model,
        "department": turn.principal.department if turn.principal else None,
        "status": turn.status,
        "outcome": turn.outcome,
        "code": turn.error_code,
        "total_us": sum(stages.values()),
        "first_chunk_us": first_us,
        "stage_us": stages,
    }
    if turn.reservation is not None:
        line["reservation_id"] = turn.reservation.id
    if turn.replica_id is not None:
        line["engine_replica"] = turn.replica_id
    if (usage := turn.usage) is not None:
        line["prompt_tokens"] = usage.prompt_tokens
        line["cached_tokens"] = usage.cached_tokens
        line["completion_tokens"] = usage.completion_tokens
    if turn.gpu_us is not None:
        line["gpu_us"] = turn.gpu_us
    if turn.charged is not None:
        line["charged_gpu_us"] = turn.charged.gpu_us
    if "trace_id" in turn.notes:
        line["trace_id"] = turn.notes["trace_id"]
    return line


class AccessLog:
    """Collects lines and writes them to the log of the replica.

    Args:
        logger: Whose handlers to write to: every ``MemoryHandler`` with a target, which is how
            Serve keeps the file of a replica. Without one the lines go through ``logging``.
    """

    def __init__(self, logger: logging.Logger = log) -> None:
        self._logger = logger
        self._enabled = logger.isEnabledFor(logging.INFO)
        self._pid = logging.LogRecord("", 0, "", 0, "", (), None).process
        self._lines: list[bytes] = []
        self._common: dict[str, Any] = {}
        self._file: logging.Handler | None = None
        self._second = 0
        self._second_text = ""
        for handler in _handlers(logger):
            if isinstance(handler, logging.handlers.MemoryHandler) and handler.target:
                self._file = handler.target
                self._common = _common(handler)
                _take_ready_lines(handler.target)
                break

    def ended(self, turn: Turn, model: str) -> None:
        """Note the line of a turn."""
        if not self._enabled:
            return
        if self._file is None:
            self._logger.info(MESSAGE, extra=fields(turn, model))
            return
        now_ns = time.time_ns()
        line = {
            "asctime": self._time(now_ns),
            "levelname": "INFO",
            "message": MESSAGE,
            "process": self._pid,
            **self._common,
            **fields(turn, model),
            "timestamp_ns": now_ns,
        }
        self._lines.append(orjson.dumps(line))
        if len(self._lines) >= MAX_LINES:
            self.flush()

    def flush(self) -> None:
        """Write the lines that wait."""
        if not self._lines or self._file is None:
            return
        lines, self._lines = self._lines, []
        record = logging.LogRecord(self._logger.name, logging.INFO, "", 0, MESSAGE, (), None)
        record.ready_line = b"\n".join(lines).decode()
        self._file.handle(record)

    def _time(self, now_ns: int) -> str:
        """As ``logging`` writes it; the part up to the second is kept."""
        second, rest = divmod(now_ns, 1_000_000_000)
        if second != self._second:
            self._second = second
            self._second_text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        return f"{self._second_text},{rest // 1_000_000:03d}"


class _ReadyLines(logging.Formatter):
    """Writes what is a finished line already as it is, and leaves the rest to another formatter."""

    def __init__(self, other: logging.Formatter | None) -> None:
        super().__init__()
        self._other = other or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter.format``."""
        ready: str | None = getattr(record, "ready_line", None)
        return self._other.format(record) if ready is None else ready


def _take_ready_lines(target: logging.Handler) -> None:
    if not isinstance(target.formatter, _ReadyLines):
        target.setFormatter(_ReadyLines(target.formatter))


def _handlers(logger: logging.Logger) -> list[logging.Handler]:
    """Handlers that a record of this logger reaches."""
    found: list[logging.Handler] = []
    at: logging.Logger | None = logger
    while at is not None:
        found += at.handlers
        at = at.parent if at.propagate else None
    return found


def _common(handler: logging.Handler) -> dict[str, Any]:
    """What the filters of a handler add to every line: node, worker, deployment, replica."""
    record = logging.LogRecord("", logging.INFO, "", 0, "", (), None)
    handler.filter(record)
    return {
        name: value
        for name, value in vars(record).items()
        if name not in _STANDARD and isinstance(value, str | int)
    }
