"""The fetcher: what a hostile or broken server can and cannot do to it."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from deployments import jwks_fetch
from deployments.jwks_fetch import MAX_BYTES, JwksFetcher

seen: list[web.Request] = []


async def answer(request: web.Request) -> web.StreamResponse:
    seen.append(request)
    match request.path:
        case "/good":
            return web.json_response({"keys": []})
        case "/redirect":
            return web.Response(status=302, headers={"location": "/good"})
        case "/large":
            return web.Response(body=b"x" * (MAX_BYTES + 1))
        case "/largest":
            return web.Response(body=b"x" * MAX_BYTES)
        case "/endless":
            response = web.StreamResponse()
            await response.prepare(request)
            try:
                while True:
                    await response.write(b"x" * 65536)
            except ConnectionError:
                return response
        case "/bomb":
            body = gzip.compress(b" " * (64 << 20))
            return web.Response(body=body, headers={"content-encoding": "gzip"})
    return web.Response(status=500, text="internal words")


@pytest.fixture
async def url() -> AsyncIterator[str]:
    seen.clear()
    app = web.Application()
    app.router.add_get("/{any:.*}", answer)
    server = TestServer(app, host="127.0.0.1")
    await server.start_server()
    yield f"http://127.0.0.1:{server.port}"
    await server.close()


@pytest.fixture
def fetch() -> JwksFetcher:
    return JwksFetcher(allow_loopback_http=True)


async def test_a_document(url: str, fetch: JwksFetcher) -> None:
    assert await fetch(f"{url}/good") == b'{"keys": []}'
    assert len(await fetch(f"{url}/largest")) == MAX_BYTES


async def test_no_redirect(url: str, fetch: JwksFetcher) -> None:
    with pytest.raises(OSError, match="answered 302"):
        await fetch(f"{url}/redirect")
    assert [request.path for request in seen] == ["/redirect"]


@pytest.mark.parametrize("path", ["large", "endless"])
async def test_no_more_than_a_mebibyte(url: str, fetch: JwksFetcher, path: str) -> None:
    with pytest.raises(OSError, match="too large"):
        await fetch(f"{url}/{path}")


async def test_nothing_compressed_is_unpacked(url: str, fetch: JwksFetcher) -> None:
    body = await fetch(f"{url}/bomb")
    assert len(body) < MAX_BYTES
    assert body[:2] == b"\x1f\x8b"
    assert seen[0].headers["accept-encoding"] == "identity"


async def test_a_refusal_is_in_our_words(url: str, fetch: JwksFetcher) -> None:
    with pytest.raises(OSError, match=r"^answered 500$"):
        await fetch(f"{url}/wrong")


async def test_nobody_there(fetch: JwksFetcher) -> None:
    with pytest.raises(OSError, match=r"^ClientConnectorError$"):
        await fetch("http://127.0.0.1:9/good")


async def test_a_server_that_never_answers(
    url: str, fetch: JwksFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks_fetch, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(jwks_fetch, "MAX_BYTES", 1 << 40)
    with pytest.raises(OSError, match="TimeoutError"):
        await fetch(f"{url}/endless")


@pytest.mark.parametrize(
    "address",
    ["http://idp.example.com/", "http://localhost/", "file:///etc/hostname", "", "https://a:b@c/"],
)
async def test_addresses_that_are_not_safe(fetch: JwksFetcher, address: str) -> None:
    with pytest.raises(OSError, match="not https"):
        await fetch(address)


async def test_loopback_only_where_allowed(url: str) -> None:
    with pytest.raises(OSError, match="not https"):
        await JwksFetcher()(f"{url}/good")
    assert seen == []


async def test_the_environment_is_not_asked(
    url: str, fetch: JwksFetcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login u password secretword\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    await fetch(f"{url}/good")
    assert "authorization" not in seen[0].headers
