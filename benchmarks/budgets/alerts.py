"""Alerts, a receiver that fails, a ledger that is killed: ``python -m benchmarks.budgets.alerts``.

A ledger runs as a process of its own. Accounts are charged past every threshold, one step at a
time, while the receiver (a small HTTP server here) answers one in six attempts with 503, and the
ledger is killed with SIGKILL now and then. Afterwards each threshold that was crossed must have
been told: signed so that the receiver verifies it, of one account in order, and where it came twice
under one id. Pauses between attempts are the real ones.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from aiohttp import web

from benchmarks.budgets.ledger_process import LedgerProcess
from deployments.alerts.signing import new_secret, signature
from deployments.ledger_alerts import SECRET_FILE
from deployments.ledger_budgets import Budgets
from deployments.ledger_calls import LedgerCalls
from governance.budget.config import BudgetsConfig
from governance.budget.messages import RenewRequest, Settlement
from governance.errors import LedgerUnavailable
from governance.types import Amount

RESULTS = Path(__file__).parent / "results" / "alerts.json"
SEED = 5
ACCOUNTS = 12
KILLS = 3
THRESHOLDS = (50, 80, 95, 100)
LIMIT = 1000
FAILS = 6
"""One attempt in so many fails."""
PATIENCE_S = 120.0


@dataclass
class Receiver:
    """Verifies, counts, and fails at random."""

    secret: bytes
    draw: Random
    taken: list[tuple[str, str, int, int]] = field(default_factory=list)
    """Id, account, highest threshold, microseconds since it was crossed; in order of arrival."""
    told: set[tuple[str, int]] = field(default_factory=set)
    attempts: int = 0
    unsigned: int = 0

    async def take(self, request: web.Request) -> web.Response:
        """One attempt."""
        body, self.attempts = await request.read(), self.attempts + 1
        name = request.headers["webhook-id"]
        sent_s = int(request.headers["webhook-timestamp"])
        wanted = signature(self.secret, name, sent_s, body)
        if wanted not in request.headers["webhook-signature"].split():
            self.unsigned += 1
        if self.draw.randrange(FAILS) == 0:
            return web.Response(status=503)
        message = json.loads(body)
        data = message["data"]
        crossed = datetime.fromisoformat(message["timestamp"])
        waited_us = (datetime.now(UTC) - crossed) // timedelta(microseconds=1)
        self.taken.append((name, data["account"], data["threshold_percent"], waited_us))
        self.told |= {(data["account"], each) for each in data["thresholds_percent"]}
        return web.Response()


async def _measure(folder: Path, kills: int, accounts: int, seed: int) -> dict[str, Any]:
    draw = Random(seed)
    secret = new_secret(os.urandom)
    path = folder / "secret"
    path.touch(0o600)
    path.write_text(secret)
    os.environ[SECRET_FILE] = str(path)
    receiver = Receiver(base64.b64decode(secret.removeprefix("whsec_")), Random(seed))
    app = web.Application()
    app.router.add_post("/", receiver.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    names = [f"d{number}" for number in range(accounts)]
    config = BudgetsConfig.model_validate(
        {
            "accounts": {name: {"window": "day", "tokens": LIMIT} for name in names},
            "alerts": {"thresholds": THRESHOLDS, "webhook": f"http://127.0.0.1:{port}/"},
        }
    )
    process = LedgerProcess(folder)
    process.start()
    calls = LedgerCalls(process.link, Budgets(config, 1).dump())
    try:
        await calls.ready()
        steps = [(name, share) for share in THRESHOLDS for name in names]
        deaths = set(draw.sample(range(1, len(steps)), kills))
        spent = dict.fromkeys(names, 0)
        for number, (name, share) in enumerate(steps):
            if number in deaths:
                process.kill()
                process.start()
            tokens = LIMIT * share // 100 - spent[name]
            spent[name] += tokens
            await _charge(calls, number, name, tokens)
            await asyncio.sleep(0.3)
        wanted = {(name, share) for name in names for share in THRESHOLDS}
        until_s = time.monotonic() + PATIENCE_S
        while not wanted <= receiver.told and time.monotonic() < until_s:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    finally:
        process.kill()
        await runner.cleanup()
    return _figures(receiver, wanted, kills)


async def _charge(calls: LedgerCalls, number: int, account: str, tokens: int) -> None:
    """Charge an account; said again until the ledger has it, which counts it once."""
    said = Settlement(
        f"rsv_g{number}_1", account, f"req_{number}", "m", "m", 0, Amount(0, tokens), True
    )
    request = RenewRequest(f"g{number}", 1, (), (said,), False)
    while True:
        try:
            await calls.renew(request)
            return
        except LedgerUnavailable:
            await asyncio.sleep(0.2)


def _figures(receiver: Receiver, wanted: set[tuple[str, int]], kills: int) -> dict[str, Any]:
    """What came of it."""
    first: dict[str, tuple[str, int, int]] = {}
    for name, account, threshold, waited_us in receiver.taken:
        first.setdefault(name, (account, threshold, waited_us))
    last: dict[str, int] = {}
    disordered = 0
    for account, threshold, _ in first.values():
        disordered += threshold <= last.get(account, 0)
        last[account] = threshold
    waits_ms = sorted(waited_us // 1000 for _, _, waited_us in first.values())
    return {
        "thresholds": len(wanted),
        "lost": len(wanted - receiver.told),
        "messages": len(first),
        "repeats": len(receiver.taken) - len(first),
        "attempts": receiver.attempts,
        "unsigned": receiver.unsigned,
        "out_of_order": disordered,
        "kills": kills,
        "wait_ms_p50": int(median(waits_ms)) if waits_ms else None,
        "wait_ms_max": waits_ms[-1] if waits_ms else None,
    }


def run(kills: int = KILLS, accounts: int = ACCOUNTS, seed: int = SEED) -> dict[str, Any]:
    """Measure; see the module."""
    with tempfile.TemporaryDirectory(prefix="gatehouse-alerts-") as folder:
        return asyncio.run(_measure(Path(folder), kills, accounts, seed))


def holds(found: dict[str, Any]) -> bool:
    """Whether everything was told, signed and in order."""
    return not (found["lost"] or found["unsigned"] or found["out_of_order"])


def main() -> int:
    """Measure and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--accounts", type=int, default=ACCOUNTS)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    found = run(options.kills, options.accounts, options.seed)
    print(json.dumps(found, indent=1))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"seed": options.seed, **found}, indent=1) + "\n")
    return 0 if holds(found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
