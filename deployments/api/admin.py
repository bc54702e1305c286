"""Administration over HTTP: service keys and revocations. No Ray and no web framework.

    POST   /v1/admin/keys                    keys:manage          make a key
    GET    /v1/admin/keys                    keys:read            list keys
    POST   /v1/admin/keys/{key_id}/rotate    keys:manage          make a successor
    DELETE /v1/admin/keys/{key_id}           keys:manage          revoke a key
    POST   /v1/admin/revocations             revocations:manage   revoke a key, token or subject
    GET    /v1/admin/revocations             revocations:manage   list what is revoked

The secret of a key is in the answer that makes it, once; it is never stored and never logged.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol

from deployments.api.admin_models import (
    CreateKey,
    KeyReference,
    NoFields,
    RevokeKey,
    RevokeSubject,
    RevokeToken,
    RotateKey,
    key_object,
    parse,
    parse_revocation,
    revocation_object,
)
from governance.control.records import (
    IssuedKey,
    KeyEntry,
    KeySpec,
    RevocationEntry,
    RevocationKind,
)
from governance.errors import NotPermitted
from governance.policy.model import Permission
from governance.ports import Clock
from governance.types import Principal, PrincipalKind

Json = dict[str, Any]
Handler = Callable[[Principal, Json], Awaitable[Json]]
_SECOND_US = 1_000_000


def _system_clock() -> int:
    return time.time_ns() // 1000


class AdminControl(Protocol):
    """What administration needs of the control plane; ``by`` is the administrator's key."""

    async def create_key(self, spec: KeySpec, by: str) -> IssuedKey:
        """Make a key."""
        ...

    async def rotate_key(
        self, key_id: str, by: str, lifetime_s: int | None, grace_s: int
    ) -> IssuedKey:
        """Make the successor of a key."""
        ...

    async def revoke_key(self, key_id: str, by: str, reason: str | None = None) -> KeyEntry:
        """Revoke a key."""
        ...

    async def get_key(self, key_id: str) -> KeyEntry:
        """One key."""
        ...

    async def list_keys(self) -> tuple[KeyEntry, ...]:
        """All keys."""
        ...

    async def revoke_token(
        self, token_id: str, by: str, expires_us: int | None = None, reason: str | None = None
    ) -> RevocationEntry:
        """Revoke a token."""
        ...

    async def revoke_subject(
        self,
        issuer: str,
        subject: str,
        by: str,
        not_before_us: int | None = None,
        reason: str | None = None,
    ) -> RevocationEntry:
        """Revoke what a subject was issued."""
        ...

    async def list_revocations(self) -> tuple[RevocationEntry, ...]:
        """All revocations in force."""
        ...


