"""The budget ledger: who may spend how much, decided in one place and lent out in leases.

**Escrow.** A gateway does not ask the ledger per request: it holds a lease, an amount that is set
aside for it, and reserves out of that in its own memory (the escrow method, O'Neil, ACM TODS 11(4),
1986; leases with a time to live as in Doorman). ``governance.budget.grants`` says how much,
``governance.budget.books`` how it is charged.

**Batches.** Calls change memory; at the end of a batch all of it is written in one transaction. A
caller must not answer before the batch has ended. If the transaction fails, memory is read again
from disk, so that nothing is remembered that a restart would not know.

A reservation that gateway and engine are through with is forgotten an hour after it was last named,
any other a day after, counted while a ledger runs. What reports one later than that is charged
anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from governance.budget import events, grants, meters
from governance.budget.books import Books
from governance.budget.checks import check_renewal, check_report
from governance.budget.config import MAX_GPU_SECONDS, MAX_TOKENS, SECOND_US, BudgetsConfig
from governance.budget.messages import (
    AccountState,
    LeaseState,
    MeterReport,
    ModelPrice,
    RenewReply,
    RenewRequest,
)
from governance.budget.room import Rooms
from governance.budget.state import ZERO, Gateway, Override, positive
from governance.budget.store import LedgerStore, Transfer
from governance.budget.sums import check_override
from governance.budget.tree import Node, Tree
from governance.errors import NoAccount
from governance.ports import Clock
from governance.types import Amount

CLOSED_KEPT_US = 3_600 * SECOND_US
"""How long a reservation is remembered that gateway and engine are through with."""
ANY_KEPT_US = 86_400 * SECOND_US
"""How long any other reservation is remembered, and a gateway that was not heard of."""
LONGEST_OVERRIDE_US = 366 * 86_400 * SECOND_US
PRICES_SAVED_S = 5.0
"""Prices are written this often; a crash forgets what was learned since."""
PRICES_KEPT_S = 0.5
"""Quantiles are computed this often at most."""


@dataclass(slots=True)
class LedgerStats:
    """Counters since the ledger started, for metrics."""

    batches: int = 0
    renewals: int = 0
    repeats: int = 0
    """Renewals and reports that had been carried out before."""
    settlements: int = 0
    reports: int = 0
    conflicts: int = 0
    """Reports that named a reservation of another gateway or account; they changed nothing."""
    backwards: int = 0
    """Meters that went back; the larger figure was kept."""
    failed_batches: int = 0


class BudgetLedger:
    """Accounts, leases and charges. Calls must not overlap.

    Args:
        store: Open database; the ledger closes it.
        config: Limits.
        clock: Wall clock; decides windows and overrides.
        monotonic: Seconds; decides when a lease ends. After a restart each lease starts anew.
    """

    def __init__(
        self,
        store: LedgerStore,
        config: BudgetsConfig,
        *,
        clock: Clock,
        monotonic: Callable[[], float],
    ) -> None:
        self.stats = LedgerStats()
        self.tree = Tree(config)
        self._store = store
        self._clock = clock
        self._monotonic = monotonic
        self._in_batch = False
        self._stale = False
        """Memory may hold what disk does not."""
        self._age_base_us = int(store.setting("age_us") or 0)
        self._opened_s = monotonic()
        self._prices_saved_s = monotonic()
        self._stale_prices: set[str] = set()
        self._known: set[str] = set()
        """Base models whose price is on disk."""
        self._priced: tuple[float, tuple[ModelPrice, ...]] = (float("-inf"), ())
        self._books = self._read()
        with self.batch():
            before = store.setting("budgets_digest")
            if before != config.digest:
                self._books.changes.settings["budgets_digest"] = config.digest
                loaded = events.budgets_loaded(config.digest, before, clock())
                self._books.changes.events.append(loaded)

    @property
    def config(self) -> BudgetsConfig:
        """The budgets file that holds."""
        return self.tree.config

    @classmethod
    def open(
        cls, path: Path, config: BudgetsConfig, *, clock: Clock, monotonic: Callable[[], float]
    ) -> BudgetLedger:
        """Open or make the database.

        Raises:
            LedgerStoreError: It cannot be used.
        """
        store = LedgerStore(path)
        try:
            return cls(store, config, clock=clock, monotonic=monotonic)
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        """Close the database; prices that were learned since the last save are written."""
        try:
            with self.batch():
                self._save_prices()
        finally:
            self._store.close()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Everything inside is on disk afterwards, or none of it happened.

        A call checks its message before it changes anything: a ``ValueError`` or ``NoAccount`` that
        is caught inside the batch leaves the batch good. Batches inside of others are one batch.

        Raises:
            sqlite3.Error: Nothing was written, and memory holds what the disk has.
        """
        if self._in_batch:
            yield
            return
        self._in_batch = True
        try:
            if self._stale:
                self._books, self._stale = self._read(), False
            self._books.advance(self._clock(), self._monotonic())
            yield
            if self._books.changes:
                self._store.save(self._books.changes, self._age_us())
            self.stats.batches += 1
            self.stats.conflicts += self._books.conflicts
            self._books.conflicts = 0
            self._books.changes = type(self._books.changes)()
        except BaseException:
            self.stats.failed_batches += 1
            self._stale = True
            raise
        finally:
            self._in_batch = False

    def renew(self, request: RenewRequest) -> RenewReply:
        """Take a gateway's settlements in, and grant it leases.

        A repeated number is answered from the state as it is; so is an older one, with the number
        of the newest as ``seq``, from which a gateway sees that its request was overtaken.

        Raises:
            ValueError: The request is not possible; nothing was changed.
        """
        check_renewal(request)
        with self.batch():
            now_us, state = self._clock(), self._books.state
            self.stats.renewals += 1
            gateway = state.gateways.get(request.gateway_id)
            if gateway is not None and request.seq <= gateway.seq:
                self.stats.repeats += 1
                return self._reply(request, gateway.seq)
            gateway = Gateway(request.gateway_id, request.seq, self._age_us())
            gateway.expires_s = self._monotonic() + self.config.lease.ttl_s
            state.gateways[gateway.id] = self._books.changes.gateways[gateway.id] = gateway
            settled = grants.settle(self._books, gateway.id, request.settlements, now_us)
            self.stats.settlements += len(request.settlements)
            self._stale_prices.update(said.base_model for said in request.settlements)
            if request.closing:
                gateway.expires_s = self._monotonic()
                for lease in state.leases_at(gateway.id):
                    self._books.end_lease(lease)
            else:
                live = sum(self._monotonic() < g.expires_s for g in state.gateways.values())
                grants.renew(self._books, gateway, request.asks, settled, live, now_us)
            return self._reply(request, request.seq)

    def report(self, report: MeterReport) -> None:
        """Take an engine's meters in.

        Raises:
            ValueError: The report is not possible; nothing was changed.
        """
        check_report(report)
        with self.batch():
            now_us = self._clock()
            self.stats.reports += 1
            fresh, backwards = meters.take(self._books, report, now_us, self._monotonic())
            self.stats.repeats += not fresh
            self.stats.backwards += backwards
            if not fresh:
                return
            book = self._books.price(report.base_model)
            weight_milli = self.config.weight_milli(report.accelerator)
            dearest_milli = self._dearest(report.base_model, weight_milli)
            if report.base_model not in self._known or book.weight_milli != dearest_milli:
                # At once: gateways reserve by it, also after a restart.
                book.weight_milli = dearest_milli
                self._books.changes.prices[book.base_model] = book
                self._known.add(report.base_model)
            for row in report.rows:
                meters.charge_row(self._books, row, report, weight_milli, book, now_us)
                if row.ended:
                    self._stale_prices.add(report.base_model)

    def state(self, account: str | None = None, *, users: bool = False) -> tuple[AccountState, ...]:
        """One account, or all that the file names or somebody used; empty where there is none.

        Args:
            account: The account; ``None`` for all.
            users: With all of them, accounts of single users as well.
        """
        with self.batch():
            state = self._books.state
            self._books.count()
            if account is not None:
                names = [account] if self._shown(account) else []
            else:
                used = {*state.accounts, *state.held, *state.overrides}
                used = {name for name in used if users or "~" not in name}
                names = sorted({*self.tree.listed(), *used})
            rooms = Rooms(self._books, self._clock())
            return tuple(rooms.state(name) for name in names)

    def totals(self) -> dict[str, Amount]:
        """Spent ever by department, over all windows: for reconciliation."""
        with self.batch():
            accounts = self._books.state.accounts
            return {n: a.total for n, a in accounts.items() if not set("/~@") & set(n)}

    def meter_sums(self) -> dict[str, dict[str, int]]:
        """Raw device-microseconds of all engines ever, by base model."""
        with self.batch():
            return meters.sums(self._books.state)

    def prices(self) -> tuple[ModelPrice, ...]:
        """Prices of all base models that reported; at most ``PRICES_KEPT_S`` old."""
        now_s, books = self._monotonic(), self._books.state.prices
        if now_s - self._priced[0] >= PRICES_KEPT_S or len(self._priced[1]) != len(books):
            self._priced = now_s, tuple(books[name].price() for name in sorted(books))
        return self._priced[1]

    def set_override(
        self,
        account: str,
        gpu_us: int | None,
        tokens: int | None,
        expires_us: int,
        by: str,
        reason: str,
    ) -> AccountState:
        """Set other limits for a time.

        Args:
            account: The account.
            gpu_us: Charged device-microseconds per window; ``None``: as the file says.
            tokens: Tokens per window; ``None``: as the file says.
            expires_us: When the limits of the file hold again; within 366 days.
            by: Pseudonym of who does it.
            reason: Why; for the record.

        Raises:
            NoAccount: There is no such account.
            ValueError: A value is out of range.
        """
        now_us = self._clock()
        node = self._node(account)
        if gpu_us is None and tokens is None:
            raise ValueError("give gpu_us, tokens or both")
        if not 0 <= (gpu_us or 0) <= MAX_GPU_SECONDS * SECOND_US:
            raise ValueError(f"gpu_us must be from 0 to {MAX_GPU_SECONDS * SECOND_US}")
        if not 0 <= (tokens or 0) <= MAX_TOKENS:
            raise ValueError(f"tokens must be from 0 to {MAX_TOKENS}")
        if not now_us < expires_us <= now_us + LONGEST_OVERRIDE_US:
            raise ValueError("expires_us must be in the future, and within 366 days")
        if not 0 < len(by) <= 256 or not 0 < len(reason) <= 1000:
            raise ValueError("say who, in 256 characters at most, and why, in 1000 at most")
        with self.batch():
            if node.parent is None and "@" not in account:
                spent = {a.name: a.spent for a in self._books.state.accounts.values()}
                overrides = self._books.state.overrides
                check_override(self.config, overrides, spent, account, gpu_us, tokens)
            override = Override(account, gpu_us, tokens, expires_us, by, reason)
            self._books.state.overrides[account] = override
            self._books.changes.overrides[account] = override
            self._books.relimit(account)
            self._books.changes.events.append(
                events.budget_set(override, "overridden", by, reason, now_us)
            )
            return self._state(account)

    def clear_override(self, account: str, by: str, reason: str) -> AccountState:
        """Return to the limits of the file; without an override this changes nothing.

        Raises:
            NoAccount: There is no such account.
        """
        self._node(account)
        with self.batch():
            override = self._books.state.overrides.get(account)
            if override is not None:
                self._books.end_override(override, "cleared", by, reason, self._clock())
            return self._state(account)

    def transfer(
        self,
        source: str,
        target: str,
        gpu_us: int,
        tokens: int,
        by: str,
        reason: str,
        *,
        key: str | None = None,
    ) -> tuple[AccountState, AccountState]:
        """Move budget from one account to another until the window ends.

        What is spent, or lent out to gateways, cannot be moved. Between departments with the same
        window, or between parts of one department.

        Args:
            source: Whose budget becomes smaller.
            target: Whose becomes larger.
            gpu_us: Charged device-microseconds; 0 for none.
            tokens: Tokens; 0 for none.
            by: Pseudonym of who does it.
            reason: Why; for the record.
            key: Of this demand: what comes again with it moves nothing.

        Returns:
            Both accounts as they are then.

        Raises:
            NoAccount: There is no such account.
            ValueError: It cannot be moved; the message says why, and nothing was changed.
        """
        nodes = (self._node(source), self._node(target))
        for figure, most in ((gpu_us, MAX_GPU_SECONDS * SECOND_US), (tokens, MAX_TOKENS)):
            if type(figure) is not int or not 0 <= figure <= most:
                raise ValueError(f"an amount must be a whole number from 0 to {most}")
        if not gpu_us and not tokens:
            raise ValueError("moves nothing; give gpu_us, tokens or both")
        if not 0 < len(by) <= 256 or not 0 < len(reason) <= 1000:
            raise ValueError("say who, in 256 characters at most, and why, in 1000 at most")
        _check_pair(*nodes, self.config)
        with self.batch():
            books, now_us, moved = self._books, self._clock(), Amount(gpu_us, tokens)
            if key is not None and self._moved(key):
                return self._state(source), self._state(target)
            rooms = Rooms(books, now_us)
            for node in nodes:
                limits = books.limits(node)
                if (gpu_us and limits[0] is None) or (tokens and limits[1] is None):
                    raise ValueError(f"account {node.name} has no limit of that kind to move")
            spare = rooms.spare(source)
            if positive(moved - spare) != ZERO:
                raise ValueError(
                    f"account {source} has {spare.gpu_us} gpu_us and {spare.tokens} tokens that are"
                    " neither spent nor lent out; what gateways hold returns within seconds"
                )
            giver, taker = books.account(source, now_us), books.account(target, now_us)
            _check_left(nodes[0], giver.moved - moved)
            larger = taker.moved + moved
            if larger.gpu_us > MAX_GPU_SECONDS * SECOND_US or larger.tokens > MAX_TOKENS:
                raise ValueError(f"account {target} would have more than an account may have")
            giver.moved -= moved
            taker.moved = larger
            books.relimit(source)
            books.relimit(target)
            books.changes.accounts.update({source: giver, target: taker})
            entry = Transfer(now_us, source, target, moved, giver.end_us, by, reason, key)
            books.changes.transfers.append(entry)
            books.changes.events.append(
                events.transferred(source, target, moved, giver.end_us, by, reason, now_us)
            )
            return self._state(source), self._state(target)

    def _moved(self, key: str) -> bool:
        """Whether a demand to move budget was carried out, in this batch or before."""
        if any(entry.key == key for entry in self._books.changes.transfers):
            return True
        return self._store.has_transfer(key)

    def transfers(self, limit: int = 1000) -> list[Transfer]:
        """The newest transfers, newest first."""
        return self._store.transfers(limit)

    def apply(
        self, config: BudgetsConfig, by: str | None = None, reason: str | None = None
    ) -> bool:
        """Take up another budgets file without a restart; what was spent counts on in it.

        Args:
            config: What it says.
            by: Pseudonym of who does it; ``None`` for a build of the application.
            reason: Why; for the record.

        Returns:
            Whether it says anything new.

        Raises:
            ValueError: It spreads accounts over another number of ledgers, or gives an account less
                than was moved out of it.
        """
        if config.shards != self.config.shards:
            raise ValueError(
                f"shards is {self.config.shards} here and cannot be changed while ledgers run:"
                " stop the platform, move the state away, and start with the new file"
            )
        if by is not None:
            self.check_file(config)
        held = self.tree
        try:
            return self._apply(config, by, reason)
        except BaseException:
            # What is not on disk does not hold: memory is read again by the file before.
            self.tree = held
            raise

    def check_file(self, config: BudgetsConfig) -> None:
        """Whether a file leaves every account as much as was moved out of it; changes nothing.

        Raises:
            ValueError: It does not.
        """
        tree = Tree(config)
        with self.batch():
            for account in self._books.state.accounts.values():
                _check_left(tree.node(account.name), account.moved)

    def _apply(self, config: BudgetsConfig, by: str | None, reason: str | None) -> bool:
        with self.batch():
            before = self.config.digest
            if config.digest == before:
                return False
            self.tree = Tree(config)
            self._books.use(self.tree)
            self._books.changes.settings["budgets_digest"] = config.digest
            loaded = events.budgets_loaded(config.digest, before, self._clock(), by, reason)
            self._books.changes.events.append(loaded)
            return True

    def setting(self, name: str) -> str | None:
        """A value that was remembered."""
        return self._store.setting(name)

    def remember(self, name: str, value: str) -> None:
        """Keep a value with the ledger's database."""
        with self.batch():
            self._books.changes.settings[name] = value

    def alerts(self, limit: int = 100) -> list[tuple[int, events.Event]]:
        """Thresholds that were crossed and not told yet, oldest first; see ``events.alert``.

        Each with a number for ``alerts_done``; one that is not confirmed comes again.
        """
        return self._store.alerts(limit)

    def alerts_done(self, up_to: int) -> None:
        """Forget alerts up to a number: they were delivered, or given up."""
        with self.batch():
            self._books.changes.alerts_done = up_to

    def alert_lost(self, alert: Mapping[str, Any], reason: str) -> None:
        """Put on record that an alert was given up."""
        with self.batch():
            self._books.changes.events.append(events.alert_lost(alert, reason, self._clock()))

    def sweep(self) -> None:
        """Do what is due: call it about once a second.

        Leases, windows and overrides end with every batch; this also notices engines that went
        silent, writes meter intervals and prices, and forgets what is old.
        """
        with self.batch():
            now_us, now_s = self._clock(), self._monotonic()
            meters.sweep(self._books, now_us, now_s)
            if now_s - self._prices_saved_s >= PRICES_SAVED_S:
                self._save_prices()
            for gateway in list(self._books.state.gateways.values()):
                if now_s >= gateway.expires_s and self._age_us() - gateway.heard_us > ANY_KEPT_US:
                    del self._books.state.gateways[gateway.id]
                    self._books.changes.gateways[gateway.id] = None
        self._store.prune(self._age_us() - CLOSED_KEPT_US, self._age_us() - ANY_KEPT_US)

    def events(self, limit: int = 1000) -> list[tuple[int, events.Event]]:
        """Audit events of committed batches that were not written yet, oldest first.

        Each with a number for ``events_written``. One that is not confirmed comes again, also
        after a restart: at least once.
        """
        return self._store.events(limit)

    def events_written(self, up_to: int) -> None:
        """Forget events up to a number: they are in the audit trail."""
        with self.batch():
            self._books.changes.events_written = up_to

    def committed(self, account: str) -> Amount:
        """Spent, and what may still be charged under leases."""
        with self.batch():
            self._books.count()
            found = self._books.view(account, self._clock())
            return found.spent + self._books.state.held.get(account, ZERO)

    def _dearest(self, base_model: str, weight_milli: int) -> int:
        """Largest weight of the devices that serve a model: which will serve, nobody knows yet."""
        weights = (
            self.config.weight_milli(replica.accelerator)
            for replica in meters.live(self._books.state)
            if replica.base_model == base_model
        )
        return max(weights, default=weight_milli)

    def _reply(self, request: RenewRequest, seq: int) -> RenewReply:
        leases = self._books.state.leases_at(request.gateway_id)
        known = [ask.account for ask in request.asks if self.tree.exists(ask.account)]
        rooms = Rooms(self._books, self._clock())
        return RenewReply(
            seq,
            self.config.lease.ttl_s * 1000,
            tuple(LeaseState(v.id, v.account, v.hold, v.adjust) for v in leases),
            tuple(rooms.state(name) for name in known),
            self.prices(),
            tuple(a.account for a in request.asks if not self.tree.exists(a.account)),
            self.config.digest,
        )

    def _state(self, account: str) -> AccountState:
        return Rooms(self._books, self._clock()).state(account)

    def _node(self, account: str) -> Node:
        """An account that the file has, or gives by default.

        Raises:
            NoAccount: There is none.
        """
        if not self._shown(account):
            raise NoAccount
        return self.tree.node(account)

    def _shown(self, account: str) -> bool:
        try:
            return self.tree.node(account).known
        except ValueError:
            return False

    def _age_us(self) -> int:
        """How long ledgers have run on this file, by the monotonic clock.

        What is old is told by this: a wall clock that jumps forward must not make the ledger forget
        what somebody is about to report again.
        """
        return self._age_base_us + round((self._monotonic() - self._opened_s) * SECOND_US)

    def _save_prices(self) -> None:
        self._prices_saved_s = self._monotonic()
        self._books.changes.settings["age_us"] = str(self._age_us())
        for name in self._stale_prices:
            self._books.changes.prices[name] = self._books.price(name)
        self._stale_prices.clear()

    def _read(self) -> Books:
        """What the disk has; every lease starts anew, since nobody knows how long it was down."""
        books = Books(self._store.load(), self._store, self.tree)
        self._known = set(books.state.prices)
        now_s = self._monotonic()
        leased = {gateway_id for gateway_id, _ in books.state.leases}
        for gateway in books.state.gateways.values():
            gateway.expires_s = now_s + self.config.lease.ttl_s if gateway.id in leased else now_s
        for replica in books.state.replicas.values():
            replica.heard_s = now_s
        return books


