"""``gatehouse config check`` and ``gatehouse doctor``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from deployments.cli.errors import Exit
from deployments.cli.options import json_option
from deployments.cli.output import print_json, print_table
from deployments.preflight import Check, failures

CONFIG_DEFAULT = "serve_config.local.yaml"

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=CONFIG_DEFAULT,
    envvar="GATEHOUSE_CONFIG",
    show_default=True,
    help="Serve file; or GATEHOUSE_CONFIG.",
)


@click.group()
def config() -> None:
    """Configuration files."""


@config.command()
@config_option
@json_option
@click.pass_context
def check(context: click.Context, config_path: Path, as_json: bool) -> None:
    """Validate the serve file, identity, policy, budgets and models; 1 if one is wrong."""
    from deployments.configuration import check_configuration

    _report(context, check_configuration(config_path), as_json)


@click.command()
@config_option
@json_option
@click.pass_context
def doctor(context: click.Context, config_path: Path, as_json: bool) -> None:
    """Say what is wrong with machine, configuration, service and security; 1 if anything is."""
    from deployments.doctor import examine
    from deployments.machine import LocalMachine

    _report(context, examine(config_path, LocalMachine(), os.environ), as_json)


def _report(context: click.Context, checks: Sequence[Check], as_json: bool) -> None:
    failed = failures(checks)
    if as_json:
        print_json({"ok": not failed, "checks": [asdict(each) for each in checks]})
    else:
        rows = [(each.status.value, each.name, each.detail, each.remedy) for each in checks]
        print_table(("", "check", "found", "what to do"), rows)
    if failed:
        context.exit(int(Exit.FAILURE))
