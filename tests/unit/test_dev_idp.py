"""The development provider: the standard flow works, and nothing else does."""

from __future__ import annotations

import base64
import json
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from werkzeug.serving import make_server

from deployments import dev_idp
from deployments.dev_token import TokenError, fetch_token
from deployments.jwks_fetch import JwksFetcher


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
