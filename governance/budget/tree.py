"""The tree of accounts: which account a principal has, and which lie above it.

Names say where an account hangs, so that a charge to an account that the file no longer names still
finds its way up:

    hr                      a department
    hr/recruiting           a part of it: a team or an application
    hr~<principal key>      one user of a department, hr/recruiting~<principal key> of a part
    hr@hour                 a further window of a department; nothing is charged to it alone

A request is charged to a *leaf* and to everything on its *path*: the user, the part, the department
and the department's further windows. A cohort is not on the path: it is where departments borrow.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from governance.budget.config import (
    AccountConfig,
    BudgetsConfig,
    LimitConfig,
    Mode,
    PartConfig,
    PriorityClass,
)
from governance.errors import NoAccount
from governance.types import Amount, Charge, Principal, PrincipalKind

_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
ACCOUNT_PATTERN = re.compile(rf"({_WORD})(?:/({_WORD}))?(?:~({_WORD})|@({_WORD}))?")
_DEPARTMENT = re.compile(_WORD)
ANY_SPAN = ("month", "UTC", 1)
"""Window of an account that the file does not name."""


NOTHING = Amount()


@dataclass(frozen=True, slots=True)
class Node:
    """One account as the file has it."""

    name: str
    department: str
    parent: str | None
    span: tuple[str, str, int] = ANY_SPAN
    """Kind, time zone and first day of its window."""
    limit_us: int | None = None
    limit_tokens: int | None = None
    mode: Mode = Mode.HARD
    priority: PriorityClass | None = None
    """``None``: the policy says."""
    owner: str | None = None
    weight_milli: int = 1000
    cohort: str | None = None
    overdraft: Amount = NOTHING
    borrow: Amount = NOTHING
    lend: Amount = NOTHING
    known: bool = True
    """The file names it, or has a rule that makes it."""
    window: str = field(init=False)
    """Its window, as the ledger remembers it."""

    def __post_init__(self) -> None:
        kind, zone, day = self.span
        window = f"{kind} {zone}" if day == 1 else f"{kind} {zone} {day}"
        object.__setattr__(self, "window", window)

    @property
    def is_user(self) -> bool:
        """Whether it is one user's; there may be very many."""
        return "~" in self.name


def parts_of(name: str) -> tuple[str, str | None, str | None, str | None]:
    """Department, part, user and further window of an account's name.

    Raises:
        ValueError: It cannot be one.
    """
    match = ACCOUNT_PATTERN.fullmatch(name) if len(name) <= 256 else None
    if match is None:
        raise ValueError("not the name of an account")
    department, part, user, window = match.groups()
    return department, part, user, window


def department_of(name: str) -> str:
    """Department that an account belongs to."""
    return parts_of(name)[0]


