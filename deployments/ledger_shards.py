"""All budget ledgers as one: which of them a call goes to.

Accounts are spread over ``shards`` ledgers by their cohort (``Tree.shard``), each a process and a
database of its own. Ledger 0 is the first among them: engines report their meters to it alone, so
that nothing counts twice, and its budgets file is the one that the others are given.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from deployments.ledger_budgets import Budgets
from deployments.ledger_calls import LedgerCalls
from governance.budget.messages import AccountState, MeterReport
from governance.budget.tree import Tree
from governance.errors import GatehouseError, InvalidRequest, ObjectNotFound

log = logging.getLogger("gatehouse.ledger")


class LedgerShards:
    """Calls to several ledgers; raises what ``LedgerCalls`` raises.

    Args:
        make: Gives the calls to one of them, from 0.
        tree: Says how many there are, and which an account lives in; ``None`` for those who only
            report.
    """

    def __init__(self, make: Callable[[int], LedgerCalls], tree: Tree | None = None) -> None:
        self.tree = tree
        self._make = make
        self._calls: dict[int, LedgerCalls] = {}

    def calls(self, shard: int) -> LedgerCalls:
        """Calls to one of them."""
        found = self._calls.get(shard)
        if found is None:
            found = self._calls[shard] = self._make(shard)
        return found

    async def report(self, report: MeterReport, shard: int = 0) -> None:
        """``LedgerCalls.report``."""
        await self.calls(shard).report(report)

    async def ready(self) -> None:
        """Wait until all have started and have the budgets of this application."""
        await asyncio.gather(*(calls.ready() for calls in self._all()))

    async def budgets(self) -> dict[str, Any]:
        """The budgets that hold."""
        return await self.calls(0).budgets()

    async def state(
        self, account: str | None = None, users: bool = False
    ) -> tuple[AccountState, ...]:
        """One account, or those of all ledgers; empty where there is none."""
        if account is not None:
            try:
                return await self._home(account).state(account)
            except ObjectNotFound:
                return ()
        found = await asyncio.gather(*(calls.state(None, users) for calls in self._all()))
        return tuple(sorted((s for each in found for s in each), key=lambda s: s.account))

    async def set_override(
        self,
        account: str,
        limit_us: int | None,
        limit_tokens: int | None,
        expires_us: int,
        reason: str,
        by: str,
    ) -> AccountState:
        """``LedgerCalls.set_override``."""
        return await self._home(account).set_override(
            account, limit_us, limit_tokens, expires_us, reason, by
        )

    async def clear_override(self, account: str, by: str) -> AccountState:
        """``LedgerCalls.clear_override``."""
        return await self._home(account).clear_override(account, by)

    async def transfer(
        self, source: str, target: str, gpu_us: int, tokens: int, reason: str, by: str
    ) -> tuple[AccountState, AccountState]:
        """``LedgerCalls.transfer``; within one ledger only.

        NOTE: between two it would need two commits. A crash between them would leave the budget in
        both, or in neither.
        """
        giver = self._home(source)
        if giver is not self._home(target):
            raise InvalidRequest(
                f"Accounts {source} and {target} live in different ledgers; budget can be moved"
                " within a cohort, and within a department."
            )
        return await giver.transfer(source, target, gpu_us, tokens, reason, by)

    async def apply(self, config: Mapping[str, Any], reason: str, by: str) -> str:
        """``LedgerCalls.apply`` at ledger 0, which decides; the others are given what it has.

        One that cannot be reached now is given it by the gateways as soon as it answers.
        """
        digest = await self.calls(0).apply(config, reason, by)
        others = list(self._all())[1:]
        if others:
            budgets = await self.calls(0).budgets()
            told = await asyncio.gather(
                *(calls.configure(budgets) for calls in others), return_exceptions=True
            )
            for shard, outcome in enumerate(told, 1):
                if isinstance(outcome, BaseException):
                    log.warning("ledger %d has older budgets still", shard)
        return digest

    def follow(self, budgets: Budgets) -> None:
        """Take up another file."""
        if self.tree is not None:
            self.tree = Tree(budgets.config)

    def _all(self) -> list[LedgerCalls]:
        shards = 1 if self.tree is None else self.tree.config.shards
        return [self.calls(shard) for shard in range(shards)]

    def _home(self, account: str) -> LedgerCalls:
        """Calls to the ledger in which an account lives.

        Raises:
            ObjectNotFound: It cannot be the name of an account.
        """
        if self.tree is None:
            return self.calls(0)
        try:
            return self.calls(self.tree.shard(account))
        except ValueError:
            raise ObjectNotFound("There is no such budget account.") from None


class BudgetsFollower:
    """Sees to it that a gateway works by the file that its ledgers work by.

    Every renewal is answered with the digest of the ledger's file. If that of ledger 0 is not the
    gateway's own, the gateway fetches the file; if another ledger's is not, it is given ledger 0's.
    Renewals go out every second (``lease.renew_s``), so that a gateway follows within two.

    Args:
        ledgers: Where files come from.
        config: Budgets of the gateway now.
        take_up: Works by others from then on.
    """

    def __init__(
        self, ledgers: LedgerShards, budgets: Budgets, take_up: Callable[[Budgets], None]
    ) -> None:
        self.budgets = budgets
        self._ledgers = ledgers
        self._take_up = take_up
        self._first = ""
        """Digest that ledger 0 said last."""
        self._busy: dict[int, asyncio.Task[None]] = {}

    def heard(self, shard: int, digest: str) -> None:
        """A ledger answered; does not wait."""
        if shard == 0:
            self._first = digest
        mine = self.budgets.config.digest
        if not digest or digest == mine or shard in self._busy:
            return
        if shard == 0:
            task = asyncio.create_task(self.refresh(), name="budgets-follow")
        elif self._first == mine:
            task = asyncio.create_task(self._give(shard), name="budgets-give")
        else:
            return  # ledger 0 is being asked
        self._busy[shard] = task
        task.add_done_callback(lambda _: self._busy.pop(shard, None))

    async def refresh(self) -> None:
        """Fetch ledger 0's file, and work by it; without an answer nothing changes."""
        try:
            found = Budgets.load(await self._ledgers.budgets())
        except GatehouseError as error:
            log.warning("the ledger's budgets could not be fetched: %s", error.code)
            return
        except (ValueError, KeyError) as error:
            # A ledger of another build: the one that runs is checked when it is found.
            log.error("the ledger's budgets cannot be read: %s", type(error).__name__)
            return
        if found.config.digest != self.budgets.config.digest:
            log.info("budgets %s taken up", found.config.digest[:12])
            self.budgets = found
            self._ledgers.follow(found)
            self._take_up(found)

    async def close(self) -> None:
        """Follow no more."""
        for task in list(self._busy.values()):
            task.cancel()
        await asyncio.gather(*self._busy.values(), return_exceptions=True)

    async def _give(self, shard: int) -> None:
        try:
            await self._ledgers.calls(shard).configure(await self._ledgers.budgets())
        except GatehouseError as error:
            log.warning("ledger %d has older budgets still: %s", shard, error.code)
