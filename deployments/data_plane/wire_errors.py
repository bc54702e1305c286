"""Errors on the wire: a code of ``governance.errors``, its public fields, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deployments.data_plane.frames import FrameType, json_frame, parse_object
from deployments.data_plane.tickets import TRANSIENT, TicketRefusal
from governance.errors import EngineFailed, EngineUnavailable, GatehouseError, InternalError

TICKET_REFUSED = "ticket_refused"


def _tree(root: type[GatehouseError]) -> Iterator[type[GatehouseError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


_BY_CODE = {cls.code: cls for cls in reversed(list(_tree(GatehouseError)))}
_BY_CODE["internal_error"] = InternalError


def error_frame(error: GatehouseError) -> bytes:
    """ERROR for a client-visible error."""
    fields: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.param is not None:
        fields["param"] = error.param
    if error.retry_after_s is not None:
        fields["retry_after_s"] = error.retry_after_s
    return json_frame(FrameType.ERROR, fields)


def refusal_frame(reason: TicketRefusal) -> bytes:
    """ERROR for a ticket that was refused; the reason is for the gateway's counters."""
    return json_frame(FrameType.ERROR, {"code": TICKET_REFUSED, "reason": reason.value})


def refusal_error(reason: str | None) -> GatehouseError:
    """What a refused ticket amounts to for the client: try again, or a defect on our side."""
    if reason in TRANSIENT:
        return EngineUnavailable("", None, 2)
    return InternalError()


def parse_error(payload: bytes) -> tuple[GatehouseError, str | None]:
    """The error that an ERROR frame carries, and the reason if it is about a ticket.

    A code that is not known here (a replica of a newer version) becomes ``EngineFailed``, with
    our words instead of the replica's.

    Raises:
        FrameError: The payload is not a JSON object.

    """
    fields = parse_object(payload)
    code = fields.get("code")
    if code == TICKET_REFUSED:
        reason = fields.get("reason")
        reason = reason if isinstance(reason, str) else "unknown"
        return refusal_error(reason), reason
    cls = _BY_CODE.get(code) if isinstance(code, str) else None
    if cls is None:
        return EngineFailed(), None
    message, param, retry = (fields.get(name) for name in ("message", "param", "retry_after_s"))
    return cls(
        message if isinstance(message, str) else "",
        param if isinstance(param, str) else None,
        retry if isinstance(retry, int) else None,
    ), None
