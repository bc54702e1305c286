"""What a message must be like before the ledger looks at it.

Gateways and engines are trusted, but a fault in one of them must not be able to lower what others
spent, to overflow a sum, or to charge a name that cannot be an account. A message is checked as a
whole before anything changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from governance.budget.config import NAME_PATTERN
from governance.budget.messages import MeterReport, RenewRequest
from governance.budget.tree import ACCOUNT_PATTERN
from governance.types import Amount

MOST = 10**15
"""Largest figure in a message: 31 device-years in microseconds. A sum of 9,000 of them still fits
into 64 bits."""
MAX_ITEMS = 100_000
"""Most rows of one message."""
_NAME = re.compile(NAME_PATTERN)


def owns(gateway_id: str, reservation_id: str) -> bool:
    """Whether a reservation id was minted by a gateway: ``rsv_<gateway>_<number>``."""
    head = f"rsv_{gateway_id}_"
    return reservation_id.startswith(head) and reservation_id[len(head) :].isdigit()


def is_name(name: object) -> bool:
    """Whether something may be the name of an account, or an id."""
    return type(name) is str and len(name) <= 256 and _NAME.fullmatch(name) is not None


def is_account(name: object) -> bool:
    """Whether something may be the name of an account that is charged."""
    return (
        type(name) is str
        and len(name) <= 256
        and ACCOUNT_PATTERN.fullmatch(name) is not None
        and "@" not in name
    )


def check_renewal(request: RenewRequest) -> None:
    """Look at a renewal.

    Raises:
        ValueError: A figure is negative or absurd, or a name cannot be one.
    """
    _names([request.gateway_id])
    _figures([request.seq])
    _size(len(request.asks), len(request.settlements))
    if len({ask.account for ask in request.asks}) != len(request.asks):
        raise ValueError("an account is asked for twice")
    for ask in request.asks:
        _accounts([ask.account])
        _amounts(ask.open, ask.need, ask.cushion)
    for settlement in request.settlements:
        _names([settlement.reservation_id])
        _accounts([settlement.account])
        _amounts(settlement.used)
        _figures([settlement.gpu_us or 0, settlement.prompt_bytes, settlement.prompt_tokens])


def check_report(report: MeterReport) -> None:
    """Look at an engine's report.

    Raises:
        ValueError: A figure is negative or absurd, or a name cannot be one.
    """
    _size(len(report.rows))
    _figures([report.seq, report.devices, report.elapsed_us, report.busy_us])
    _figures([report.attributed_us, report.unattributed_us, report.running])
    for row in report.rows:
        _names([row.reservation_id, row.gateway_id])
        _accounts([row.account])
        _figures([row.gpu_us, row.prefill_us, row.decode_us, row.prefill_tokens])
        _figures([row.cached_tokens, row.prompt_tokens, row.decode_tokens])


def _amounts(*amounts: Amount) -> None:
    for amount in amounts:
        _figures((amount.gpu_us, amount.tokens))


def _figures(figures: Iterable[int]) -> None:
    for figure in figures:
        if type(figure) is not int or not 0 <= figure <= MOST:
            raise ValueError("a figure is not a whole number from 0 to 10^15")


def _names(names: Iterable[str]) -> None:
    for name in names:
        if not is_name(name):
            raise ValueError("a name is empty, too long or has characters that no name has")


def _accounts(names: Iterable[str]) -> None:
    for name in names:
        if not is_account(name):
            raise ValueError("the name of an account is not one that can be charged")


def _size(*sizes: int) -> None:
    if max(sizes) > MAX_ITEMS:
        raise ValueError(f"a message has more than {MAX_ITEMS} rows")
