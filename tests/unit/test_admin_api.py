"""Administration over a real control plane in the same process."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.api.admin import AdminApi
from deployments.control_copy import ControlCopy
from governance.control.plane import ControlPlane
from governance.control.store import ControlStore
from governance.errors import InvalidRequest, NotPermitted, ObjectNotFound, UnsupportedField
from governance.identity.service_keys import ServiceKeyChecker
from governance.types import Principal, PrincipalKind

PEPPER = bytes(range(32))
DAY_S = 86_400
ROLES = {
    "keys:manage": {"key-manager", "platform-admin"},
    "keys:read": {"key-manager", "auditor", "platform-admin"},
    "revocations:manage": {"responder", "platform-admin"},
    "budgets:read": {"auditor", "platform-admin"},
    "budgets:manage": {"platform-admin"},
    "config:read": {"platform-admin"},
}
BODY = {
    "name": "nightly report",
    "department": "hr",
    "roles": ["analyst"],
    "expires_in_s": DAY_S,
}


def caller(*roles: str, kind: PrincipalKind = PrincipalKind.USER) -> Principal:
    return Principal(kind, "someone", "entra", "it", frozenset(roles), "d" * 64)


MANAGER = caller("key-manager")
RESPONDER = caller("responder")
ADMIN = caller("platform-admin")


def authorize(principal: Principal, permission: str) -> None:
    if principal.roles.isdisjoint(ROLES[permission]):
        raise NotPermitted


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[ControlPlane]:
    store = ControlStore(tmp_path / "control.sqlite", lambda: time.time_ns() // 1000)
    yield ControlPlane(store, PEPPER, time.monotonic)
    store.close()


@pytest.fixture
def api(plane: ControlPlane) -> AdminApi:
    async def call(method: str, *args: Any) -> Any:
        return getattr(plane, method)(*args)

    async def resolve() -> Any:
        return call

    return AdminApi(ControlCopy(resolve), authorize)


def checker(plane: ControlPlane) -> ServiceKeyChecker:
    return ServiceKeyChecker(
        lambda: plane.snapshot, lambda: 0.0, PEPPER, lambda: time.time_ns() // 1000
    )


# What must be refused


@pytest.mark.parametrize(
    ("handler", "body", "allowed"),
    [
        ("create_key", BODY, MANAGER),
        ("list_keys", {}, caller("auditor")),
        ("rotate_key", {"key_id": "a" * 12}, MANAGER),
        ("revoke_key", {"key_id": "a" * 12}, MANAGER),
        ("revoke", {"kind": "token", "token_id": "jti"}, RESPONDER),
        ("list_revocations", {}, RESPONDER),
    ],
)
async def test_every_handler_asks_for_its_permission_first(
    api: AdminApi, plane: ControlPlane, handler: str, body: dict[str, Any], allowed: Principal
) -> None:
    call: Callable[..., Awaitable[Any]] = getattr(api, handler)
    for principal in (caller(), caller("analyst")):
        for attempt in (body, {"nonsense": 1}):
            with pytest.raises(NotPermitted):
                await call(principal, attempt)
    assert plane.events() == ()
    try:
        await call(allowed, body)
    except ObjectNotFound:
        assert "key_id" in body


async def test_reading_and_managing_are_apart(api: AdminApi) -> None:
    with pytest.raises(NotPermitted):
        await api.create_key(caller("auditor"), BODY)
    with pytest.raises(NotPermitted):
        await api.revoke(MANAGER, {"kind": "token", "token_id": "jti"})


async def test_a_service_key_makes_no_service_keys(api: AdminApi) -> None:
    made = await api.create_key(ADMIN, BODY)
    key = replace(ADMIN, kind=PrincipalKind.KEY)
    with pytest.raises(NotPermitted):
        await api.create_key(key, BODY)
    with pytest.raises(NotPermitted):
        await api.rotate_key(key, {"key_id": made["id"]})
    await api.revoke_key(key, {"key_id": made["id"]})


async def test_nobody_grants_an_administrative_permission_that_they_lack(
    api: AdminApi, plane: ControlPlane
) -> None:
    for roles in (["platform-admin"], ["analyst", "responder"]):
        with pytest.raises(NotPermitted) as refused:
            await api.create_key(MANAGER, {**BODY, "roles": roles})
        assert refused.value.param == "roles"
    assert plane.list_keys() == ()
    made = await api.create_key(ADMIN, {**BODY, "roles": ["responder"]})
    with pytest.raises(NotPermitted):
        await api.rotate_key(MANAGER, {"key_id": made["id"]})
    assert len(plane.list_keys()) == 1


CREATE_ATTACKS: list[tuple[dict[str, Any], str]] = [
    ({"expires_in_s": None}, "expires_in_s"),
    ({"expires_in_s": 90 * DAY_S + 1}, "expires_in_s"),
    ({"expires_in_s": 0}, "expires_in_s"),
    ({"expires_in_s": "86400"}, "expires_in_s"),
    ({"expires_in_s": True}, "expires_in_s"),
    ({"expires_in_s": 1e30}, "expires_in_s"),
    ({"roles": []}, "roles"),
    ({"roles": "analyst"}, "roles"),
    ({"roles": ["analyst", 7]}, "roles.1"),
    ({"roles": ["a"] * 33}, "roles"),
    ({"department": "hr\n"}, "department"),
    ({"department": ""}, "department"),
    ({"name": "x" * 129}, "name"),
    ({"name": "x\x1b[31m"}, "name"),
    ({"models": []}, "models"),
    ({"models": ["../secret"]}, "models.0"),
    ({"operations": ["administer"]}, "operations.0"),
    ({"secret_hash": "0" * 64}, "secret_hash"),
    ({"key_id": "a" * 12}, "key_id"),
    ({"created_by": "x"}, "created_by"),
]


@pytest.mark.parametrize(("change", "param"), CREATE_ATTACKS)
async def test_wrong_fields_are_named_and_never_repeated(
    api: AdminApi, plane: ControlPlane, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await api.create_key(MANAGER, {**BODY, **change})
    assert refused.value.param == param
    assert "pydantic" not in refused.value.message
    value = json.dumps(next(iter(change.values()))).strip('[]"')
    if len(value) > 6:
        assert value not in refused.value.message
    assert plane.list_keys() == ()


@pytest.mark.parametrize("field", sorted(BODY))
async def test_each_field_is_mandatory(api: AdminApi, field: str) -> None:
    body = {name: value for name, value in BODY.items() if name != field}
    with pytest.raises(InvalidRequest) as refused:
        await api.create_key(MANAGER, body)
    assert refused.value.param == field
    assert "missing" in refused.value.message


async def test_an_unknown_field_is_unsupported(api: AdminApi) -> None:
    with pytest.raises(UnsupportedField):
        await api.create_key(MANAGER, {**BODY, "forever": True})


@pytest.mark.parametrize(
    "key_id", ["", "A" * 12, "a" * 13, "' OR 1=1 --", 7, None, "a" * 11 + "\n"]
)
async def test_a_key_id_of_another_form_is_refused(api: AdminApi, key_id: object) -> None:
    for call in (api.rotate_key, api.revoke_key):
        with pytest.raises(InvalidRequest) as refused:
            await call(MANAGER, {"key_id": key_id})
        assert refused.value.param == "key_id"


async def test_unknown_keys(api: AdminApi) -> None:
    for call in (api.rotate_key, api.revoke_key):
        with pytest.raises(ObjectNotFound):
            await call(MANAGER, {"key_id": "a" * 12})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "kind"),
        ({"kind": "everything"}, "kind"),
        ({"kind": ["key"]}, "kind"),
        ({"kind": "key"}, "key_id"),
        ({"kind": "key", "key_id": "a" * 12, "subject": "x"}, "subject"),
        ({"kind": "token"}, "token_id"),
        ({"kind": "token", "token_id": ""}, "token_id"),
        ({"kind": "token", "token_id": "x" * 257}, "token_id"),
        ({"kind": "token", "token_id": "jti", "expires_at": 1}, "expires_at"),
        ({"kind": "token", "token_id": "jti", "expires_at": 1.7e12}, "expires_at"),
        ({"kind": "subject", "subject": "x"}, "issuer"),
        ({"kind": "subject", "issuer": "entra"}, "subject"),
        ({"kind": "subject", "issuer": "entra", "subject": "x", "not_before": -1}, "not_before"),
        (
            {"kind": "subject", "issuer": "entra", "subject": "x", "not_before": 9_999_999_999},
            "not_before",
        ),
        ({"kind": "subject", "issuer": "e", "subject": "x", "reason": "a\x00b"}, "reason"),
        ({"kind": "subject", "issuer": "e", "subject": "\ud800"}, None),
    ],
)
async def test_wrong_revocations(
    api: AdminApi, plane: ControlPlane, body: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await api.revoke(RESPONDER, body)
    assert refused.value.param == param
    assert plane.list_revocations() == ()


# What works


async def test_the_secret_is_shown_once(
    api: AdminApi, plane: ControlPlane, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    made = await api.create_key(MANAGER, {**BODY, "models": ["small"], "operations": ["chat"]})
    rotated = await api.rotate_key(MANAGER, {"key_id": made["id"]})
    listed = await api.list_keys(MANAGER, {})
    revoked = await api.revoke_key(MANAGER, {"key_id": rotated["id"]})
    shown = json.dumps([listed, revoked]) + str(plane.events()) + caplog.text
    for answer in (made, rotated):
        secret = answer["key"].split("_")[2]
        assert answer["key"].split("_")[1] == answer["id"]
        assert secret not in shown
        assert "secret" not in answer
    assert "hash" not in shown


async def test_life_of_a_key(api: AdminApi, plane: ControlPlane) -> None:
    check = checker(plane).check
    body = {**BODY, "models": ["small", "tier:large"], "operations": ["chat"]}
    made = await api.create_key(MANAGER, body)
    principal = check(made["key"])
    assert principal.models == {"small", "tier:large"}
    assert principal.operations == {"chat"}
    assert made["status"] == "active"
    assert made["expires_at"] - made["created_at"] == DAY_S
    assert made["created_by"] == MANAGER.key

    rotated = await api.rotate_key(MANAGER, {"key_id": made["id"], "grace_s": 60})
    assert rotated["replaces"] == made["id"]
    assert check(rotated["key"]).models == principal.models
    check(made["key"])

    await api.revoke_key(MANAGER, {"key_id": made["id"]})
    await api.revoke(RESPONDER, {"kind": "key", "key_id": rotated["id"], "reason": "leaked"})
    for answer in (made, rotated):
        with pytest.raises(Exception, match="revoked"):
            check(answer["key"])
    listed = await api.list_keys(MANAGER, {})
    assert {k["id"]: k["status"] for k in listed["data"]} == {
        made["id"]: "revoked",
        rotated["id"]: "revoked",
    }


async def test_grace_is_a_day_unless_told_otherwise(api: AdminApi, plane: ControlPlane) -> None:
    made = await api.create_key(MANAGER, {**BODY, "expires_in_s": 30 * DAY_S})
    await api.rotate_key(MANAGER, {"key_id": made["id"]})
    left_us = plane.get_key(made["id"]).record.expires_us - time.time_ns() // 1000
    assert abs(left_us / 1e6 - DAY_S) < 60


async def test_revocations_are_listed_as_they_were_asked_for(
    api: AdminApi, plane: ControlPlane
) -> None:
    moment = int(time.time()) - 60
    asked: list[dict[str, Any]] = [
        {"kind": "token", "token_id": "jti", "reason": "laptop lost"},
        {"kind": "subject", "issuer": "entra", "subject": "tid/oid", "not_before": moment},
    ]
    answers = [await api.revoke(RESPONDER, body) for body in asked]
    for body, answer in zip(asked, answers, strict=True):
        assert body.items() <= answer.items()
        assert answer["revoked_by"] == RESPONDER.key
    listed = await api.list_revocations(RESPONDER, {})
    assert sorted(map(json.dumps, listed["data"])) == sorted(map(json.dumps, answers))
    assert plane.snapshot.revocations.subjects == {("entra", "tid/oid"): moment * 1_000_000}


async def test_routes_reach_every_handler(api: AdminApi) -> None:
    routes = {(method, path): handler for method, path, handler, _ in api.routes()}
    assert set(routes) == {
        ("POST", "/v1/admin/keys"),
        ("GET", "/v1/admin/keys"),
        ("POST", "/v1/admin/keys/{key_id}/rotate"),
        ("DELETE", "/v1/admin/keys/{key_id}"),
        ("POST", "/v1/admin/revocations"),
        ("GET", "/v1/admin/revocations"),
    }
    made = await routes["POST", "/v1/admin/keys"](MANAGER, BODY)
    assert (await routes["GET", "/v1/admin/keys"](MANAGER, {}))["data"][0]["id"] == made["id"]
