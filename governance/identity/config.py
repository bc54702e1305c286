"""What ``config/identity.yaml`` may say: issuers, and how claims become roles and a department.

Semantics of ``mappings``, in full:

1. A mapping applies when everything in its ``when`` matches the verified token.
2. The first applying mapping that names a department decides the department.
3. The roles are the union of ``grant`` over all applying mappings.
4. A token to which no mapping applies, or that gets no department, is refused with 403: it is a
   good token of somebody who has no place here.
5. With several issuers every mapping names one: a role called ``admin`` at one provider says
   nothing about a role called ``admin`` at another.

Nothing is granted by default, and no mapping can take a role away; what a role may do is the
policy's to say.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from governance.yaml_config import read_yaml, validate

ALGORITHMS = ("RS256", "RS384", "RS512", "ES256", "ES384", "ES512")
"""Asymmetric signatures only: with a shared secret, whoever can verify can also forge."""
TENANT = "{tid}"
"""Stands in an issuer's URL for the tenant's id (Microsoft Entra)."""

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Claim = Annotated[str, Field(min_length=1, max_length=256)]
Guid = Annotated[
    str, Field(pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")
]


class Section(BaseModel):
    """Base of all sections: immutable, and a name that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class IssuerConfig(Section):
    """One OpenID provider."""

    name: Name
    """Short name, used in mappings, records and revocations. ``gatehouse`` is taken."""
    issuer: str = Field(min_length=8, max_length=512)
    """Exact value of ``iss``; ``{tid}`` stands for one of ``tenants``."""
    tenants: tuple[Guid, ...] = ()
    """Tenant ids that are accepted, in lower case as in tokens; required with ``{tid}`` and only
    then."""
    audiences: tuple[Claim, ...] = Field(min_length=1)
    """Accepted values of ``aud``: what this platform is called at the provider. In v2.0 tokens of
    Entra that is the client id of the API, in v1.0 tokens its ``api://`` URI."""
    algorithms: tuple[str, ...] = ("RS256",)
    """Accepted signature algorithms."""
    types: tuple[Literal["JWT", "at+jwt", "absent"], ...] = Field(("JWT", "at+jwt"), min_length=1)
    """Accepted values of the ``typ`` header. ``at+jwt`` alone where the provider follows
    RFC 9068, so that an ID token cannot pass for an access token. ``absent`` accepts a token
    without ``typ``: Okta's custom authorization servers send none."""
    subject: tuple[Claim, ...] = Field(("sub",), min_length=1)
    """Claims that together name the caller; ``[tid, oid]`` for Entra, where ``sub`` differs
    from application to application."""
    client: tuple[Claim, ...] = ("azp", "appid", "cid", "client_id")
    """Claims that may name the client application; the first present counts."""
    roles_claim: Claim | None = "roles"
    groups_claim: Claim | None = None
    """Claim with group names or ids, if mappings use groups."""
    required_scope: Claim | None = None
    """Scope that a delegated token must have."""
    jwks_uri: str | None = None
    """Where the keys are, ``{tid}`` as in ``issuer``; left out, discovery tells."""
    on_overage: Literal["deny"] = "deny"
    """Too many groups for the token: group-derived roles are not granted. The URL that such a
    token names is never followed."""

    @field_validator("algorithms")
    @classmethod
    def _asymmetric(cls, algorithms: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in algorithms if name not in ALGORITHMS]
        if unknown or not algorithms:
            raise ValueError(f"must be some of {', '.join(ALGORITHMS)}")
        return algorithms

    @field_validator("name")
    @classmethod
    def _not_ours(cls, name: str) -> str:
        if name == "gatehouse":
            raise ValueError("is the issuer name of service keys; choose another")
        return name

    @field_validator("issuer", "jwks_uri")
    @classmethod
    def _url(cls, url: str | None) -> str | None:
        if url is not None and not is_safe_url(url, allow_loopback_http=True):
            raise ValueError("must be an https URL (http on loopback is for local mode)")
        return url

    @model_validator(mode="after")
    def _tenants_fit(self) -> IssuerConfig:
        if (TENANT in self.issuer) != bool(self.tenants):
            raise ValueError("tenants and {tid} in issuer belong together: give both or neither")
        if self.jwks_uri is not None and TENANT in self.jwks_uri and not self.tenants:
            raise ValueError("jwks_uri holds {tid}, and there are no tenants")
        return self

    def issuer_urls(self) -> tuple[str, ...]:
        """Every accepted value of ``iss``."""
        return tuple(self.key_urls())

    def key_urls(self) -> dict[str, str | None]:
        """Every accepted value of ``iss`` with its ``jwks_uri``, if one is configured."""
        if not self.tenants:
            return {self.issuer: self.jwks_uri}
        return {
            self.issuer.replace(TENANT, tenant): self.jwks_uri
            and self.jwks_uri.replace(TENANT, tenant)
            for tenant in self.tenants
        }


