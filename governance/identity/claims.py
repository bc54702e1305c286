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
MAX_SUBJECT = 512
"""Characters of one claim that names the caller."""


def values(claims: Mapping[str, Any], name: str | None) -> frozenset[str]:
    """A claim as a set of strings; a string is one value, so ``"not admin"`` holds no ``admin``."""
    value = claims.get(name) if name else None
    if isinstance(value, str):
        return frozenset((value,))
    if isinstance(value, list):
        return frozenset(item for item in value if isinstance(item, str))
    return frozenset()


def scopes_of(claims: Mapping[str, Any]) -> frozenset[str]:
    """Scopes: ``scp`` or ``scope``, a list or words in a string (RFC 8693 section 4.2)."""
    both = values(claims, "scp") | values(claims, "scope")
    return frozenset(word for value in both for word in value.split())


def has_overage(claims: Mapping[str, Any], groups_claim: str | None) -> bool:
    """Whether the issuer left groups out because there were too many.

    Entra then writes ``hasgroups``, or names a place to ask in ``_claim_names`` and
    ``_claim_sources``. That URL comes from the token, so it is never followed.
    """
    if claims.get("hasgroups") not in (None, False, "false"):
        return True
    names = claims.get("_claim_names", {})
    if not isinstance(names, dict):
        return True
    return not {"groups", groups_claim or "groups"}.isdisjoint(names)


def _without_groups(claims: Mapping[str, Any], groups_claim: str | None) -> Mapping[str, Any]:
    """The claims less all that an overage makes incomplete, whatever part of it was sent."""
    names = claims.get("_claim_names")
    withheld = {"groups", groups_claim, *(names if isinstance(names, dict) else ())}
    return {name: value for name, value in claims.items() if name not in withheld}


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
    subject = _subject(issuer, claims)
    tenant = claims.get("tid") if isinstance(claims.get("tid"), str) else None
    client = _client(issuer, claims)
    scopes = scopes_of(claims)
    kind = _kind(claims, client)
    if issuer.required_scope and kind is PrincipalKind.USER and issuer.required_scope not in scopes:
        raise NotPermitted("The token lacks the scope that this service requires.")
    overage = has_overage(claims, issuer.groups_claim)
    granting = _without_groups(claims, issuer.groups_claim) if overage else claims
    facts = _Facts(
        issuer=issuer.name,
        roles=values(granting, issuer.roles_claim),
        groups=values(granting, issuer.groups_claim),
        scopes=scopes,
        client=client,
        claims=granting,
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


def _subject(issuer: IssuerConfig, claims: Mapping[str, Any]) -> str:
    """Stable name of the caller: the configured claims, joined by ``/``."""
    parts = []
    for name in issuer.subject:
        part = claims.get(name)
        if not isinstance(part, str) or not 0 < len(part) <= MAX_SUBJECT or not part.isprintable():
            raise Unauthenticated()
        # Two different pairs must not join to one name.
        if len(issuer.subject) > 1 and "/" in part:
            raise Unauthenticated()
        parts.append(part)
    return "/".join(parts)


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
