"""``gatehouse serve``: what ``make serve`` runs."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deployments.cli.check import config_option
from deployments.cli.errors import CliError
from deployments.cli.options import ADMINISTRATORS, DEFAULT_ISSUER, DEFAULT_URL, IDENTITIES

if TYPE_CHECKING:
    from deployments.supervisor import Plan

CPU_READY_S = 300.0
GPU_READY_S = 3600.0
"""The first start fetches weights."""


@click.command()
@config_option
@click.option("--port", type=click.IntRange(1, 65535), help="Port, in place of the file's.")
@click.option(
    "--ready-timeout",
    type=click.FloatRange(min=1),
    help="Seconds in which the engines must be ready; 300, with GPUs 3600.",
)
@click.pass_context
def serve(
    context: click.Context, config_path: Path, port: int | None, ready_timeout: float | None
) -> None:
    """Start everything on this machine and stay until Ctrl-C or SIGTERM.

    Exit status: 0 after an orderly stop, 130 when stopped before it was ready, 1 on failure.
    """
    # Imported here: most commands need neither Ray nor pydantic models.
    from deployments.configuration import load_installation
    from deployments.guard import guarded
    from deployments.supervisor import STOP_BOUND_S, Plan
    from governance.yaml_config import ConfigError

    try:
        installation = load_installation(config_path)
    except ConfigError as error:
        raise CliError(str(error), "see `gatehouse config check`") from None
    file = installation.file.with_port(port)
    gpu = any(model.accelerator.kind == "gpu" for model in file.app.models)
    plan = Plan(
        file=file,
        config_path=config_path,
        settings=installation.settings,
        issuer=installation.dev_issuer,
        ready_timeout_s=ready_timeout or (GPU_READY_S if gpu else CPU_READY_S),
        announcement=announcement,
    )
    context.exit(guarded(lambda: _supervise(plan), stop_bound_s=STOP_BOUND_S))


def _supervise(plan: Plan) -> int:
    """Run the supervisor with the chatter of libraries kept out of the way.

    Standard error goes to a log; what we have to say goes to standard output.
    """
    from deployments.steps import Steps
    from deployments.supervisor import Supervisor

    log = plan.settings.state / "logs" / "serve.log"
    try:
        for folder in (plan.settings.state, log.parent):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with log.open("ab") as sink:
            os.dup2(sink.fileno(), 2)
    except OSError as error:
        raise _cannot_write(error, log) from None
    os.chdir(plan.settings.config_root)
    steps = Steps(sys.stdout)
    try:
        return Supervisor(plan, steps).run()
    except Exception:
        traceback.print_exc()
        steps.say(f"error: unexpected failure\n  {log} says more")
        return 1


def _cannot_write(error: OSError, path: Path) -> SystemExit:
    click.echo(f"error: {path} cannot be written: {error.strerror}", err=True)
    click.echo("  set GATEHOUSE_STATE to a folder of yours", err=True)
    return SystemExit(1)


def announcement(plan: Plan, logs: Path) -> str:
    """What to do next, ready to paste."""
    url = plan.file.url
    tool = _tool()
    python = _relative(Path(sys.executable))
    small = plan.file.app.models[0].id
    lines = ["", f"Gatehouse is ready at {url}", ""]
    if plan.issuer:
        issuer = "" if plan.issuer == DEFAULT_ISSUER else f" --issuer {plan.issuer}"
        lines += ["A development token, one per sample identity:"]
        lines += [f"  {tool} token{issuer} {identity}" for identity in IDENTITIES]
        lines += [f"and to administer keys: {', '.join(ADMINISTRATORS)}"]
        bearer = f"$({tool} token{issuer} {IDENTITIES[0]})"
    else:
        lines += [f"Tokens come from your identity provider ({plan.file.app.identity}); put one in"]
        lines += ["  export GATEHOUSE_TOKEN=..."]
        bearer = "$GATEHOUSE_TOKEN"
    lines += [
        "",
        "curl:",
        f"  curl -sS {url}/v1/chat/completions \\",
        f'    -H "Authorization: Bearer {bearer}" \\',
        '    -H "Content-Type: application/json" \\',
        f'    -d \'{{"model": "{small}", "messages": [{{"role": "user", "content": "Hello"}}],'
        ' "max_tokens": 32}\'',
        "",
        "OpenAI SDK:",
        f"  OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={bearer} {python} -c '",
        "from openai import OpenAI",
        f'answer = OpenAI().chat.completions.create(model="{small}", max_tokens=32,',
        '    messages=[{"role": "user", "content": "Hello"}])',
        "print(answer.choices[0].message.content)'",
        "",
        f"Data: {plan.settings.state}   configuration: {plan.config_path}   logs: {logs}",
    ]
    if url != DEFAULT_URL:
        lines.append(f"For the commands of gatehouse: export GATEHOUSE_URL={url}")
    lines.append("Ctrl-C stops everything.")
    return "\n".join(lines)


def _tool() -> str:
    beside = Path(sys.executable).with_name("gatehouse")
    return _relative(beside) if beside.exists() else "gatehouse"


def _relative(path: Path) -> str:
    """Path as short as it works from the folder that the user is in."""
    start = Path(os.environ.get("PWD") or Path.cwd())
    return str(path.relative_to(start)) if path.is_relative_to(start) else str(path)