def _check_left(node: Node, moved: Amount) -> None:
    """Whether an account has as much by the file as is moved out of it.

    What it lacked would count twice: a limit is not less than nothing, and an override that it was
    taken from ends.

    Raises:
        ValueError: It has not.
    """
    for limit, change in ((node.limit_us, moved.gpu_us), (node.limit_tokens, moved.tokens)):
        if limit is not None and limit + change < 0:
            raise ValueError(
                f"account {node.name} has {limit} by the file, but {-change} would be moved out of"
                " it in this window"
            )


def _check_pair(source: Node, target: Node, config: BudgetsConfig) -> None:
    """Whether budget may be moved between two accounts.

    Raises:
        ValueError: It may not.
    """
    names = f"{source.name} and {target.name}"
    if source.name == target.name:
        raise ValueError("source and target are the same account")
    if source.is_user or target.is_user or "@" in source.name or "@" in target.name:
        raise ValueError("only departments and their parts have budget that can be moved")
    if source.parent != target.parent:
        raise ValueError(f"{names} are not two departments, nor two parts of one")
    if source.span != target.span:
        raise ValueError(f"{names} have different windows; a transfer counts within one")
    if source.cohort != target.cohort:
        # A cohort's limit is over what its members have: what moves out would be free there again.
        for name in (source.cohort, target.cohort):
            cohort = config.cohorts.get(name or "")
            if cohort is not None and not (cohort.gpu_seconds is None and cohort.tokens is None):
                raise ValueError(f"{names} are not in one cohort, and cohort {name} has a limit")
    if config.shards > 1 and source.cohort != target.cohort:
        raise ValueError(f"{names} may live in different ledgers; move within a cohort")
