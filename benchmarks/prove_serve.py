"""``make prove-serve``: the goals of serving, measured on a running platform, one line each.

    goal | measured | holds or falls short

Exit status 1 if any goal falls short. Takes under ten minutes. Raw figures go to
``benchmarks/results/prove_serve.json``.
"""

from __future__ import annotations

import argparse
import base64
import collections
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from joserfc import jwt
from joserfc.jwk import RSAKey

from benchmarks.platform import ROOT, Platform, running
from benchmarks.proof import Proof, until
from deployments.weights import DigestCache, digest_directory

RESULTS = ROOT / "benchmarks" / "results" / "prove_serve.json"
HELLO: Any = [{"role": "user", "content": "Good morning"}]
LONG = {"model": "small", "messages": HELLO, "max_tokens": 900, "min_tokens": 900, "stream": True}
STREAMS = 200


def first_answers(proof: Proof, p: Platform) -> None:
    """Starting, identities, models, versions, SDK."""
    proof.add(
        "every engine ready within 100 s of the command", f"{p.ready_s:.0f} s", p.ready_s <= 100
    )
    with proof.goal("the sample identities see different models") as done:
        seen = {
            who: sorted(m.id for m in p.openai(who).models.list())
            for who in ("marketing-intern", "hr-analyst", "data-scientist")
        }
        done(json.dumps(seen), len({tuple(models) for models in seen.values()}) == 3)
    with proof.goal("each answer carries the digest of the weights loaded") as done:
        client = p.openai("data-scientist")
        right = 0
        for model in ("small", "large"):
            answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=4)
            files = ROOT / "data" / "checkpoints" / model
            right += answer.system_fingerprint == digest_directory(
                files, DigestCache(Path(tempfile.mkdtemp()) / "weights.json")
            )
        done(f"{right} of 2 equal a digest made here from the files", right == 2)
    with proof.goal("a stream and a whole answer say the same, with usage") as done:
        ask: Any = {"model": "small", "messages": HELLO, "max_tokens": 16, "temperature": 0}
        whole = client.chat.completions.create(**ask)
        chunks = list(
            client.chat.completions.create(
                **ask, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        same = text == whole.choices[0].message.content
        done(f"same text: {same}, usage: {chunks[-1].usage is not None}", same)


def bad_credentials(proof: Proof, p: Platform) -> None:
    """Wrong, expired, forged, revoked."""
    good = p.token("hr-analyst")
    head, body, signature = good.split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    key = RSAKey.import_key(json.loads((p.state / "keys/dev_idp/dev-idp.json").read_text()))
    other = RSAKey.generate_key(2048, {"kid": key.kid})
    header = {"alg": "RS256", "typ": "at+jwt", "kid": key.kid}
    past = {**claims, "iat": claims["iat"] - 7200, "exp": claims["iat"] - 3600}
    none = base64.urlsafe_b64encode(b'{"alg":"none","typ":"at+jwt"}').rstrip(b"=").decode()
    attempts = {
        "nonsense": "nonsense",
        "no signature": f"{head}.{body}.",
        "alg none": f"{none}.{body}.",
        "changed signature": f"{head}.{body}.{signature[:-8]}AAAAAAAA",
        "expired": jwt.encode(header, past, key),
        "forged with another key": jwt.encode(header, claims, other),
        "other audience": jwt.encode(header, {**claims, "aud": "else"}, key),
        "no audience": jwt.encode(header, {k: v for k, v in claims.items() if k != "aud"}, key),
        "service key made up": "ghk_aaaaaaaaaaaa_aaaaaaaa_aaaaaaa",
    }
    with proof.goal("wrong, expired and forged credentials get 401") as done:
        got = {
            name: p.http.get("/v1/models", headers={"authorization": f"Bearer {token}"}).status_code
            for name, token in attempts.items()
        }
        wrong = {name: status for name, status in got.items() if status != 401}
        done(f"{len(got) - len(wrong)} of {len(got)} refused {wrong or ''}".strip(), not wrong)
    with proof.goal("a service key works, and is refused within 2 s of its revocation") as done:
        admin = p.auth("platform-admin")
        made = p.http.post(
            "/v1/admin/keys",
            json={"name": "proof", "department": "hr", "roles": ["analyst"], "expires_in_s": 600},
            headers=admin,
        ).json()
        bearer = {"authorization": f"Bearer {made['key']}"}
        accepted = until(lambda: p.http.get("/v1/models", headers=bearer).status_code == 200, 2)
        p.http.delete(f"/v1/admin/keys/{made['id']}", headers=admin)
        gone = until(lambda: p.http.get("/v1/models", headers=bearer).status_code == 401, 5)
        done(f"accepted after {accepted:.2f} s, refused after {gone:.2f} s", gone <= 2)
    with proof.goal("a revoked token is refused within 2 s") as done:
        mine = {"authorization": f"Bearer {good}"}
        assert p.http.get("/v1/models", headers=mine).status_code == 200
        p.http.post(
            "/v1/admin/revocations",
            json={"kind": "token", "token_id": claims["jti"]},
            headers=p.auth("security-officer"),
        ).raise_for_status()
        gone = until(lambda: p.http.get("/v1/models", headers=mine).status_code == 401, 5)
        done(f"refused after {gone:.2f} s", gone <= 2)


def hostile_requests(proof: Proof, p: Platform) -> None:
    """A body that is too large; an engine's own port."""
    with proof.goal("a body of 50 MB is refused with 413") as done:
        gateway = p.replica("GatewayIngress")
        before = gateway.memory_info().rss
        started = time.monotonic()
        try:
            status: object = p.http.post(
                "/v1/chat/completions",
                content=b'{"model":"small","messages":"' + b"x" * 50_000_000 + b'"}',
                headers={**p.auth("hr-analyst"), "content-type": "application/json"},
            ).status_code
        except (httpx.WriteError, httpx.RemoteProtocolError) as error:
            status = f"connection closed ({type(error).__name__})"
        grown = (gateway.memory_info().rss - before) >> 20
        took = time.monotonic() - started
        done(f"{status} after {took:.1f} s, gateway grew by {grown} MiB", status == 413)
    with proof.goal("an engine's port serves nothing without a ticket") as done:
        engine = p.replica("Engine-small")
        ports = [
            c.laddr.port for c in engine.net_connections("tcp") if c.status == psutil.CONN_LISTEN
        ]
        served = sum(port_serves(port) for port in ports)
        done(f"{served} of {len(ports)} listening ports answered", served == 0 and bool(ports))


def port_serves(port: int) -> bool:
    """Whether a port gives an answer that looks like a model's to plain HTTP."""
    try:
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json={"model": "small", "messages": HELLO, "max_tokens": 2},
            timeout=5,
            trust_env=False,
        )
    except httpx.HTTPError:
        return False
    return "choices" in answer.text


def stream_lines(p: Platform, started: threading.Event) -> list[str]:
    """Lines of a long stream until it ends or breaks."""
    lines: list[str] = []
    try:
        with httpx.stream(
            "POST",
            f"{p.url}/v1/chat/completions",
            json=LONG,
            headers=p.auth("data-scientist"),
            timeout=60,
            trust_env=False,
        ) as answer:
            for line in answer.iter_lines():
                if line:
                    lines.append(line)
                if len(lines) > 3:
                    started.set()
    except httpx.HTTPError as error:
        lines.append(f"connection broken: {type(error).__name__}")
    return lines


def breakage(proof: Proof, p: Platform) -> None:
    """Hang-up, and each kind of process killed in mid-stream."""
    with proof.goal("a client that hangs up frees the engine within 1 s") as done:
        (core,) = p.processes("EngineCore", p.replica("Engine-small"))
        with httpx.stream(
            "POST",
            f"{p.url}/v1/chat/completions",
            json=LONG,
            headers=p.auth("data-scientist"),
            timeout=60,
            trust_env=False,
        ) as answer:
            next(answer.iter_lines())
        freed = until(lambda: busy_share(core) < 0.2, 10)
        done(f"engine idle {freed:.2f} s after the hang-up (sampled over 0.1 s)", freed <= 1.1)
    cores = lambda: p.processes("EngineCore", p.replica("Engine-small"))  # noqa: E731
    victims: tuple[tuple[str, Callable[[], psutil.Process]], ...] = (
        ("engine process", lambda: cores()[0]),
        ("engine replica", lambda: p.replica("Engine-small")),
    )
    for name, victim in victims:
        with proof.goal(f"{name} killed in mid-stream: an error, noticed in 1 s, heals") as done:
            with kill_in_mid_stream(p, victim()) as lines:
                noticed = p.wait_unready()
                healed = p.wait_ready()
            last = lines[-1]
            done(
                f"last line {last[:60]!r}, noticed in {noticed:.2f} s, ready after {healed:.0f} s",
                "engine_failed" in last and noticed <= 1,
            )
    with proof.goal("gateway killed in mid-stream: no [DONE], heals") as done:
        with kill_in_mid_stream(p, p.replica("GatewayIngress")) as lines:
            healed = p.wait_ready()
        done(f"last line {lines[-1][:60]!r}, ready after {healed:.0f} s", "[DONE]" not in lines[-1])


@contextmanager
def kill_in_mid_stream(p: Platform, victim: psutil.Process) -> Iterator[list[str]]:
    """Kill a process while a stream runs; the list holds the stream's lines at the end."""
    started = threading.Event()
    lines: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(stream_lines, p, started)
        if not started.wait(60):
            raise TimeoutError("the stream did not start")
        victim.kill()
        yield lines
        lines.extend(future.result(60))


def crowd(proof: Proof, p: Platform) -> None:
    """Two hundred streams at once on two cores."""
    with proof.goal(f"{STREAMS} concurrent streams: only 200, 429 or 503, and flat memory") as done:
        gateway = p.replica("GatewayIngress")
        before = gateway.memory_info().rss
        admin = p.auth("platform-admin")
        # Four applications of fifty streams each: one principal may have 64 at once.
        keys = [
            p.http.post(
                "/v1/admin/keys",
                json={
                    "name": f"crowd-{number}",
                    "department": "data-science",
                    "roles": ["data-scientist"],
                    "expires_in_s": 600,
                },
                headers=admin,
            ).json()["key"]
            for number in range(4)
        ]
        time.sleep(0.5)
        peak = before

        def one(number: int) -> int:
            with httpx.stream(
                "POST",
                f"{p.url}/v1/chat/completions",
                json={**LONG, "max_tokens": 100, "min_tokens": 100},
                headers={"authorization": f"Bearer {keys[number % 4]}"},
                timeout=120,
                trust_env=False,
            ) as answer:
                text = answer.read()
                whole = text.endswith(b"data: [DONE]\n\n")
                return answer.status_code if whole or answer.status_code != 200 else 0

        with ThreadPoolExecutor(STREAMS) as pool:
            futures = [pool.submit(one, number) for number in range(STREAMS)]
            while not all(future.done() for future in futures):
                peak = max(peak, gateway.memory_info().rss)
                time.sleep(0.2)
        counts = collections.Counter(future.result() for future in futures)
        grown = (peak - before) >> 20
        done(
            f"{dict(sorted(counts.items()))}, gateway grew by at most {grown} MiB",
            set(counts) <= {200, 429, 503} and counts[200] > 0 and grown < 64,
        )


def cost(proof: Proof, litellm: str | None) -> None:
    """CPU against LiteLLM, by the gateway benchmark in its short form."""
    command = [sys.executable, "-m", "benchmarks.gateway.run", "--quick"]
    if litellm:
        command += ["--litellm", litellm]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "gateway.json"
        run = subprocess.run(
            [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True
        )
        if not out.exists():
            reason = (run.stderr.strip() or "no output").splitlines()[-1][:160]
            proof.add("CPU of a plain request at most a tenth of LiteLLM's", reason, False)
            return
        for goal in json.loads(out.read_text())["goals"]:
            proof.add(goal["goal"], goal["measured"], goal["holds"])


def busy_share(process: psutil.Process) -> float:
    """Share of one core that a process used over the next 0.1 s."""
    before = sum(process.cpu_times()[:2])
    time.sleep(0.1)
    return (sum(process.cpu_times()[:2]) - before) / 0.1


def main() -> int:
    """Run every proof."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--litellm", help="Python of an environment with litellm[proxy]")
    parser.add_argument("--skip-litellm", action="store_true", help="leave the comparison out")
    options = parser.parse_args()
    proof = Proof()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, running(Path(directory)) as platform:
        for part in (first_answers, bad_credentials, hostile_requests, crowd, breakage):
            part(proof, platform)
        left = platform.stop()
        code = platform.process.returncode
        proof.add(
            "SIGTERM stops everything that was started",
            f"exit {code}, {len(left)} processes left",
            code == 0 and not left,
        )
    if not options.skip_litellm:
        cost(proof, options.litellm)
    took = time.monotonic() - started
    proof.add("this proof takes under ten minutes", f"{took:.0f} s", took < 600)
    proof.save(RESULTS, "ray", "openai", "gatehouse")
    return proof.code


if __name__ == "__main__":
    raise SystemExit(main())
