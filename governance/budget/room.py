"""What is left on an account's path: the least over the accounts on it, borrowing counted."""

from __future__ import annotations

from dataclasses import dataclass

from governance.budget.books import Books
from governance.budget.borrowing import Member, Pool
from governance.budget.config import Mode, PriorityClass
from governance.budget.messages import AccountState, Tight
from governance.budget.state import ZERO, Account, positive
from governance.budget.tree import Node
from governance.types import Amount

LIMITLESS = 1 << 62


@dataclass(frozen=True, slots=True)
class _View:
    """One account on a path: what is used of it, and its limits."""

    node: Node
    account: Account
    limits: tuple[int | None, int | None]


class Rooms:
    """What accounts have left, at one moment.

    Args:
        books: Accounts.
        now_us: Wall time.
    """

    def __init__(self, books: Books, now_us: int) -> None:
        self.books = books
        self.now_us = now_us
        books.count()
        self._pools: dict[tuple[str, int, str], Pool] = {}
        """By cohort, quantity, and what members use: ``held``, ``opened`` or ``spent``."""

    def changed(self, name: str) -> None:
        """What an account holds is another now."""
        self.books.count()
        node = self.books.tree.node(self.books.tree.node(name).department)
        if node.cohort is None:
            return
        view = self._view(node)
        for (cohort, place, basis), pool in self._pools.items():
            if cohort == node.cohort and view.limits[place] is not None:
                pool.put(node.name, self._member(view, place, self._used(view, place, basis)))

    def available(self, name: str, own: Amount, floor: Amount, need: Amount) -> Amount:
        """What a gateway may be lent beyond what its running requests have reserved.

        Args:
            name: The account.
            own: What its lease is counted with now; it is granted anew.
            floor: What its running requests have reserved and is not charged yet.
            need: What waits; what is a department's own and cannot be had is reclaimed.
        """
        held = self.books.state.held
        found = [LIMITLESS, LIMITLESS]
        for node in self.books.tree.path(name):
            view = self._view(node)
            out = held.get(node.name, ZERO) - own + floor
            used = view.account.spent + out
            for place, (taken, limit) in enumerate(zip(_pair(used), view.limits, strict=True)):
                if limit is None:
                    continue
                if node.cohort is None:
                    left = limit - taken
                else:
                    left = self._lent(view, place, taken, _pair(need)[place])
                found[place] = min(found[place], left)
        return positive(Amount(*found))

    def _lent(self, view: _View, place: int, used: int, need: int) -> int:
        """What a member of a cohort may still use, and whether it must be given back to it."""
        cohort, name = view.node.cohort, view.node.name
        assert cohort is not None
        pool, member = self._pool(cohort, place, "held"), self._member(view, place, used)
        key = (cohort, place)
        found = pool.room(name, member, lending=not self.books.reclaims(key))
        total = found.own + found.borrowed
        entitled = max(0, member.nominal - member.used)
        if need > total and entitled > total and pool.borrowers(name):
            self.books.reclaim(key)
        return total

    def state(self, name: str) -> AccountState:
        """An account as people see it, and as gateways reserve by."""
        tree, held, opened = self.books.tree, self.books.state.held, self.books.state.opened
        view = self._view(tree.node(name))
        node, account = view.node, view.account
        override = self.books.state.overrides.get(name)
        rests, reaches = [LIMITLESS] * 2, [LIMITLESS] * 2
        tight: list[Tight | None] = [None, None]
        limited, over, stops = [False, False], False, False
        for above in tree.path(name):
            each = view if above.name == name else self._view(above)
            leased, reserved = held.get(above.name, ZERO), opened.get(above.name, ZERO)
            stops = stops or (each.limits != (None, None) and above.mode is not Mode.SOFT)
            for place, limit in enumerate(each.limits):
                if limit is None:
                    continue
                limited[place] = True
                spent = _pair(each.account.spent)[place]
                rest = self._left(each, place, spent + _pair(leased)[place], "held")
                reach = self._left(each, place, spent + _pair(reserved)[place], "opened")
                over = over or self._left(each, place, spent, "spent") <= 0
                rests[place] = min(rests[place], rest)
                if reach < reaches[place] or tight[place] is None:
                    reaches[place] = reach
                    tight[place] = Tight(
                        above.name,
                        each.account.window.split()[0],
                        each.account.end_us,
                        limit,
                        spent,
                        above.owner,
                    )
        department = self.books.state.accounts.get(node.department)
        return AccountState(
            account=name,
            window=account.window.split()[0],
            window_start_us=account.start_us,
            reset_us=account.end_us,
            limit_us=view.limits[0],
            limit_tokens=view.limits[1],
            spent=account.spent,
            leased=held.get(name, ZERO),
            open=opened.get(name, ZERO),
            overridden_until_us=override.expires_us if override else None,
            parent=node.parent,
            cohort=node.cohort,
            owner=node.owner,
            mode=node.mode.value,
            priority_class=(node.priority or PriorityClass.STANDARD).value,
            weight_milli=node.weight_milli,
            moved=account.moved,
            overdraft=node.overdraft,
            borrowed=self._borrowed(view),
            borrow=node.borrow,
            lend=node.lend,
            total=account.total,
            rest_us=max(0, rests[0]) if limited[0] else None,
            rest_tokens=max(0, rests[1]) if limited[1] else None,
            reach_us=max(0, reaches[0]) if limited[0] else None,
            reach_tokens=max(0, reaches[1]) if limited[1] else None,
            over=over,
            stops=stops,
            tight_us=tight[0],
            tight_tokens=tight[1],
            served_us=0 if department is None else department.total.gpu_us,
        )

    def spare(self, name: str) -> Amount:
        """What an account has of its own and has neither spent nor lent out."""
        view = self._view(self.books.tree.node(name))
        used = view.account.spent + self.books.state.held.get(name, ZERO)
        found = [0, 0]
        for place, limit in enumerate(view.limits):
            if limit is None:
                continue
            taken = _pair(used)[place]
            if view.node.cohort is None:
                found[place] = limit - taken
            else:
                member = self._member(view, place, taken)
                pool = self._pool(view.node.cohort, place, "held")
                found[place] = pool.room(name, member, lending=False).own
        return positive(Amount(*found))

    def _left(self, view: _View, place: int, used: int, basis: str) -> int:
        """What is left of one account, if others hold what they do, or only what they spent."""
        limit = view.limits[place]
        assert limit is not None
        if view.node.cohort is None:
            return limit - used
        member = self._member(view, place, used)
        free = self._pool(view.node.cohort, place, basis).free(view.node.name, member)
        return min(member.nominal + member.borrow - used, free)

    def _member(self, view: _View, place: int, used: int) -> Member:
        node = view.node
        standing = self.books.standing(node, view.account, self.now_us)
        return Member(
            nominal=view.limits[place] or 0,
            lend=_pair(node.lend)[place],
            borrow=_pair(node.borrow)[place],
            used=used,
            standing=_pair(standing)[place],
        )

    def _pool(self, cohort: str, place: int, basis: str) -> Pool:
        key = (cohort, place, basis)
        pool = self._pools.get(key)
        if pool is None:
            members = {}
            for name in self.books.tree.members[cohort]:
                view = self._view(self.books.tree.node(name))
                if view.limits[place] is not None:
                    used = self._used(view, place, basis)
                    members[name] = self._member(view, place, used)
            pool = self._pools[key] = Pool(members, self._shared(cohort, place))
        return pool

    def _used(self, view: _View, place: int, basis: str) -> int:
        """What an account spent, and holds or has reserved."""
        state, used = self.books.state, view.account.spent
        if basis == "held":
            used += state.held.get(view.node.name, ZERO)
        elif basis == "opened":
            used += state.opened.get(view.node.name, ZERO)
        return _pair(used)[place]

    def _shared(self, cohort: str, place: int) -> int:
        """What a cohort has beyond its members' nominal budgets."""
        tree = self.books.tree
        config = tree.config.cohorts[cohort]
        limit = (config.limit_us, config.tokens)[place]
        if limit is None:
            return 0
        nominal = 0
        for name in tree.members[cohort]:
            node = tree.node(name)
            nominal += (self._view(node).limits[place] or 0) - _pair(node.overdraft)[place]
        return max(0, limit - nominal)

    def _borrowed(self, view: _View) -> Amount:
        if view.node.cohort is None:
            return ZERO
        used = view.account.spent + self.books.state.held.get(view.node.name, ZERO)
        pairs = zip(_pair(used), view.limits, strict=True)
        return Amount(*(0 if limit is None else max(0, taken - limit) for taken, limit in pairs))

    def _view(self, node: Node) -> _View:
        return _View(node, self.books.view(node.name, self.now_us), self.books.limits(node))


def _pair(amount: Amount) -> tuple[int, int]:
    return amount.gpu_us, amount.tokens
