"""What a budgets file would have done: by hand, and against the rules of the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from governance.budget.config import BudgetsConfig
from governance.finops.simulate import Past, Simulation, simulate
from governance.types import Amount, Principal, PrincipalKind

MORNING_US = 1_795_507_200_000_000
"""24 November 2026, 08:00 UTC."""
SECOND_US = 1_000_000
DAY_US = 86_400 * SECOND_US


def principal(department: str, key: str = "anna", **more: Any) -> Principal:
    return Principal(
        PrincipalKind.USER, key, "trail", department, frozenset(more.pop("roles", ())), key, **more
    )


def ask(
    second: float, who: Principal, gpu_seconds: float = 1, tokens: int = 10, refused: bool = False
) -> Past:
    took = Amount() if refused else Amount(round(gpu_seconds * SECOND_US), tokens)
    return Past(MORNING_US + round(second * SECOND_US), who, took, refused)


def play(folder: Path, requests: list[Past], **file: Any) -> Simulation:
    return simulate(BudgetsConfig.model_validate(file), requests, folder)


def fate(found: Simulation, account: str) -> tuple[int, int, int | None]:
    """Requests, refusals, and the second of the first one."""
    (one,) = [each for each in found.fates if each.account == account]
    first = None if one.first_us is None else (one.first_us - MORNING_US) // SECOND_US
    return one.requests, one.refused, first


HR = principal("hr")


def test_a_hard_limit_stops_at_the_limit(tmp_path: Path) -> None:
    found = play(
        tmp_path,
        [ask(second, HR) for second in range(10)],
        accounts={"hr": {"window": "day", "gpu_seconds": 4}},
    )
    assert fate(found, "hr") == (10, 6, 4)
    assert (found.requests, found.refused, found.refused_then, found.unknown) == (10, 6, 0, 0)
    (one,), (level,) = found.fates, found.levels
    assert (one.served, one.asked) == (Amount(4 * SECOND_US, 40), Amount(10 * SECOND_US, 100))
    assert one.reasons == {"hr: GPU time per day": 6}
    assert one.last_us == MORNING_US + 9 * SECOND_US
    assert level.spent == one.served
    assert level.exhausted_us == one.first_us
    assert level.thresholds == {"gpu_us 50": 1, "gpu_us 100": 1, "gpu_us 80": 1, "gpu_us 95": 1}


def test_a_smaller_request_still_fits(tmp_path: Path) -> None:
    requests = [ask(0, HR, 3), ask(1, HR, 2), ask(2, HR, 1), ask(3, HR, 0.5, tokens=0)]
    found = play(tmp_path, requests, accounts={"hr": {"window": "day", "gpu_seconds": 4}})
    assert fate(found, "hr") == (4, 2, 1)
    assert found.fates[0].served == Amount(4 * SECOND_US, 20)


def test_tokens_are_limited_as_well(tmp_path: Path) -> None:
    found = play(
        tmp_path,
        [ask(second, HR, tokens=40) for second in range(4)],
        accounts={"hr": {"window": "day", "gpu_seconds": 1000, "tokens": 100}},
    )
    assert fate(found, "hr") == (4, 2, 2)
    assert found.fates[0].reasons == {"hr: tokens per day": 2}


def test_a_window_is_fresh_again(tmp_path: Path) -> None:
    requests = [ask(day * 86_400 + n, HR) for day in range(3) for n in range(3)]
    found = play(tmp_path, requests, accounts={"hr": {"window": "day", "gpu_seconds": 2}})
    assert fate(found, "hr") == (9, 3, 2)
    (level,) = found.levels
    assert level.spent.gpu_us == 2 * SECOND_US
    assert level.thresholds["gpu_us 100"] == 3
    hourly = tmp_path / "hourly"
    hourly.mkdir()
    found = play(
        hourly,
        [ask(n * 600, HR) for n in range(12)],
        accounts={"hr": {"window": "day", "gpu_seconds": 99,
                         "also": [{"window": "hour", "gpu_seconds": 4}]}},
    )  # fmt: skip
    assert fate(found, "hr") == (12, 4, 2400)
    assert found.fates[0].reasons == {"hr@hour: GPU time per hour": 4}


def test_soft_finishes_what_runs(tmp_path: Path) -> None:
    requests = [ask(second, HR, 3) for second in range(5)]
    account = {"window": "day", "gpu_seconds": 4, "mode": "soft"}
    found = play(tmp_path, requests, accounts={"hr": account})
    assert fate(found, "hr") == (5, 3, 2)
    assert found.fates[0].served.gpu_us == 6 * SECOND_US, "the second one was finished"


def test_an_overdraft_is_used_and_ends(tmp_path: Path) -> None:
    account = {
        "window": "day", "gpu_seconds": 4, "mode": "overdraft", "overdraft": {"gpu_seconds": 2},
    }  # fmt: skip
    found = play(tmp_path, [ask(s, HR) for s in range(10)], accounts={"hr": account})
    assert fate(found, "hr") == (10, 4, 6)


COHORT: dict[str, Any] = {
    "cohorts": {"business": {"window": "day"}},
    "accounts": {
        "hr": {"cohort": "business", "window": "day", "gpu_seconds": 10,
               "lend": {"gpu_seconds": 4}},
        "marketing": {"cohort": "business", "window": "day", "gpu_seconds": 5,
                      "borrow": {"gpu_seconds": 3}},
    },
}  # fmt: skip


def test_borrowing_ends_at_what_is_lent_and_at_what_may_be_borrowed(tmp_path: Path) -> None:
    marketing = principal("marketing")
    requests = [ask(second, marketing) for second in range(12)]
    requests += [ask(100 + second, HR) for second in range(12)]
    found = play(tmp_path, requests, **COHORT)
    assert fate(found, "marketing") == (12, 4, 8)
    assert fate(found, "hr") == (12, 5, 107), "three of its ten are with marketing"
    levels = {level.account: level for level in found.levels}
    assert levels["marketing"].borrowed == Amount(3 * SECOND_US, 0)
    assert levels["marketing"].spent.gpu_us == 8 * SECOND_US
    assert levels["hr"].borrowed == Amount()


def test_parts_and_users_have_caps_of_their_own(tmp_path: Path) -> None:
    file = {
        "accounts": {
            "hr": {
                "window": "day", "gpu_seconds": 9,
                "per_user": {"window": "day", "gpu_seconds": 2},
                "parts": {
                    "screening": {
                        "match": {"applications": ["app-1", "key-1"]}, "window": "day",
                        "gpu_seconds": 3, "per_user": {"window": "day", "gpu_seconds": 9},
                    }
                },
            }
        }
    }  # fmt: skip
    app = principal("hr", "robot", client_id="app-1")
    key = Principal(PrincipalKind.KEY, "key-1", "trail", "hr", frozenset(), "robot-2")
    requests = [ask(n, who) for n, who in enumerate([HR] * 4 + [principal("hr", "ben")] * 3)]
    requests += [ask(50 + n, who) for n, who in enumerate([app, key] * 3)]
    found = play(tmp_path, requests, **file)
    assert fate(found, "hr~anna") == (4, 2, 2)
    assert fate(found, "hr~ben") == (3, 1, 6)
    assert fate(found, "hr/screening~robot") == (3, 1, 54)
    assert fate(found, "hr/screening~robot-2") == (3, 2, 53)
    assert {level.account for level in found.levels} == {"hr", "hr/screening"}, "users are no level"
    assert found.levels[0].spent.gpu_us == 7 * SECOND_US


def test_what_was_refused_then_is_played_as_a_guess(tmp_path: Path) -> None:
    requests = [ask(n, HR, 1 + n) for n in range(3)]
    requests += [ask(10, HR, refused=True), ask(11, principal("hr", "ben"), refused=True)]
    requests += [ask(12, principal("it"), refused=True)]
    found = play(tmp_path, requests, default_account={"window": "day", "gpu_seconds": 100})
    assert (found.refused, found.refused_then) == (0, 3)
    fates = {each.account: each for each in found.fates}
    assert (fates["hr"].guessed, fates["it"].guessed) == (2, 1)
    assert fates["hr"].served.gpu_us == (1 + 2 + 3 + 2 + 2) * SECOND_US
    assert fates["it"].served.gpu_us == 2 * SECOND_US, "nothing is known of it: as anybody's"


def test_departments_without_an_account_are_counted(tmp_path: Path) -> None:
    requests = [ask(0, HR), ask(1, principal("it"))]
    found = play(tmp_path, requests, accounts={"hr": {"window": "day", "gpu_seconds": 4}})
    assert (found.requests, found.unknown, len(found.fates)) == (2, 1, 1)


@pytest.mark.parametrize("shards", [1, 8])
def test_order_and_shards_do_not_matter(tmp_path: Path, shards: int) -> None:
    marketing = principal("marketing")
    requests = [ask(n / 3, who) for n, who in enumerate([marketing, HR] * 10)]
    found = play(tmp_path, requests[::-1], **COHORT, shards=shards)
    other = tmp_path / "other"
    other.mkdir()
    assert found == play(other, requests, **COHORT)
    assert found.from_us == requests[0].ts_us
    assert found.until_us == requests[-1].ts_us


def test_nothing_on_record(tmp_path: Path) -> None:
    found = play(tmp_path, [], **COHORT)
    assert (found.requests, found.refused, found.fates, found.levels) == (0, 0, (), ())
