"""The two books of a gateway: what its callers may still spend, and what they did.

Opens a log of the gateway's own for the audit trail, sees to it that its node and the ledger's have
a sealer, and holds leases of the ledger. A gateway whose log is broken can serve nobody: it is
unhealthy, so that Serve starts another in its place.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import ray

from deployments.audit_actors import get_or_start_sealer
from deployments.ledger_actor import LedgerClient
from deployments.ledger_budgets import Budgets
from deployments.ledger_shards import BudgetsFollower, LedgerShards
from deployments.named_actors import HEAD_NODE
from deployments.settings import Settings
from governance.audit.keystore import FileKeystore
from governance.audit.turns import TurnAudit
from governance.audit.writer import AuditWriter
from governance.budget.leases import LeaseBook
from governance.budget.messages import RenewReply, RenewRequest
from governance.budget.sharded import ShardedLeases
from governance.budget.shards import book_id
from governance.budget.tree import Tree
from governance.ports import AuditLog, Clock, Ledger

log = logging.getLogger("gatehouse.ingress")

SEALER_PERIOD_S = 10.0
"""How often a gateway makes sure of the sealers, in seconds."""


class BrokenLog(RuntimeError):
    """The audit log of this gateway cannot be written any more."""


class GatewayBooks:
    """Opens, holds and closes both books.

    Args:
        gateway_id: Identity of the gateway, new for each start of its process.
        settings: Roots.
        budgets: Dump of the ``Budgets`` that the application was built with.
        clock: Wall clock, microseconds.
    """

    def __init__(
        self,
        gateway_id: str,
        settings: Settings,
        budgets: Mapping[str, Any],
        clock: Clock,
    ) -> None:
        built = Budgets.load(budgets)
        tree = Tree(built.config)
        self._settings = settings
        self.ledger_client = LedgerShards(
            lambda shard: LedgerClient(settings.state, budgets, shard=shard), tree
        )
        self._follower = BudgetsFollower(self.ledger_client, built, self._follow)
        books = [self._book(gateway_id, shard, tree, clock) for shard in range(tree.config.shards)]
        self.leases: LeaseBook | ShardedLeases
        self.leases = books[0] if len(books) == 1 else ShardedLeases(books, tree)
        self._books = books
        self.writer = AuditWriter.open(settings.wal, gateway_id, clock=clock)
        self.turns = TurnAudit(
            self.writer,
            FileKeystore(settings.keys / "content", clock=clock),
            clock,
        )
        self._sealer: asyncio.Task[None] | None = None

    @property
    def ledger(self) -> Ledger:
        """The ``Ledger`` port."""
        return self.leases

    @property
    def audit(self) -> AuditLog:
        """The ``AuditLog`` port."""
        return self.turns

    async def start(self) -> None:
        """Reach the ledger, so that what is wrong with it is said at start; start a sealer."""
        await self.ledger_client.ready()
        await self._follower.refresh()  # a file may have been applied since this build
        self.leases.start()
        self._sealer = asyncio.create_task(self._keep_sealer(), name="audit-sealer")

    def check(self) -> None:
        """Raise if this gateway can record nothing any more.

        Raises:
            BrokenLog: It must be started again.
        """
        if self.writer.broken:
            raise BrokenLog(f"audit log of {self.writer.writer_id}: {self.writer.stats.last_error}")

    async def close(self) -> None:
        """Give leases back, and finish the log; what is open must be closed before."""
        if self._sealer is not None:
            self._sealer.cancel()
            await asyncio.gather(self._sealer, return_exceptions=True)
        await self.leases.close()
        await self._follower.close()
        await self.turns.close()
        await self.writer.close()

    def _book(self, gateway_id: str, shard: int, tree: Tree, clock: Clock) -> LeaseBook:
        """Leases of one ledger."""

        async def renew(request: RenewRequest) -> RenewReply:
            reply = await self.ledger_client.calls(shard).renew(request)
            self._follower.heard(shard, reply.digest)
            return reply

        return LeaseBook(
            book_id(gateway_id, shard),
            renew,
            clock=clock,
            monotonic=time.monotonic,
            tree=tree,
            chunk_tokens=tree.config.chunk_tokens,
            renew_s=tree.config.lease.renew_s,
        )

    def _follow(self, budgets: Budgets) -> None:
        """Work by another file from now on; what is reserved stays so."""
        self.leases.tree = Tree(budgets.config)
        for book in self._books:
            book.chunk_tokens = budgets.config.chunk_tokens
            book.renew_s = budgets.config.lease.renew_s

    async def _keep_sealer(self) -> None:
        """See to it that whoever writes a log has a sealer: this node, and the ledger's.

        Ray restarts a sealer that dies; one whose node came back must be started by somebody.
        """
        while True:
            for node_id in {ray.get_runtime_context().get_node_id(), *_head_nodes()}:
                try:
                    # Asks Ray's head node, and blocks.
                    await asyncio.to_thread(
                        get_or_start_sealer, self._settings.state, self._settings.evidence, node_id
                    )
                except Exception as error:
                    log.error("no sealer on node %s: %s", node_id, type(error).__name__)
            await asyncio.sleep(SEALER_PERIOD_S)


def _head_nodes() -> list[str]:
    """Id of the living node that ledger and control plane are pinned to."""
    nodes: Any = ray.nodes()  # type: ignore[no-untyped-call]
    return [str(n["NodeID"]) for n in nodes if n["Alive"] and HEAD_NODE in n["Resources"]]
