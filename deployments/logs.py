"""Our log lines where an operator looks for them: in Serve's log of the replica, in its format."""

from __future__ import annotations

import logging

_OURS = "gatehouse"
_SERVE = "ray.serve"


def join_serve_log() -> None:
    """Send our lines to the log files that Serve has set up for this replica.

    Serve configures its own logger alone; without this our warnings would only reach the raw
    output of a worker, without time or replica, and our information nobody. Idempotent.
    """
    serve, ours = logging.getLogger(_SERVE), logging.getLogger(_OURS)
    ours.setLevel(serve.getEffectiveLevel())
    ours.handlers[:] = serve.handlers
    ours.propagate = not serve.handlers


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
