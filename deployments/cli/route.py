"""``gatehouse route``: why ``auto`` chooses what it chooses, and what came of it.

Nothing here writes.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deployments.cli.audit import SinceUs, opened, reported, with_roots
from deployments.cli.check import config_option
from deployments.cli.errors import CliError, Exit
from deployments.cli.output import print_json
from deployments.cli.route_output import print_explanation, print_report

if TYPE_CHECKING:
    from deployments.route_explain import Explainer
    from deployments.route_report import Known

MAX_PROMPT_BYTES = 4 << 20

artefact_option = click.option(
    "--artefact",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of a trained scorer; else the one that is served, or the built-in one.",
)


@click.group()
def route() -> None:
    """Routing: the choice behind the model auto."""


@route.command()
@click.argument("prompt")
@click.option("--department", default="*", help="Whose target counts; left out, that of others.")
@click.option(
    "--models",
    "models_path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Models file, in place of the one that the serve file names.",
)
@artefact_option
@config_option
@click.option("--format", "form", type=click.Choice(("text", "json")), default="text")
def explain(
    prompt: str,
    department: str,
    models_path: Path | None,
    artefact: Path | None,
    config_path: Path,
    form: str,
) -> None:
    """Say which model auto would choose for PROMPT, why, and what would change it.

    PROMPT is the last question of a request, or - for standard input. Works without a running
    platform: every model of the serve file is taken as permitted and idle, and a department's
    traffic as ordinary. Nothing is recorded.
    """
    if prompt == "-":
        prompt = sys.stdin.read(MAX_PROMPT_BYTES + 1)
    if not prompt.strip():
        raise CliError("there is no prompt", "give one, or - for standard input", Exit.USAGE)
    if len(prompt) > MAX_PROMPT_BYTES:
        raise CliError("the prompt is too long", "at most 4 MiB", Exit.USAGE)
    explainer = _explainer(config_path, models_path, artefact)
    found = asyncio.run(explainer.explain(prompt, department))
    if form == "json":
        print_json(asdict(found))
    else:
        print_explanation(found)


@route.command()
@click.option(
    "--since",
    type=SinceUs(),
    default="7d",
    show_default=True,
    help="What began since: 30d, 12h, or a date (UTC).",
)
@artefact_option
@click.option("--format", "form", type=click.Choice(("table", "json")), default="table")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds after which it is stopped.",
)
@click.option("--memory", default="2GB", show_default=True, help="Memory that queries may use.")
@with_roots
def report(
    since: int,
    artefact: Path | None,
    form: str,
    timeout: float,
    memory: str,
    evidence: Path,
    state: Path,
) -> None:
    """Report from the audit trail what auto chose, what that saved, and what speaks for it.

    Ends with 4 if the trail has no request that was left to the platform in that time.
    """
    from deployments.route_report import make_report
    from governance.audit.sql_guard import time_limit

    known = _known(artefact)
    with (
        opened(evidence, state, since, memory) as connection,
        reported(timeout),
        time_limit(connection, timeout),
    ):
        found = make_report(connection, known)
    if found is None:
        click.echo("no request was left to the platform in this time", err=True)
        raise click.exceptions.Exit(Exit.NOT_FOUND)
    if form == "json":
        print_json(found.as_json())
    else:
        print_report(found)


def _explainer(config: Path, models_path: Path | None, artefact: Path | None) -> Explainer:
    from deployments.configuration import settings_for
    from deployments.route_explain import Explainer, NothingToChoose
    from deployments.routing.scoring import inspect_artefact, open_scorer
    from deployments.serve_file import load_serve_file
    from governance.models_file import load_models
    from governance.yaml_config import ConfigError
    from routing.artefact import ArtefactError

    try:
        app = load_serve_file(config).app
        root = settings_for(config).config_root
        served = app.model_infos()
        models = load_models(models_path or root / app.models_file, served)
        named = app.router.artefact if artefact is None else str(artefact.resolve())
        facts = inspect_artefact(root, named)
        return Explainer(models, served, facts, open_scorer(facts, threads=1, gpu=False))
    except (ConfigError, ArtefactError) as error:
        raise CliError(str(error), "`gatehouse config check` looks at every file") from None
    except NothingToChoose:
        raise CliError(
            "no served model has a card, so auto is not offered",
            f"give the models of {config} cards in the models file",
            Exit.NOT_FOUND,
        ) from None


def _known(folder: Path | None) -> Known:
    from deployments.route_report import Known
    from deployments.routing.scoring import BUILT_IN
    from routing import artefact
    from routing.artefact import ArtefactError
    from routing.complexity import HEADS_FILE, Reference, arrays_of

    try:
        checked = artefact.load(folder or BUILT_IN)
        reference = Reference.read(arrays_of(checked.file(HEADS_FILE)), "reference")
    except ArtefactError as error:
        raise CliError(str(error), "name another folder with --artefact") from None
    return Known(checked.digest.removeprefix("sha256:")[:12], reference)
