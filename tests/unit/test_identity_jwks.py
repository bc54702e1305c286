"""Keys of an issuer: rotation, outage, and what strangers can make us do."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from governance.errors import IdentityUnavailable
from governance.identity.jwks import (
    FRESH_S,
    MAX_KEYS,
    RETRY_S,
    RETRY_WITHOUT_KEYS_S,
    USABLE_S,
    KeySet,
)
from tests.unit import forge
from tests.unit.forge import ISSUER, JWKS_URI, Clocks, Web

DISCOVERY = f"{ISSUER}/.well-known/openid-configuration"


def jwk(kid: str = "k1", **more: Any) -> dict[str, Any]:
    return forge.rsa_jwk(forge.rsa_key(), kid, **more)


@pytest.fixture
def web() -> Web:
    web = Web()
    web.publish(jwk())
    web.documents[DISCOVERY] = {"issuer": ISSUER, "jwks_uri": JWKS_URI}
    return web


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def keys(web: Web, clocks: Clocks) -> KeySet:
    return KeySet("idp", ISSUER, None, web, clocks.monotonic)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_discovered_once_and_built_once(keys: KeySet, web: Web) -> None:
    first = await keys.key("k1", "RS256")
    assert first is not None
    assert await keys.key("k1", "RS256") is first
    assert web.asked == [DISCOVERY, JWKS_URI]


async def test_a_configured_place_needs_no_discovery(web: Web, clocks: Clocks) -> None:
    keys = KeySet("idp", ISSUER, JWKS_URI, web, clocks.monotonic)
    assert await keys.key("k1", "RS256")
    assert web.asked == [JWKS_URI]


@pytest.mark.parametrize(
    "document",
    [
        {"issuer": "https://other.example.com", "jwks_uri": JWKS_URI},
        {"issuer": ISSUER + "/", "jwks_uri": JWKS_URI},
        {"jwks_uri": JWKS_URI},
        {"issuer": ISSUER},
        {"issuer": ISSUER, "jwks_uri": [JWKS_URI]},
        {"issuer": ISSUER, "jwks_uri": "http://idp.example.com/keys"},
        {"issuer": ISSUER, "jwks_uri": "http://127.0.0.1/keys"},
        {"issuer": ISSUER, "jwks_uri": "file:///etc/hostname"},
        {"issuer": ISSUER, "jwks_uri": "https://user:word@idp.example.com/keys"},
        [],
        b"<html>",
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
async def test_discovery_that_is_not_believed(keys: KeySet, web: Web, document: object) -> None:
    web.documents[DISCOVERY] = document
    with pytest.raises(IdentityUnavailable):
        await keys.key("k1", "RS256")
    assert web.asked == [DISCOVERY]


@pytest.mark.parametrize(
    "document",
    [
        {"keys": []},
        {"keys": [jwk(f"k{i}") for i in range(MAX_KEYS + 1)]},
        {"keys": {"k1": jwk()}},
        {"keys": [{"kty": "RSA"}]},
        {"keys": ["k1", None, 1]},
        {"keys": [jwk(), jwk()]},
        {},
        [],
        b"",
    ],
)
async def test_key_documents_that_are_not_believed(
    keys: KeySet, web: Web, document: object
) -> None:
    web.documents[JWKS_URI] = document
    with pytest.raises(IdentityUnavailable):
        await keys.key("k1", "RS256")


async def test_keys_that_are_no_use_do_not_hide_the_others(
    keys: KeySet, web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    web.publish(jwk(), {"kty": "oct", "kid": "k2", "k": "c2VjcmV0"}, {"kty": "RSA"}, jwk("k3", n=5))
    assert await keys.key("k1", "RS256")
    for _ in range(100):
        assert await keys.key("k2", "RS256") is None
        assert await keys.key("k3", "RS256") is None
    # A stranger who names them cannot fill the log, and secrets do not get there.
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 2
    assert "c2VjcmV0" not in caplog.text


async def test_rotation_with_a_single_flight(keys: KeySet, web: Web, clocks: Clocks) -> None:
    assert await keys.key("k1", "RS256")
    web.publish(jwk("k1"), jwk("k2"))
    clocks.advance(RETRY_S)
    web.asked.clear()
    found = await asyncio.gather(*(keys.key("k2", "RS256") for _ in range(50)))
    assert all(found)
    assert web.asked == [DISCOVERY, JWKS_URI]


async def test_made_up_ids_cause_one_renewal_a_minute(
    keys: KeySet, web: Web, clocks: Clocks
) -> None:
    assert await keys.key("k1", "RS256")
    clocks.advance(RETRY_S)
    web.asked.clear()
    for second in range(int(RETRY_S) - 1):
        for attempt in range(20):
            assert await keys.key(f"made-up-{second}-{attempt}", "RS256") is None
        clocks.advance(1)
    assert web.asked.count(JWKS_URI) == 1
    clocks.advance(1)
    assert await keys.key("made-up", "RS256") is None
    assert web.asked.count(JWKS_URI) == 2


async def test_a_key_that_was_taken_back_is_gone_with_the_next_renewal(
    keys: KeySet, web: Web, clocks: Clocks
) -> None:
    assert await keys.key("k1", "RS256")
    web.publish(jwk("k2"))
    clocks.advance(FRESH_S + 1)
    assert await keys.key("k1", "RS256")
    await settle()
    assert await keys.key("k1", "RS256") is None
    assert await keys.key("k2", "RS256")


async def test_a_key_replaced_under_its_id_is_built_again(
    keys: KeySet, web: Web, clocks: Clocks
) -> None:
    first = await keys.key("k1", "RS256")
    web.publish(forge.rsa_jwk(forge.rsa_key(2048, 1)))
    clocks.advance(FRESH_S + 1)
    await keys.key("k1", "RS256")
    await settle()
    second = await keys.key("k1", "RS256")
    assert second is not None
    assert second is not first


async def test_renewal_in_the_background_delays_nobody(web: Web, clocks: Clocks) -> None:
    gate = asyncio.Event()
    gate.set()

    async def slow(url: str) -> bytes:
        body = await web(url)
        await gate.wait()
        return body

    keys = KeySet("idp", ISSUER, JWKS_URI, slow, clocks.monotonic)
    assert await keys.key("k1", "RS256")
    gate.clear()
    clocks.advance(FRESH_S + 1)
    for _ in range(10):
        async with asyncio.timeout(1):
            assert await keys.key("k1", "RS256")
    await settle()
    assert web.asked == [JWKS_URI] * 2
    gate.set()
    await settle()


async def test_old_keys_serve_for_a_day_and_no_longer(
    keys: KeySet, web: Web, clocks: Clocks
) -> None:
    assert await keys.key("k1", "RS256")
    document = web.documents.pop(JWKS_URI)
    while clocks.steady_s < 1000 + USABLE_S - 600:
        clocks.advance(600)
        assert await keys.key("k1", "RS256")
        await settle()
    clocks.advance(601)
    with pytest.raises(IdentityUnavailable) as caught:
        await keys.key("k1", "RS256")
    assert caught.value.retry_after_s == RETRY_WITHOUT_KEYS_S
    web.documents[JWKS_URI] = document
    clocks.advance(RETRY_WITHOUT_KEYS_S)
    assert await keys.key("k1", "RS256")


async def test_an_issuer_that_is_down_is_asked_once_in_five_seconds(
    keys: KeySet, web: Web, clocks: Clocks
) -> None:
    document = web.documents.pop(DISCOVERY)
    for _ in range(20):
        with pytest.raises(IdentityUnavailable):
            await keys.key("k1", "RS256")
    assert web.asked == [DISCOVERY]
    web.documents[DISCOVERY] = document
    clocks.advance(RETRY_WITHOUT_KEYS_S)
    assert await keys.key("k1", "RS256")


async def test_who_hangs_up_does_not_take_the_renewal_along(web: Web, clocks: Clocks) -> None:
    gate = asyncio.Event()

    async def slow(url: str) -> bytes:
        await gate.wait()
        return await web(url)

    keys = KeySet("idp", ISSUER, JWKS_URI, slow, clocks.monotonic)
    gone = asyncio.create_task(keys.key("k1", "RS256"))
    waiting = asyncio.create_task(keys.key("k1", "RS256"))
    await settle()
    gone.cancel()
    await settle()
    gate.set()
    assert await waiting
    assert gone.cancelled()


async def test_loopback_only_where_it_is_allowed(clocks: Clocks) -> None:
    local = "http://127.0.0.1:8100"
    web = Web()
    web.documents[f"{local}/.well-known/openid-configuration"] = {
        "issuer": local,
        "jwks_uri": f"{local}/jwks",
    }
    web.publish(jwk(), url=f"{local}/jwks")
    with pytest.raises(IdentityUnavailable):
        await KeySet("dev", local, None, web, clocks.monotonic).key("k1", "RS256")
    assert web.asked == []
    allowed = KeySet("dev", local, None, web, clocks.monotonic, allow_loopback_http=True)
    assert await allowed.key("k1", "RS256")
