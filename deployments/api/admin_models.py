"""What the administration interface reads and writes, as JSON. Times are Unix seconds."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from governance.control.records import (
    DEFAULT_GRACE_S,
    MAX_GRACE_S,
    MAX_KEY_LIFETIME_S,
    KeyEntry,
    RevocationEntry,
    RevocationKind,
)
from governance.errors import InvalidRequest, UnsupportedField
from governance.policy.model import ModelName, Name
from governance.types import Operation

Json = dict[str, Any]

_SECOND_US = 1_000_000
_LAST_SECOND = 253_402_300_799
"""31 December 9999; a larger time is one in milliseconds."""

KeyId = Annotated[str, Field(pattern=r"^[a-z2-7]{12}$")]
Text = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
LifetimeS = Annotated[int, Field(ge=60, le=MAX_KEY_LIFETIME_S)]
UnixTime = Annotated[int, Field(ge=0, le=_LAST_SECOND)]


class Fields(BaseModel):
    """Types are taken as JSON has them: ``"60"`` is no number and ``true`` neither."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class NoFields(Fields):
    """A request that takes nothing."""


class KeyReference(Fields):
    """A request about one key."""

    key_id: KeyId
    """Id of the key: the part between the first and the second underscore."""


class CreateKey(Fields):
    """A new service key."""

    name: Annotated[Text, Field(max_length=128)]
    """What the key is for; shown in lists."""
    department: Name
    """Department whose budget and rules apply to the holder."""
    roles: tuple[Name, ...] = Field(min_length=1, max_length=32)
    """Roles of the holder."""
    expires_in_s: LifetimeS
    """Seconds until the key expires: a minute to 90 days. There is no default."""
    models: tuple[ModelName, ...] | None = Field(default=None, min_length=1, max_length=64)
    """Models that the key is limited to; left out, the rules alone decide."""
    operations: tuple[Operation, ...] | None = Field(default=None, min_length=1, max_length=8)
    """``chat``, ``completions``, ``embeddings``; left out, the rules alone decide."""


class RotateKey(KeyReference):
    """A successor for a key."""

    expires_in_s: LifetimeS | None = None
    """Seconds until the successor expires; left out, as long as the old key was made for."""
    grace_s: int = Field(default=DEFAULT_GRACE_S, ge=0, le=MAX_GRACE_S)
    """Seconds that the old key still works; never longer than it would have."""


class _Revocation(Fields):
    reason: Text | None = None
    """For the record."""


class RevokeKey(_Revocation):
    """Refuse a service key."""

    kind: Literal["key"]
    key_id: KeyId
    """Id of the key."""


class RevokeToken(_Revocation):
    """Refuse one access token."""

    kind: Literal["token"]
    token_id: Text
    """``jti`` of the token, or SHA-256 of the whole token in hex; never the token itself."""
    expires_at: UnixTime | None = None
    """When the token expires, at most a day ahead; left out, the revocation is kept for a day."""


class RevokeSubject(_Revocation):
    """Refuse what a subject was issued before a moment."""

    kind: Literal["subject"]
    issuer: Name
    """Configured name of the issuer."""
    subject: Text
    """Subject within the issuer; for Entra ``tid/oid``."""
    not_before: UnixTime | None = None
    """The moment; left out, now. At most a day ahead."""


_Model = TypeVar("_Model", bound=BaseModel)
_REVOCATION: TypeAdapter[RevokeKey | RevokeToken | RevokeSubject] = TypeAdapter(
    Annotated[RevokeKey | RevokeToken | RevokeSubject, Field(discriminator="kind")]
)


def parse(model: type[_Model], body: Json) -> _Model:
    """Read a request.

    Raises:
        InvalidRequest: A field is missing or not valid; names the field, never repeats its value.
        UnsupportedField: A field is not known.
    """
    try:
        # As JSON again: strict validation of Python values takes no list for a tuple.
        return model.model_validate_json(json.dumps(body))
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_input=False)[0], 0) from None


def parse_revocation(body: Json) -> RevokeKey | RevokeToken | RevokeSubject:
    """Read a revocation; raises as ``parse`` does."""
    try:
        return _REVOCATION.validate_json(json.dumps(body))
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)[0]
        if details["type"].startswith("union_tag"):
            kinds = ", ".join(kind.value for kind in RevocationKind)
            raise InvalidRequest(f"'kind' must be one of {kinds}.", "kind") from None
        # The first element of the place is the kind.
        raise _refusal(details, 1) from None


def key_object(entry: KeyEntry, now_us: int) -> Json:
    """A key as the interface shows it: everything but what proves it."""
    record = entry.record
    return {
        "object": "service_key",
        "id": record.key_id,
        "name": record.name,
        "department": record.department,
        "roles": list(record.roles),
        "models": None if record.models is None else list(record.models),
        "operations": None if record.operations is None else list(record.operations),
        "status": entry.status(now_us).value,
        "created_at": record.created_us // _SECOND_US,
        "created_by": record.created_by,
        "expires_at": record.expires_us // _SECOND_US,
        "revoked_at": _seconds(entry.revoked_us),
        "last_used_at": _seconds(entry.last_used_us),
        "replaces": record.replaces,
    }


def revocation_object(entry: RevocationEntry) -> Json:
    """A revocation as the interface shows it, with the field names of the request."""
    shown: Json = {"object": "revocation", "kind": entry.kind.value}
    if entry.kind is RevocationKind.KEY:
        shown["key_id"] = entry.target
    elif entry.kind is RevocationKind.TOKEN:
        shown |= {"token_id": entry.target, "kept_until": _seconds(entry.until_us)}
    else:
        shown |= {
            "issuer": entry.issuer,
            "subject": entry.target,
            "not_before": _seconds(entry.not_before_us),
        }
    return {
        **shown,
        "revoked_at": entry.revoked_us // _SECOND_US,
        "revoked_by": entry.by,
        "reason": entry.reason,
    }


def _seconds(time_us: int | None) -> int | None:
    return None if time_us is None else time_us // _SECOND_US


def _refusal(details: ErrorDetails, skip: int) -> InvalidRequest:
    place = ".".join(str(part) for part in details["loc"][skip:])[:100]
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return UnsupportedField(f"{place!r} is not a field of this request.", place)
    if kind == "missing":
        return InvalidRequest(f"{place!r} is missing.", place)
    if kind == "greater_than_equal":
        return InvalidRequest(f"{place!r} must be at least {context['ge']}.", place)
    if kind == "less_than_equal":
        return InvalidRequest(f"{place!r} must be at most {context['le']}.", place)
    if not place:
        return InvalidRequest("The body is not valid.")
    return InvalidRequest(f"{place!r} is not valid.", place)
