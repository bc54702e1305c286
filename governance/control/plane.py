"""The control plane: one place that knows keys, revocations and who is there, and tells everybody.

Every gateway and engine replica keeps a ``watch`` call open. It carries the caller's registration
and the version that the caller has; it comes back as soon as there is another version, or with
``None`` after some seconds, which confirms that the caller's copy is still the latest. Nothing
is asked per request: gateways authorise from their copy, and stop believing it when it has not
been confirmed for a while.

Versions count changes within one process (``epoch``). After a restart the epoch differs, so every
caller gets a whole snapshot, and the registry fills again with the calls that arrive.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from governance.control.pepper import PepperError, create_pepper, fingerprint, read_pepper
from governance.control.records import AdminEvent, KeyEntry, KeySpec, RevocationEntry
from governance.control.registry import REGISTRATION_TTL_S, Registration, Registry
from governance.control.snapshot import ControlSnapshot
from governance.control.store import ControlStore

log = logging.getLogger("gatehouse.control")

SWEEP_INTERVAL_S = 0.5
"""How often registrations are looked over, in seconds; adds to their life at most this."""
COALESCE_S = 0.01
"""How long a woken watch waits for more changes, in seconds. After a restart everybody registers
at once, and each registration would otherwise send a snapshot to everybody."""


class ControlPlane:
    """See the module; plain class, all calls from one event loop.

    Args:
        store: Durable half.
        pepper: Secret of this installation (``load_pepper``).
        monotonic: Seconds of a clock that never goes back.
        registration_ttl_s: Life of a registration that is not renewed, in seconds.
    """

    def __init__(
        self,
        store: ControlStore,
        pepper: bytes,
        monotonic: Callable[[], float],
        registration_ttl_s: float = REGISTRATION_TTL_S,
    ) -> None:
        self._store = store
        self._pepper = pepper
        self._registry = Registry(monotonic, registration_ttl_s)
        self._changed = asyncio.Event()
        self._snapshot = ControlSnapshot(epoch=uuid.uuid4().hex)
        self._publish(durable=True)

    @property
    def snapshot(self) -> ControlSnapshot:
        """The latest version."""
        return self._snapshot

    def pepper(self) -> bytes:
        """Secret of this installation, for gateways, which hash what is presented to them."""
        return self._pepper

    async def watch(
        self,
        known_epoch: str,
        known_version: int,
        registration: Registration | None,
        timeout_s: float,
    ) -> ControlSnapshot | None:
        """Wait for another version than the caller has.

        Args:
            known_epoch: Epoch of the caller's copy; empty if it has none.
            known_version: Version of the caller's copy.
            registration: The caller, whose registration this renews; ``None`` for a viewer.
            timeout_s: Longest wait, in seconds; cut to half a registration's life, so that a
                caller that watches again at once never loses its own.

        Returns:
            The latest snapshot, or ``None`` if the caller has it.

        Raises:
            InvalidRequest: The registration is not valid.
        """
        if registration is not None and self._registry.renew(registration):
            self._publish()
        longest_s = min(timeout_s, self._registry.ttl_s / 2)
        if self._has_latest(known_epoch, known_version):
            try:
                async with asyncio.timeout(longest_s):
                    await self._changed.wait()
            except TimeoutError:
                return None
            await asyncio.sleep(COALESCE_S)
        return self._snapshot

    def deregister(self, registration_id: str) -> None:
        """Remove a replica or a gateway at once; an unknown id is no error."""
        if self._registry.remove(registration_id):
            self._publish()

    def sweep(self) -> None:
        """Remove what was not renewed, and take over what another process wrote to the store."""
        expired = self._registry.expire()
        foreign = self._store.changed_elsewhere()
        if expired or foreign:
            self._publish(durable=foreign)

    async def run(self) -> None:
        """Sweep until cancelled; a sweep that fails is logged and tried again."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            try:
                self.sweep()
            except Exception:
                log.exception("sweep failed")

    # Administration. Each change is on disk, then published, then acknowledged.

    def create_key(self, key_id: str, secret_hash: str, spec: KeySpec, by: str) -> KeyEntry:
        """See ``KeyTable.create``."""
        entry = self._store.keys.create(key_id, secret_hash, spec, by)
        self._publish(durable=True)
        return entry

    def rotate_key(
        self,
        key_id: str,
        new_key_id: str,
        secret_hash: str,
        by: str,
        lifetime_s: int | None,
        grace_s: int,
    ) -> KeyEntry:
        """See ``KeyTable.rotate``."""
        entry = self._store.keys.rotate(key_id, new_key_id, secret_hash, by, lifetime_s, grace_s)
        self._publish(durable=True)
        return entry

    def revoke_key(self, key_id: str, by: str, reason: str | None = None) -> KeyEntry:
        """See ``KeyTable.revoke``."""
        entry = self._store.keys.revoke(key_id, by, reason)
        self._publish(durable=True)
        return entry

    def get_key(self, key_id: str) -> KeyEntry:
        """See ``KeyTable.get``."""
        return self._store.keys.get(key_id)

    def list_keys(self) -> tuple[KeyEntry, ...]:
        """See ``KeyTable.all``."""
        return self._store.keys.all()

    def touch_keys(self, last_used_us: Mapping[str, int]) -> None:
        """See ``KeyTable.touch``; no gateway needs to hear of it."""
        self._store.keys.touch(last_used_us)

    def revoke_token(
        self, token_id: str, by: str, expires_us: int | None = None, reason: str | None = None
    ) -> RevocationEntry:
        """See ``RevocationTable.revoke_token``."""
        entry = self._store.revocations.revoke_token(token_id, by, expires_us, reason)
        self._publish(durable=True)
        return entry

    def revoke_subject(
        self,
        issuer: str,
        subject: str,
        by: str,
        not_before_us: int | None = None,
        reason: str | None = None,
    ) -> RevocationEntry:
        """See ``RevocationTable.revoke_subject``."""
        entry = self._store.revocations.revoke_subject(issuer, subject, by, not_before_us, reason)
        self._publish(durable=True)
        return entry

    def list_revocations(self) -> tuple[RevocationEntry, ...]:
        """See ``RevocationTable.entries``."""
        return self._store.revocations.entries()

    def events(self, after_seq: int = 0, limit: int = 1000) -> tuple[AdminEvent, ...]:
        """Administrative acts after a sequence number, oldest first."""
        return self._store.events(after_seq, limit)

    def _has_latest(self, epoch: str, version: int) -> bool:
        return (epoch, version) == (self._snapshot.epoch, self._snapshot.version)

    def _publish(self, durable: bool = False) -> None:
        """Make the next version, from the store too if it changed, and wake everybody."""
        last = self._snapshot
        self._snapshot = ControlSnapshot(
            epoch=last.epoch,
            version=last.version + 1,
            service_keys=self._store.keys.published() if durable else last.service_keys,
            revocations=self._store.revocations.published() if durable else last.revocations,
            replicas=self._registry.replicas,
            gateways=self._registry.gateways,
        )
        self._changed.set()
        self._changed = asyncio.Event()


def load_pepper(path: Path, store: ControlStore, random_bytes: Callable[[int], bytes]) -> bytes:
    """The pepper that the store's hashes were made with; a new one only for a new store.

    Raises:
        PepperError: The file is missing, damaged, readable by others, or of another installation.
    """
    pepper = read_pepper(path)
    if pepper is None:
        if store.pepper_fingerprint() is not None:
            raise PepperError(f"{path}: missing, but service keys depend on it; restore it")
        pepper = create_pepper(path, random_bytes)
    if not store.bind_pepper(fingerprint(pepper)):
        raise PepperError(f"{path}: not the pepper of this store; restore both from one backup")
    return pepper
