"""``gatehouse budget``: what departments have used, and changing budgets while the platform runs.

Commands that read the audit trail are in ``deployments.cli.budget_trail`` and ``budget_reports``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from deployments.cli.admin import DurationS
from deployments.cli.budget_alerts import alerts
from deployments.cli.budget_output import limits, moment, show_accounts
from deployments.cli.budget_reports import export, report
from deployments.cli.budget_trail import forecast, simulate, top
from deployments.cli.client import GatewayClient
from deployments.cli.errors import CliError, Exit
from deployments.cli.options import json_option, with_gateway
from deployments.cli.output import print_json, print_table, printable

if TYPE_CHECKING:
    from governance.budget.config import BudgetsConfig
    from governance.finops.compare import Difference


class GpuSeconds(click.ParamType[int]):
    """``90``, ``0.25``, ``2h``: device time, as microseconds."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> int:
        """Read an amount without passing through a float."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,9})(?:\.(\d{1,6}))?([smhd]?)", str(value))
        if match is None:
            self.fail("write device time such as 3600, 0.5 or 2h", param, context)
        amount_us = int(match[1]) * 1_000_000 + int((match[2] or "").ljust(6, "0"))
        return amount_us * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[3] or "s"]


reason_option = click.option("--reason", required=True, help="For the record.")


@click.group()
def budget() -> None:
    """Budgets: device time and tokens per department and window."""


for command in (alerts, forecast, simulate, top, report, export):
    budget.add_command(command)


@budget.command()
@click.option("--department", help="One department; left out, all that the caller may see.")
@click.option("--account", help="One account, such as hr/recruiting or hr@hour.")
@click.option("--users", is_flag=True, help="Accounts of single users as well.")
@with_gateway
@json_option
def show(
    gateway: GatewayClient,
    department: str | None,
    account: str | None,
    users: bool,
    as_json: bool,
) -> None:
    """Show what is spent and what is left, by department, part and window.

    'left' is what new requests may take, accounts above and borrowing counted. The burn rate is
    the average since the window began; 'used up' is when that would use up what is left, where
    the window does not end first. `gatehouse budget forecast` knows more.
    """
    if department is not None and (account is not None or users):
        raise CliError(
            "--department stands alone", "use --account for a single account", Exit.USAGE
        )
    if department is not None:
        answer = gateway.call("GET", f"/v1/usage?department={_quoted(department)}").body
    elif account is not None:
        answer = gateway.call("GET", f"/v1/usage?account={_quoted(account)}").body
    elif users:
        answer = gateway.call("GET", "/v1/admin/budgets?users=true").body
    else:
        answer = _visible(gateway)
    if as_json:
        print_json(answer)
        return
    show_accounts(
        answer["data"] if answer["object"] == "list" else [answer, *answer.get("accounts", ())]
    )


@budget.command(name="set")
@click.argument("account")
@click.option("--gpu-seconds", type=GpuSeconds(), help="Such as 3600, 0.5 or 2h, per window.")
@click.option("--tokens", type=click.IntRange(min=0), help="Tokens per window.")
@click.option("--expires", type=DurationS(), required=True, help="Such as 4h; at most 31d.")
@reason_option
@with_gateway
@json_option
def set_budget(
    gateway: GatewayClient,
    account: str,
    gpu_seconds: int | None,
    tokens: int | None,
    expires: int,
    reason: str,
    as_json: bool,
) -> None:
    """Override an account's limits for a time; what is left out stays as in the file."""
    body = _amounts(gpu_seconds, tokens) | {"expires_in_s": expires, "reason": reason}
    answer = gateway.call("PUT", _path(account), body).body
    if as_json:
        print_json(answer)
    else:
        until = moment(answer["overridden_until"])
        click.echo(f"{answer['account']}: {limits(answer)}, until {until}")


@budget.command()
@click.argument("account")
@with_gateway
@json_option
def clear(gateway: GatewayClient, account: str, as_json: bool) -> None:
    """End an override: the limits of the budgets file hold again."""
    answer = gateway.call("DELETE", _path(account)).body
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{answer['account']}: {limits(answer)}, as in the file")


