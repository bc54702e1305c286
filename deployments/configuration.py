"""All configuration of one installation, loaded and checked together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deployments.preflight import Check, Status
from deployments.routing.plan import checked_artefact, checked_models
from deployments.serve_file import ServeFile, load_serve_file
from deployments.settings import Settings, from_environment
from governance.budget.config import BudgetsConfig, load_budgets
from governance.identity.config import IdentityConfig, load_identity
from governance.policy.load import load_policy
from governance.yaml_config import ConfigError

LOOPBACK = {"127.0.0.1", "::1", "localhost"}


@dataclass(frozen=True, slots=True)
class Installation:
    """A serve file and what it names."""

    config_path: Path
    settings: Settings
    file: ServeFile
    identity: IdentityConfig

    @property
    def dev_issuer(self) -> str | None:
        """URL of the development identity provider, in local mode and if one is configured."""
        if self.file.app.mode != "local":
            return None
        for issuer in self.identity.issuers:
            where = urlsplit(issuer.issuer)
            if where.scheme == "http" and where.hostname in LOOPBACK:
                return issuer.issuer
        return None


def settings_for(config: Path, environ: Mapping[str, str] | None = None) -> Settings:
    """Roots; relative paths of a serve file start at its own folder unless told otherwise."""
    env = dict(os.environ if environ is None else environ)
    env["GATEHOUSE_CONFIG_ROOT"] = env.get("GATEHOUSE_CONFIG_ROOT") or str(config.resolve().parent)
    return from_environment(env)


def load_installation(config: Path) -> Installation:
    """Load the serve file and the identity file, and check the other files.

    Raises:
        ConfigError: The first thing that is wrong.
    """
    settings = settings_for(config)
    file = load_serve_file(config)
    identity = _identity(file, settings)
    load_policy(settings.config_root / file.app.policy, file.app.model_infos())
    budgets = load_budgets(settings.config_root / file.app.budgets)
    checked_models(file.app, settings.config_root, budgets)
    checked_artefact(file.app, settings.config_root)
    return Installation(config, settings, file, identity)


def check_configuration(config: Path) -> list[Check]:
    """Look at every file, also after one of them is wrong."""
    settings = settings_for(config)
    loaded: list[ServeFile] = []
    checks = [_attempt("serve file", str(config), lambda: loaded.append(load_serve_file(config)))]
    if not loaded:
        return checks
    file = loaded[0]
    app = file.app
    checks.append(_attempt("Ray Serve", "its own schema", lambda: _check_schema(config)))
    checks.append(_attempt("identity", app.identity, lambda: _identity(file, settings)))
    policy = settings.config_root / app.policy
    checks.append(_attempt("policy", app.policy, lambda: load_policy(policy, app.model_infos())))
    root = settings.config_root
    accounts: list[BudgetsConfig] = []
    checks.append(
        _attempt("budgets", app.budgets, lambda: accounts.append(load_budgets(root / app.budgets)))
    )
    known = accounts[0] if accounts else None
    checks.append(_attempt("models", app.models_file, lambda: checked_models(app, root, known)))
    artefact = app.router.artefact or "the built-in one"
    checks.append(_attempt("scorer", artefact, lambda: checked_artefact(app, root)))
    checks += [
        _check_source(settings, model.id, model.source, model.is_hub) for model in app.models
    ]
    return checks


def _identity(file: ServeFile, settings: Settings) -> IdentityConfig:
    path = settings.config_root / file.app.identity
    return load_identity(path, local=file.app.mode == "local")


def _attempt(name: str, detail: str, load: Callable[[], Any]) -> Check:
    try:
        load()
    except ConfigError as error:
        return Check(name, Status.FAIL, str(error), "correct the file")
    return Check(name, Status.OK, detail)


def _check_schema(config: Path) -> None:
    """Hold the file to Serve's schema, which also knows the keys that we pass on."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    from governance.yaml_config import read_yaml

    source = read_yaml(config)
    try:
        ServeDeploySchema.model_validate(source.data)
    except ValidationError as failure:
        first = failure.errors(include_input=False, include_url=False, include_context=False)[0]
        raise source.error(tuple(first["loc"]), first["msg"]) from None


def _check_source(settings: Settings, model: str, source: str, is_hub: bool) -> Check:
    name = f"model {model}"
    if is_hub:
        return Check(name, Status.OK, f"{source}, fetched when its engine starts")
    folder = settings.config_root / source
    if (folder / "config.json").exists():
        return Check(name, Status.OK, source)
    if folder.parent.name == "checkpoints":
        return Check(name, Status.OK, f"{source}, built by `make serve`")
    remedy = "put the checkpoint there, or correct `source`"
    return Check(name, Status.FAIL, f"{source} has no config.json", remedy)
