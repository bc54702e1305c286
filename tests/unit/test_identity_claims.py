"""Claims of Okta, Entra and standard issuers, and who they become."""

from __future__ import annotations

from typing import Any

import pytest

from governance.errors import NotPermitted, Unauthenticated
from governance.identity.claims import principal_of
from governance.identity.config import IdentityConfig
from governance.identity.pseudonym import principal_key
from governance.identity.verifier import VerifiedToken
from governance.types import Principal, PrincipalKind
from tests.unit import forge
from tests.unit.forge import NOW_S, PEPPER, TENANT_A, good_claims, without

HASH = "ab" * 32
GROUP = {"when": {"group": "llm-hr"}, "grant": ["employee"], "department": "hr"}
STAFF = {"when": {"role": "staff"}, "department": "hr"}


def become(claims: dict[str, Any], config: IdentityConfig | None = None) -> Principal:
    config = config or forge.identity()
    token = VerifiedToken(
        config.issuers[0], "k1", claims, NOW_S * 1_000_000, (NOW_S + 600) * 1_000_000
    )
    return principal_of(token, config, PEPPER, HASH)


def mapped(*mappings: dict[str, Any], **issuer: Any) -> IdentityConfig:
    return forge.identity(forge.issuer_section(**issuer), mappings=list(mappings))


def test_a_standard_token() -> None:
    principal = become(good_claims(client_id="cli"))
    assert principal == Principal(
        kind=PrincipalKind.USER,
        subject="person-1",
        issuer="idp",
        department="hr",
        roles=frozenset({"employee", "analyst"}),
        key=principal_key(PEPPER, "idp", None, "person-1"),
        client_id="cli",
        key_id="k1",
        token_id="t-1",
        token_hash=HASH,
        issued_at_us=NOW_S * 1_000_000,
        expires_at_us=(NOW_S + 600) * 1_000_000,
    )


def okta(**more: Any) -> dict[str, Any]:
    return good_claims(
        sub="person@example.com", uid="00u1", cid="0oa1", scp=["openid", "llm.use"], **more
    )


def test_an_okta_person() -> None:
    config = mapped(GROUP, client=["cid"], roles_claim=None, required_scope="llm.use")
    principal = become(okta(groups=["llm-hr", "everyone"]), config)
    assert principal.kind is PrincipalKind.USER
    assert principal.subject == "person@example.com"
    assert principal.client_id == "0oa1"
    assert become(okta(groups="llm-hr"), config).department == "hr"
    by_uid = mapped(GROUP, subject=["uid"], roles_claim=None)
    assert become(okta(groups=["llm-hr"]), by_uid).subject == "00u1"


def test_an_okta_application() -> None:
    config = mapped({"when": {"client": "0oa1"}, "grant": ["batch"], "department": "hr"})
    assert become({**okta(), "sub": "0oa1"}, config).kind is PrincipalKind.SERVICE


def entra(**more: Any) -> dict[str, Any]:
    return good_claims(
        iss=f"https://login.example.com/{TENANT_A}/v2.0", tid=TENANT_A, oid="object-1", **more
    )


@pytest.mark.parametrize("client", [{"azp": "app-1", "ver": "2.0"}, {"appid": "app-1"}])
def test_an_entra_person(client: dict[str, str]) -> None:
    config = forge.identity(forge.entra_section(required_scope="Llm.Use"))
    claims = without(entra(scp="openid Llm.Use", uti="u-1", **client), "jti")
    principal = become(claims, config)
    assert principal.kind is PrincipalKind.USER
    assert principal.subject == f"{TENANT_A}/object-1"
    assert principal.tenant_id == TENANT_A
    assert principal.client_id == "app-1"
    assert principal.token_id == "u-1"
    assert principal.key == principal_key(PEPPER, "idp", TENANT_A, f"{TENANT_A}/object-1")


def test_an_entra_application_needs_no_scope() -> None:
    config = forge.identity(forge.entra_section(required_scope="Llm.Use"))
    assert become(entra(idtyp="app", azp="app-1"), config).kind is PrincipalKind.SERVICE
    # Without idtyp it cannot be told from an ID token, which has no scope either.
    with pytest.raises(NotPermitted, match="scope"):
        become(entra(azp="app-1"), config)
    with pytest.raises(NotPermitted, match="scope"):
        become(entra(scp="Llm.Use.Other", idtyp="user"), config)


@pytest.mark.parametrize("missing", ["tid", "oid"])
def test_a_caller_without_a_name(missing: str) -> None:
    with pytest.raises(Unauthenticated):
        become(without(entra(), missing), forge.identity(forge.entra_section()))


@pytest.mark.parametrize("oid", ["", None, 1, ["object-1"], "a/b", "x" * 513, "a\nb", "\ud800"])
def test_names_that_could_be_taken_for_others(oid: object) -> None:
    with pytest.raises(Unauthenticated):
        become({**entra(), "oid": oid}, forge.identity(forge.entra_section()))


def test_a_lone_subject_may_hold_a_slash() -> None:
    assert become(good_claims(sub="team/person")).subject == "team/person"


# Overage


OVERAGE: list[dict[str, Any]] = [
    {"_claim_names": {"groups": "src1"}},
    {
        "_claim_names": {"groups": "src1"},
        "_claim_sources": {"src1": {"endpoint": "https://attacker.example/getMemberObjects"}},
    },
    {"hasgroups": True},
    {"hasgroups": "true"},
    {"hasgroups": 1},
    {"_claim_names": "groups"},
    {"_claim_names": ["groups"]},
]


