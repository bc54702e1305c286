"""``gatehouse`` against a small gateway over real HTTP: output, exit codes, what is sent."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner, Result

from deployments.cli.errors import Exit, from_answer
from deployments.cli.main import cli, main
from deployments.cli.output import printable

KEY = {
    "object": "service_key",
    "id": "fwwx6jfq3ixv",
    "name": "nightly report",
    "department": "hr",
    "roles": ["employee"],
    "models": None,
    "status": "active",
    "created_at": 1_700_000_000,
    "expires_at": 1_700_086_400,
    "revoked_at": None,
    "last_used_at": None,
}
MODELS = {
    "object": "list",
    "data": [
        {"id": "small", "tier": "small", "operations": ["chat"], "max_model_len": 1024},
        {"id": "large", "tier": "large", "operations": ["chat"], "max_model_len": 2048},
    ],
}


def error(code: str, message: str = "No.", **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "param": None, "code": code, **more}}


@dataclass
class Stub:
    """Answers by method and path; remembers what it was sent."""

    url: str = ""
    answers: dict[tuple[str, str], tuple[int, Any]] = field(default_factory=dict)
    seen: list[tuple[str, str, str | None, Any]] = field(default_factory=list)
    headers: list[tuple[str, str]] = field(default_factory=list)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                authorization = self.headers.get("authorization")
                stub.seen.append((self.command, self.path, authorization, body))
                status, answer = stub.answers.get(
                    (self.command, self.path), (404, error("not_found"))
                )
                raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in stub.headers:
                    self.send_header(name, value)
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_POST = do_PUT = do_DELETE = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), stub.handler())
    stub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield stub
    server.shutdown()
    thread.join()
    server.server_close()


def run(stub: Stub | None, *words: str, stdin: str | None = None) -> Result:
    environment = {"GATEHOUSE_TOKEN": "secret-token", "GATEHOUSE_URL": stub.url if stub else None}
    return CliRunner().invoke(cli, words, env=environment, input=stdin)


def test_models_for_people_and_for_scripts(stub: Stub) -> None:
    stub.answers["GET", "/v1/models"] = 200, MODELS
    assert run(stub, "models").output.splitlines() == [
        "small\tsmall\tchat\t1024",
        "large\tlarge\tchat\t2048",
    ]
    assert json.loads(run(stub, "models", "--json").output) == MODELS
    assert stub.seen[0] == ("GET", "/v1/models", "Bearer secret-token", None)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "invalid_request", Exit.FAILURE),
        (400, "limit_exceeded", Exit.REFUSED),
        (401, "invalid_credential", Exit.DENIED),
        (403, "not_permitted", Exit.DENIED),
        (403, "blocked_by_policy", Exit.REFUSED),
        (404, "model_not_found", Exit.NOT_FOUND),
        (409, "approval_pending", Exit.REFUSED),
        (413, "request_too_large", Exit.FAILURE),
        (429, "rate_limit_exceeded", Exit.REFUSED),
        (429, "overloaded", Exit.UNAVAILABLE),
        (500, "engine_failed", Exit.FAILURE),
        (503, "engine_unavailable", Exit.UNAVAILABLE),
        (504, "engine_timeout", Exit.UNAVAILABLE),
    ],
)
def test_exit_codes(stub: Stub, status: int, code: str, expected: Exit) -> None:
    stub.answers["GET", "/v1/models"] = status, error(code, "It is so.", rule_ids=["r1"])
    result = run(stub, "models")
    assert result.exit_code == expected
    assert result.stderr.splitlines()[0] == f"error: It is so. (rules: r1) [{code}]"
    assert result.stdout == ""


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"error": "text"}', b"", b"\xff"])
def test_a_stranger_at_the_port_is_recognised(stub: Stub, body: bytes) -> None:
    stub.answers["GET", "/v1/models"] = 500, body
    result = run(stub, "models")
    assert result.exit_code == Exit.FAILURE
    assert "may not be Gatehouse" in result.stderr
    stub.answers["GET", "/v1/models"] = 200, body
    result = run(stub, "models")
    assert result.exit_code == Exit.FAILURE
    assert "not a list" in result.stderr


def test_nothing_at_the_port() -> None:
    result = run(None, "models", "--url", "http://127.0.0.1:1")
    assert result.exit_code == Exit.UNAVAILABLE
    assert "nothing answers at http://127.0.0.1:1" in result.stderr
    assert "make serve" in result.stderr


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "file:///etc/passwd", "http://"])
def test_a_wrong_base_url_is_wrong_use(url: str) -> None:
    assert run(None, "models", "--url", url).exit_code == Exit.USAGE


def test_a_token_cannot_smuggle_a_header(stub: Stub) -> None:
    result = run(stub, "models", "--token", "abc\r\nX-Evil: 1")
    assert result.exit_code == Exit.USAGE
    assert stub.seen == []


def sse(*events: Any, done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return "".join([": comment\n\n", *lines, "data: [DONE]\n\n" if done else ""]).encode()


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}], "system_fingerprint": "sha256:ab"}


USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
CHAT = ("POST", "/v1/chat/completions")


def test_chat_streams_the_answer_alone_to_standard_output(stub: Stub) -> None:
    stub.answers[CHAT] = 200, sse(piece("Hel"), piece("lo ✓"), USAGE)
    # Serve's proxy adds a request id of its own; the gateway's counts.
    stub.headers = [
        ("x-gatehouse-model", "small"),
        ("x-gatehouse-decision-id", "dec_1"),
        ("x-gatehouse-request-id", "req_1"),
        ("x-request-id", "another"),
    ]
    result = run(stub, "chat", "--model", "small", "--system", "Be brief", "Say", "hello")
    assert result.exit_code == 0
    assert result.stdout == "Hello ✓\n"
    facts = result.stderr
    for fact in ("model small", "decision dec_1", "request req_1", "version sha256:ab", "3 in"):
        assert fact in facts
    body = stub.seen[0][3]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Say hello"},
    ]
    assert body["stream"] is True
    assert "max_tokens" not in body


def test_chat_takes_the_first_visible_model_and_standard_input(stub: Stub) -> None:
    stub.answers["GET", "/v1/models"] = 200, MODELS
    stub.answers[CHAT] = 200, sse(piece("ok"))
    assert run(stub, "chat", stdin="From a pipe").exit_code == 0
    assert stub.seen[1][3]["model"] == "small"
    assert stub.seen[1][3]["messages"][0]["content"] == "From a pipe"
    assert run(stub, "chat", stdin="  \n").exit_code == Exit.USAGE
    stub.answers["GET", "/v1/models"] = 200, {"object": "list", "data": []}
    assert run(stub, "chat", "Hello").exit_code == Exit.NOT_FOUND


def test_chat_as_json_is_one_document(stub: Stub) -> None:
    stub.answers[CHAT] = 200, {"choices": [], "model": "small"}
    stub.headers = [("x-gatehouse-decision-id", "dec_1")]
    result = run(stub, "chat", "--json", "--model", "small", "--max-tokens", "5", "Hello")
    assert json.loads(result.stdout)["gatehouse"] == {"decision": "dec_1"}
    assert stub.seen[0][3]["max_tokens"] == 5
    assert "stream" not in stub.seen[0][3]


@pytest.mark.parametrize(
    ("stream", "expected", "words"),
    [
        (sse(piece("half"), done=False), Exit.UNAVAILABLE, "not complete"),
        (sse(piece("half"), error("engine_failed", "It broke.")), Exit.FAILURE, "It broke."),
        (b"data: {broken\n\n", Exit.FAILURE, "not an event stream"),
    ],
)
def test_an_answer_that_breaks_off_is_an_error(
    stub: Stub, stream: bytes, expected: Exit, words: str
) -> None:
    stub.answers[CHAT] = 200, stream
    result = run(stub, "chat", "--model", "small", "Hello")
    assert result.exit_code == expected
    assert words in result.stderr


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\rc\x9b\n\té") == "a�[2Jb�c�\n\té"


def test_a_key_is_made_and_only_the_key_goes_to_standard_output(stub: Stub) -> None:
    stub.answers["POST", "/v1/admin/keys"] = 200, {**KEY, "key": "ghk_text"}
    words = ["key", "create", "nightly report", "--department", "hr", "--role", "employee"]
    words += ["--expires-in", "30d", "--model", "small", "--operation", "chat"]
    result = run(stub, *words)
    assert result.stdout == "ghk_text\n"
    assert "not shown again" in result.stderr
    assert stub.seen[0][3] == {
        "name": "nightly report",
        "department": "hr",
        "roles": ["employee"],
        "expires_in_s": 30 * 86_400,
        "models": ["small"],
        "operations": ["chat"],
    }
    assert run(stub, *words[:-4]).exit_code == 0
    assert not {"models", "operations"} & stub.seen[1][3].keys()


@pytest.mark.parametrize("text", ["", "30x", "-1d", "1.5h", "d", "9999999999d"])
def test_durations_that_mean_nothing(stub: Stub, text: str) -> None:
    words = ["key", "create", "n", "--department", "hr", "--role", "r", "--expires-in", text]
    assert run(stub, *words).exit_code == Exit.USAGE
    assert stub.seen == []


def test_rotate_revoke_and_list(stub: Stub) -> None:
    path = "/v1/admin/keys/fwwx6jfq3ixv"
    stub.answers["POST", path + "/rotate"] = 200, {**KEY, "key": "ghk_new"}
    stub.answers["DELETE", path] = 200, {**KEY, "status": "revoked"}
    stub.answers["GET", "/v1/admin/keys"] = 200, {"object": "list", "data": [KEY]}
    assert run(stub, "key", "rotate", KEY["id"], "--grace", "12h").stdout == "ghk_new\n"
    assert stub.seen[0][3] == {"grace_s": 43_200}
    assert "revoked" in run(stub, "key", "revoke", KEY["id"]).stdout
    row = run(stub, "key", "list").stdout.rstrip("\n").split("\t")
    assert row == [
        "fwwx6jfq3ixv",
        "nightly report",
        "hr",
        "employee",
        "any",
        "active",
        "2023-11-15 22:13Z",
        "",
    ]
    assert json.loads(run(stub, "key", "list", "--json").stdout)["data"] == [KEY]


def test_a_key_id_cannot_reach_another_path(stub: Stub) -> None:
    run(stub, "key", "revoke", "../revocations?x=1")
    assert stub.seen[0][1] == "/v1/admin/keys/..%2Frevocations%3Fx%3D1"


def test_revocations(stub: Stub) -> None:
    path = "/v1/admin/revocations"
    entry = {
        "kind": "subject",
        "issuer": "dev",
        "subject": "u1",
        "revoked_at": 1_700_000_000,
        "reason": None,
    }
    stub.answers["POST", path] = 200, entry
    stub.answers["GET", path] = 200, {"object": "list", "data": [entry]}
    assert run(stub, "revoke", "subject", "dev", "u1", "--reason", "left").exit_code == 0
    assert stub.seen[0][3] == {
        "kind": "subject",
        "issuer": "dev",
        "subject": "u1",
        "reason": "left",
    }
    assert run(stub, "revoke", "token", "jti-1").exit_code == 0
    assert stub.seen[1][3] == {"kind": "token", "token_id": "jti-1"}
    assert "u1\tdev" in run(stub, "revoke", "list").stdout


def test_a_whole_token_is_not_sent_to_be_revoked(stub: Stub) -> None:
    assert run(stub, "revoke", "token", "aaa.bbb.ccc").exit_code == Exit.USAGE
    assert stub.seen == []


def test_an_identity_wins_over_a_token_in_the_environment(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(issuer: str, identity: str) -> str:
        asked.append((issuer, identity))
        return "fresh"

    monkeypatch.setattr("deployments.dev_token.fetch_token", fetch)
    stub.answers["GET", "/v1/models"] = 200, MODELS
    assert run(stub, "models", "--as", "hr-analyst").exit_code == 0
    assert stub.seen[0][2] == "Bearer fresh"
    assert asked == [("http://127.0.0.1:8100", "hr-analyst")]
    assert run(None, "token", "hr-analyst", "--issuer", "http://127.0.0.1:9").stdout == "fresh\n"


def test_no_identity_provider() -> None:
    result = run(None, "token", "hr-analyst", "--issuer", "http://127.0.0.1:1")
    assert result.exit_code == Exit.UNAVAILABLE
    assert "make serve" in result.stderr
    assert run(None, "token", "x", "--issuer", "https://login.example.org").exit_code == 5


def test_every_status_of_ours_has_an_exit_code() -> None:
    from governance import errors

    for cls in vars(errors).values():
        if isinstance(cls, type) and issubclass(cls, errors.GatehouseError):
            code = from_answer(cls.status, error(cls.code)).exit_code
            assert (code == Exit.DENIED) == (
                cls.status in {401, 403} and cls.code != "blocked_by_policy"
            )
            assert (code == Exit.NOT_FOUND) == (cls.status == 404)
            if cls.status >= 502:
                assert code == Exit.UNAVAILABLE


def test_version_help_and_completion() -> None:
    assert run(None, "--version").output.startswith("gatehouse, version ")
    for name in cli.list_commands(None):  # type: ignore[arg-type]
        assert run(None, name, "--help").exit_code == 0
    for shell in ("bash", "zsh", "fish"):
        assert "_GATEHOUSE_COMPLETE" in run(None, "completion", shell).output
    assert run(None, "completion", "tcsh").exit_code == Exit.USAGE
    assert run(None, "no-such-command").exit_code == Exit.USAGE


def test_an_unexpected_failure_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: Any) -> None:
        raise KeyError("internals")

    monkeypatch.setattr(cli, "main", broken)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == Exit.FAILURE
    text = capsys.readouterr().err
    assert text.startswith("error: unexpected failure (KeyError)")
    assert "internals" not in text


def test_a_command_starts_without_heavy_imports() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from deployments.cli.main import cli;"
        "CliRunner().invoke(cli, ['models', '--url', 'http://127.0.0.1:1']);"
        "heavy = {'ray', 'torch', 'vllm', 'fastapi', 'pydantic', 'httpx'} & sys.modules.keys();"
        "sys.exit(','.join(sorted(heavy)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