class WhenClaims(Section):
    """Condition on a verified token; everything given must match."""

    issuer: Name | None = None
    """Name of the issuer."""
    role: Claim | None = None
    """Value in the issuer's ``roles_claim``."""
    group: Claim | None = None
    """Value in the issuer's ``groups_claim``."""
    scope: Claim | None = None
    """Scope of the token."""
    client: Claim | None = None
    """Client application."""
    claim: Claim | None = None
    """Name of another claim, which must equal ``value`` or, if it is a list, hold it."""
    value: Claim | None = None

    @model_validator(mode="after")
    def _meaningful(self) -> WhenClaims:
        if (self.claim is None) != (self.value is None):
            raise ValueError("claim and value belong together")
        if all(v is None for v in (self.role, self.group, self.scope, self.client, self.claim)):
            raise ValueError("name a role, group, scope, client or claim: an issuer is not enough")
        return self


class Mapping(Section):
    """Grants for tokens that meet a condition."""

    when: WhenClaims
    grant: tuple[Name, ...] = ()
    """Roles granted."""
    department: Name | None = None
    """Department, unless an earlier mapping decided it."""

    @model_validator(mode="after")
    def _grants(self) -> Mapping:
        if not self.grant and self.department is None:
            raise ValueError("grants nothing; give roles in grant, or a department")
        return self


class IdentityConfig(Section):
    """The whole file."""

    version: Literal[1] = 1
    issuers: tuple[IssuerConfig, ...] = Field(min_length=1)
    mappings: tuple[Mapping, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> IdentityConfig:
        names = [issuer.name for issuer in self.issuers]
        if len(names) != len(set(names)):
            raise ValueError("two issuers have the same name")
        urls = [url for issuer in self.issuers for url in issuer.issuer_urls()]
        if len(urls) != len(set(urls)):
            raise ValueError("two issuers have the same URL")
        for number, mapping in enumerate(self.mappings):
            if reason := self._misfit(mapping.when):
                raise ValueError(f"mappings.{number}: {reason}")
        return self

    def _misfit(self, when: WhenClaims) -> str | None:
        """Why a condition could never match, or could match the wrong issuer's tokens."""
        if when.issuer is None and len(self.issuers) > 1:
            return "name the issuer, since there are several"
        chosen = [i for i in self.issuers if when.issuer in (None, i.name)]
        if not chosen:
            return "names an issuer that is not declared"
        if when.role is not None and chosen[0].roles_claim is None:
            return "looks for a role, and the issuer has no roles_claim"
        if when.group is not None and chosen[0].groups_claim is None:
            return "looks for a group, and the issuer has no groups_claim"
        return None

    def roles(self) -> Iterable[str]:
        """All roles that some mapping grants."""
        return {role for mapping in self.mappings for role in mapping.grant}


def is_safe_url(url: str, *, allow_loopback_http: bool) -> bool:
    """Whether keys may be fetched from a URL: https, or plain http on loopback where allowed."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    if not host or parts.username or parts.password or parts.fragment:
        return False
    if parts.scheme == "https":
        return True
    return allow_loopback_http and parts.scheme == "http" and host in ("127.0.0.1", "::1")


def load_identity(path: str | Path, *, local: bool = False) -> IdentityConfig:
    """Read and check the identity file.

    Args:
        path: The file.
        local: Local mode: an issuer on loopback is accepted.

    Raises:
        ConfigError: Names the file, the place and the reason.
    """
    source = read_yaml(path)
    config = validate(source, IdentityConfig)
    for number, issuer in enumerate(config.issuers):
        for field, url in (("issuer", issuer.issuer), ("jwks_uri", issuer.jwks_uri)):
            if url and not local and not is_safe_url(url, allow_loopback_http=False):
                raise source.error(
                    ("issuers", number, field),
                    "plain http on loopback is for mode: local only; use an https URL",
                )
    return config
