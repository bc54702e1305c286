"""Five weeks of a house that spends: departments, parts, applications and persons, by a fixed seed.

Marketing works office hours and has a cap for each person; human resources has an application and
a part for it; data science runs batches at night. Sums are kept beside the trail, so that tests
hold what is read from it against what was written.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from typing import Any

from tests.trail import Trail

FIRST = date(2026, 10, 26)
"""A Monday."""
AFTER = date(2026, 11, 30)
PERSONS = {"hr": 3, "marketing": 6, "data-science": 2}
HOSTILE = '=HYPERLINK("http://x","<b>|y")'
"""An application that somebody registered to be read by a spreadsheet, or as markup."""


class Spending:
    """What was written, summed up."""

    def __init__(self) -> None:
        self.charged_us: dict[str, int] = defaultdict(int)
        """By department."""
        self.tokens: dict[str, int] = defaultdict(int)
        self.accounts: dict[str, int] = defaultdict(int)
        """Charged by the account that was charged."""
        self.november_us: dict[str, int] = defaultdict(int)
        """By department, in November alone."""
        self.requests = 0
        self.refused = 0


def person(department: str, number: int) -> str:
    """A pseudonym."""
    return hashlib.sha256(f"{department} {number}".encode()).hexdigest()


def spend(trail: Trail, seed: int = 7) -> Spending:
    """Write five weeks."""
    draw, sums, number = random.Random(seed), Spending(), 0
    day = FIRST
    while day < AFTER:
        for department, persons in PERSONS.items():
            for hour in _hours(draw, department, day):
                number += 1
                at = datetime(day.year, day.month, day.day, hour, tzinfo=UTC) + timedelta(
                    microseconds=draw.randrange(3_500_000_000)
                )
                _request(trail, draw, sums, number, department, persons, at)
        day += timedelta(days=1)
    _refuse(trail, sums)
    _administer(trail)
    return sums


def _hours(draw: random.Random, department: str, day: date) -> list[int]:
    """When requests of a day begin, in order."""
    if department == "data-science":
        return sorted(draw.choices(range(1, 5), k=8))
    weekend = day.weekday() >= 5
    busy = {"hr": 9, "marketing": 16}[department]
    return sorted(draw.choices(range(8, 18), k=2 if weekend else busy))


def _request(
    trail: Trail,
    draw: random.Random,
    sums: Spending,
    number: int,
    department: str,
    persons: int,
    at: datetime,
) -> None:
    who = person(department, draw.randrange(persons))
    app = "desk"
    account = department
    if department == "marketing":
        account = f"marketing~{who}"
    elif department == "hr" and draw.random() < 0.4:
        app, account = "hr-screening", "hr/screening"
    elif department == "data-science" and number % 40 == 0:
        app = HOSTILE
    model = "large" if draw.random() < 0.3 else "small"
    gpu_us = round(draw.lognormvariate(14.5, 0.6)) * (4 if model == "large" else 1)
    prompt, answer = draw.randrange(50, 2000), draw.randrange(10, 400)
    charged_us = gpu_us * 2 if model == "large" else gpu_us
    ended = at + timedelta(seconds=3)
    trail.write(
        "inference.completed", f"{at:%Y-%m-%d %H:%M:%S.%f}", principal_kind="user",
        department=department, subject_key=who, client_id=app, roles=["employee"],
        operation="chat", request_id=f"q{number}", reservation_id=f"rsv_g_{number}",
        budget_account=account, request_model=model, response_model=model,
        ts_end_us=_us(ended), outcome="completed", status=200, input_tokens=prompt,
        output_tokens=answer, gpu_us=gpu_us, charged_us=charged_us, gpu_us_method="step_split",
        latency_us=3_000_000,
    )  # fmt: skip
    sums.requests += 1
    sums.charged_us[department] += charged_us
    sums.tokens[department] += prompt + answer
    sums.accounts[account] += charged_us
    if ended.month == 11:
        sums.november_us[department] += charged_us


def _refuse(trail: Trail, sums: Spending) -> None:
    for minute in range(5):
        trail.write(
            "inference.refused", f"2026-11-27 15:0{minute}:00", writer="gw-2",
            principal_kind="user", department="marketing", subject_key=person("marketing", 1),
            client_id="desk", roles=["employee"], operation="chat", request_id=f"no{minute}",
            request_model="large", outcome="refused", status=429, error_code="budget_exhausted",
            budget_account=f"marketing~{person('marketing', 1)}",
        )  # fmt: skip
        sums.refused += 1


def _administer(trail: Trail) -> None:
    changes: list[dict[str, Any]] = [
        {"event_type": "budget.set", "at": "2026-11-10 09:00:00", "department": "hr",
         "budget_account": "hr", "state": "overridden", "reason_code": "quarter end",
         "detail": '{"gpu_us":90000000,"tokens":null}'},
        {"event_type": "budget.transfer", "at": "2026-11-12 09:00:00", "department": "marketing",
         "budget_account": "marketing", "reason_code": "fair in | Cologne",
         "detail": '{"gpu_us":30000000,"source":"hr","target":"marketing","tokens":0}'},
        {"event_type": "budget.threshold", "at": "2026-11-27 14:00:00", "department": "marketing",
         "budget_account": "marketing",
         "detail": '{"limit":1,"quantity":"gpu_us","spent":1,"threshold":80}'},
    ]  # fmt: skip
    for change in changes:
        trail.write(
            change.pop("event_type"), change.pop("at"), writer="ledger-1",
            subject_key=person("platform", 0), **change,
        )  # fmt: skip


def _us(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
