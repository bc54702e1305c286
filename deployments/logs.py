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
