"""The form of an admission ticket: a gateway's signed permission for one request to one model.

Encoding (version 2), all integers big-endian:

    u8 version = 2
    i64 issued_at_us, i32 priority, u32 max_tokens, u32 context_tokens (0: no bound)
    u32 weight_milli, i64 served_us, u32 patience_ms
    16 bytes ticket id, 32 bytes SHA-256 of the body
    gateway_id, audience, operation, request_id, decision_id, reservation_id, principal_key,
    department, replica_id, account: each u16 length and that many bytes of UTF-8
    64 bytes Ed25519 signature over DOMAIN and everything before it

Each value has exactly one encoding, and the signature is checked over the bytes received, so
no second, canonical form exists that could differ. Lifetime is not a field: a ticket is good for
``START_WINDOW_US`` after its issue, whatever the gateway would like.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

VERSION = 2
DOMAIN = b"gatehouse admission ticket\0"
"""Signed in front of the ticket, so that no other signature of the same key can pass for one."""

START_WINDOW_US = 30_000_000
"""Time from issue within which the engine must have taken the request."""
MAX_TICKET_BYTES = 4096
SIGNATURE_BYTES = 64

_FIXED = struct.Struct(">BqiIIIqI16s32s")
_LENGTH = struct.Struct(">H")
_TEXTS = 10


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a gateway decided about one request; the engine acts on this, not on the body."""

    gateway_id: str
    audience: str
    """Model or adapter id that may answer."""
    operation: str
    request_id: str
    decision_id: str
    reservation_id: str
    principal_key: str
    department: str
    priority: int
    max_tokens: int
    """Most answer tokens, over all choices."""
    context_tokens: int | None
    """Most tokens of prompt and answer together, or ``None``."""
    issued_at_us: int
    ticket_id: bytes
    """16 random bytes, good for one use."""
    body_sha256: bytes
    replica_id: str = ""
    """Replica that the gateway chose, where it is the gateway that chooses. Replicas remember the
    ids they have seen each for itself and until they restart, so a ticket must be good at no other
    one and for no later one."""
    account: str = ""
    """Budget account that is charged."""
    weight_milli: int = 1000
    """Share of the engine beside other departments, in thousandths."""
    served_us: int = 0
    """Charged device-microseconds of the department so far, everywhere, as last heard."""
    patience_ms: int = 0
    """Longest wait in the engine's queue; 0 is no bound."""


def encode(ticket: Ticket) -> bytes:
    """The part that is signed."""
    parts = [
        _FIXED.pack(
            VERSION,
            ticket.issued_at_us,
            ticket.priority,
            ticket.max_tokens,
            ticket.context_tokens or 0,
            ticket.weight_milli,
            ticket.served_us,
            ticket.patience_ms,
            ticket.ticket_id,
            ticket.body_sha256,
        )
    ]
    for text in (
        ticket.gateway_id,
        ticket.audience,
        ticket.operation,
        ticket.request_id,
        ticket.decision_id,
        ticket.reservation_id,
        ticket.principal_key,
        ticket.department,
        ticket.replica_id,
        ticket.account,
    ):
        raw = text.encode()
        parts.append(_LENGTH.pack(len(raw)))
        parts.append(raw)
    return b"".join(parts)


def decode(payload: bytes) -> Ticket:
    """Read the part that is signed.

    Raises:
        ValueError: Wrong version, cut short, bytes left over, or not UTF-8.
        struct.error: Cut short.

    """
    version, issued, priority, max_tokens, context, *share, ticket_id, digest = _FIXED.unpack_from(
        payload
    )
    if version != VERSION:
        raise ValueError("version")
    texts: list[str] = []
    at = _FIXED.size
    for _ in range(_TEXTS):
        (length,) = _LENGTH.unpack_from(payload, at)
        at += _LENGTH.size
        if at + length > len(payload):
            raise ValueError("length")
        texts.append(payload[at : at + length].decode())
        at += length
    if at != len(payload):
        raise ValueError("trailing bytes")
    gateway, audience, operation, request, decision, reservation, principal, *rest = texts
    department, replica, account = rest
    weight_milli, served_us, patience_ms = share
    return Ticket(
        gateway,
        audience,
        operation,
        request,
        decision,
        reservation,
        principal,
        department,
        priority,
        max_tokens,
        context or None,
        issued,
        ticket_id,
        digest,
        replica,
        account,
        weight_milli,
        served_us,
        patience_ms,
    )
