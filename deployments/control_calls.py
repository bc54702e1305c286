"""Calls to the control plane, and administration through them. How a call travels is passed in."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from governance.control.records import (
    AdminEvent,
    IssuedKey,
    KeyEntry,
    KeySpec,
    RevocationEntry,
)
from governance.errors import ControlUnavailable, GatehouseError
from governance.identity.service_keys import hash_secret, mint

log = logging.getLogger("gatehouse.control")

CALL_TIMEOUT_S = 5.0
"""How long a call may take, in seconds."""
_ATTEMPTS = 3
_PAUSE_S = 0.2
_START_TIMEOUT_S = 60.0


class ControlLink(Protocol):
    """A way to call the control plane; good until it raises ``ControlUnavailable``."""

    def __call__(self, method: str, *args: Any) -> Awaitable[Any]:
        """Call a method of ``ControlPlane`` by name.

        Raises:
            GatehouseError: What the method raised.
            ControlUnavailable: The control plane could not be reached.
        """
        ...


class ControlCalls:
    """Finds the control plane, calls it, and finds it again after a failure.

    Administrative calls are sent again when no answer came, which is safe: a key has its id
    before it is sent, so it is not made twice, and a revocation repeated changes nothing.

    Args:
        resolve: Finds the control plane anew; may raise anything.
        random_bytes: Cryptographic randomness, for new keys.
    """

    def __init__(
        self,
        resolve: Callable[[], Awaitable[ControlLink]],
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._resolve = resolve
        self._random_bytes = random_bytes
        self._link: ControlLink | None = None
        self._finding: asyncio.Task[ControlLink] | None = None
        self._pepper: bytes | None = None

    async def pepper(self) -> bytes:
        """Secret of this installation; fetched once.

        Raises:
            ControlUnavailable: The control plane could not be reached.
        """
        if self._pepper is None:
            # Asked once, while everything starts; the control plane may be starting too.
            self._pepper = await self._insist("pepper", timeout_s=_START_TIMEOUT_S)
        return self._pepper

    # ``by`` is the principal key of the administrator. All methods raise ControlUnavailable when
    # the control plane cannot be reached, and what the methods that they name raise.

    async def create_key(self, spec: KeySpec, by: str) -> IssuedKey:
        """Make a service key (``KeyTable.create``).

        The secret is made here and leaves this process only in the result; the control plane gets
        its hash.
        """
        key = mint(self._random_bytes)
        secret_hash = hash_secret(await self.pepper(), key.secret)
        return IssuedKey(await self._insist("create_key", key.key_id, secret_hash, spec, by), key)

    async def rotate_key(
        self, key_id: str, by: str, lifetime_s: int | None, grace_s: int
    ) -> IssuedKey:
        """Make a successor of a key (``KeyTable.rotate``)."""
        key = mint(self._random_bytes)
        secret_hash = hash_secret(await self.pepper(), key.secret)
        entry = await self._insist(
            "rotate_key", key_id, key.key_id, secret_hash, by, lifetime_s, grace_s
        )
        return IssuedKey(entry, key)

    async def revoke_key(self, key_id: str, by: str, reason: str | None = None) -> KeyEntry:
        """Revoke a key (``KeyTable.revoke``)."""
        entry: KeyEntry = await self._insist("revoke_key", key_id, by, reason)
        return entry

    async def get_key(self, key_id: str) -> KeyEntry:
        """One key (``KeyTable.get``)."""
        entry: KeyEntry = await self._insist("get_key", key_id)
        return entry

    async def list_keys(self) -> tuple[KeyEntry, ...]:
        """All keys ever made, newest first."""
        entries: tuple[KeyEntry, ...] = await self._insist("list_keys")
        return entries

    async def revoke_token(
        self, token_id: str, by: str, expires_us: int | None = None, reason: str | None = None
    ) -> RevocationEntry:
        """Refuse one token (``RevocationTable.revoke_token``)."""
        entry: RevocationEntry = await self._insist(
            "revoke_token", token_id, by, expires_us, reason
        )
        return entry

    async def revoke_subject(
        self,
        issuer: str,
        subject: str,
        by: str,
        not_before_us: int | None = None,
        reason: str | None = None,
    ) -> RevocationEntry:
        """Refuse what a subject was issued (``RevocationTable.revoke_subject``)."""
        entry: RevocationEntry = await self._insist(
            "revoke_subject", issuer, subject, by, not_before_us, reason
        )
        return entry

    async def list_revocations(self) -> tuple[RevocationEntry, ...]:
        """Revocations in force, newest first."""
        entries: tuple[RevocationEntry, ...] = await self._insist("list_revocations")
        return entries

    async def events(self, after_seq: int = 0, limit: int = 1000) -> tuple[AdminEvent, ...]:
        """Administrative acts after a sequence number, oldest first."""
        events: tuple[AdminEvent, ...] = await self._insist("events", after_seq, limit)
        return events

    async def _insist(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await self._call(timeout_s, method, *args)
            except ControlUnavailable:
                if attempt == _ATTEMPTS:
                    raise
            await asyncio.sleep(_PAUSE_S * attempt)
        raise ControlUnavailable

    async def _call(self, timeout_s: float, method: str, *args: Any) -> Any:
        """Call once.

        Raises:
            GatehouseError: What the method raised.
            ControlUnavailable: No answer, for whatever reason; the link is given up.
        """
        try:
            async with asyncio.timeout(timeout_s):
                link = await self._connect()
                return await link(method, *args)
        except ControlUnavailable:
            self._link = None
            raise
        except GatehouseError:
            raise
        except Exception as error:
            self._link = None
            log.warning("control plane: %s failed (%s)", method, type(error).__name__)
            raise ControlUnavailable from error

    async def _connect(self) -> ControlLink:
        """The link; found once for all who wait, and found to the end when a waiter gives up."""
        if self._link is not None:
            return self._link
        if self._finding is None:
            self._finding = asyncio.create_task(self._find_link(), name="control-find")
        return await asyncio.shield(self._finding)

    async def _find_link(self) -> ControlLink:
        try:
            self._link = await self._resolve()
            return self._link
        finally:
            self._finding = None