@pytest.mark.parametrize("overage", OVERAGE, ids=str)
def test_too_many_groups_give_no_group_roles(overage: dict[str, Any]) -> None:
    config = mapped(GROUP, {"when": {"role": "staff"}, "grant": ["reader"], "department": "it"})
    claims = good_claims(roles=["staff"], groups=["llm-hr"], **overage)
    principal = become(claims, config)
    assert principal.groups_overage
    assert principal.roles == {"reader"}
    assert principal.department == "it"
    with pytest.raises(NotPermitted):
        become({**claims, "roles": []}, config)


@pytest.mark.parametrize("overage", OVERAGE, ids=str)
def test_groups_do_not_come_in_by_another_door(overage: dict[str, Any]) -> None:
    """What is left of the groups grants nothing as roles, nor through a general claim."""
    as_roles = mapped({"when": {"role": "llm-hr"}, "department": "hr"}, roles_claim="groups")
    as_claim = mapped({"when": {"claim": "groups", "value": "llm-hr"}, "department": "hr"})
    for config in (as_roles, as_claim):
        assert become(good_claims(groups=["llm-hr"]), config).department == "hr"
        with pytest.raises(NotPermitted):
            become(good_claims(groups=["llm-hr"], **overage), config)


def test_overage_of_a_groups_claim_by_another_name() -> None:
    config = mapped(GROUP, STAFF, groups_claim="teams")
    claims = good_claims(teams=["llm-hr"], roles=["staff"], _claim_names={"teams": "src1"})
    principal = become(claims, config)
    assert principal.groups_overage
    assert principal.roles == frozenset()


@pytest.mark.parametrize(
    "claims",
    [{}, {"hasgroups": False}, {"hasgroups": "false"}, {"_claim_names": {"address": "src1"}}],
)
def test_what_is_no_overage(claims: dict[str, Any]) -> None:
    principal = become(good_claims(groups=["llm-hr"], **claims), mapped(GROUP))
    assert not principal.groups_overage
    assert principal.roles == {"employee"}


# Mappings


def test_no_mapping_no_place() -> None:
    for roles in ([], ["other"], None, 1, {"hr-analyst": True}, [["hr-analyst"]], ["HR-Analyst"]):
        with pytest.raises(NotPermitted, match="no role here"):
            become(good_claims(roles=roles))


def test_roles_without_a_department_are_no_place() -> None:
    with pytest.raises(NotPermitted):
        become(good_claims(), mapped({"when": {"role": "hr-analyst"}, "grant": ["employee"]}))


def test_first_department_and_all_roles() -> None:
    config = mapped(
        {"when": {"role": "a"}, "grant": ["one"]},
        {"when": {"role": "b"}, "grant": ["two"], "department": "first"},
        {"when": {"role": "c"}, "grant": ["three", "one"], "department": "second"},
        {"when": {"role": "d"}, "grant": ["four"], "department": "third"},
    )
    principal = become(good_claims(roles=["c", "b", "a"]), config)
    assert principal.department == "first"
    assert principal.roles == {"one", "two", "three"}


def test_everything_in_a_condition_must_match() -> None:
    when = {
        "issuer": "idp",
        "role": "staff",
        "group": "llm-hr",
        "scope": "llm.use",
        "client": "cli",
        "claim": "country",
        "value": "NL",
    }
    config = mapped({"when": when, "department": "hr"})
    claims = good_claims(
        roles=["staff"], groups=["llm-hr"], scope="openid llm.use", client_id="cli", country="NL"
    )
    assert become(claims, config).department == "hr"
    for name in ("roles", "groups", "scope", "client_id", "country"):
        with pytest.raises(NotPermitted):
            become(without(claims, name), config)
        with pytest.raises(NotPermitted):
            become({**claims, name: "other"}, config)


def test_a_mapping_of_another_issuer() -> None:
    other = forge.issuer_section(name="other", issuer="https://other.example.com")
    config = forge.identity(
        forge.issuer_section(),
        other,
        mappings=[{"when": {"issuer": "other", "role": "hr-analyst"}, "department": "hr"}],
    )
    with pytest.raises(NotPermitted):
        become(good_claims(), config)


def test_a_text_is_one_role_and_many_scopes() -> None:
    staff = mapped(STAFF)
    assert become(good_claims(roles="staff"), staff).department == "hr"
    with pytest.raises(NotPermitted):
        become(good_claims(roles="not staff"), staff)
    scoped = mapped({"when": {"scope": "llm.use"}, "department": "hr"})
    for claims in ({"scp": "a llm.use"}, {"scp": ["a", "llm.use"]}, {"scope": "a llm.use"}):
        assert become(good_claims(**claims), scoped).department == "hr"


@pytest.mark.parametrize("value", [True, 1, ["yes", 1], {"yes": 1}, "Yes"])
def test_a_claim_matches_text_only(value: object) -> None:
    config = mapped({"when": {"claim": "member", "value": "True"}, "department": "hr"})
    with pytest.raises(NotPermitted):
        become(good_claims(member=value), config)


@pytest.mark.parametrize("token_id", [None, 1, ["t"], {}])
def test_token_ids_that_are_no_text(token_id: object) -> None:
    assert become(good_claims(jti=token_id)).token_id is None


# Pseudonym


def test_pseudonyms_do_not_meet() -> None:
    triples = [
        ("a", "b", "c"),
        ("ab", "", "c"),
        ("a", "bc", ""),
        ("a", None, "bc"),
        ("a", "", "bc"),
        ("abc", None, ""),
    ]
    assert len({principal_key(PEPPER, *t) for t in triples}) == len(triples)
    assert principal_key(PEPPER, "a", None, "b") != principal_key(b"q" * 32, "a", None, "b")
    assert len(principal_key(PEPPER, "a", None, "b")) == 64
    with pytest.raises(ValueError, match="pepper"):
        principal_key(b"short", "a", None, "b")