@budget.command()
@click.argument("source")
@click.argument("target")
@click.option("--gpu-seconds", type=GpuSeconds(), help="Such as 3600, 0.5 or 2h.")
@click.option("--tokens", type=click.IntRange(min=0), help="Tokens.")
@reason_option
@with_gateway
@json_option
def transfer(
    gateway: GatewayClient,
    source: str,
    target: str,
    gpu_seconds: int | None,
    tokens: int | None,
    reason: str,
    as_json: bool,
) -> None:
    """Move budget from SOURCE to TARGET until their window ends.

    Between two departments, or two parts of one, whose windows are the same. What is spent, or in
    use at gateways, cannot be moved.
    """
    body = _amounts(gpu_seconds, tokens) | {"source": source, "target": target, "reason": reason}
    answer = gateway.call("POST", "/v1/admin/budgets/transfer", body).body
    if as_json:
        print_json(answer)
        return
    for name in ("source", "target"):
        account = answer[name]
        until = moment(account["reset_at"])
        click.echo(f"{account['account']}: {limits(account)}, until {until}")


@budget.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@reason_option
@click.option("--dry-run", is_flag=True, help="Only say what would change.")
@with_gateway
@json_option
def apply(gateway: GatewayClient, file: Path, reason: str, dry_run: bool, as_json: bool) -> None:
    """Take up a budgets file without a restart; what is spent stays spent.

    A file that is wrong, or does not add up, is refused with the reason, and nothing changes.
    """
    from governance.budget.config import load_budgets
    from governance.finops.compare import compare
    from governance.yaml_config import ConfigError

    try:
        config = load_budgets(file)
    except ConfigError as error:
        raise CliError(str(error), "docs/reference/budgets.md has every key") from None
    found = compare(_file(gateway), config)
    body = {
        "budgets": config.model_dump(mode="json"),
        "reason": reason,
        "dry_run": dry_run,
    }
    answer = gateway.call("POST", "/v1/admin/budgets/apply", body).body
    if as_json:
        changes = [
            {"kind": d.kind.value, "place": d.place, "before": d.before, "after": d.after}
            for d in found
        ]
        print_json({**answer, "changes": changes})
        return
    _print_changes(found)
    if dry_run:
        click.echo("it adds up; nothing was changed", err=True)
    else:
        state = "taken up" if answer["changed"] else "held already"
        click.echo(f"budgets {answer['digest'][:12]} {state}", err=True)


def _file(gateway: GatewayClient) -> BudgetsConfig:
    """The budgets file that holds."""
    from governance.budget.config import BudgetsConfig

    return BudgetsConfig.model_validate(
        gateway.call("GET", "/v1/admin/budget-file").body["budgets"]
    )


def _print_changes(found: list[Difference]) -> None:
    def text(value: object) -> str:
        return "" if value is None else printable(str(value))

    print_table(
        ("what", "where", "before", "after"),
        [(each.kind.value, printable(each.place), text(each.before), text(each.after))
         for each in found],
        "nothing differs",
    )  # fmt: skip


def _amounts(gpu_us: int | None, tokens: int | None) -> dict[str, Any]:
    """What is given of the two; at least one."""
    if gpu_us is None and tokens is None:
        raise CliError("no amount", "give --gpu-seconds, --tokens or both", Exit.USAGE)
    given = {"gpu_us": gpu_us, "tokens": tokens}
    return {name: amount for name, amount in given.items() if amount is not None}


def _visible(gateway: GatewayClient) -> Any:
    """All accounts for those who may see them, else the caller's own."""
    try:
        return gateway.call("GET", "/v1/admin/budgets").body
    except CliError as error:
        if error.exit_code != Exit.DENIED:
            raise
    return gateway.call("GET", "/v1/usage").body


def _path(account: str) -> str:
    return f"/v1/admin/budgets/{quote(account, safe='/~@')}"


def _quoted(text: str) -> str:
    return quote(text, safe="")
