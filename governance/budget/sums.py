"""Whether a budgets file adds up: what it promises below fits into what it allows above."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from governance.budget.windows import most_windows

if TYPE_CHECKING:
    from governance.budget.config import AccountConfig, BudgetsConfig, WindowSection
    from governance.budget.state import Override
    from governance.types import Amount

_QUANTITIES = ("gpu_seconds", "tokens")


def check_sums(config: BudgetsConfig) -> None:
    """Look at cohorts and the organisation.

    Raises:
        ValueError: Names what does not fit into what, with both figures.
    """
    for name, account in config.accounts.items():
        if account.cohort is not None and account.cohort not in config.cohorts:
            raise ValueError(f"account {name} is in cohort {account.cohort}, which is not named")
    if config.default_account is not None and config.default_account.cohort is not None:
        raise ValueError("default_account cannot be in a cohort: nobody knows how many there are")
    for name, cohort in config.cohorts.items():
        members = {n: a for n, a in config.accounts.items() if a.cohort == name}
        for member, account in members.items():
            if account.span != cohort.span:
                raise ValueError(
                    f"account {member} and its cohort {name} have different windows; they lend"
                    " within one"
                )
        _fits(f"cohort {name}", cohort, members.items())
        if cohort.gpu_seconds is None and cohort.tokens is None:
            continue
        for quantity in _QUANTITIES:
            limit = getattr(cohort, quantity)
            open_ended = [n for n, a in members.items() if getattr(a, quantity) is None]
            if limit is not None and open_ended:
                raise ValueError(
                    f"cohort {name} limits {quantity}, but account {open_ended[0]} does not"
                )
    if config.organisation is not None:
        _organisation(config)


def check_override(
    config: BudgetsConfig,
    overrides: Mapping[str, Override],
    spent: Mapping[str, Amount],
    account: str,
    gpu_us: int | None,
    tokens: int | None,
) -> None:
    """Look at limits that somebody sets for a time, beside those that are set already.

    What a department spent under a higher limit that was cleared counts as its limit (of a cohort's
    members the cohort's limit counts, whatever they borrowed).

    One that is lower than the file's gives nobody else more: it may end before theirs does.

    Raises:
        ValueError: With them the file would not add up.
    """
    if config.organisation is None and not config.cohorts:
        return
    wanted = {name: (o.gpu_us, o.tokens) for name, o in overrides.items()}
    wanted[account] = (gpu_us, tokens)
    accounts = dict(config.accounts)
    for name, (us, count) in wanted.items():
        found = accounts.get(name)
        if found is None:
            continue
        changes = {}
        if us is not None:
            changes["gpu_seconds"] = max(found.gpu_seconds or 0, -(-us // 1_000_000))
        if count is not None:
            changes["tokens"] = max(found.tokens or 0, count)
        accounts[name] = found.model_copy(update=changes)
    for name, found in accounts.items():
        used = spent.get(name)
        if used is None or found.cohort is not None:
            continue
        changes = {}
        if found.gpu_seconds is not None:
            changes["gpu_seconds"] = max(found.gpu_seconds, -(-used.gpu_us // 1_000_000))
        if found.tokens is not None:
            changes["tokens"] = max(found.tokens, used.tokens)
        accounts[name] = found.model_copy(update=changes)
    check_sums(config.model_copy(update={"accounts": accounts}))


def _organisation(config: BudgetsConfig) -> None:
    organisation = config.organisation
    assert organisation is not None
    if config.default_account is not None:
        raise ValueError(
            "organisation has a limit, but default_account gives any number of departments a"
            " budget; name the departments, or take one of the two out"
        )
    for quantity in _QUANTITIES:
        limit = getattr(organisation, quantity)
        if limit is None:
            continue
        total, seen = 0, set()
        for name, account in config.accounts.items():
            cohort = config.cohorts.get(account.cohort or "")
            pooled = None if cohort is None else getattr(cohort, quantity)
            over = account.overdraft
            extra = 0 if over is None else getattr(over, quantity)
            own = getattr(account, quantity)
            if own is None and pooled is None:
                raise ValueError(f"organisation limits {quantity}, but account {name} does not")
            times = most_windows(account.span, organisation.span)
            if times is None:
                raise ValueError(
                    f"account {name} has a longer window than the organisation; nobody could tell"
                    " whether it fits"
                )
            if pooled is None:
                total += (own + extra) * times
            else:
                total += extra * times
                if account.cohort not in seen:
                    seen.add(account.cohort)
                    total += pooled * times
        if total > limit:
            raise ValueError(
                f"the accounts may use {total} {quantity} in a {organisation.window.value}, but"
                f" the organisation has {limit}"
            )


def _fits(place: str, outer: WindowSection, members: Iterable[tuple[str, AccountConfig]]) -> None:
    """Nominal budgets within a cohort's; all have its window."""
    found = list(members)
    for quantity in _QUANTITIES:
        limit = getattr(outer, quantity)
        if limit is None:
            continue
        total = sum(getattr(account, quantity) or 0 for _, account in found)
        if total > limit:
            raise ValueError(f"the accounts of {place} have {total} {quantity}, but it has {limit}")
