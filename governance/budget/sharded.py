"""A gateway's leases where accounts are spread over several ledgers: one book a ledger.

An account lives in the ledger of its cohort (``Tree.shard``), so whatever is borrowed is borrowed
within one, and nothing is ever asked of two for one request. Each book renews by itself: while a
ledger is away, accounts of the others are served as if it were there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from itertools import chain

from governance.budget.holds import LeaseHold
from governance.budget.leases import LeaseBook, LeaseStats
from governance.budget.lines import Line
from governance.budget.messages import AccountState, ModelPrice
from governance.budget.state import ZERO
from governance.budget.tree import Tree
from governance.errors import NoAccount
from governance.types import BudgetAsk, Charge, Principal

_REMEMBERED = 100_000
"""Accounts whose ledger is remembered."""
_SUMMED = (
    "leases",
    "waiting",
    "unsent",
    "reservations",
    "refusals",
    "unavailable",
    "renewals",
    "failures",
    "rejections",
    "given_up",
)


class ShardedLeases:
    """Implements ``governance.ports.Ledger`` over one ``LeaseBook`` a ledger.

    Args:
        books: By ledger, from 0; each under a gateway id of its own (``shards.book_id``).
        tree: Says which ledger an account lives in.

    Raises:
        ValueError: The tree is of another number of ledgers.
    """

    def __init__(self, books: Sequence[LeaseBook], tree: Tree) -> None:
        if len(books) != tree.config.shards:
            raise ValueError(f"{len(books)} books for {tree.config.shards} ledgers")
        self.books = tuple(books)
        self._tree = tree
        self._shard: Callable[[str], int] = lru_cache(_REMEMBERED)(tree.shard)

    @property
    def tree(self) -> Tree:
        """Accounts by the budgets file."""
        return self._tree

    @tree.setter
    def tree(self, tree: Tree) -> None:
        self._tree = tree
        self._shard = lru_cache(_REMEMBERED)(tree.shard)
        for book in self.books:
            book.tree = tree

    @property
    def digest(self) -> str:
        """Of the file by which ledger 0 works, as of its last renewal; the others follow it."""
        return self.books[0].digest

    def book(self, account: str) -> LeaseBook:
        """The book of an account.

        Raises:
            ValueError: It cannot be the name of one.
        """
        return self.books[self._shard(account)]

    async def reserve(self, ask: BudgetAsk) -> LeaseHold:
        """``LeaseBook.reserve``, at the account's ledger."""
        try:
            book = self.book(ask.account)
        except ValueError:
            raise NoAccount from None
        return await book.reserve(ask)

    def charge(self, principal: Principal) -> Charge:
        """``LeaseBook.charge``, at the department's ledger.

        Raises:
            NoAccount: The department has no account.
        """
        try:
            book = self.book(principal.department)
        except ValueError:
            raise NoAccount from None
        return book.charge(principal)

    def usage(self, account: str) -> AccountState | None:
        """``LeaseBook.usage``, at the account's ledger."""
        try:
            book = self.book(account)
        except ValueError:
            return None
        return book.usage(account)

    def fits(self, ask: BudgetAsk) -> int | None:
        """``LeaseBook.fits``, at the account's ledger."""
        try:
            book = self.book(ask.account)
        except ValueError:
            return None
        return book.fits(ask)

    def price(self, base_model: str) -> ModelPrice:
        """Price of a base model, by the ledger that has seen most of it."""
        return max((book.price(base_model) for book in self.books), key=lambda p: p.observations)

    @property
    def stats(self) -> LeaseStats:
        """Figures over all books; ``renew_us`` is the slowest's."""
        each = [book.stats for book in self.books]
        found = LeaseStats(**{name: sum(getattr(s, name) for s in each) for name in _SUMMED})
        found.free = sum((s.free for s in each), ZERO)
        found.open = sum((s.open for s in each), ZERO)
        found.renew_us = max(s.renew_us for s in each)
        return found

    @property
    def lines(self) -> Collection[Line]:
        """Every account that has been asked for, at any ledger."""
        return list(chain.from_iterable(book.lines for book in self.books))

    def age_s(self) -> float:
        """``LeaseBook.age_s`` of the ledger that has not answered for longest."""
        return max(book.age_s() for book in self.books)

    def start(self) -> None:
        """Begin to renew at all ledgers."""
        for book in self.books:
            book.start()

    async def close(self) -> None:
        """Give all leases back; at most as long as the slowest book takes."""
        await asyncio.gather(*(book.close() for book in self.books))
