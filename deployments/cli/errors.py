"""Errors of the command line: one clear line, the remedy, an exit code that scripts can rely on.

| code | meaning |
|---|---|
| 0 | done |
| 1 | failed, or a check found something wrong; the message says what |
| 2 | wrong use: unknown option, missing argument |
| 3 | not authenticated, or not permitted |
| 4 | not found, or not visible to this caller |
| 5 | service unavailable: not running, starting, overloaded |
| 6 | refused by policy, limit or budget |
"""

from __future__ import annotations

from enum import IntEnum
from typing import IO, Any

import click


class Exit(IntEnum):
    """Exit codes; documented at the top of this module."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    DENIED = 3
    NOT_FOUND = 4
    UNAVAILABLE = 5
    REFUSED = 6


class CliError(click.ClickException):
    """An error that ends a command."""

    def __init__(self, message: str, remedy: str = "", code: Exit = Exit.FAILURE) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.exit_code = int(code)  # type: ignore[misc]

    def show(self, file: IO[Any] | None = None) -> None:
        """Print to standard error."""
        click.echo(f"error: {self.message}", err=True)
        if self.remedy:
            click.echo(f"  {self.remedy}", err=True)


_BY_STATUS = {
    401: Exit.DENIED,
    403: Exit.DENIED,
    404: Exit.NOT_FOUND,
    409: Exit.REFUSED,
    429: Exit.REFUSED,
    502: Exit.UNAVAILABLE,
    503: Exit.UNAVAILABLE,
    504: Exit.UNAVAILABLE,
}
_BY_CODE = {
    "blocked_by_policy": Exit.REFUSED,
    "limit_exceeded": Exit.REFUSED,
    "overloaded": Exit.UNAVAILABLE,
}
_REMEDIES = {
    "missing_credential": "name an identity with --as (local mode), or set GATEHOUSE_TOKEN",
    "invalid_credential": "get a new token, and check the issuer with `gatehouse config check`",
    "expired_credential": "get a new token",
    "revoked_credential": "ask an administrator; the credential will not work again",
    "model_not_found": "`gatehouse models` lists what you may use",
    "budget_exhausted": "`gatehouse budget show` says what is left, and when it is fresh again",
    "not_found": "check --url: something else may be listening there",
}


def from_answer(status: int, body: object) -> CliError:
    """The error that an HTTP answer means.

    Args:
        status: HTTP status, 400 or above.
        body: Parsed body; OpenAI's error envelope if it comes from Gatehouse.
    """
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        code = _BY_STATUS.get(status, Exit.FAILURE)
        return CliError(f"HTTP {status}", "check --url: this may not be Gatehouse", code)
    name = str(error.get("code") or "")
    message = str(error.get("message") or f"HTTP {status}")
    if rules := error.get("rule_ids"):
        message += f" (rules: {', '.join(map(str, rules))})"
    if name:
        message += f" [{name}]"
    return CliError(
        message,
        _REMEDIES.get(name, ""),
        _BY_CODE.get(name, _BY_STATUS.get(status, Exit.FAILURE)),
    )
