"""What the control plane tells every gateway and engine replica.

One immutable snapshot per version. Gateways authorise from their own copy, so a slow or
restarting control plane costs nothing per request; how old a copy may be is stated where it is
used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ServiceKeyRecord:
    """A service key as stored: everything but the secret."""

    key_id: str
    secret_hash: str
    """HMAC-SHA256(pepper, secret) in hex."""
    name: str
    department: str
    roles: tuple[str, ...]
    models: tuple[str, ...] | None
    """Models the key is limited to, or ``None``."""
    operations: tuple[str, ...] | None
    created_us: int
    expires_us: int
    created_by: str
    """Principal key of the creator."""
    replaces: str | None = None
    """Key that this one rotated out."""


@dataclass(frozen=True, slots=True)
class Revocations:
    """Credentials that no longer count, whatever they say themselves."""

    key_ids: frozenset[str] = frozenset()
    token_ids: frozenset[str] = frozenset()
    """``jti`` values, or SHA-256 in hex of whole tokens."""
    subjects: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(issuer name, subject) -> not-before in microseconds: older tokens are refused."""


@dataclass(frozen=True, slots=True)
class ReplicaAddress:
    """An engine replica that registered."""

    replica_id: str
    base_model: str
    served: tuple[str, ...]
    """Ids it answers for: the base model and its adapters."""
    host: str
    port: int
    model_version: str
    """``sha256:<hex>`` of the weights loaded."""
    engine_version: str


@dataclass(frozen=True, slots=True)
class GatewayIdentity:
    """A gateway whose tickets engines accept."""

    gateway_id: str
    public_key: bytes
    """Raw Ed25519 public key, 32 bytes."""


@dataclass(frozen=True, slots=True)
class ControlSnapshot:
    """Everything the control plane publishes, at one version."""

    epoch: str = ""
    """Identity of the control plane process; versions compare only within one epoch."""
    version: int = 0
    service_keys: Mapping[str, ServiceKeyRecord] = field(default_factory=dict)
    revocations: Revocations = Revocations()
    replicas: tuple[ReplicaAddress, ...] = ()
    gateways: tuple[GatewayIdentity, ...] = ()
