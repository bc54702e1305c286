"""``gatehouse budget alerts``: a secret to sign alerts with, and a message to try them out."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

import click

from deployments.cli.errors import CliError, Exit
from deployments.cli.options import json_option
from deployments.cli.output import print_json

_KEPT = 2
"""Secrets in a file after a new one is put in: it, and the one before."""


@click.group()
def alerts() -> None:
    """Alerts at thresholds of budgets, told to a webhook."""


@alerts.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--rotate", is_flag=True, help="Put a new secret first; the one before stays valid.")
def secret(file: Path, rotate: bool) -> None:
    """Write a new secret to FILE, and print it for the receiver.

    Set GATEHOUSE_ALERT_SECRET_FILE to FILE on the node of the ledger. After --rotate, alerts are
    signed with both secrets: give the receiver the new one, then delete the last line of FILE.
    """
    from deployments.alerts.signing import SecretError, new_secret, read_secrets
    from deployments.ledger_budgets import replace_file

    if file.exists() != rotate:
        there = "exists" if file.exists() else "does not exist"
        remedy = "add --rotate to keep the secret in it" if file.exists() else "leave --rotate out"
        raise CliError(f"{file}: {there}", remedy, Exit.USAGE)
    fresh = new_secret(secrets.token_bytes)
    lines = [fresh]
    try:
        if rotate:
            read_secrets(file)
            old = [line.strip() for line in file.read_text().splitlines()]
            lines += [line for line in old if line and not line.startswith("#")]
        replace_file(file, "".join(f"{line}\n" for line in lines[:_KEPT]).encode())
    except SecretError as error:
        raise CliError(str(error)) from None
    except OSError as error:
        raise CliError(f"{file}: cannot be written ({error.strerror})") from None
    click.echo(fresh)


@alerts.command()
@click.option(
    "--budgets",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("config/budgets.yaml"),
    show_default=True,
    help="Budgets file with `alerts.webhook`.",
)
@click.option("--url", help="Another receiver than the file's.")
@click.option(
    "--secret-file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="GATEHOUSE_ALERT_SECRET_FILE",
    help="File with the secret; or GATEHOUSE_ALERT_SECRET_FILE.",
)
@json_option
def test(budgets: Path, url: str | None, secret_file: Path | None, as_json: bool) -> None:
    """Send a message from here to the webhook, once, and say what it answered.

    It is signed like an alert; its `type` is `gatehouse.alerts.test`. The ledger sends from its own
    node: what its network lets through, only an alert shows.
    """
    # Late: HTTP and the budgets' checks cost every other command a second.
    import asyncio

    from deployments.alerts.payload import check_body
    from deployments.alerts.sender import Result, WebhookSender, safe
    from deployments.alerts.signing import SecretError, read_secrets

    target = url or _webhook(budgets)
    if not safe(target):
        raise CliError("the webhook must be https, or http on 127.0.0.1, without a password in it")
    if secret_file is None:
        remedy = "`gatehouse budget alerts secret FILE` writes one"
        raise CliError("no secret: set GATEHOUSE_ALERT_SECRET_FILE", remedy, Exit.USAGE)
    try:
        keys = read_secrets(secret_file)
    except SecretError as error:
        raise CliError(str(error)) from None
    message_id = f"test_{os.urandom(16).hex()}"
    body = check_body(time.time_ns() // 1000, "Alerts of this Gatehouse arrive here.")
    sender = WebhookSender(clock=lambda: time.time_ns() // 1000)
    attempt = asyncio.run(sender.send(target, keys, message_id, body))
    if as_json:
        print_json({"id": message_id, "result": attempt.result.value, "why": attempt.why})
    else:
        click.echo(f"{attempt.result.value}: {attempt.why} ({message_id})")
    if attempt.result is not Result.DELIVERED:
        code = Exit.FAILURE if attempt.result is Result.REFUSED else Exit.UNAVAILABLE
        raise CliError("the webhook did not take it", "see its log, and the URL and secret", code)


def _webhook(budgets: Path) -> str:
    from governance.budget.config import load_budgets
    from governance.yaml_config import ConfigError

    try:
        webhook = load_budgets(budgets).alerts.webhook
    except ConfigError as error:
        raise CliError(str(error)) from None
    if webhook is None:
        raise CliError(f"{budgets}: has no alerts.webhook", "set it, or give --url", Exit.USAGE)
    return webhook