class Tree:
    """Accounts of one budgets file. Immutable; look-ups are remembered."""

    def __init__(self, config: BudgetsConfig) -> None:
        self.config = config
        self.members: dict[str, tuple[str, ...]] = {
            cohort: tuple(n for n, a in config.accounts.items() if a.cohort == cohort)
            for cohort in config.cohorts
        }
        """Departments by cohort."""
        self.node = lru_cache(maxsize=100_000)(self._node)
        self.path = lru_cache(maxsize=100_000)(self._path)

    def leaf(self, principal: Principal) -> str:
        """Account that a principal's requests are charged to.

        Raises:
            NoAccount: The department has none.
        """
        account = self.config.account(principal.department)
        if account is None or not _DEPARTMENT.fullmatch(principal.department):
            # A department of the name of somebody's account would be charged to that.
            raise NoAccount
        name, limits = principal.department, account.per_user
        for part, config in account.parts.items():
            if _matches(config, principal):
                name, limits = f"{name}/{part}", config.per_user or limits
                break
        if limits is None:
            return name
        return f"{name}~{principal.key}"

    def charge(self, principal: Principal, served_us: int = 0) -> Charge:
        """Where a principal's requests are charged, and how they share engines.

        Raises:
            NoAccount: The department has none.
        """
        leaf = self.leaf(principal)
        node, department = self.node(leaf), self.node(principal.department)
        priority = None if node.priority is None else node.priority.value
        return Charge(leaf, principal.department, priority, department.weight_milli, served_us)

    def exists(self, leaf: str) -> bool:
        """Whether an account may be charged."""
        try:
            return self.node(leaf).known and "@" not in leaf
        except ValueError:
            return False

    def listed(self) -> list[str]:
        """Every account that the file names: departments, their parts and further windows."""
        names = []
        for department, account in self.config.accounts.items():
            names.append(department)
            names += [f"{department}@{limit.window.value}" for limit in account.also]
            names += [f"{department}/{part}" for part in account.parts]
        return names

    def shard(self, name: str) -> int:
        """Which of the ledgers an account lives in: that of its cohort."""
        from zlib import crc32

        department = parts_of(name)[0]
        account = self.config.accounts.get(department)
        home = department if account is None or account.cohort is None else account.cohort
        return crc32(home.encode()) % self.config.shards

    def _path(self, name: str) -> tuple[Node, ...]:
        """An account and all above it, the department's further windows included.

        Raises:
            ValueError: It is no account's name.
        """
        node = self.node(name)
        found = [node]
        while node.parent is not None:
            node = self.node(node.parent)
            found.append(node)
        account = self.config.account(node.name)
        if account is not None and "@" not in name:
            found += [self.node(f"{node.name}@{limit.window.value}") for limit in account.also]
        return tuple(found)

    def _node(self, name: str) -> Node:
        department, part, user, window = parts_of(name)
        account = self.config.account(department)
        parent: str | None = None
        if window is not None:
            return self._further(name, department, window, account)
        if user is not None:
            parent = department if part is None else f"{department}/{part}"
        elif part is not None:
            parent = department
        if account is None:
            return Node(name, department, parent, limit_us=0, limit_tokens=0, known=False)
        config = None if part is None else account.parts.get(part)
        owner = (config.owner if config else None) or account.owner
        mode = (config.mode if config else None) or account.mode
        priority = (config.priority if config else None) or account.priority
        limits: LimitConfig | None = account
        if user is not None:
            limits = (config.per_user if config else None) or account.per_user
        elif part is not None:
            limits = config
        known = limits is not None and (part is None or config is not None)
        if parent is not None:
            # What a department may overdraw is its own: none of its parts has it beside.
            mode = Mode.HARD if mode is Mode.OVERDRAFT else mode
            if limits is None:
                return Node(name, department, parent, known=False, owner=owner, priority=priority)
            return Node(
                name,
                department,
                parent,
                limits.span,
                limits.limit_us,
                limits.tokens,
                mode,
                priority,
                owner,
                known=known,
            )
        over = account.overdraft
        return Node(
            name,
            department,
            None,
            account.span,
            account.limit_us,
            account.tokens,
            account.mode,
            account.priority,
            account.owner,
            account.weight_milli,
            account.cohort,
            NOTHING if over is None else Amount(over.gpu_us, over.tokens),
            Amount(account.borrow.gpu_us, account.borrow.tokens),
            Amount(account.lend.gpu_us, account.lend.tokens),
        )

    @staticmethod
    def _further(name: str, department: str, window: str, account: AccountConfig | None) -> Node:
        for limit in account.also if account is not None else ():
            if account is not None and limit.window.value == window:
                return Node(
                    name,
                    department,
                    None,
                    limit.span,
                    limit.limit_us,
                    limit.tokens,
                    Mode.SOFT if account.mode is Mode.SOFT else Mode.HARD,
                    account.priority,
                    account.owner,
                )
        return Node(name, department, None, known=False)


def _matches(part: PartConfig, principal: Principal) -> bool:
    applications = part.match.applications
    if principal.kind is PrincipalKind.KEY and principal.subject in applications:
        return True
    if principal.client_id is not None and principal.client_id in applications:
        return True
    return not part.match.roles.isdisjoint(principal.roles)
