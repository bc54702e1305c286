"""What administrators put into the control plane and read back from it.

Times are microseconds since the epoch (``_us``), durations seconds (``_s``). What every gateway and
engine gets is in ``governance.control.snapshot``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from governance.control.snapshot import ServiceKeyRecord
from governance.identity.service_keys import ServiceKey

SECOND_US = 1_000_000
DAY_S = 86_400
MAX_KEY_LIFETIME_S = 90 * DAY_S
"""A service key that nobody renews stops working within a quarter."""
DEFAULT_GRACE_S = DAY_S
"""How long a rotated key works beside its successor."""
MAX_GRACE_S = 7 * DAY_S
MAX_TOKEN_REVOCATION_S = 36 * 3600
"""Longest time that the revocation of a single token is kept, so the verifier accepts no token that
lives longer. Entra's longest (continuous access evaluation) live 28 hours."""
REVOCATION_LEEWAY_S = 300
"""Added to the life of a token before its revocation is dropped: verifiers accept a token up to
60 s past its expiry, and clocks of machines differ."""


@dataclass(frozen=True, slots=True)
class KeySpec:
    """What a new service key shall be allowed to do."""

    name: str
    department: str
    roles: tuple[str, ...]
    lifetime_s: int
    """From 1 to ``MAX_KEY_LIFETIME_S``, counted by the clock of the store."""
    models: tuple[str, ...] | None = None
    """Models the key is limited to, or ``None``."""
    operations: tuple[str, ...] | None = None


class KeyStatus(StrEnum):
    """Whether a key works; revoked wins over expired."""

    ACTIVE = "active"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A service key with what happened to it."""

    record: ServiceKeyRecord
    revoked_us: int | None = None
    last_used_us: int | None = None
    """Reported in batches by gateways; some seconds behind, and lost with a gateway that dies."""

    def status(self, now_us: int) -> KeyStatus:
        """Whether the key works at a time."""
        if self.revoked_us is not None:
            return KeyStatus.REVOKED
        return KeyStatus.ACTIVE if now_us < self.record.expires_us else KeyStatus.EXPIRED


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A key at the one moment when its secret is known."""

    entry: KeyEntry
    key: ServiceKey


class RevocationKind(StrEnum):
    """What was revoked."""

    KEY = "key"
    TOKEN = "token"  # noqa: S105 - a kind, not a secret
    SUBJECT = "subject"


@dataclass(frozen=True, slots=True)
class RevocationEntry:
    """One revocation that is in force."""

    kind: RevocationKind
    target: str
    """Key id; ``jti`` or SHA-256 of a token; subject."""
    revoked_us: int
    by: str
    """Principal key of whoever revoked."""
    issuer: str | None = None
    """Of a subject."""
    not_before_us: int | None = None
    """Of a subject: credentials issued earlier are refused."""
    until_us: int | None = None
    """Of a token: when it has expired anyway and the entry lapses."""
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class AdminEvent:
    """One administrative act; these are never changed or removed."""

    seq: int
    """1, 2, 3, ... without gaps."""
    at_us: int
    by: str
    """Principal key of the administrator."""
    action: str
    """``key.created``, ``key.rotated``, ``key.revoked``, ``token.revoked``, ``subject.revoked``."""
    target: str
    detail: str
    """Canonical JSON: sorted keys, no spaces, no secret."""
