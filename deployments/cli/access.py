"""``gatehouse token``, ``chat``, ``models``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click

from deployments.cli.client import GatewayClient
from deployments.cli.errors import CliError, Exit
from deployments.cli.options import (
    development_token,
    identity_argument,
    issuer_option,
    json_option,
    with_gateway,
)
from deployments.cli.output import print_json, print_table, printable

_SHOWN_HEADERS = {
    "x-gatehouse-model": "model",
    "x-gatehouse-decision-id": "decision",
    "x-gatehouse-rules": "rules",
    "x-gatehouse-request-id": "request",
    "x-gatehouse-model-version": "version",
}


@click.command()
@identity_argument
@issuer_option
@json_option
def token(identity: str, issuer: str, as_json: bool) -> None:
    """Print a development token for a sample IDENTITY (local mode only)."""
    value = development_token(issuer, identity)
    if as_json:
        print_json({"identity": identity, "issuer": issuer, "access_token": value})
    else:
        click.echo(value)


@click.command()
@with_gateway
@json_option
def models(gateway: GatewayClient, as_json: bool) -> None:
    """List the models that the caller may use."""
    found = gateway.call("GET", "/v1/models").body
    if as_json:
        print_json(found)
        return
    rows = [
        (
            str(model["id"]),
            str(model.get("tier", "")),
            ", ".join(model.get("operations", [])),
            str(model.get("max_model_len", "")),
        )
        for model in _list(found)
    ]
    print_table(("model", "tier", "operations", "context tokens"), rows, "no model is visible")


@click.command()
@click.argument("prompt", nargs=-1)
@click.option("--model", help="Model id; left out, the first that the caller may use.")
@click.option("--system", help="System message.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer, in tokens.")
@with_gateway
@json_option
def chat(
    gateway: GatewayClient,
    prompt: tuple[str, ...],
    model: str | None,
    system: str | None,
    max_tokens: int | None,
    as_json: bool,
) -> None:
    """Ask a model and print the answer as it comes. PROMPT may also arrive on standard input.

    Model, decision and request id go to standard error, so the answer alone can be piped on.
    """
    text = " ".join(prompt)
    if not text and not sys.stdin.isatty():
        text = sys.stdin.read()
    if not text.strip():
        raise CliError("nothing to ask", 'such as: gatehouse chat "Hello"', Exit.USAGE)
    if model is None:
        visible = _list(gateway.call("GET", "/v1/models").body)
        if not visible:
            raise CliError("no model is visible to this caller", code=Exit.NOT_FOUND)
        model = str(visible[0]["id"])
    messages = [{"role": "user", "content": text}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    body: dict[str, Any] = {"model": model, "messages": messages}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    if as_json:
        answer = gateway.call("POST", "/v1/chat/completions", body)
        metered = answer.body.get("gatehouse") or {}
        print_json({**answer.body, "gatehouse": {**metered, **_facts(answer.headers)}})
        return
    _stream(gateway, body)


def _stream(gateway: GatewayClient, body: dict[str, Any]) -> None:
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    headers, events = gateway.stream("/v1/chat/completions", body)
    facts = _facts(headers)
    terminal = sys.stdout.isatty()
    try:
        for event in events:
            if fingerprint := event.get("system_fingerprint"):
                facts.setdefault("version", str(fingerprint))
            if usage := event.get("usage"):
                facts["tokens"] = f"{usage['prompt_tokens']} in, {usage['completion_tokens']} out"
            if metered := event.get("gatehouse"):
                facts["gpu"] = _gpu_time(metered)
            for choice in event.get("choices", []):
                piece = (choice.get("delta") or {}).get("content") or ""
                click.echo(printable(piece) if terminal else piece, nl=False)
    finally:
        click.echo()
        shown = "  ".join(f"{name} {value}" for name, value in facts.items())
        click.secho(printable(shown), err=True, dim=True)


def _gpu_time(metered: dict[str, Any]) -> str:
    """Metered device time, and what it counts for where the accelerator has a weight."""
    gpu_us, charged_us = metered.get("gpu_us"), metered.get("charged_us")
    if gpu_us is None:
        return "not metered"
    shown = f"{gpu_us / 1_000_000:.3f} s"
    return (
        shown if charged_us in (None, gpu_us) else f"{shown} ({charged_us / 1_000_000:.3f} charged)"
    )


def _facts(headers: Mapping[str, str]) -> dict[str, str]:
    return {short: headers[name] for name, short in _SHOWN_HEADERS.items() if name in headers}


def _list(body: Any) -> list[dict[str, Any]]:
    if not isinstance(body, dict) or not isinstance(body.get("data"), list):
        raise CliError("the answer is not a list", "check --url: this may not be Gatehouse")
    return list(body["data"])
