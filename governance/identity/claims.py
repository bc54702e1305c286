"""Verified claims of Okta, Microsoft Entra and standard issuers become a ``Principal``.

| | Okta (custom authorization server) | Entra v1.0 and v2.0 | standard (RFC 9068) |
|---|---|---|---|
| caller | ``sub``, ``uid`` | ``tid`` and ``oid`` | ``sub`` |
| client | ``cid`` | ``appid`` (v1.0), ``azp`` (v2.0) | ``client_id`` |
| scopes | ``scp``, a list | ``scp``, a string | ``scope``, a string |
| application alone | ``sub`` equals ``cid`` | ``idtyp: app`` | ``sub`` equals ``client_id`` |
| groups | ``groups`` if configured | ``groups``, left out above 200 | ``groups`` |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from governance.errors import NotPermitted, Unauthenticated
from governance.identity.config import IdentityConfig, IssuerConfig, WhenClaims
from governance.identity.pseudonym import principal_key
from governance.identity.verifier import VerifiedToken
from governance.types import Principal, PrincipalKind

NO_PLACE = "This identity has no role here. Ask the owner of model access in your organisation."
MAX_VALUES = 2_000
"""Values read of one list claim; a token of 16 KiB cannot hold more."""


def strings(claims: Mapping[str, Any], name: str | None) -> frozenset[str]:
    """A claim as a set of strings: a list's strings, or a string's words."""
    value = claims.get(name) if name else None
    if isinstance(value, str):
        return frozenset(value.split())
    if isinstance(value, list):
        return frozenset(item for item in value[:MAX_VALUES] if isinstance(item, str))
    return frozenset()


def has_overage(claims: Mapping[str, Any], groups_claim: str | None) -> bool:
    """Whether the issuer left groups out because there were too many.

    Entra then writes ``hasgroups``, or names a place to ask in ``_claim_names`` and
    ``_claim_sources``. That URL comes from the token, so it is never followed.
    """
    if claims.get("hasgroups") in (True, "true"):
        return True
    names = claims.get("_claim_names")
    return isinstance(names, dict) and (groups_claim or "groups") in names


def principal_of(
    token: VerifiedToken, config: IdentityConfig, pepper: bytes, token_hash: str
) -> Principal:
    """Who a verified token stands for.

    Args:
        token: The token.
        config: Mappings of claims to roles and department.
        pepper: Keys the pseudonym.
        token_hash: SHA-256 in hex of the presented token.

    Raises:
        Unauthenticated: A claim that names the caller is missing.
        NotPermitted: No mapping gives a department, or a required scope is missing.
    """
    issuer, claims = token.issuer, token.claims
    named = [claims.get(name) for name in issuer.subject]
    if not all(isinstance(part, str) and part for part in named):
        raise Unauthenticated()
    # "/" cannot join two different pairs to one name where both are ids; sub alone stays itself.
    subject = "/".join(str(part) for part in named)
    tenant = claims.get("tid") if isinstance(claims.get("tid"), str) else None
    client = _client(issuer, claims)
    scopes = strings(claims, "scp") | strings(claims, "scope")
    kind = _kind(claims, client)
    if issuer.required_scope and kind is PrincipalKind.USER and issuer.required_scope not in scopes:
        raise NotPermitted("The token lacks the scope that this service requires.")
    overage = has_overage(claims, issuer.groups_claim)
    facts = _Facts(
        issuer=issuer.name,
        roles=strings(claims, issuer.roles_claim),
        groups=frozenset() if overage else strings(claims, issuer.groups_claim),
        scopes=scopes,
        client=client,
        claims=claims,
    )
    roles, department = _map(config, facts)
    if department is None:
        raise NotPermitted(NO_PLACE)
    token_id = claims.get("jti") or claims.get("uti")
    return Principal(
        kind=kind,
        subject=subject,
        issuer=issuer.name,
        department=department,
        roles=roles,
        key=principal_key(pepper, issuer.name, tenant, subject),
        tenant_id=tenant,
        client_id=client,
        key_id=token.kid,
        token_id=token_id if isinstance(token_id, str) else None,
        token_hash=token_hash,
        issued_at_us=token.issued_at_us,
        expires_at_us=token.expires_at_us,
        groups_overage=overage,
    )


class _Facts:
    """What mappings may look at."""

    def __init__(
        self,
        *,
        issuer: str,
        roles: frozenset[str],
        groups: frozenset[str],
        scopes: frozenset[str],
        client: str | None,
        claims: Mapping[str, Any],
    ) -> None:
        self.issuer = issuer
        self.roles = roles
        self.groups = groups
        self.scopes = scopes
        self.client = client
        self.claims = claims

    def meet(self, when: WhenClaims) -> bool:
        """Whether everything that the condition names matches."""
        if when.issuer is not None and when.issuer != self.issuer:
            return False
        if when.role is not None and when.role not in self.roles:
            return False
        if when.group is not None and when.group not in self.groups:
            return False
        if when.scope is not None and when.scope not in self.scopes:
            return False
        if when.client is not None and when.client != self.client:
            return False
        return when.claim is None or self._claim_is(when.claim, when.value)

    def _claim_is(self, name: str, wanted: str | None) -> bool:
        value = self.claims.get(name)
        return value == wanted or (isinstance(value, list) and wanted in value)


def _map(config: IdentityConfig, facts: _Facts) -> tuple[frozenset[str], str | None]:
    roles: set[str] = set()
    department = None
    for mapping in config.mappings:
        if facts.meet(mapping.when):
            roles.update(mapping.grant)
            department = department or mapping.department
    return frozenset(roles), department


def _client(issuer: IssuerConfig, claims: Mapping[str, Any]) -> str | None:
    for name in issuer.client:
        value = claims.get(name)
        if isinstance(value, str) and value:
            return value
    return None


def _kind(claims: Mapping[str, Any], client: str | None) -> PrincipalKind:
    """An application with a token of its own, or a person through one."""
    if claims.get("idtyp") == "app":
        return PrincipalKind.SERVICE
    alone = client is not None and claims.get("sub") == client
    return PrincipalKind.SERVICE if alone else PrincipalKind.USER
