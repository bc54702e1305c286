"""Two hundred streams at once against a gateway that takes fewer; see README.md.

python -m benchmarks.gateway.soak           run, write results/soak-<time>.json, print the figures

Each client asks for a paced stream and asks again when it has ended. A refused one waits as long
as ``Retry-After`` says, or ``BACKOFF_S``. Two bounds show: the parallel requests of one caller
(429, by the gateway's policy) and the requests of a gateway replica (503, by Serve in front of it).
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import datetime
import json
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gateway.cost import process_memory_mb, titled
from benchmarks.gateway.run import facts
from benchmarks.gateway.targets import BUILD, EVENTS, HERE, Target, open_targets, start_serve

CLIENTS = 200
PARALLEL_REQUESTS = 120
"""Streams that the policy allows the caller at once."""
MAX_ONGOING = 150
"""Requests that a gateway replica takes, streams and refusals together."""
MAX_QUEUED = 10
PACE_MS = 20
BACKOFF_S = 1.0
SAMPLE_S = 1.0
FLAT_SHARE = 0.05
"""Memory is flat when the last third of the samples is at most this much above the middle one."""


@dataclass
class Seen:
    """What the clients saw."""

    status: collections.Counter[int] = field(default_factory=collections.Counter)
    whole: int = 0
    """Streams with every event and ``[DONE]``."""
    broken: int = 0
    unlike_openai: collections.Counter[int] = field(default_factory=collections.Counter)
    """Refusals without an OpenAI error object, by status."""
    examples: dict[str, str] = field(default_factory=dict)
    """Body of the first refusal of each status, shortened."""
    running: int = 0
    most_running: int = 0
    """Requests open at once."""
    without_retry_after: collections.Counter[int] = field(default_factory=collections.Counter)
    latency_ms: list[float] = field(default_factory=list)
    refusal_ms: list[float] = field(default_factory=list)


async def client(target: Target, body: bytes, until: float, seen: Seen) -> None:
    """One client: a stream after the other, each on its own connection, until the time is over."""
    while time.monotonic() < until:
        began = time.perf_counter()
        seen.running += 1
        seen.most_running = max(seen.most_running, seen.running)
        status, headers, answer = await ask(target, body)
        seen.running -= 1
        took_ms = (time.perf_counter() - began) * 1000
        seen.status[status] += 1
        if status == 200:
            good = answer.count(b"data: ") == EVENTS and b"data: [DONE]" in answer
            seen.whole += good
            seen.broken += not good
            seen.latency_ms.append(took_ms)
            continue
        seen.refusal_ms.append(took_ms)
        seen.examples.setdefault(str(status), answer[:300].decode(errors="replace"))
        seen.unlike_openai[status] += b'"error"' not in answer or b'"code"' not in answer
        wait = headers.get("retry-after", "")
        seen.without_retry_after[status] += not wait.isdigit()
        await asyncio.sleep(min(float(wait), 5.0) if wait.isdigit() else BACKOFF_S)


async def ask(target: Target, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send one request and read all of the answer; status 0 when there was none."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    except OSError:
        return 0, {}, b""
    try:
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nAuthorization: Bearer "
            + target.token.encode()
            + b"\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )
        head, _, rest = (await reader.read(-1)).partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines[1:])
        }
        words = lines[0].split(" ")
        return (int(words[1]) if len(words) > 1 else 0), headers, rest
    except OSError:
        return 0, {}, b""
    finally:
        writer.close()


async def drive(target: Target, gateway: int, seconds: float) -> tuple[Seen, list[float]]:
    """Run all clients; meanwhile sample the gateway's memory, in MB."""
    body = json.loads(target.bodies["paced"].read_text())
    text = body["messages"][-1]["content"]
    body["messages"][-1]["content"] = text.replace("pace=5", f"pace={PACE_MS}")
    seen, until = Seen(), time.monotonic() + seconds
    payload = json.dumps(body).encode()
    clients = [asyncio.create_task(client(target, payload, until, seen)) for _ in range(CLIENTS)]
    memory = [process_memory_mb(gateway)]
    while not all(task.done() for task in clients):
        await asyncio.sleep(SAMPLE_S)
        memory.append(process_memory_mb(gateway))
    await asyncio.gather(*clients)
    return seen, memory


def judged(seen: Seen, memory: list[float]) -> dict[str, Any]:
    """The figures, and the goal: nothing but 200, 429 and 503, no broken stream, flat memory."""
    third = max(1, len(memory) // 3)
    middle = statistics.mean(memory[third : 2 * third] or memory)
    last = statistics.mean(memory[-third:])
    other = sorted(set(seen.status) - {200, 429, 503})
    return {
        "status": {str(status): count for status, count in sorted(seen.status.items())},
        "most_requests_open": seen.most_running,
        "whole_streams": seen.whole,
        "broken_streams": seen.broken,
        "refusals_without_openai_error": {str(k): v for k, v in seen.unlike_openai.items() if v},
        "refusals_without_retry_after": {
            str(k): v for k, v in seen.without_retry_after.items() if v
        },
        "first_refusal": seen.examples,
        "stream_p50_ms": _quantile(seen.latency_ms, 0.5),
        "stream_p99_ms": _quantile(seen.latency_ms, 0.99),
        "refusal_p50_ms": _quantile(seen.refusal_ms, 0.5),
        "refusal_p99_ms": _quantile(seen.refusal_ms, 0.99),
        "memory_mb": {
            "start": round(memory[0], 1),
            "middle": round(middle, 1),
            "end": round(last, 1),
            "highest": round(max(memory), 1),
        },
        "only_200_429_503": not other,
        "memory_flat": last <= middle * (1 + FLAT_SHARE),
        "holds": not other
        and not seen.broken
        and seen.whole > 0
        and last <= middle * (1 + FLAT_SHARE),
    }


def _quantile(values: list[float], share: float) -> float | None:
    if not values:
        return None
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 1)


def main() -> int:
    """Start the gateway, run the clients, write and print what they saw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    with open_targets() as targets:
        target = start_serve(
            targets,
            "gatehouse",
            "--max-ongoing-requests",
            str(MAX_ONGOING),
            "--max-queued-requests",
            str(MAX_QUEUED),
            "--parallel-requests",
            str(PARALLEL_REQUESTS),
        )
        [gateway] = titled(target.pid, r"^ray::.*GatewayIngress")
        seen, memory = asyncio.run(drive(target, gateway, options.seconds))
    result = judged(seen, memory)
    now = datetime.datetime.now(datetime.UTC)
    path = HERE / "results" / f"soak-{now:%Y%m%dT%H%M%SZ}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "clients": CLIENTS,
        "parallel_requests": PARALLEL_REQUESTS,
        "max_ongoing_requests": MAX_ONGOING,
        "max_queued_requests": MAX_QUEUED,
        "pace_ms": PACE_MS,
        "seconds": options.seconds,
    }
    described = facts(None)
    described["method"] = {
        "loop": "closed; a refused client waits as Retry-After says (5 s at most), or 1 s",
        "memory": "proportional set size of the gateway's replica, each second",
        "figures": "of all answers",
    }
    document = {
        "when": now.isoformat(timespec="seconds"),
        **described,
        "settings": settings,
        "result": result,
        "memory_samples_mb": [round(mb, 1) for mb in memory],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(
        f"goal: {CLIENTS} streams at once: only 200, 429 and 503, no broken stream, flat memory: "
        f"{'holds' if result['holds'] else 'falls short'}"
    )
    print(f"raw figures: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
