"""OpenAPI fragments of ``GET /v1/usage``: what it takes and answers."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _parameter(name: str, description: str, pattern: str, longest: int) -> Schema:
    text = {"type": "string", "minLength": 1, "maxLength": longest, "pattern": pattern}
    return {
        "name": name,
        "in": "query",
        "required": False,
        "description": description,
        "schema": text,
    }


_WORD = "[A-Za-z0-9][A-Za-z0-9._-]*"
USAGE: Schema = {
    "security": [{"bearer": []}],
    "parameters": [
        _parameter(
            "department",
            "Department to show; left out, the caller's own. Another one needs the permission "
            "budgets:read.",
            f"^{_WORD}$",
            64,
        ),
        _parameter(
            "account",
            "Account to show, in place of a department: one that the caller's requests are "
            "charged to; any other needs the permission budgets:read.",
            f"^{_WORD}(/{_WORD})?([~@]{_WORD})?$",
            256,
        ),
    ],
}


def _counts(description: str, *, nullable: bool = False) -> Schema:
    kind: Schema = {"type": ["integer", "null"] if nullable else "integer"}
    return {
        "type": "object",
        "description": description,
        "properties": {
            "gpu_us": {**kind, "description": "Charged device-microseconds."},
            "tokens": {**kind, "description": "Prompt and answer tokens."},
        },
        "required": ["gpu_us", "tokens"],
        "additionalProperties": False,
    }


_ISO: Schema = {"type": "string", "format": "date-time"}
_UNIX: Schema = {"type": "integer", "description": "Unix seconds."}
_TEXT: Schema = {"type": ["string", "null"]}
_TIGHT: Schema = {
    "type": ["object", "null"],
    "properties": {
        "account": {"type": "string"},
        "window": {"type": "string"},
        "reset_at": _UNIX,
        "limit": {"type": "integer"},
        "spent": {"type": "integer"},
        "owner": _TEXT,
    },
    "additionalProperties": False,
}
ACCOUNT: Schema = {
    "object": {"const": "usage"},
    "account": {"type": "string"},
    "parent": {**_TEXT, "description": "Account above; null for a department."},
    "cohort": {**_TEXT, "description": "Departments of one cohort lend to each other."},
    "owner": {**_TEXT, "description": "Who to ask for more."},
    "mode": {"enum": ["hard", "soft", "overdraft"]},
    "class": {"enum": ["critical", "standard", "batch"]},
    "weight_milli": {
        "type": "integer",
        "description": "Share of engines at peak beside others of the class, in thousandths.",
    },
    "window": {"enum": ["hour", "day", "week", "month", "fiscal-month"]},
    "start": _ISO,
    "start_at": _UNIX,
    "reset": {**_ISO, "description": "When the window ends and the count begins again."},
    "reset_at": _UNIX,
    "limit": _counts(
        "Limits of the window, override, transfers and overdraft counted; null is no limit.",
        nullable=True,
    ),
    "spent": _counts("Charged in this window."),
    "leased": _counts("Lent to gateways beyond what is spent."),
    "open": _counts("Of what is lent, reserved by requests in flight."),
    "remaining": _counts("Limit less spent and open; null is no limit.", nullable=True),
    "available": _counts(
        "What new requests may take, all accounts above and borrowing counted; null is no limit.",
        nullable=True,
    ),
    "moved": _counts("Transferred in during this window, less transferred out."),
    "overdraft": _counts("Part of the limit that is overdraft."),
    "borrow": _counts("The most that may be borrowed of the cohort."),
    "borrowed": _counts("Used or held beyond the limit, out of what the cohort lends."),
    "lend": _counts("The most that others of the cohort may use of it."),
    "lent": _counts("Of what remains, with others of the cohort."),
    "total": _counts("Charged ever, over all windows."),
    "limited_by": {
        "type": "object",
        "description": "The account, of those on the path, that leaves least of a quantity.",
        "properties": {"gpu_us": _TIGHT, "tokens": _TIGHT},
        "required": ["gpu_us", "tokens"],
        "additionalProperties": False,
    },
    "exhausted": {
        "type": "boolean",
        "description": "Some account on the path has spent all that it may.",
    },
    "overridden_until": {
        "type": ["integer", "null"],
        "description": "Unix seconds until which other limits than those of the file hold.",
    },
    "age_ms": {"type": "integer", "minimum": 0, "description": "Age of these figures."},
}
"""Fields of one account."""
_OBJECT: Schema = {
    "type": "object",
    "properties": ACCOUNT,
    "required": list(ACCOUNT),
    "additionalProperties": False,
}
USAGE_ANSWER: dict[int | str, Schema] = {
    200: {
        "description": "The account, and the others that the caller's requests are charged to.",
        "content": {
            "application/json": {
                "schema": {
                    **_OBJECT,
                    "properties": {**ACCOUNT, "accounts": {"type": "array", "items": _OBJECT}},
                    "required": [*ACCOUNT, "accounts"],
                }
            }
        },
    }
}
