"""Load on a running platform, and SIGKILLs under it, of each kind of process.

The load is mixed (chat, completions, embeddings; whole and streamed) and remembers what it was
told: a request is *acknowledged* when its answer was complete, *begun* when only its headers came.
Afterwards ``benchmarks.books`` compares that with the audit trail and the ledger.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from benchmarks.platform import Platform

REQUEST_ID = "x-gatehouse-request-id"
WHO = ("data-scientist", "data-scientist", "hr-analyst")
"""Identities of the load; a data scientist may have the most requests in flight."""


@dataclass
class Told:
    """What clients were told."""

    acknowledged: dict[str, str] = field(default_factory=dict)
    """Request id of each complete answer, with the identity that asked."""
    begun: set[str] = field(default_factory=set)
    """Ids of answers that began with status 200 and broke off."""
    refused: Counter[int] = field(default_factory=Counter)
    """Other statuses; 0 for a connection that broke before any."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Load:
    """Clients that ask one request after the other until told to stop."""

    def __init__(self, platform: Platform, clients: int, seed: int) -> None:
        self.told = Told()
        self._platform = platform
        self._stop = threading.Event()
        self._tokens = {who: platform.token(who) for who in set(WHO)}
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(seed + number),), daemon=True)
            for number in range(clients)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> Told:
        """End; gives what clients were told."""
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
        return self.told

    def _run(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            # A new connection for each: what is measured here is not speed.
            with httpx.Client(base_url=self._platform.url, timeout=60, trust_env=False) as client:
                who = rng.choice(WHO)
                path, body = _ask(rng)
                if who != "data-scientist" and path.endswith("embeddings"):
                    continue
                self._one(client, who, path, body)
            time.sleep(0.02)

    def _one(self, client: httpx.Client, who: str, path: str, body: dict[str, Any]) -> None:
        told, request_id = self.told, ""
        headers = {"authorization": f"Bearer {self._tokens[who]}"}
        try:
            with client.stream("POST", path, json=body, headers=headers) as answer:
                if answer.status_code == 200:
                    request_id = answer.headers[REQUEST_ID]
                text = answer.read()
        except httpx.HTTPError:
            with told.lock:
                if request_id:
                    told.begun.add(request_id)
                else:
                    told.refused[0] += 1
            time.sleep(0.1)
            return
        whole = not body.get("stream") or text.endswith(b"data: [DONE]\n\n")
        with told.lock:
            if answer.status_code != 200:
                told.refused[answer.status_code] += 1
            elif whole:
                told.acknowledged[request_id] = who
            else:
                told.begun.add(request_id)
        if answer.status_code != 200:
            time.sleep(0.1)


def _ask(rng: random.Random) -> tuple[str, dict[str, Any]]:
    tokens = rng.choice((4, 16, 48))
    words = " ".join(rng.choice(("what", "is", "the", "large", "model", "for")) for _ in range(9))
    match rng.randrange(8):
        case 0:
            return "/v1/embeddings", {"model": "vectors", "input": [words, words[::-1]]}
        case 1:
            ask = {"prompt": words, "max_tokens": tokens, "n": 2}
            return "/v1/completions", {"model": "small", **ask}
        case kind:
            model = "large" if kind == 2 else "small"
            body = {"messages": [{"role": "user", "content": words}], "max_tokens": tokens}
            return "/v1/chat/completions", {"model": model, **body, "stream": kind > 4}


@dataclass
class Killer:
    """Kills one kind of process again and again, each time it is back.

    Args:
        name: What it kills.
        find: Gives the process to kill, or raises while there is none.
        ready: Whether what was killed has taken up its work again.
        kills: How often.
        rest_s: Time under load between its return and the next kill.
    """

    name: str
    find: Callable[[], psutil.Process]
    ready: Callable[[], bool]
    kills: int
    rest_s: float
    done: int = 0
    back_s: list[float] = field(default_factory=list)
    """Seconds from each kill until it was back."""

    def run(self, deadline: float) -> None:
        """Kill until done or until ``deadline`` (monotonic seconds)."""
        while self.done < self.kills and time.monotonic() < deadline:
            if not _holds(self.ready):
                time.sleep(0.2)
                continue
            time.sleep(self.rest_s)
            try:
                victim = self.find()
                victim.kill()
            except (LookupError, psutil.Error):
                time.sleep(0.2)
                continue
            killed = time.monotonic()
            self.done += 1
            psutil.wait_procs([victim], timeout=10)
            while not _holds(self.ready) and time.monotonic() < deadline:
                time.sleep(0.1)
            self.back_s.append(round(time.monotonic() - killed, 1))


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except (httpx.HTTPError, LookupError, psutil.Error, KeyError, ValueError):
        return False


def killers(p: Platform, kills: int) -> list[Killer]:
    """One for the gateway, the ledger, the sealer, and each of the engines, which share theirs.

    The cores and the replicas of engines die in turn: the first leaves a replica that reports its
    loss, the second nobody.
    """
    models = ["small", "large", "vectors"]

    def process(fragment: str) -> Callable[[], psutil.Process]:
        return lambda: p.replica(fragment)

    def parts() -> dict[str, bool]:
        found: dict[str, bool] = p.http.get("/readyz").json()["parts"]
        return found

    def engine_ready(model: str) -> Callable[[], bool]:
        place = f"model {models.index(model) + 1}"
        return lambda: parts()[place]

    def engine(model: str) -> Callable[[], psutil.Process]:
        turn = iter(range(1 << 30))

        def find() -> psutil.Process:
            replica = p.replica(f"Engine-{model}")
            return p.processes("EngineCore", replica)[0] if next(turn) % 2 else replica

        return find

    def alive(fragment: str) -> Callable[[], bool]:
        return lambda: bool(p.replica(fragment))

    each = -(-kills // len(models))
    return [
        Killer("gateway", process("GatewayIngress"), lambda: bool(parts()), kills, 4.0),
        Killer("ledger", process("LedgerActor"), alive("LedgerActor"), kills, 6.0),
        Killer("sealer", process("AuditSealer"), alive("AuditSealer"), kills, 6.0),
        *(Killer(f"engine {m}", engine(m), engine_ready(m), each, 2.0) for m in models),
    ]


def kill_all(found: list[Killer], most_s: float) -> None:
    """Let all of them kill at the same time."""
    deadline = time.monotonic() + most_s
    threads = [threading.Thread(target=each.run, args=(deadline,)) for each in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
