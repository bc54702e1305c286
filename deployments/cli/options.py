"""Options that commands share, and what they amount to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from deployments.cli.client import GatewayClient
from deployments.cli.errors import CliError, Exit

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_ISSUER = "http://127.0.0.1:8100"
IDENTITIES = ("hr-analyst", "data-scientist", "marketing-intern")
"""Sample identities of users."""
ADMINISTRATORS = ("platform-admin", "security-officer")
"""Sample identities that administer."""

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="JSON for scripts.")
issuer_option = click.option(
    "--issuer",
    envvar="GATEHOUSE_DEV_ISSUER",
    default=DEFAULT_ISSUER,
    show_default=True,
    help="Development identity provider.",
)


def _complete_identity(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    return [name for name in (*IDENTITIES, *ADMINISTRATORS) if name.startswith(incomplete)]


identity_argument = click.argument("identity", shell_complete=_complete_identity)


def development_token(issuer: str, identity: str) -> str:
    """A token of the development identity provider.

    Raises:
        CliError: The provider does not answer, or does not know the identity.
    """
    from deployments.dev_token import TokenError, UnknownIdentity, fetch_token

    try:
        return fetch_token(issuer, identity)
    except UnknownIdentity:
        known = ", ".join((*IDENTITIES, *ADMINISTRATORS))
        raise CliError(
            f"no such identity: {identity}", f"such as {known}", Exit.NOT_FOUND
        ) from None
    except TokenError as error:
        remedy = "development tokens are for local mode; elsewhere set GATEHOUSE_TOKEN"
        raise CliError(str(error), remedy, Exit.UNAVAILABLE) from None


def with_gateway(command: F) -> F:
    """Add the options of a connection; the command gets ``gateway: GatewayClient``."""

    @click.option(
        "--url",
        envvar="GATEHOUSE_URL",
        default=DEFAULT_URL,
        show_default=True,
        help="Base URL; or GATEHOUSE_URL.",
    )
    @click.option(
        "--token",
        envvar="GATEHOUSE_TOKEN",
        help="Access token or service key. GATEHOUSE_TOKEN keeps it out of the process list.",
    )
    @click.option(
        "--as",
        "identity",
        shell_complete=_complete_identity,
        help=f"Sample identity, local mode only: {', '.join((*IDENTITIES, *ADMINISTRATORS))}.",
    )
    @issuer_option
    @functools.wraps(command)
    def wrapped(
        *args: Any, url: str, token: str | None, identity: str | None, issuer: str, **kwargs: Any
    ) -> Any:
        if identity is not None:
            # NOTE: wins over GATEHOUSE_TOKEN, which may stand in the environment for good.
            token = development_token(issuer, identity)
        return command(*args, gateway=GatewayClient(url, token or None), **kwargs)

    return wrapped  # type: ignore[return-value]
