"""Our log lines where an operator looks for them: in Serve's log of the replica, in its format.

Every line that is written while a request is served carries the request's ids, whoever writes it:
the task that serves it says once whose it is (``concern``), and a filter on the handlers looks
that up when a line is written. Ids only; content is never logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Protocol

from governance.types import Turn

_OURS = "gatehouse"
_SERVE = "ray.serve"


class _Ids(Protocol):
    """Whatever knows the ids of a request, such as an engine's ticket."""

    @property
    def request_id(self) -> str: ...

    @property
    def decision_id(self) -> str: ...

    @property
    def reservation_id(self) -> str: ...


_subject: ContextVar[Turn | _Ids | None] = ContextVar("gatehouse_log_subject", default=None)


def concern(subject: Turn | _Ids) -> None:
    """What this task, and those that it starts, log from now on concerns this request.

    Costs a tenth of a microsecond: ids are read when a line is written.

    Args:
        subject: The turn in a gateway, the ticket in an engine replica.
    """
    _subject.set(subject)


def request_fields() -> Mapping[str, str]:
    """Ids of the request that this task serves, as far as they are known; none outside of one."""
    subject = _subject.get()
    if subject is None:
        return {}
    if not isinstance(subject, Turn):
        return {
            "request_id": subject.request_id,
            "decision_id": subject.decision_id,
            "reservation_id": subject.reservation_id,
        }
    fields = {"request_id": subject.request_id, "decision_id": subject.decision_id}
    if subject.reservation is not None:
        fields["reservation_id"] = subject.reservation.id
    if "trace_id" in subject.notes:
        fields["trace_id"] = subject.notes["trace_id"]
    return fields


def join_serve_log() -> None:
    """Send our lines to the log files that Serve has set up for this replica.

    Serve configures its own logger alone; without this our warnings would only reach the raw
    output of a worker, without time or replica, and our information nobody. Idempotent.
    """
    serve, ours = logging.getLogger(_SERVE), logging.getLogger(_OURS)
    ours.setLevel(serve.getEffectiveLevel())
    ours.handlers[:] = serve.handlers
    ours.propagate = not serve.handlers
    for handler in serve.handlers:
        if not any(isinstance(known, _RequestFields) for known in handler.filters):
            handler.addFilter(_RequestFields())


class _RequestFields(logging.Filter):
    """On handlers, so that Serve's own lines about a request get its ids too.

    NOTE: it must come after Serve's filters. They set ``request_id`` to a number that Serve draws
    and that nobody else knows; it is kept as ``serve_request_id``.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record through, with the ids of its request."""
        fields = request_fields()
        if fields:
            drawn = getattr(record, "request_id", None)
            if drawn is not None and drawn != fields["request_id"]:
                record.serve_request_id = drawn
            for name, value in fields.items():
                setattr(record, name, value)
        return True


def withhold_content(library: str) -> None:
    """Keep what exceptions of a library say out of the log, where it handles requests.

    Its loggers print exceptions that quote prompts and answers, in their text, arguments and
    traceback alike (vLLM's tool parsers print the line of the model's answer that is no Python).
    What is left names the place and the class. Idempotent.

    Args:
        library: Name of its top logger.
    """
    handlers = logging.getLogger(library).handlers + logging.getLogger().handlers
    for handler in handlers:
        if not any(isinstance(known, _Withhold) for known in handler.filters):
            handler.addFilter(_Withhold(library))


class _Withhold(logging.Filter):
    """On handlers, because a filter of a logger does not see the records of those below it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record through; rewrite those of the library that carry an exception."""
        if super().filter(record) and record.exc_info:
            kind = record.exc_info[0]
            name = kind.__name__ if kind is not None else "no exception"
            record.msg = f"{record.name}:{record.lineno} in {record.funcName}: {name}"
            record.args = record.exc_info = record.exc_text = None
        return True
