"""Compare wire forms between gateway and engine replica; see README.md for the method.

python -m benchmarks.data_plane.run            measure, write results/<time>.json, print a table
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.data_plane.instant import EVENT, PLAIN, STREAM_EVENTS, dispatch_of
from benchmarks.data_plane.wires import CLIENTS, SEED, SERVERS, SIGNER, Client, verifier_of
from governance.types import Dispatch, EngineChunk, EngineFinished

REQUESTS = {"plain": 1500, "stream": 250, "paced": 0}
"""Requests of a cell; paced ones are ``PACED_ROUNDS`` for each connection, as they take a while."""
PACED_ROUNDS = 5
CONCURRENCY = {"plain": (1, 8, 64), "stream": (1, 8, 64), "paced": (8, 64)}
ROUNDS = 2
"""Each cell is measured this often, in turn; the table shows the better one, JSON has all."""


def cpu_ms(pid: int) -> float:
    """CPU time of all threads of a process so far, in ms (Linux, ns resolution)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total / 1e6


async def serve(wire: str) -> None:
    """Server process: print the port and serve until stdin closes."""
    print(await SERVERS[wire](), flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def drive(wire: str, port: int, server_pid: int) -> None:
    """Client process: measure all cells of one wire form, one JSON line each."""
    client, close = await CLIENTS[wire](port)
    for kind in REQUESTS:
        for concurrency in CONCURRENCY[kind]:
            dispatch = dispatch_of(kind)
            await _load(client, dispatch, concurrency, 2 * concurrency + 10)
            own, theirs, start = cpu_ms(os.getpid()), cpu_ms(server_pid), time.perf_counter()
            wanted = REQUESTS[kind] or PACED_ROUNDS * concurrency
            latencies = await _load(client, dispatch, concurrency, wanted)
            elapsed = time.perf_counter() - start
            count = len(latencies)
            cell = {
                "wire": wire,
                "kind": kind,
                "concurrency": concurrency,
                "requests": count,
                "client_cpu_ms": round((cpu_ms(os.getpid()) - own) / count, 4),
                "server_cpu_ms": round((cpu_ms(server_pid) - theirs) / count, 4),
                "p50_ms": round(statistics.median(latencies), 3),
                "p99_ms": round(statistics.quantiles(latencies, n=100)[98], 3),
                "requests_per_s": round(count / elapsed),
            }
            print(json.dumps(cell), flush=True)
    await close()


async def _load(client: Client, dispatch: Dispatch, concurrency: int, count: int) -> list[float]:
    left = count
    latencies: list[float] = []

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            start = time.perf_counter()
            size = 0
            event: object = None
            async with aclosing(client(dispatch)) as events:
                async for event in events:
                    if isinstance(event, EngineChunk):
                        size += len(event.data)
            latencies.append((time.perf_counter() - start) * 1000)
            if not isinstance(event, EngineFinished) or size not in (
                len(PLAIN),
                STREAM_EVENTS * len(EVENT),
            ):
                raise SystemExit("an answer was not complete")

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return latencies


def ticket_us() -> dict[str, float]:
    """What minting and verifying one ticket costs; part of every figure."""
    dispatch, verifier, count = dispatch_of("plain"), verifier_of(), 2000
    start = time.process_time()
    tickets = [SIGNER.mint(dispatch) for _ in range(count)]
    minted = time.process_time()
    for ticket in tickets:
        verifier.verify(ticket, operation="chat", body=dispatch.body)
    verified = time.process_time()
    return {
        "mint_us": round((minted - start) / count * 1e6, 1),
        "verify_us": round((verified - minted) / count * 1e6, 1),
    }


def measure(wire: str) -> list[dict[str, Any]]:
    """One round over one wire form, in two fresh processes."""
    module = [sys.executable, "-m", "benchmarks.data_plane.run"]
    server = subprocess.Popen(
        [*module, "serve", wire], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout
        port = server.stdout.readline().strip()
        done = subprocess.run(
            [*module, "drive", wire, port, str(server.pid)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=60,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]
    finally:
        server.kill()
        server.wait()


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: the better round of each cell."""
    best: dict[tuple[str, int, str], dict[str, Any]] = {}
    for cell in cells:
        key = (cell["kind"], cell["concurrency"], cell["wire"])
        cost = cell["client_cpu_ms"] + cell["server_cpu_ms"]
        if key not in best or cost < best[key]["cost"]:
            best[key] = {**cell, "cost": cost}
    lines = [
        "| request | concurrency | wire | client CPU ms | server CPU ms | both | p50 ms | p99 ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in REQUESTS:
        for concurrency in CONCURRENCY[kind]:
            for wire in SERVERS:
                c = best[kind, concurrency, wire]
                lines.append(
                    f"| {kind} | {concurrency} | {wire} | {c['client_cpu_ms']:.3f} "
                    f"| {c['server_cpu_ms']:.3f} | {c['cost']:.3f} | {c['p50_ms']:.2f} "
                    f"| {c['p99_ms']:.2f} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Measure everything, write the raw figures, print the table."""
    start = time.monotonic()
    load_before = os.getloadavg()
    cells = [
        {**cell, "round": number}
        for number in range(ROUNDS)
        for wire in SERVERS
        for cell in measure(wire)
    ]
    now = datetime.datetime.now(datetime.UTC)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    result = {
        "when": now.isoformat(timespec="seconds"),
        "commit": commit,
        "seed": SEED,
        "requests": REQUESTS,
        "rounds": ROUNDS,
        "machine": {
            "cores": os.cpu_count(),
            "arch": platform.machine(),
            "kernel": platform.release(),
            "load_before": load_before,
            "load_after": os.getloadavg(),
        },
        "versions": {
            "python": platform.python_version(),
            **{n: version(n) for n in ("uvloop", "aiohttp", "uvicorn", "httptools", "orjson")},
            "cryptography": version("cryptography"),
        },
        "ticket": ticket_us(),
        "seconds": round(time.monotonic() - start),
        "cells": cells,
    }
    path = Path(__file__).parent / "results" / f"{now:%Y%m%dT%H%M%SZ}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(cells))
    print(f"\nticket: {result['ticket']}; {result['seconds']} s; raw: results/{path.name}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", wire]:
            uvloop.run(serve(wire))
        case ["drive", wire, port, pid]:
            uvloop.run(drive(wire, int(port), int(pid)))
        case ["table", path]:
            print(table(json.loads(Path(path).read_text())["cells"]))
        case _:
            main()
