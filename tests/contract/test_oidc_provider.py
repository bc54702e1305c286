"""Tokens of an independent, certified OpenID provider pass our verifier; near misses do not.

Our own forge and our own development provider could share a misunderstanding with the verifier.
This provider (npm ``oidc-provider``) shares nothing with it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import selectors
import subprocess
import time
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import parse_qs, urlencode, urlsplit
from urllib.request import HTTPCookieProcessor, HTTPRedirectHandler, Request, build_opener

import pytest

from deployments.jwks_fetch import JwksFetcher
from governance.control.snapshot import Revocations
from governance.errors import NotPermitted, RevokedCredential, Unauthenticated
from governance.identity.authenticator import BearerAuthenticator
from governance.identity.config import IdentityConfig
from governance.types import Principal, PrincipalKind
from tests.contract.node import NODE, install

RESOURCE = "https://gatehouse.example/api"
CALLBACK = "http://127.0.0.1/callback"
START_S = 30.0


class NoRedirect(HTTPRedirectHandler):
    """A redirect is an answer here."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


class Provider:
    """The running provider, and a client of it."""

    def __init__(self, issuer: str) -> None:
        self.issuer = issuer
        self.metadata = json.loads(self._call("GET", "/.well-known/openid-configuration")[1])

    def _call(
        self, method: str, path: str, form: dict[str, str] | None = None, **headers: str
    ) -> tuple[dict[str, str], bytes]:
        url = path if path.startswith("http") else self.issuer + path
        data = urlencode(form).encode() if form is not None else None
        request = Request(url, data, headers, method=method)
        with build_opener().open(request, timeout=10) as answer:
            return dict(answer.headers), answer.read()

    def rotate(self) -> str:
        """Put a new signing key in front; gives its id."""
        return self._call("POST", "/rotate", {})[1].decode()

    def client_credentials(self) -> dict[str, Any]:
        """Token of an application."""
        basic = base64.b64encode(b"nightly-batch:a+secret+for+this+test+run+only").decode()
        form = {"grant_type": "client_credentials", "scope": "llm.use", "resource": RESOURCE}
        endpoint = self.metadata["token_endpoint"]
        answer: dict[str, Any] = json.loads(
            self._call("POST", endpoint, form, authorization=f"Basic {basic}")[1]
        )
        return answer

    def code(self, identity: str, challenge: dict[str, str]) -> dict[str, list[str]]:
        """Authorization request as a browser makes it; gives the parameters of the callback."""
        opener = build_opener(HTTPCookieProcessor(CookieJar()), NoRedirect())
        query = {
            "client_id": "desktop",
            "response_type": "code",
            "redirect_uri": CALLBACK,
            "scope": "openid llm.use",
            "resource": RESOURCE,
            "login_hint": identity,
            **challenge,
        }
        url = f"{self.metadata['authorization_endpoint']}?{urlencode(query)}"
        for _ in range(6):
            with pytest.raises(HTTPError) as caught:
                opener.open(url, timeout=10)
            with caught.value as answer:
                location = answer.headers["location"]
                assert answer.code in (302, 303), answer.read()
            if location.startswith(CALLBACK):
                return parse_qs(urlsplit(location).query)
            url = location if location.startswith("http") else self.issuer + location
        raise AssertionError("the provider never came back to the client")

    def tokens(self, identity: str) -> dict[str, Any]:
        """Tokens of a person: authorization code with PKCE."""
        verifier = secrets.token_urlsafe(48)
        digest = hashlib.sha256(verifier.encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        answer = self.code(identity, {"code_challenge": challenge, "code_challenge_method": "S256"})
        form = {
            "grant_type": "authorization_code",
            "client_id": "desktop",
            "redirect_uri": CALLBACK,
            "code": answer["code"][0],
            "code_verifier": verifier,
        }
        tokens: dict[str, Any] = json.loads(
            self._call("POST", self.metadata["token_endpoint"], form)[1]
        )
        return tokens


def first_line(process: subprocess.Popen[str]) -> str:
    """What the process says first; it has ``START_S`` for it."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        assert selector.select(START_S), "the provider did not start in time"
    line = process.stdout.readline().strip()
    assert line.startswith("http://127.0.0.1:"), "the provider did not start; see its errors"
    return line


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    directory = install(Path(__file__).with_name("oidc_provider"))
    with subprocess.Popen(
        [NODE, "provider.mjs"],
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Provider(first_line(process))
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


class Gate:
    """Our side, configured for the provider."""

    def __init__(self, provider: Provider, **issuer: Any) -> None:
        section = {
            "name": "certified",
            "issuer": provider.issuer,
            "audiences": [RESOURCE],
            "algorithms": ["RS256", "ES256"],
            "types": ["at+jwt"],
            "required_scope": "llm.use",
            **issuer,
        }
        mappings = [
            {"when": {"role": "hr-analyst"}, "grant": ["employee", "analyst"], "department": "hr"},
            {"when": {"client": "nightly-batch"}, "grant": ["batch"], "department": "platform"},
        ]
        config = IdentityConfig.model_validate({"issuers": [section], "mappings": mappings})
        self.steady_s = 1000.0
        self.revoked = Revocations()
        self._door = BearerAuthenticator(
            config,
            fetch=JwksFetcher(allow_loopback_http=True),
            pepper=b"p" * 32,
            service_keys=self,
            revocations=lambda: self.revoked,
            clock=lambda: time.time_ns() // 1000,
            monotonic=lambda: self.steady_s,
            allow_loopback_http=True,
        )

    def check(self, presented: str) -> Principal:
        """No service keys here."""
        raise Unauthenticated()

    async def enter(self, token: str) -> Principal:
        return await self._door.authenticate(f"Bearer {token}")


@pytest.fixture
def gate(provider: Provider) -> Gate:
    return Gate(provider)


async def test_a_person_by_code_and_pkce(provider: Provider, gate: Gate) -> None:
    principal = await gate.enter(provider.tokens("hr-analyst")["access_token"])
    assert principal.kind is PrincipalKind.USER
    assert principal.subject == "hr-analyst"
    assert principal.client_id == "desktop"
    assert principal.key_id == "key-ec"
    assert principal.department == "hr"
    assert principal.roles == {"employee", "analyst"}
    assert principal.token_id
    assert principal.expires_at_us - principal.issued_at_us == 600_000_000


async def test_an_application_by_client_credentials(provider: Provider, gate: Gate) -> None:
    principal = await gate.enter(provider.client_credentials()["access_token"])
    assert principal.kind is PrincipalKind.SERVICE
    assert principal.client_id == principal.subject == "nightly-batch"
    assert principal.roles == {"batch"}


async def test_a_person_without_a_place(provider: Provider, gate: Gate) -> None:
    token = provider.tokens("visitor")["access_token"]
    with pytest.raises(NotPermitted):
        await gate.enter(token)


async def test_an_id_token_is_no_access_token(provider: Provider, gate: Gate) -> None:
    """Same issuer, same key, and with a lax audience nothing but its type tells it apart."""
    token = provider.tokens("hr-analyst")["id_token"]
    for door in (gate, Gate(provider, audiences=["desktop"])):
        with pytest.raises(Unauthenticated):
            await door.enter(token)


async def test_a_token_for_another_service(provider: Provider) -> None:
    door = Gate(provider, audiences=["https://other.example/api"])
    for tokens in (provider.tokens("hr-analyst"), provider.client_credentials()):
        with pytest.raises(Unauthenticated):
            await door.enter(tokens["access_token"])


async def test_a_token_that_was_changed(provider: Provider, gate: Gate) -> None:
    header, claims, signature = provider.tokens("visitor")["access_token"].split(".")
    text = base64.urlsafe_b64decode(claims + "==").replace(b"visitor", b"hr-analyst")
    assert b"hr-analyst" in text
    changed = base64.urlsafe_b64encode(text).rstrip(b"=").decode()
    with pytest.raises(Unauthenticated):
        await gate.enter(f"{header}.{changed}.{signature}")


async def test_revocation_of_one_token_and_of_a_person(provider: Provider, gate: Gate) -> None:
    one, two = (provider.tokens("hr-analyst")["access_token"] for _ in range(2))
    principal = await gate.enter(one)
    assert principal.token_id is not None
    gate.revoked = Revocations(token_ids=frozenset({principal.token_id}))
    with pytest.raises(RevokedCredential):
        await gate.enter(one)
    await gate.enter(two)
    tomorrow_us = time.time_ns() // 1000 + 86_400_000_000
    gate.revoked = Revocations(subjects={("certified", "hr-analyst"): tomorrow_us})
    with pytest.raises(RevokedCredential):
        await gate.enter(two)


def test_the_provider_insists_on_pkce(provider: Provider) -> None:
    assert provider.code("hr-analyst", {})["error"] == ["invalid_request"]


async def test_key_rotation(provider: Provider, gate: Gate) -> None:
    before = provider.client_credentials()["access_token"]
    assert (await gate.enter(before)).key_id == "key-1"
    kid = provider.rotate()
    after = provider.client_credentials()["access_token"]
    with pytest.raises(Unauthenticated):  # renewals are rationed: at most one a minute
        await gate.enter(after)
    gate.steady_s += 60
    assert (await gate.enter(after)).key_id == kid == "key-2"
    assert (await gate.enter(before)).key_id == "key-1"
