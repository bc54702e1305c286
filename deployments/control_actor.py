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
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deployments.control_calls import ControlLink
from deployments.control_copy import ControlCopy
from deployments.settings import Settings
from governance.control.plane import ControlPlane, load_pepper
from governance.control.records import AdminEvent, KeyEntry, KeySpec, RevocationEntry
from governance.control.registry import Registration
from governance.control.snapshot import ControlSnapshot
from governance.control.store import ControlStore
from governance.errors import ControlUnavailable, GatehouseError

log = logging.getLogger("gatehouse.control")

ACTOR_NAME = "gatehouse-control"
NAMESPACE = "gatehouse"
START_TIMEOUT_S = 60.0
HEAD_NODE = "node:__internal_head__"
"""Resource that Ray gives to the head node alone."""
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
    # NOTE: never left to Ray's choice: on another node the actor would find an empty store, and
    # start a new installation without a word.
    placement: dict[str, Any] = {"resources": {HEAD_NODE: 0.001}}
    if node_id is not None:
        placement = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
    actor_class: Any = ray.remote(ControlPlaneActor)
    handle = actor_class.options(
        name=ACTOR_NAME,
        namespace=namespace,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=_MAX_CALLS,
        num_cpus=0,
        **placement,
    ).remote(str(state_dir))
    try:
        ray.get(handle.epoch.remote(), timeout=START_TIMEOUT_S)
    except RayActorError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ControlStartError(f"the control plane did not start: {reason}") from None
    except RayError as error:
        raise ControlStartError(
            f"the control plane did not start within {START_TIMEOUT_S:.0f} s"
            f" ({type(error).__name__})"
        ) from None
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
        return _RayLink(handle)


class _RayLink:
    """Calls the actor; what Ray raises becomes one of our errors."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def __call__(self, method: str, *args: Any) -> Any:
        try:
            return await getattr(self._handle, method).remote(*args)
        except RayTaskError as error:
            if isinstance(error.cause, GatehouseError):
                raise error.cause from None
            log.error("control plane: %s raised %s", method, type(error.cause).__name__)
            raise ControlUnavailable from error
        except RayError as error:
            raise ControlUnavailable from error
