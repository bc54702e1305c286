"""The control plane as a named Ray actor, and the client that finds it."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from deployments.control_calls import ControlLink
from deployments.control_copy import ControlCopy
from deployments.named_actors import NAMESPACE, START_TIMEOUT_S, RayLink, find_or_start, starting
from deployments.settings import Settings
from governance.control.plane import ControlPlane, load_pepper
from governance.control.records import AdminEvent, KeyEntry, KeySpec, RevocationEntry
from governance.control.registry import Registration
from governance.control.snapshot import ControlSnapshot
from governance.control.store import ControlStore
from governance.errors import ControlUnavailable

log = logging.getLogger("gatehouse.control")

ACTOR_NAME = "gatehouse-control"
_MAX_CALLS = 10_000
"""Calls open at once: one watch for each gateway and engine replica, and administration."""


class ControlStartError(RuntimeError):
    """The control plane did not start; the message is for the operator."""


class ControlPlaneActor:
    """Delegates to ``ControlPlane``; every method is safe to run twice, since Ray may do that."""

    def __init__(self, state_dir: str) -> None:
        settings = Settings(Path(state_dir), Path(state_dir), Path(state_dir))
        store = ControlStore(settings.control_db, lambda: time.time_ns() // 1000)
        pepper = load_pepper(settings.keys / "pepper", store, secrets.token_bytes)
        self._plane = ControlPlane(store, pepper, time.monotonic)
        self._sweeper: asyncio.Task[None] | None = None

    async def epoch(self) -> str:
        """Identity of this process; also tells that it runs."""
        return self._plane.snapshot.epoch

    async def watch(
        self,
        known_epoch: str,
        known_version: int,
        registration: Registration | None,
        timeout_s: float,
    ) -> ControlSnapshot | None:
        """See ``ControlPlane.watch``."""
        # The constructor has no event loop yet; whoever registers comes through here.
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._plane.run())
        return await self._plane.watch(known_epoch, known_version, registration, timeout_s)

    async def deregister(self, registration_id: str) -> None:
        """See ``ControlPlane.deregister``."""
        self._plane.deregister(registration_id)

    async def pepper(self) -> bytes:
        """See ``ControlPlane.pepper``."""
        return self._plane.pepper()

    async def create_key(self, key_id: str, secret_hash: str, spec: KeySpec, by: str) -> KeyEntry:
        """See ``ControlPlane.create_key``."""
        return self._plane.create_key(key_id, secret_hash, spec, by)

    async def rotate_key(
        self,
        key_id: str,
        new_key_id: str,
        secret_hash: str,
        by: str,
        lifetime_s: int | None,
        grace_s: int,
    ) -> KeyEntry:
        """See ``ControlPlane.rotate_key``."""
        return self._plane.rotate_key(key_id, new_key_id, secret_hash, by, lifetime_s, grace_s)

    async def revoke_key(self, key_id: str, by: str, reason: str | None) -> KeyEntry:
        """See ``ControlPlane.revoke_key``."""
        return self._plane.revoke_key(key_id, by, reason)

    async def get_key(self, key_id: str) -> KeyEntry:
        """See ``ControlPlane.get_key``."""
        return self._plane.get_key(key_id)

    async def list_keys(self) -> tuple[KeyEntry, ...]:
        """See ``ControlPlane.list_keys``."""
        return self._plane.list_keys()

    async def touch_keys(self, last_used_us: Mapping[str, int]) -> None:
        """See ``ControlPlane.touch_keys``."""
        self._plane.touch_keys(last_used_us)

    async def revoke_token(
        self, token_id: str, by: str, expires_us: int | None, reason: str | None
    ) -> RevocationEntry:
        """See ``ControlPlane.revoke_token``."""
        return self._plane.revoke_token(token_id, by, expires_us, reason)

    async def revoke_subject(
        self, issuer: str, subject: str, by: str, not_before_us: int | None, reason: str | None
    ) -> RevocationEntry:
        """See ``ControlPlane.revoke_subject``."""
        return self._plane.revoke_subject(issuer, subject, by, not_before_us, reason)

    async def list_revocations(self) -> tuple[RevocationEntry, ...]:
        """See ``ControlPlane.list_revocations``."""
        return self._plane.list_revocations()

    async def events(self, after_seq: int, limit: int) -> tuple[AdminEvent, ...]:
        """See ``ControlPlane.events``."""
        return self._plane.events(after_seq, limit)


def get_or_start_control(
    state_dir: Path | str, node_id: str | None = None, namespace: str = NAMESPACE
) -> Any:
    """The control plane's actor, started if there is none. Blocks; not for an event loop.

    Args:
        state_dir: State root, on the volume of the actor's node; absolute.
        node_id: Node that has the volume; ``None`` for the head node.
        namespace: Ray namespace.

    Returns:
        Handle of an actor that has started.

    Raises:
        ControlStartError: It does not start.
    """
    handle = find_or_start(
        ControlPlaneActor,
        ACTOR_NAME,
        (str(state_dir),),
        node_id=node_id,
        namespace=namespace,
        max_concurrency=_MAX_CALLS,
    )
    with starting("the control plane", ControlStartError):
        ray.get(handle.epoch.remote(), timeout=START_TIMEOUT_S)
    return handle


class ControlClient(ControlCopy):
    """``ControlCopy`` over Ray.

    Args:
        state_dir: State root, so that a control plane that is gone is started again; ``None`` to
            use one that others start.
        node_id: See ``get_or_start_control``.
        namespace: Ray namespace.
    """

    def __init__(
        self,
        state_dir: Path | str | None,
        node_id: str | None = None,
        namespace: str = NAMESPACE,
    ) -> None:
        super().__init__(self._find)
        self._state_dir = state_dir
        self._node_id = node_id
        self._namespace = namespace

    async def _find(self) -> ControlLink:
        # Both ask Ray's head node and block.
        if self._state_dir is None:
            handle = await asyncio.to_thread(ray.get_actor, ACTOR_NAME, self._namespace)
        else:
            handle = await asyncio.to_thread(
                get_or_start_control, self._state_dir, self._node_id, self._namespace
            )
        return RayLink(handle, "control plane", ControlUnavailable, log)
