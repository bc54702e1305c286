"""``gatehouse key`` and ``gatehouse revoke``: administration over the gateway."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import click

from deployments.cli.client import GatewayClient
from deployments.cli.errors import CliError, Exit
from deployments.cli.options import json_option, with_gateway
from deployments.cli.output import print_json, print_table

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class DurationS(click.ParamType[int]):
    """``90d``, ``12h``, ``30m``, ``45s`` or plain seconds, as seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> int:
        """Read one duration."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,9})([smhd]?)", str(value))
        if match is None:
            self.fail("write a duration such as 30d, 12h or 45m", param, context)
        return int(match[1]) * _UNITS_S[match[2] or "s"]


@click.group()
def key() -> None:
    """Service keys: hashed at rest, scoped, expiring."""


@key.command()
@click.argument("name")
@click.option("--department", required=True, help="Whose rules and limits apply.")
@click.option("--role", "roles", multiple=True, required=True, help="Repeat for several.")
@click.option("--expires-in", type=DurationS(), required=True, help="Such as 30d; at most 90d.")
@click.option("--model", "models", multiple=True, help="Limit to a model; repeat for several.")
@click.option("--operation", "operations", multiple=True, help="Limit to chat, completions, ...")
@with_gateway
@json_option
def create(
    gateway: GatewayClient,
    name: str,
    department: str,
    roles: tuple[str, ...],
    expires_in: int,
    models: tuple[str, ...],
    operations: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make a key. It is shown once and cannot be read back."""
    body: dict[str, Any] = {
        "name": name,
        "department": department,
        "roles": list(roles),
        "expires_in_s": expires_in,
    }
    if models:
        body["models"] = list(models)
    if operations:
        body["operations"] = list(operations)
    _show_issued(gateway.call("POST", "/v1/admin/keys", body).body, as_json)


@key.command()
@click.argument("key_id")
@click.option("--expires-in", type=DurationS(), help="Left out, as long as the old key.")
@click.option("--grace", type=DurationS(), help="How long the old key still works; 1d if left out.")
@with_gateway
@json_option
def rotate(
    gateway: GatewayClient, key_id: str, expires_in: int | None, grace: int | None, as_json: bool
) -> None:
    """Make a successor with the same rights; the old key ends after a grace period."""
    body = {"expires_in_s": expires_in, "grace_s": grace}
    given = {name: value for name, value in body.items() if value is not None}
    answer = gateway.call("POST", f"/v1/admin/keys/{_path(key_id)}/rotate", given)
    _show_issued(answer.body, as_json)


@key.command(name="revoke")
@click.argument("key_id")
@with_gateway
@json_option
def revoke_key(gateway: GatewayClient, key_id: str, as_json: bool) -> None:
    """Revoke a key at once and for good."""
    answer = gateway.call("DELETE", f"/v1/admin/keys/{_path(key_id)}").body
    if as_json:
        print_json(answer)
    else:
        click.echo(f"revoked {key_id}; every gateway refuses it within two seconds")


@key.command(name="list")
@with_gateway
@json_option
def list_keys(gateway: GatewayClient, as_json: bool) -> None:
    """List all keys; never their secrets."""
    answer = gateway.call("GET", "/v1/admin/keys").body
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            entry["id"],
            entry["name"],
            entry["department"],
            ", ".join(entry["roles"]),
            ", ".join(entry["models"] or ["any"]),
            entry["status"],
            _date(entry["expires_at"]),
            _date(entry["last_used_at"]),
        )
        for entry in answer["data"]
    ]
    columns = ("id", "name", "department", "roles", "models", "status", "expires", "last used")
    print_table(columns, rows, "no keys")


@click.group()
def revoke() -> None:
    """Refuse tokens and subjects, on all gateways within two seconds."""


@revoke.command(name="token")
@click.argument("token_id")
@click.option("--expires-at", type=int, help="Unix seconds; left out, kept for 36 hours.")
@click.option("--reason", help="For the record.")
@with_gateway
@json_option
def revoke_token(
    gateway: GatewayClient, token_id: str, expires_at: int | None, reason: str | None, as_json: bool
) -> None:
    """Revoke one token, by its `jti` or the SHA-256 of the whole token in hex."""
    if token_id.count(".") == 2:
        raise CliError(
            "give the token's `jti` or its SHA-256, not the token itself",
            "printf %s TOKEN | sha256sum",
            Exit.USAGE,
        )
    _revoke(gateway, as_json, kind="token", token_id=token_id, expires_at=expires_at, reason=reason)


@revoke.command(name="subject")
@click.argument("issuer_name", metavar="ISSUER")
@click.argument("subject")
@click.option("--not-before", type=int, help="Unix seconds; left out, now.")
@click.option("--reason", help="For the record.")
@with_gateway
@json_option
def revoke_subject(
    gateway: GatewayClient,
    issuer_name: str,
    subject: str,
    not_before: int | None,
    reason: str | None,
    as_json: bool,
) -> None:
    """Revoke everything that SUBJECT was issued until now by ISSUER (its configured name)."""
    _revoke(
        gateway,
        as_json,
        kind="subject",
        issuer=issuer_name,
        subject=subject,
        not_before=not_before,
        reason=reason,
    )


@revoke.command(name="list")
@with_gateway
@json_option
def list_revocations(gateway: GatewayClient, as_json: bool) -> None:
    """List what is revoked."""
    answer = gateway.call("GET", "/v1/admin/revocations").body
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            entry["kind"],
            entry.get("key_id") or entry.get("token_id") or entry["subject"],
            entry.get("issuer") or "",
            _date(entry["revoked_at"]),
            entry["reason"] or "",
        )
        for entry in answer["data"]
    ]
    print_table(("kind", "target", "issuer", "revoked", "reason"), rows, "nothing is revoked")


def _revoke(gateway: GatewayClient, as_json: bool, **fields: Any) -> None:
    given = {name: value for name, value in fields.items() if value is not None}
    answer = gateway.call("POST", "/v1/admin/revocations", given).body
    if as_json:
        print_json(answer)
    else:
        click.echo(f"revoked; every gateway refuses this {fields['kind']} within two seconds")


def _show_issued(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    click.echo(answer["key"])
    note = f"key {answer['id']}, expires {_date(answer['expires_at'])}. "
    click.echo(note + "Keep it now: it is not shown again.", err=True)


def _path(key_id: str) -> str:
    return quote(key_id, safe="")


def _date(seconds: int | None) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%MZ}" if seconds else ""