class AdminApi:
    """Handlers that take an authenticated principal and a JSON object and give a JSON object.

    Beyond the permission that each route names, whoever makes a key is held to two rules, so
    that a permission to make keys is not a permission to do everything:

    - A service key makes no service keys: it would never expire.
    - A key gets no administrative permission that its maker lacks.

    Which models a key may reach is the maker's to grant.

    Args:
        control: The control plane.
        authorize: Raises ``NotPermitted`` unless a principal has the named permission.
        clock: Wall clock, to show whether a key is active; ``None`` for the system's.
    """

    def __init__(
        self,
        control: AdminControl,
        authorize: Callable[[Principal, str], None],
        clock: Clock | None = None,
    ) -> None:
        self._control = control
        self._authorize = authorize
        self._clock = clock or _system_clock

    def routes(self) -> Iterable[tuple[str, str, Handler, bool]]:
        """(method, path, handler, takes a body); path parameters join the JSON object."""
        return (
            ("POST", "/v1/admin/keys", self.create_key, True),
            ("GET", "/v1/admin/keys", self.list_keys, False),
            ("POST", "/v1/admin/keys/{key_id}/rotate", self.rotate_key, True),
            ("DELETE", "/v1/admin/keys/{key_id}", self.revoke_key, False),
            ("POST", "/v1/admin/revocations", self.revoke, True),
            ("GET", "/v1/admin/revocations", self.list_revocations, False),
        )

    async def create_key(self, principal: Principal, body: Json) -> Json:
        """Make a key; ``key`` of the answer is the only copy of its text."""
        self._authorize(principal, Permission.KEYS_MANAGE)
        fields = parse(CreateKey, body)
        spec = KeySpec(
            name=fields.name,
            department=fields.department,
            roles=fields.roles,
            lifetime_s=fields.expires_in_s,
            models=fields.models,
            operations=None if fields.operations is None else tuple(fields.operations),
        )
        self._may_issue(principal, spec.department, spec.roles)
        return self._issued(await self._control.create_key(spec, principal.key))

    async def rotate_key(self, principal: Principal, body: Json) -> Json:
        """Make a successor with the same rights; the old key ends after ``grace_s``."""
        self._authorize(principal, Permission.KEYS_MANAGE)
        fields = parse(RotateKey, body)
        old = (await self._control.get_key(fields.key_id)).record
        self._may_issue(principal, old.department, old.roles)
        issued = await self._control.rotate_key(
            fields.key_id, principal.key, fields.expires_in_s, fields.grace_s
        )
        return self._issued(issued)

    async def revoke_key(self, principal: Principal, body: Json) -> Json:
        """Revoke a key, at once and for good."""
        self._authorize(principal, Permission.KEYS_MANAGE)
        fields = parse(KeyReference, body)
        return key_object(
            await self._control.revoke_key(fields.key_id, principal.key), self._clock()
        )

    async def list_keys(self, principal: Principal, body: Json) -> Json:
        """List all keys ever made, newest first."""
        self._authorize(principal, Permission.KEYS_READ)
        parse(NoFields, body)
        entries = await self._control.list_keys()
        now_us = self._clock()
        return {"object": "list", "data": [key_object(entry, now_us) for entry in entries]}

    async def revoke(self, principal: Principal, body: Json) -> Json:
        """Revoke a key, a token or what a subject was issued; effective within two seconds."""
        self._authorize(principal, Permission.REVOCATIONS_MANAGE)
        fields = parse_revocation(body)
        if isinstance(fields, RevokeKey):
            key = await self._control.revoke_key(fields.key_id, principal.key, fields.reason)
            entry = RevocationEntry(
                RevocationKind.KEY,
                key.record.key_id,
                key.revoked_us or self._clock(),
                principal.key,
                reason=fields.reason,
            )
        elif isinstance(fields, RevokeToken):
            expires_us = None if fields.expires_at is None else fields.expires_at * _SECOND_US
            entry = await self._control.revoke_token(
                fields.token_id, principal.key, expires_us, fields.reason
            )
        else:
            entry = await self._revoke_subject(principal, fields)
        return revocation_object(entry)

    async def list_revocations(self, principal: Principal, body: Json) -> Json:
        """List the revocations in force, newest first."""
        self._authorize(principal, Permission.REVOCATIONS_MANAGE)
        parse(NoFields, body)
        entries = await self._control.list_revocations()
        return {"object": "list", "data": [revocation_object(entry) for entry in entries]}

    async def _revoke_subject(self, principal: Principal, fields: RevokeSubject) -> RevocationEntry:
        not_before_us = None if fields.not_before is None else fields.not_before * _SECOND_US
        return await self._control.revoke_subject(
            fields.issuer, fields.subject, principal.key, not_before_us, fields.reason
        )

    def _may_issue(self, principal: Principal, department: str, roles: Iterable[str]) -> None:
        if principal.kind is PrincipalKind.KEY:
            raise NotPermitted("A service key cannot make service keys; use an access token.")
        holder = replace(
            principal, kind=PrincipalKind.KEY, department=department, roles=frozenset(roles)
        )
        for permission in Permission:
            if self._permits(holder, permission) and not self._permits(principal, permission):
                raise NotPermitted(
                    "These roles carry an administrative permission that you do not have.", "roles"
                )

    def _permits(self, principal: Principal, permission: Permission) -> bool:
        try:
            self._authorize(principal, permission)
        except NotPermitted:
            return False
        return True

    def _issued(self, issued: IssuedKey) -> Json:
        return {**key_object(issued.entry, self._clock()), "key": issued.key.text()}
