"""The development provider: the standard flow works, and nothing else does."""

from __future__ import annotations

import base64
import hashlib
import json
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from flask.testing import FlaskClient
from werkzeug.serving import make_server

from deployments import dev_idp
from deployments.dev_token import TokenError, fetch_token
from deployments.jwks_fetch import JwksFetcher
from governance.control.snapshot import Revocations
from governance.identity.authenticator import BearerAuthenticator
from governance.identity.config import IdentityConfig, load_identity
from tests.unit import forge

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / "config" / "identity.local.yaml"
CALLBACK = "http://127.0.0.1:5000/callback"
VERIFIER = "v" * 64
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest())[:-1].decode()
AUTHORIZE = {
    "response_type": "code",
    "client_id": dev_idp.CLIENT_ID,
    "redirect_uri": CALLBACK,
    "scope": "openid",
    "state": "s-1",
    "login_hint": "hr-analyst",
    "code_challenge": CHALLENGE,
    "code_challenge_method": "S256",
}


@pytest.fixture
def issuer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AUTHLIB_INSECURE_TRANSPORT", "1")
    key = dev_idp.load_key(tmp_path)
    holder: list[str] = []
    server = make_server("127.0.0.1", 0, lambda *a: app(*a), threaded=True)
    holder.append(f"http://127.0.0.1:{server.server_port}")
    app = dev_idp.create_app(holder[0], key)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield holder[0]
    server.shutdown()
    server.server_close()
    thread.join()


def part(token: str, index: int) -> dict[str, object]:
    raw = token.split(".")[index]
    value: dict[str, object] = json.loads(base64.urlsafe_b64decode(raw + "=" * (-len(raw) % 4)))
    return value


@pytest.mark.parametrize("identity", list(dev_idp.IDENTITIES))
def test_the_standard_flow_gives_an_access_token(issuer: str, identity: str) -> None:
    token = fetch_token(issuer, identity)
    header, claims = part(token, 0), part(token, 1)
    assert header["typ"] == "at+jwt"
    assert header["kid"]
    assert claims["iss"] == issuer
    assert claims["aud"] == "gatehouse"
    assert claims["sub"] == identity
    assert claims["roles"] == [dev_idp.IDENTITIES[identity].role]


def test_an_unknown_identity_gets_nothing(issuer: str) -> None:
    with pytest.raises(TokenError, match="does not know"):
        fetch_token(issuer, "chief-executive")


def test_a_provider_that_is_not_there(issuer: str) -> None:
    with pytest.raises(TokenError, match="is `make serve` running"):
        fetch_token("http://127.0.0.1:9", "hr-analyst")
    with pytest.raises(TokenError, match="loopback"):
        fetch_token("https://login.example.com", "hr-analyst")


async def test_discovery_and_keys_can_be_fetched(issuer: str) -> None:
    fetch = JwksFetcher(allow_loopback_http=True)
    document = json.loads(await fetch(f"{issuer}/.well-known/openid-configuration"))
    keys = json.loads(await fetch(document["jwks_uri"]))["keys"]
    assert "d" not in keys[0]
    with pytest.raises(OSError, match="not https"):
        await JwksFetcher()(document["jwks_uri"])
    with pytest.raises(OSError, match="404"):
        await fetch(f"{issuer}/nothing")


def test_the_key_is_private_and_stays(tmp_path: Path) -> None:
    first = dev_idp.load_key(tmp_path)
    assert dev_idp.load_key(tmp_path).kid == first.kid
    assert stat.S_IMODE((tmp_path / "dev-idp.json").stat().st_mode) == 0o600


def test_it_binds_nothing_but_loopback(tmp_path: Path) -> None:
    for arguments in (["--host", "0.0.0.0"], ["--issuer", "http://10.0.0.1:8100"]):
        with pytest.raises(SystemExit) as stopped:
            dev_idp.main([*arguments, "--key-dir", str(tmp_path)])
        assert stopped.value.code == 2


class NoKeys:
    """No service keys here."""

    def check(self, presented: str) -> Any:
        raise AssertionError(presented)


SAMPLE: dict[str, tuple[str, set[str]]] = {
    "hr-analyst": ("hr", {"employee", "analyst"}),
    "data-scientist": ("data-science", {"employee", "data-scientist"}),
    "marketing-intern": ("marketing", {"employee", "intern"}),
    "platform-admin": ("platform", {"employee", "platform-admin"}),
    "security-officer": ("security", {"employee", "security-officer"}),
}


