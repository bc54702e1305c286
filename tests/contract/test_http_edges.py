"""What hostile or broken clients send."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.parse

import pytest

from governance.types import Outcome
from tests.contract.conftest import MAX_BODY_BYTES, Server

GOOD = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}


def post(
    server: Server,
    body: bytes,
    path: str = "/v1/chat/completions",
    token: str | None = "hr-analyst",
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    parts = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    sent = {"content-type": "application/json"}
    if token:
        sent["authorization"] = f"Bearer {token}"
    sent.update({name.replace("_", "-"): value for name, value in headers.items()})
    connection.request("POST", path, body, sent)
    answer = connection.getresponse()
    got = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return got


def code(body: bytes) -> str:
    error = json.loads(body)["error"]
    assert set(error) >= {"message", "type", "param", "code", "request_id"}
    return str(error["code"])


def test_no_credential_names_the_scheme(server: Server) -> None:
    status, headers, body = post(server, json.dumps(GOOD).encode(), token="forged")
    assert (status, code(body)) == (401, "invalid_credential")
    assert headers["www-authenticate"].startswith("Bearer")


def test_identity_is_checked_before_the_body_is_read(server: Server) -> None:
    status, _, body = post(server, b"{" * 100, token="forged")
    assert (status, code(body)) == (401, "invalid_credential")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model":' + b'{"a":' * 5_000 + b"1" + b"}" * 5_001,
        json.dumps({**GOOD, "messages": "hello"}).encode(),
        json.dumps({**GOOD, "messages": []}).encode(),
        json.dumps({**GOOD, "temperature": "hot"}).encode(),
        b'{"model":"small","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
        json.dumps({**GOOD, "no_such_field": 1}).encode(),
        json.dumps({**GOOD, "cache_salt": "mine"}).encode(),
        json.dumps(
            {
                "model": "small",
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}
                        ],
                    }
                ],
            }
        ).encode(),
    ],
)
def test_broken_bodies_get_a_client_error(server: Server, body: bytes) -> None:
    status, _, answer = post(server, body)
    assert status == 400
    code(answer)
    assert server.engine.dispatched == []


def test_a_body_that_is_declared_too_large_is_refused_unread(server: Server) -> None:
    parts = urllib.parse.urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port or 0), timeout=5) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer hr-analyst"
            b"\r\ncontent-type: application/json\r\ncontent-length: 52428800\r\n\r\n"
        )
        assert b" 413 " in sock.recv(200)


def test_a_body_that_turns_out_too_large_is_refused(server: Server) -> None:
    parts = urllib.parse.urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port or 0), timeout=5) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer hr-analyst"
            b"\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        try:
            for _ in range(MAX_BODY_BYTES // 0x10000 + 4):
                sock.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before everything was sent
        assert b" 413 " in sock.recv(200)


def test_a_body_that_never_comes_times_out(server: Server) -> None:
    parts = urllib.parse.urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port or 0), timeout=10) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer hr-analyst"
            b"\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n{"
        )
        started = time.monotonic()
        assert b" 408 " in sock.recv(200)
        assert time.monotonic() - started < 5


def test_other_content_types_are_refused(server: Server) -> None:
    status, _, body = post(server, b"model=small", content_type="application/x-www-form-urlencoded")
    assert (status, code(body)) == (415, "unsupported_media_type")


def test_unknown_paths_and_methods(server: Server) -> None:
    assert code(post(server, b"{}", "/v1/nothing")[2]) == "not_found"
    status, headers, body = post(server, b"{}", "/v1/models")
    assert (status, code(body)) == (405, "method_not_allowed")
    assert "GET" in headers["allow"]


def test_identity_headers_of_a_client_count_for_nothing(server: Server) -> None:
    status, _, body = post(
        server,
        json.dumps({**GOOD, "model": "large"}).encode(),
        token="marketing-intern",
        x_forwarded_user="data-scientist",
        x_department="data-science",
        x_request_id="mine",
    )
    assert (status, code(body)) == (404, "model_not_found")
    assert "mine" not in body.decode()


def test_a_hang_up_aborts_the_engine(server: Server) -> None:
    server.engine.hang_at = 1
    parts = urllib.parse.urlsplit(server.url)
    body = json.dumps({**GOOD, "stream": True}).encode()
    with socket.create_connection((parts.hostname, parts.port or 0), timeout=5) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer hr-analyst"
            b"\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
            % (len(body), body)
        )
        assert b" 200 " in sock.recv(100)
    deadline = time.monotonic() + 1
    while server.engine.closed == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.engine.closed == 1
    deadline = time.monotonic() + 1
    while server.audit.kinds != ["decided", "completed"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.audit.entries[-1][1].outcome is Outcome.ABORTED


def test_a_client_that_does_not_read_is_cut_off(server: Server) -> None:
    server.engine.words = ("x" * 100_000,) * 500
    parts = urllib.parse.urlsplit(server.url)
    body = json.dumps({**GOOD, "stream": True}).encode()
    with socket.create_connection((parts.hostname, parts.port or 0), timeout=5) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer hr-analyst"
            b"\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
            % (len(body), body)
        )
        deadline = time.monotonic() + 10
        while server.audit.kinds != ["decided", "completed"] and time.monotonic() < deadline:
            time.sleep(0.05)
    assert server.engine.closed == 1
    assert server.audit.entries[-1][1].outcome is Outcome.ABORTED


def test_nothing_internal_leaks_from_an_unforeseen_failure(server: Server) -> None:
    def broken(dispatch: object) -> object:
        raise RuntimeError("/secret/path and a token")

    server.engine.stream = broken  # type: ignore[assignment, method-assign]
    status, _, body = post(server, json.dumps(GOOD).encode())
    assert (status, code(body)) == (500, "internal_error")
    assert b"secret" not in body


def test_health_needs_no_credential(server: Server) -> None:
    parts = urllib.parse.urlsplit(server.url)
    for path in ("/healthz", "/readyz"):
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
        connection.request("GET", path)
        assert connection.getresponse().status == 200
        connection.close()
