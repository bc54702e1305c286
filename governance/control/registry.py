"""Who is there: engine replicas and gateways, as they say themselves, each for some seconds."""

from __future__ import annotations

from collections.abc import Callable

from governance.control.snapshot import GatewayIdentity, ReplicaAddress
from governance.errors import InvalidRequest

Registration = ReplicaAddress | GatewayIdentity
"""An engine replica or a gateway; a viewer registers nothing."""

REGISTRATION_TTL_S = 5.0
"""How long a registration lives that nobody renews, in seconds. Gateways notice a dead replica
sooner, by its broken connection; this removes it from the books."""

_PUBLIC_KEY_BYTES = 32


def registration_id(registration: Registration) -> str:
    """Id of a replica or a gateway; one never has the id of the other."""
    if isinstance(registration, ReplicaAddress):
        return registration.replica_id
    return registration.gateway_id


class Registry:
    """Soft state: it is gone after a restart, and everybody who is alive registers again.

    Args:
        monotonic: Seconds of a clock that never goes back.
        ttl_s: Life of a registration, in seconds.
    """

    def __init__(self, monotonic: Callable[[], float], ttl_s: float = REGISTRATION_TTL_S) -> None:
        self._monotonic = monotonic
        self._ttl_s = ttl_s
        self._entries: dict[str, tuple[Registration, float]] = {}

    @property
    def ttl_s(self) -> float:
        """Life of a registration, in seconds."""
        return self._ttl_s

    @property
    def replicas(self) -> tuple[ReplicaAddress, ...]:
        """Registered engine replicas, by id."""
        return tuple(r for r in self._registrations() if isinstance(r, ReplicaAddress))

    @property
    def gateways(self) -> tuple[GatewayIdentity, ...]:
        """Registered gateways, by id."""
        return tuple(r for r in self._registrations() if isinstance(r, GatewayIdentity))

    def renew(self, registration: Registration) -> bool:
        """Enter a registration or prolong it; says whether anything visible changed.

        Raises:
            InvalidRequest: A public key or a port cannot be one.
        """
        if isinstance(registration, ReplicaAddress):
            if not 0 < registration.port < 65_536:
                raise InvalidRequest("The port is not valid.", "port")
        elif len(registration.public_key) != _PUBLIC_KEY_BYTES:
            raise InvalidRequest("The public key must have 32 bytes.", "public_key")
        key = registration_id(registration)
        before = self._entries.get(key)
        self._entries[key] = (registration, self._monotonic() + self._ttl_s)
        return before is None or before[0] != registration

    def remove(self, key: str) -> bool:
        """Remove a replica or a gateway by its id; says whether it was there."""
        return self._entries.pop(key, None) is not None

    def expire(self) -> bool:
        """Remove what nobody renewed in time; says whether anything went."""
        now = self._monotonic()
        gone = [key for key, (_, expires) in self._entries.items() if now >= expires]
        for key in gone:
            del self._entries[key]
        return bool(gone)

    def _registrations(self) -> list[Registration]:
        return [self._entries[key][0] for key in sorted(self._entries)]