async def test_its_tokens_pass_the_gateways_own_check(issuer: str) -> None:
    """With the file that `make serve` uses, but for the port."""
    shipped = load_identity(LOCAL, local=True).model_dump()
    assert shipped["issuers"][0]["issuer"] == "http://127.0.0.1:8100"
    shipped["issuers"][0]["issuer"] = issuer
    door = BearerAuthenticator(
        IdentityConfig.model_validate(shipped),
        fetch=JwksFetcher(allow_loopback_http=True),
        pepper=forge.PEPPER,
        service_keys=NoKeys(),
        revocations=Revocations,
        clock=lambda: time.time_ns() // 1000,
        monotonic=time.monotonic,
        allow_loopback_http=True,
    )
    assert set(SAMPLE) == set(dev_idp.IDENTITIES)
    for identity, (department, roles) in SAMPLE.items():
        principal = await door.authenticate(f"Bearer {fetch_token(issuer, identity)}")
        assert principal.department == department
        assert principal.roles == roles
        assert principal.subject == identity
        assert principal.token_id


# What the flow refuses


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    monkeypatch.setenv("AUTHLIB_INSECURE_TRANSPORT", "1")
    app = dev_idp.create_app("http://127.0.0.1:8100", dev_idp.load_key(tmp_path))
    return app.test_client()


def get(client: FlaskClient, path: str, query: dict[str, str] | None = None, **more: Any) -> Any:
    return client.get(path, query_string=query, base_url="http://127.0.0.1:8100", **more)


def code(client: FlaskClient) -> str:
    answer = get(client, "/authorize", AUTHORIZE)
    query = parse_qs(urlsplit(answer.headers["location"]).query)
    assert query["state"] == ["s-1"]
    return str(query["code"][0])


def redeem(client: FlaskClient, **change: str) -> Any:
    form = {
        "grant_type": "authorization_code",
        "client_id": dev_idp.CLIENT_ID,
        "redirect_uri": CALLBACK,
        "code_verifier": VERIFIER,
        **change,
    }
    form = {name: value for name, value in form.items() if value}
    return client.post("/token", data=form, base_url="http://127.0.0.1:8100")


def test_a_code_is_good_once(client: FlaskClient) -> None:
    one = code(client)
    assert redeem(client, code=one).status_code == 200
    assert redeem(client, code=one).status_code == 400


@pytest.mark.parametrize(
    "change",
    [
        {"code_verifier": "w" * 64},
        {"code_verifier": ""},
        {"code_verifier": CHALLENGE},
        {"redirect_uri": "http://127.0.0.1:5001/callback"},
        {"client_id": "another"},
        {"grant_type": "client_credentials"},
        {"grant_type": "password"},
        {"code": "made-up"},
    ],
    ids=str,
)
def test_a_code_in_the_wrong_hands(client: FlaskClient, change: dict[str, str]) -> None:
    answer = redeem(client, **{"code": code(client), **change})
    assert answer.status_code in (400, 401)
    assert "access_token" not in answer.text


def test_a_code_that_is_old(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev_idp, "CODE_LIFETIME_S", 0)
    assert redeem(client, code=code(client)).status_code == 400


@pytest.mark.parametrize(
    "change",
    [
        {"code_challenge_method": "plain"},
        {"code_challenge_method": ""},
        {"code_challenge": ""},
        {"client_id": "another"},
        {"response_type": "token"},
        {"redirect_uri": "https://attacker.example/callback"},
        {"redirect_uri": "http://127.0.0.1.attacker.example/callback"},
        {"redirect_uri": "http://127.0.0.1@attacker.example/callback"},
    ],
    ids=str,
)
def test_requests_that_get_no_code(client: FlaskClient, change: dict[str, str]) -> None:
    query = {name: value for name, value in {**AUTHORIZE, **change}.items() if value}
    answer = get(client, "/authorize", query)
    assert "code=" not in answer.headers.get("location", "")
    assert "attacker" not in answer.headers.get("location", "")


@pytest.mark.parametrize("host", ["attacker.example", "attacker.example:8100", "127.0.0.1.nip.io"])
@pytest.mark.parametrize("path", ["/authorize", "/", "/jwks"])
def test_a_name_that_was_rebound_to_loopback(client: FlaskClient, host: str, path: str) -> None:
    answer = client.get(path, query_string=AUTHORIZE, base_url=f"http://{host}")
    assert answer.status_code == 400
    assert "location" not in answer.headers


def test_no_page_may_read_what_it_answers(client: FlaskClient) -> None:
    answer = get(client, "/jwks", headers={"origin": "https://attacker.example"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_the_page_to_choose_on(client: FlaskClient) -> None:
    query = {**AUTHORIZE, "state": '"><script>alert(1)</script>'}
    del query["login_hint"]
    page = get(client, "/authorize", query).text
    assert all(f'value="{name}"' in page for name in dev_idp.IDENTITIES)
    assert CHALLENGE in page
    assert "<script>" not in page
    for name in dev_idp.IDENTITIES:
        assert name in get(client, "/").text
