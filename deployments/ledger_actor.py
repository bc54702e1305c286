"""The budget ledger as a named Ray actor, and the client that finds it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import ray

from deployments import __version__
from deployments.ledger_calls import LedgerCalls, LedgerLink
from deployments.ledger_service import LedgerService
from deployments.ledger_shards import LedgerShards
from deployments.named_actors import NAMESPACE, START_TIMEOUT_S, RayLink, find_or_start, starting
from deployments.settings import Settings
from deployments.telemetry.actors import LedgerTelemetry
from governance.budget.messages import (
    AccountState,
    LeaseAsk,
    LeaseState,
    MeterReport,
    MeterRow,
    ModelPrice,
    RenewReply,
    RenewRequest,
    Settlement,
    Tight,
)
from governance.budget.schema import SCHEMA_VERSION
from governance.budget.store import LedgerStoreError
from governance.errors import LedgerUnavailable

log = logging.getLogger("gatehouse.ledger")

ACTOR_NAME = "gatehouse-ledger"
_MAX_CALLS = 10_000
"""Calls open at once: they only queue and wait."""
_LOCK_WAIT_S = 10.0
"""How long a new process waits for the one before it to let go of the database."""


class LedgerStartError(RuntimeError):
    """The ledger did not start, or must not be used; the message is for the operator."""


def _form() -> str:
    """Digest of what messages look like."""
    kinds: list[type] = [MeterReport, MeterRow, RenewRequest, LeaseAsk, Settlement]
    kinds += [RenewReply, LeaseState, AccountState, Tight, ModelPrice]
    text = ";".join(f"{k.__name__}:{','.join(f.name for f in fields(k))}" for k in kinds)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


IDENTITY = {"version": __version__, "messages": _form(), "file": str(SCHEMA_VERSION)}
"""Of this code; a ledger of other code is not used."""


class LedgerActor:
    """Delegates to ``LedgerService``; every method is safe to run twice, since Ray may do that.

    Args:
        state_dir: State root.
        shard: Which of the ledgers it is, from 0.
    """

    def __init__(self, state_dir: str, shard: int = 0) -> None:
        self._root = state_dir
        settings = Settings(Path(state_dir), Path(state_dir), Path(state_dir))
        self._service = _open(settings, shard)
        self._telemetry: LedgerTelemetry | None = None

    def _start(self) -> None:
        """The constructor has no event loop yet; whoever calls first comes through here."""
        self._service.start()
        if self._telemetry is None:
            self._telemetry = LedgerTelemetry(
                lambda: self._service.audit.stats, service=self._service
            )

    async def process_id(self) -> int:
        """Of this process; also tells that it runs."""
        self._start()
        return os.getpid()

    async def identity(self) -> dict[str, str]:
        """What code this process runs, and on which root: it may be older than its callers."""
        self._start()
        return {**IDENTITY, "state_root": self._root}

    async def renew(self, request: RenewRequest, deadline_us: int) -> RenewReply:
        """See ``LedgerService.renew``."""
        self._start()
        return await self._service.renew(request, deadline_us)

    async def report(self, report: MeterReport) -> None:
        """See ``LedgerService.report``."""
        self._start()
        await self._service.report(report)

    async def configure(self, budgets: Mapping[str, Any]) -> None:
        """See ``LedgerService.configure``."""
        self._start()
        await self._service.configure(budgets)

    async def budgets(self) -> dict[str, Any]:
        """See ``LedgerService.budgets``."""
        self._start()
        return await self._service.budgets()

    async def state(self, account: str | None, users: bool = False) -> tuple[AccountState, ...]:
        """See ``LedgerService.state``."""
        self._start()
        return await self._service.state(account, users)

    async def set_override(
        self,
        account: str,
        limit_us: int | None,
        limit_tokens: int | None,
        expires_us: int,
        reason: str,
        by: str,
        deadline_us: int,
    ) -> AccountState:
        """See ``LedgerService.set_override``."""
        self._start()
        return await self._service.set_override(
            account, limit_us, limit_tokens, expires_us, reason, by, deadline_us
        )

    async def clear_override(self, account: str, by: str, deadline_us: int) -> AccountState:
        """See ``LedgerService.clear_override``."""
        self._start()
        return await self._service.clear_override(account, by, deadline_us)

    async def transfer(
        self,
        source: str,
        target: str,
        gpu_us: int,
        tokens: int,
        reason: str,
        by: str,
        deadline_us: int,
        key: str,
    ) -> tuple[AccountState, AccountState]:
        """See ``LedgerService.transfer``."""
        self._start()
        return await self._service.transfer(
            source, target, gpu_us, tokens, reason, by, deadline_us, key
        )

    async def apply(self, config: Mapping[str, Any], reason: str, by: str, deadline_us: int) -> str:
        """See ``LedgerService.apply``."""
        self._start()
        return await self._service.apply(config, reason, by, deadline_us)

    async def stats(self) -> dict[str, int]:
        """See ``LedgerService.stats``."""
        self._start()
        return await self._service.stats()


def actor_name(shard: int) -> str:
    """Name of a ledger's actor: of the first ``gatehouse-ledger``, then ``gatehouse-ledger-1``."""
    return ACTOR_NAME if shard == 0 else f"{ACTOR_NAME}-{shard}"


