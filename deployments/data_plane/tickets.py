"""Admission tickets: minted by gateways, checked by engine replicas.

The form is in ``ticket_form``. A verifier holds public keys only: who runs an engine can check
tickets and cannot mint them.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
import time
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from deployments.data_plane.replay import ReplayCache, Seen
from deployments.data_plane.ticket_form import (
    DOMAIN,
    MAX_TICKET_BYTES,
    SIGNATURE_BYTES,
    START_WINDOW_US,
    Ticket,
    decode,
    encode,
)
from governance.ports import Clock
from governance.types import Dispatch


def wall_clock_us() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000


class TicketRefusal(StrEnum):
    """Why a ticket was refused; engines count each."""

    MALFORMED = "malformed"
    UNKNOWN_GATEWAY = "unknown_gateway"
    BAD_SIGNATURE = "bad_signature"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    WRONG_AUDIENCE = "wrong_audience"
    WRONG_REPLICA = "wrong_replica"
    """For another replica of the same model, or for the one that was here before."""
    WRONG_OPERATION = "wrong_operation"
    WRONG_BODY = "wrong_body"
    REPLAYED = "replayed"
    REPLAY_CACHE_FULL = "replay_cache_full"
    """Too many tickets at once to remember; refused, because an unremembered one can be
    replayed."""


TRANSIENT = frozenset(
    {
        TicketRefusal.UNKNOWN_GATEWAY,
        TicketRefusal.EXPIRED,
        TicketRefusal.NOT_YET_VALID,
        TicketRefusal.REPLAY_CACHE_FULL,
    }
)
"""Refusals that a correct gateway can meet (it is newer than the replica's copy of the control
snapshot, or clocks differ); another replica may accept. The others mean a defect or an attack."""


class TicketRefused(Exception):
    """The ticket does not admit the request.

    Args:
        reason: Which check failed; the first one, in the order of ``TicketVerifier.verify``.

    """

    def __init__(self, reason: TicketRefusal) -> None:
        super().__init__(reason)
        self.reason = reason


class TicketSigner:
    """Mints tickets; lives in a gateway.

    Args:
        gateway_id: Name under which engines find this gateway's public key.
        private_key: Ed25519 key of this gateway process.
        clock: Wall clock in microseconds.

    """

    def __init__(
        self, gateway_id: str, private_key: Ed25519PrivateKey, clock: Clock = wall_clock_us
    ) -> None:
        self.gateway_id = gateway_id
        self._key = private_key
        self._clock = clock

    @property
    def public_key(self) -> bytes:
        """Raw public key, 32 bytes, to be registered with the control plane."""
        return self._key.public_key().public_bytes_raw()

    def mint(
        self, dispatch: Dispatch, body_sha256: bytes | None = None, replica_id: str = ""
    ) -> bytes:
        """Sign a ticket for one attempt of one request.

        Args:
            dispatch: The request as decided.
            body_sha256: Digest of ``dispatch.body`` where the caller has it already.
            replica_id: Replica that it goes to; empty where Serve chooses.

        """
        return self._sign(
            Ticket(
                self.gateway_id,
                dispatch.model,
                dispatch.operation.value,
                dispatch.request_id,
                dispatch.decision_id,
                dispatch.reservation_id,
                dispatch.principal_key,
                dispatch.department,
                dispatch.priority,
                dispatch.max_tokens,
                dispatch.context_tokens,
                self._clock(),
                secrets.token_bytes(16),
                body_sha256 or hashlib.sha256(dispatch.body).digest(),
                replica_id,
                dispatch.account,
                dispatch.weight_milli,
                dispatch.served_us,
                dispatch.patience_ms,
            )
        )

    def mint_internal(
        self, operation: str, audience: str, body: bytes, replica_id: str = ""
    ) -> bytes:
        """Sign a ticket for something that no principal asked for: a connection, a tokenizer call.

        Args:
            operation: ``connect`` or ``detokenize``; never an inference operation, so that such a
                ticket cannot be turned into one.
            audience: Base model of the replica.
            body: Bytes that the ticket binds.
            replica_id: As for ``mint``; empty for a connection, whose first message must not tell
                a stranger at that address whose name to give.

        """
        return self._sign(
            Ticket(
                self.gateway_id,
                audience,
                operation,
                "",
                "",
                "",
                "",
                "",
                0,
                0,
                None,
                self._clock(),
                secrets.token_bytes(16),
                hashlib.sha256(body).digest(),
                replica_id,
            )
        )

    def _sign(self, ticket: Ticket) -> bytes:
        payload = encode(ticket)
        return payload + self._key.sign(DOMAIN + payload)


class TicketVerifier:
    """Checks tickets; lives in an engine replica.

    Args:
        audience: Ids that this replica answers for: the base model and its adapters.
        gateway_keys: Gives gateway id -> raw public key, from the current control snapshot; asked
            each time, so that a gateway taken out is refused at once.
        clock: Wall clock in microseconds.
        skew_us: By how much the clocks of gateway and engine may differ.
        capacity: Tickets remembered at most; at ``capacity / 34 s`` new ones a second the cache is
            full and refuses. Some 150 bytes each.

    """

    def __init__(
        self,
        audience: Collection[str],
        gateway_keys: Callable[[], Mapping[str, bytes]],
        clock: Clock = wall_clock_us,
        *,
        skew_us: int = 2_000_000,
        capacity: int = 262_144,
    ) -> None:
        self.audience = frozenset(audience)
        self.refused: dict[TicketRefusal, int] = dict.fromkeys(TicketRefusal, 0)
        self.accepted = 0
        self._gateway_keys = gateway_keys
        self._clock = clock
        self._skew_us = skew_us
        self._replays = ReplayCache(capacity)
        self._loaded: dict[str, tuple[bytes, Ed25519PublicKey]] = {}

    def verify(self, raw: bytes, *, operation: str, body: bytes, replica_id: str = "") -> Ticket:
        """Check one ticket and use it up.

        Order: form, gateway, signature, time, audience, operation, replica, body, replay. The
        replay cache comes last, so that a refused ticket neither fills it nor spends the id.

        Args:
            raw: The ticket as received.
            operation: What the peer asks for.
            body: What the peer sent with it.
            replica_id: What the ticket must name: this replica, or nothing where the peer cannot
                know it.

        Raises:
            TicketRefused: With the first check that failed; counted in ``refused``.

        """
        try:
            ticket = self._check(raw, operation, body, replica_id)
        except TicketRefused as refusal:
            self.refused[refusal.reason] += 1
            raise
        self.accepted += 1
        return ticket

    def _check(self, raw: bytes, operation: str, body: bytes, replica_id: str) -> Ticket:
        payload, signature = raw[:-SIGNATURE_BYTES], raw[-SIGNATURE_BYTES:]
        if len(raw) > MAX_TICKET_BYTES:
            raise TicketRefused(TicketRefusal.MALFORMED)
        try:
            ticket = decode(payload)
        except (ValueError, struct.error):
            raise TicketRefused(TicketRefusal.MALFORMED) from None
        try:
            self._public_key(ticket.gateway_id).verify(signature, DOMAIN + payload)
        except InvalidSignature:
            raise TicketRefused(TicketRefusal.BAD_SIGNATURE) from None
        now = self._clock()
        expires = ticket.issued_at_us + START_WINDOW_US + self._skew_us
        if now > expires:
            raise TicketRefused(TicketRefusal.EXPIRED)
        if ticket.issued_at_us > now + self._skew_us:
            raise TicketRefused(TicketRefusal.NOT_YET_VALID)
        if ticket.audience not in self.audience:
            raise TicketRefused(TicketRefusal.WRONG_AUDIENCE)
        if ticket.operation != operation:
            raise TicketRefused(TicketRefusal.WRONG_OPERATION)
        if ticket.replica_id != replica_id:
            raise TicketRefused(TicketRefusal.WRONG_REPLICA)
        if not hmac.compare_digest(ticket.body_sha256, hashlib.sha256(body).digest()):
            raise TicketRefused(TicketRefusal.WRONG_BODY)
        seen = self._replays.use(ticket.gateway_id.encode() + ticket.ticket_id, expires, now)
        if seen is not Seen.NEW:
            raise TicketRefused(_SEEN[seen])
        return ticket

    def _public_key(self, gateway_id: str) -> Ed25519PublicKey:
        """Key of a gateway that is registered now; parsing it is cached, its standing is not."""
        keys = self._gateway_keys()
        raw = keys.get(gateway_id)
        if raw is None:
            self._loaded.pop(gateway_id, None)
            raise TicketRefused(TicketRefusal.UNKNOWN_GATEWAY)
        cached = self._loaded.get(gateway_id)
        if cached is not None and cached[0] == raw:
            return cached[1]
        try:
            key = Ed25519PublicKey.from_public_bytes(raw)
        except ValueError:
            raise TicketRefused(TicketRefusal.UNKNOWN_GATEWAY) from None
        for gone in self._loaded.keys() - keys.keys():
            del self._loaded[gone]
        self._loaded[gateway_id] = (raw, key)
        return key


_SEEN = {
    Seen.BEFORE: TicketRefusal.REPLAYED,
    Seen.FORGOTTEN: TicketRefusal.EXPIRED,
    Seen.NO_ROOM: TicketRefusal.REPLAY_CACHE_FULL,
}
