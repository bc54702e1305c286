"""Admission tickets, attacked: each refusal by the attack that it is for."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deployments.data_plane import ticket_form
from deployments.data_plane.ticket_form import DOMAIN, SIGNATURE_BYTES, Ticket, decode, encode
from deployments.data_plane.tickets import (
    TicketRefusal,
    TicketRefused,
    TicketSigner,
    TicketVerifier,
)
from tests.fakes import dispatch_of

BODY = b'{"messages": []}'
DISPATCH = dispatch_of(BODY)
NOW_US = 1_700_000_000_000_000
SECOND_US = 1_000_000


class Clock:
    """A wall clock that the test moves."""

    def __init__(self) -> None:
        self.now_us = NOW_US

    def __call__(self) -> int:
        return self.now_us


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def signer(key: Ed25519PrivateKey, clock: Clock) -> TicketSigner:
    return TicketSigner("gw-1", key, clock)


@pytest.fixture
def keys(signer: TicketSigner) -> dict[str, bytes]:
    return {"gw-1": signer.public_key}


@pytest.fixture
def verifier(keys: dict[str, bytes], clock: Clock) -> TicketVerifier:
    return TicketVerifier({"small", "small-lora"}, lambda: keys, clock)


def refused(
    verifier: TicketVerifier, raw: bytes, operation: str = "chat", body: bytes = BODY
) -> TicketRefusal:
    """Reason of the refusal, which must have been counted."""
    before = dict(verifier.refused)
    with pytest.raises(TicketRefused) as caught:
        verifier.verify(raw, operation=operation, body=body)
    reason = caught.value.reason
    assert verifier.refused == {**before, reason: before[reason] + 1}
    return reason


def signed(key: Ed25519PrivateKey, payload: bytes, domain: bytes = DOMAIN) -> bytes:
    return payload + key.sign(domain + payload)


def test_a_good_ticket_carries_the_decision(signer: TicketSigner, verifier: TicketVerifier) -> None:
    ticket = verifier.verify(signer.mint(DISPATCH), operation="chat", body=BODY)

    assert dataclasses.replace(ticket, ticket_id=b"", body_sha256=b"") == Ticket(
        gateway_id="gw-1",
        audience="small",
        operation="chat",
        request_id="r-1",
        decision_id="d-1",
        reservation_id="v-1",
        principal_key="principal",
        department="hr",
        priority=0,
        max_tokens=64,
        context_tokens=1024,
        issued_at_us=NOW_US,
        ticket_id=b"",
        body_sha256=b"",
        account="hr",
    )
    assert verifier.accepted == 1
    assert not any(verifier.refused.values())


def test_every_bit_is_signed(signer: TicketSigner, keys: dict[str, bytes], clock: Clock) -> None:
    raw = signer.mint(DISPATCH)
    verifier = TicketVerifier({"small"}, lambda: keys, clock)

    for bit in range(len(raw) * 8):
        altered = bytearray(raw)
        altered[bit // 8] ^= 1 << bit % 8
        assert refused(verifier, bytes(altered)) in {
            TicketRefusal.MALFORMED,
            TicketRefusal.UNKNOWN_GATEWAY,
            TicketRefusal.BAD_SIGNATURE,
        }
    assert verifier.accepted == 0


def test_every_cut_and_any_addition_is_refused(
    signer: TicketSigner, verifier: TicketVerifier
) -> None:
    raw = signer.mint(DISPATCH)

    for length in range(len(raw)):
        assert refused(verifier, raw[:length]) is TicketRefusal.MALFORMED
    assert refused(verifier, raw + b"\0") is TicketRefusal.MALFORMED
    assert refused(verifier, b"\0" * 10_000) is TicketRefusal.MALFORMED


@pytest.mark.parametrize("version", [b"\x00", b"\x01", b"\x03"])
def test_a_foreign_version_is_refused_though_signed(
    signer: TicketSigner, verifier: TicketVerifier, key: Ed25519PrivateKey, version: bytes
) -> None:
    payload = signer.mint(DISPATCH)[:-SIGNATURE_BYTES]

    assert refused(verifier, signed(key, version + payload[1:])) is TicketRefusal.MALFORMED


def test_a_ticket_carries_account_share_and_patience(
    signer: TicketSigner, verifier: TicketVerifier
) -> None:
    dispatch = dataclasses.replace(
        dispatch_of(BODY, department="hr", account="hr/recruiting"),
        priority=-10,
        weight_milli=2500,
        served_us=1 << 50,
        patience_ms=1500,
    )
    ticket = verifier.verify(signer.mint(dispatch), operation="chat", body=BODY)

    assert (ticket.department, ticket.account) == ("hr", "hr/recruiting")
    assert (ticket.priority, ticket.weight_milli) == (-10, 2500)
    assert (ticket.served_us, ticket.patience_ms) == (1 << 50, 1500)


def test_bytes_after_the_fields_are_refused_though_signed(
    signer: TicketSigner, verifier: TicketVerifier, key: Ed25519PrivateKey
) -> None:
    payload = signer.mint(DISPATCH)[:-SIGNATURE_BYTES] + b"\0\0"

    assert refused(verifier, signed(key, payload)) is TicketRefusal.MALFORMED


def test_text_that_is_not_utf8_is_refused_though_signed(
    signer: TicketSigner, verifier: TicketVerifier, key: Ed25519PrivateKey
) -> None:
    payload = signer.mint(DISPATCH)[:-SIGNATURE_BYTES].replace(b"principal", b"princi\xff\xfel")

    assert refused(verifier, signed(key, payload)) is TicketRefusal.MALFORMED


def test_a_gateway_that_is_not_registered_is_refused(
    verifier: TicketVerifier, clock: Clock
) -> None:
    stranger = TicketSigner("gw-2", Ed25519PrivateKey.generate(), clock)

    assert refused(verifier, stranger.mint(DISPATCH)) is TicketRefusal.UNKNOWN_GATEWAY


def test_a_gateway_that_was_taken_out_is_refused_at_once(
    signer: TicketSigner, verifier: TicketVerifier, keys: dict[str, bytes]
) -> None:
    verifier.verify(signer.mint(DISPATCH), operation="chat", body=BODY)
    keys.clear()

    assert refused(verifier, signer.mint(DISPATCH)) is TicketRefusal.UNKNOWN_GATEWAY


def test_a_replaced_key_is_used_at_once(
    signer: TicketSigner, verifier: TicketVerifier, keys: dict[str, bytes], clock: Clock
) -> None:
    verifier.verify(signer.mint(DISPATCH), operation="chat", body=BODY)
    successor = TicketSigner("gw-1", Ed25519PrivateKey.generate(), clock)
    keys["gw-1"] = successor.public_key

    assert refused(verifier, signer.mint(DISPATCH)) is TicketRefusal.BAD_SIGNATURE
    verifier.verify(successor.mint(DISPATCH), operation="chat", body=BODY)


def test_another_gateways_key_does_not_sign_for_this_one(
    verifier: TicketVerifier, keys: dict[str, bytes], clock: Clock
) -> None:
    other = TicketSigner("gw-2", Ed25519PrivateKey.generate(), clock)
    keys["gw-2"] = other.public_key
    forger = TicketSigner("gw-1", other._key, clock)

    assert refused(verifier, forger.mint(DISPATCH)) is TicketRefusal.BAD_SIGNATURE


@pytest.mark.parametrize("raw", [b"", b"short", b"x" * 33])
def test_a_registered_key_that_is_none_admits_nothing(
    signer: TicketSigner, verifier: TicketVerifier, keys: dict[str, bytes], raw: bytes
) -> None:
    keys["gw-1"] = raw

    assert refused(verifier, signer.mint(DISPATCH)) is TicketRefusal.UNKNOWN_GATEWAY


@pytest.mark.parametrize("domain", [b"", b"gatehouse checkpoint\0", DOMAIN[:-1]])
def test_a_signature_made_for_something_else_is_none(
    signer: TicketSigner, verifier: TicketVerifier, key: Ed25519PrivateKey, domain: bytes
) -> None:
    payload = signer.mint(DISPATCH)[:-SIGNATURE_BYTES]

    assert refused(verifier, signed(key, payload, domain)) is TicketRefusal.BAD_SIGNATURE


def test_the_engine_side_holds_nothing_that_signs(verifier: TicketVerifier) -> None:
    held = [*vars(verifier).values(), *verifier._loaded.values()]

    assert not any(isinstance(value, Ed25519PrivateKey) for value in held)
    assert not hasattr(verifier, "mint")


@pytest.mark.parametrize(
    ("age_s", "reason"),
    [
        (-2.000001, TicketRefusal.NOT_YET_VALID),
        (-2, None),
        (0, None),
        (32, None),
        (32.000001, TicketRefusal.EXPIRED),
        (86_400, TicketRefusal.EXPIRED),
    ],
)
def test_a_ticket_is_good_for_30_seconds_and_the_skew(
    signer: TicketSigner,
    verifier: TicketVerifier,
    clock: Clock,
    age_s: float,
    reason: TicketRefusal | None,
) -> None:
    raw = signer.mint(DISPATCH)
    clock.now_us += round(age_s * SECOND_US)

    if reason is None:
        verifier.verify(raw, operation="chat", body=BODY)
    else:
        assert refused(verifier, raw) is reason


@pytest.mark.parametrize("audience", ["large", "smal", "small ", "SMALL", ""])
def test_a_ticket_for_another_model_is_refused(
    signer: TicketSigner, verifier: TicketVerifier, audience: str
) -> None:
    raw = signer.mint(dispatch_of(BODY, model=audience))

    assert refused(verifier, raw) is TicketRefusal.WRONG_AUDIENCE


def test_a_ticket_for_an_adapter_admits_to_its_base_models_engine(
    signer: TicketSigner, verifier: TicketVerifier
) -> None:
    raw = signer.mint(dispatch_of(BODY, model="small-lora"))

    assert verifier.verify(raw, operation="chat", body=BODY).audience == "small-lora"


@pytest.mark.parametrize("operation", ["completions", "embeddings", "connect", "", "CHAT"])
def test_a_ticket_for_another_operation_is_refused(
    signer: TicketSigner, verifier: TicketVerifier, operation: str
) -> None:
    raw = signer.mint(DISPATCH)

    assert refused(verifier, raw, operation=operation) is TicketRefusal.WRONG_OPERATION


@pytest.mark.parametrize("operation", ["connect", "detokenize"])
def test_an_internal_ticket_runs_no_inference(
    signer: TicketSigner, verifier: TicketVerifier, operation: str
) -> None:
    raw = signer.mint_internal(operation, "small", BODY)

    assert refused(verifier, raw) is TicketRefusal.WRONG_OPERATION


@pytest.mark.parametrize("body", [b"", BODY + b" ", BODY[:-1], b'{"messages": [1]}'])
def test_another_body_is_refused(
    signer: TicketSigner, verifier: TicketVerifier, body: bytes
) -> None:
    assert refused(verifier, signer.mint(DISPATCH), body=body) is TicketRefusal.WRONG_BODY


def test_a_ticket_is_good_once_for_as_long_as_it_is_good(
    signer: TicketSigner, verifier: TicketVerifier, clock: Clock
) -> None:
    raw = signer.mint(DISPATCH)
    verifier.verify(raw, operation="chat", body=BODY)

    for _ in range(33):
        assert refused(verifier, raw) is TicketRefusal.REPLAYED
        clock.now_us += SECOND_US
    assert refused(verifier, raw) is TicketRefusal.EXPIRED


def test_a_refused_attempt_does_not_spend_the_ticket(
    signer: TicketSigner, verifier: TicketVerifier
) -> None:
    raw = signer.mint(DISPATCH)
    refused(verifier, raw, body=b"other")
    refused(verifier, raw, operation="embeddings")

    verifier.verify(raw, operation="chat", body=BODY)


def test_a_clock_set_back_does_not_bring_a_used_ticket_back(
    signer: TicketSigner, verifier: TicketVerifier, clock: Clock
) -> None:
    raw = signer.mint(DISPATCH)
    verifier.verify(raw, operation="chat", body=BODY)
    clock.now_us += 60 * SECOND_US
    verifier.verify(signer.mint(DISPATCH), operation="chat", body=BODY)  # drops the first id
    clock.now_us -= 60 * SECOND_US

    assert refused(verifier, raw) is TicketRefusal.EXPIRED


def test_a_full_memory_refuses_and_recovers(
    signer: TicketSigner, keys: dict[str, bytes], clock: Clock
) -> None:
    verifier = TicketVerifier({"small"}, lambda: keys, clock, capacity=3)
    for _ in range(3):
        verifier.verify(signer.mint(DISPATCH), operation="chat", body=BODY)

    assert refused(verifier, signer.mint(DISPATCH)) is TicketRefusal.REPLAY_CACHE_FULL
    clock.now_us += 33 * SECOND_US
    verifier.verify(signer.mint(DISPATCH), operation="chat", body=BODY)


def test_tickets_of_equal_requests_differ(signer: TicketSigner) -> None:
    assert len({signer.mint(DISPATCH) for _ in range(50)}) == 50


def test_a_field_cannot_grow_into_the_next() -> None:
    one = Ticket("g", "ab", "c", "", "", "", "", "", 0, 0, None, 0, bytes(16), bytes(32))
    two = dataclasses.replace(one, audience="a", operation="bc")

    assert encode(one) != encode(two)
    assert decode(encode(one)) == one
    assert decode(encode(two)) == two


def test_a_text_longer_than_its_length_field_is_not_minted() -> None:
    ticket = Ticket("g", "a" * 70_000, "c", "", "", "", "", "", 0, 0, None, 0, bytes(16), bytes(32))

    with pytest.raises(struct.error):
        encode(ticket)


def test_the_form_is_as_documented(signer: TicketSigner) -> None:
    raw = signer.mint(DISPATCH)

    assert raw[0] == ticket_form.VERSION == 2
    assert int.from_bytes(raw[1:9], "big") == NOW_US
    assert raw[85:91] == b"\x00\x04gw-1"


@pytest.mark.parametrize("named", ["", "replica-1", "replica-22"])
def test_a_ticket_is_good_for_the_replica_that_it_names(
    signer: TicketSigner, verifier: TicketVerifier, named: str
) -> None:
    raw = signer.mint(DISPATCH, None, named)
    with pytest.raises(TicketRefused) as caught:
        verifier.verify(raw, operation="chat", body=BODY, replica_id="replica-2")
    assert caught.value.reason is TicketRefusal.WRONG_REPLICA
    assert verifier.verify(raw, operation="chat", body=BODY, replica_id=named).replica_id == named