def _open(settings: Settings, shard: int) -> LedgerService:
    """The service; a process that was declared dead may still hold the database for a moment."""
    until_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            return LedgerService(
                settings.ledger_shard(shard),
                settings.wal,
                clock=lambda: time.time_ns() // 1000,
                monotonic=time.monotonic,
                shard=shard,
            )
        except LedgerStoreError:
            if time.monotonic() > until_s:
                raise
        time.sleep(0.1)


def get_or_start_ledger(
    state_dir: Path | str,
    node_id: str | None = None,
    namespace: str = NAMESPACE,
    shard: int = 0,
) -> Any:
    """A ledger's actor, started if there is none. Blocks; not for an event loop.

    Args:
        state_dir: State root, on the volume of the actor's node; absolute.
        node_id: Node that has the volume; ``None`` for the head node.
        namespace: Ray namespace.
        shard: Which of the ledgers, from 0.

    Returns:
        Handle of an actor that has started.

    Raises:
        LedgerStartError: It does not start, or another deployment's runs.
    """
    handle = find_or_start(
        LedgerActor,
        actor_name(shard),
        (str(state_dir), shard) if shard else (str(state_dir),),
        node_id=node_id,
        namespace=namespace,
        max_concurrency=_MAX_CALLS,
    )
    with starting("the budget ledger", LedgerStartError):
        check_identity(handle, str(state_dir), actor_name(shard))
    return handle


def check_identity(handle: Any, state_dir: str | None, name: str = ACTOR_NAME) -> None:
    """Refuse a ledger that an earlier deployment left, with other code or another root.

    A detached actor outlives the application that started it, and would go on charging by rules
    that nobody reads any more, to a file that nobody looks at. Blocks.

    Args:
        handle: The actor.
        state_dir: State root that it should have; ``None`` for those who do not know it.
        name: Of the actor, for the operator.

    Raises:
        LedgerStartError: It must not be used.
        RayError: It does not answer.
    """
    wanted = dict(IDENTITY)
    if state_dir is not None:
        wanted["state_root"] = state_dir
    try:
        call = handle.identity
    except AttributeError:
        found: dict[str, str] = {}  # from before it had one
    else:
        found = ray.get(call.remote(), timeout=START_TIMEOUT_S)
    differs = [name for name in wanted if found.get(name) != wanted[name]]
    if differs:
        what = ", ".join(
            f"{name.replace('_', ' ')} {found.get(name, 'unknown')}, not {wanted[name]}"
            for name in differs
        )
        raise LedgerStartError(
            f"the budget ledger that runs is another deployment's ({what}); it is not used."
            f" Stop the actor {name}, or the Ray cluster, and a new one is started"
        )


class LedgerClient(LedgerCalls):
    """``LedgerCalls`` over Ray.

    Args:
        state_dir: State root, so that a ledger that is gone is started again; ``None`` to use one
            that others start.
        budgets: See ``LedgerCalls``.
        node_id: See ``get_or_start_ledger``.
        namespace: Ray namespace.
        shard: Which of the ledgers, from 0.
    """

    def __init__(
        self,
        state_dir: Path | str | None,
        budgets: Mapping[str, Any] | None = None,
        node_id: str | None = None,
        namespace: str = NAMESPACE,
        shard: int = 0,
    ) -> None:
        super().__init__(self._find, budgets)
        self._shard = shard
        self._state_dir = state_dir
        self._node_id = node_id
        self._namespace = namespace

    async def _find(self) -> LedgerLink:
        try:
            # Asks Ray's head node, and blocks.
            handle = await asyncio.to_thread(self._handle)
            return RayLink(handle, "ledger", LedgerUnavailable, log)
        except LedgerStartError as error:
            log.error("%s", error)  # callers are told only that it is not there
            raise

    def _handle(self) -> Any:
        if self._state_dir is not None:
            return get_or_start_ledger(self._state_dir, self._node_id, self._namespace, self._shard)
        name = actor_name(self._shard)
        handle = ray.get_actor(name, self._namespace)
        check_identity(handle, None, name)
        return handle


def ledger_shards(state_dir: Path | str | None = None, namespace: str = NAMESPACE) -> LedgerShards:
    """All ledgers, for those who only report to them, such as an engine."""
    return LedgerShards(lambda shard: LedgerClient(state_dir, namespace=namespace, shard=shard))
