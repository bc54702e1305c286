"""From the models file to a router: what is planned where, checked when, and measured how."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments import app
from deployments.capacity import GpuNeed, needs
from deployments.config import AppConfig
from deployments.configuration import check_configuration, load_installation
from deployments.preflight import Status
from deployments.routing.gateway_router import GatewayRouter
from deployments.routing.plan import RoutingPlan
from deployments.routing.scoring import BUILT_IN
from deployments.serve_file import load_serve_file
from deployments.telemetry import names
from deployments.telemetry.registry import Registry
from deployments.telemetry.routing import (
    BatcherSource,
    RouteCounts,
    ScoreNote,
    ShareSource,
    reason_of,
)
from deployments.telemetry.turns import TurnObserver
from governance.budget.config import BudgetsConfig
from governance.budget.prices import COLD
from governance.nulls import FixedRouter
from governance.request import parse_request
from governance.routes import AutoRouting
from governance.types import Amount, Attempt, ModelInfo, Operation, Route, RouteAsk, Turn
from governance.yaml_config import ConfigError
from routing.auto import Achieved
from routing.reasons import Instead, Reason
from routing.types import ModelLoad
from tests.doubles import principal

ROOT = Path(__file__).resolve().parents[2]
CARDS = "models: [{id: small}, {id: large}]\n"


def app_config(*models: tuple[str, str], **router: Any) -> AppConfig:
    return AppConfig.model_validate(
        {
            "mode": "local",
            "models_file": "models.yaml",
            "router": {"place": "gateway", **router},
            "models": [
                {"id": name, "tier": tier, "source": f"./{name}", "context_tokens": 1024}
                for name, tier in models
            ],
        }
    )


BUDGETS = BudgetsConfig.model_validate({"accounts": {"platform": {"window": "day", "tokens": 9}}})
BOTH = (("small", "small"), ("large", "large"))


def plan(root: Path, config: AppConfig, cards: str = CARDS) -> RoutingPlan:
    (root / "models.yaml").write_text("version: 1\n" + cards)
    return RoutingPlan.of(config, root, BUDGETS)


# -- the plan -----------------------------------------------------------------------------------


def test_a_scorer_is_planned_where_there_is_a_choice(tmp_path: Path) -> None:
    config = app_config(*BOTH)
    both = plan(tmp_path, config)
    assert both.scorer is not None
    assert [model.id for model in both.eligible(config.model_infos())] == ["small", "large"]
    alone = plan(tmp_path, config, "models: [{id: large}]\n")
    assert alone.scorer is None
    assert [model.id for model in alone.eligible(config.model_infos())] == ["large"]
    assert plan(tmp_path, config, "models: [{id: other}]\n").eligible(config.model_infos()) == ()


def test_a_plan_travels_as_plain_values(tmp_path: Path) -> None:
    made = plan(tmp_path, app_config(*BOTH))
    assert RoutingPlan.load(json.loads(json.dumps(made.dump()))) == made
    none = plan(tmp_path, app_config(*BOTH), "models: []\n")
    assert RoutingPlan.load(json.loads(json.dumps(none.dump()))) == none


def test_cards_of_models_that_are_not_served_are_left_out(tmp_path: Path) -> None:
    config = app_config(*BOTH)
    cards = plan(tmp_path, config, "models: [{id: small}, {id: far, languages: [en]}]\n").cards(
        config.model_infos()
    )
    assert [card.id for card in cards] == ["small"]


def test_a_damaged_scorer_keeps_the_application_from_being_built(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(BUILT_IN, tmp_path / "mine"))
    config = app_config(*BOTH, artefact="mine")
    assert plan(tmp_path, config).scorer is not None
    (folder / "encoder.onnx").write_bytes(b"another model")
    with pytest.raises(ConfigError, match=r"router\.artefact: .*encoder\.onnx: is not the file"):
        plan(tmp_path, config)
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="no such file"):
        plan(tmp_path, config)


def test_comparisons_are_paid_by_an_account_that_there_is(tmp_path: Path) -> None:
    text = CARDS + "routing:\n  shadow: {account: %s}\n"
    assert plan(tmp_path, app_config(*BOTH), text % "platform").models.routing.shadow is not None
    with pytest.raises(ConfigError, match=r"models\.yaml:4: routing\.shadow\.account: 'nobody'"):
        plan(tmp_path, app_config(*BOTH), text % "nobody")


# -- the application ----------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("serve_config.local.yaml", "serve_config.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.setenv("GATEHOUSE_CONFIG_ROOT", str(tmp_path))
    return tmp_path


def arguments(file: Path, monkeypatch: pytest.MonkeyPatch, **change: Any) -> list[Any]:
    """What the gateway of an application is constructed with."""
    bound: list[Any] = []

    class Bound:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def bind(self, *args: Any) -> tuple[Any, ...]:
            bound.append(args)
            return args

    monkeypatch.setattr(app.serve, "deployment", Bound)
    config = load_serve_file(file).app
    app.build_app(config.model_copy(update=change))
    return list(bound[-1])


def test_the_scorer_is_a_deployment_or_a_thread_of_the_gateway(
    install: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = install / "serve_config.local.yaml"
    *_, routing, scorer = arguments(local, monkeypatch)
    assert routing["scorer"] is not None
    assert scorer is None
    here = load_serve_file(local).app.router
    *_, scorer = arguments(
        local, monkeypatch, router=here.model_copy(update={"place": "deployment"})
    )
    assert scorer[1].digest == routing["scorer"]["digest"]


def test_nothing_is_deployed_for_nothing(install: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (install / "config" / "models.yaml").write_text("version: 1\nmodels: [{id: llama-3.1-8b}]\n")
    cluster = load_serve_file(install / "serve_config.local.yaml").app
    assert cluster.models[0].id == "small"
    *_, routing, scorer = arguments(
        install / "serve_config.local.yaml",
        monkeypatch,
        router=cluster.router.model_copy(update={"place": "deployment"}),
    )
    assert (routing["scorer"], scorer) == (None, None)


def test_what_is_wrong_with_the_models_file_is_found_beforehand(install: Path) -> None:
    config = install / "serve_config.local.yaml"
    checks = {check.name: check for check in check_configuration(config)}
    assert checks["models"].status is Status.OK
    assert checks["scorer"].status is Status.OK
    models = install / "config" / "models.yaml"
    models.write_text(models.read_text().replace("default_tier: small", "default_tier: tiny"))
    checks = {check.name: check for check in check_configuration(config)}
    assert checks["models"].status is Status.FAIL
    assert "default_tier" in checks["models"].detail
    with pytest.raises(ConfigError, match="default_tier"):
        load_installation(config)


def test_a_missing_scorer_is_found_beforehand(install: Path) -> None:
    config = install / "serve_config.local.yaml"
    text = config.read_text()
    config.write_text(text.replace("place: gateway", "place: gateway, artefact: gone"))
    checks = {check.name: check for check in check_configuration(config)}
    assert checks["scorer"].status is Status.FAIL
    assert "gone" in checks["scorer"].detail


def test_the_gpus_of_scorers_are_needed_too() -> None:
    config = AppConfig.model_validate(
        {
            "mode": "local",
            "router": {"gpus": 0.5, "replicas": {"min": 3, "max": 3}},
            "models": [
                {
                    "id": "a",
                    "tier": "small",
                    "source": "./a",
                    "context_tokens": 64,
                    "accelerator": {"kind": "cpu"},
                }
            ],
        }
    )
    assert needs(config) == [GpuNeed("router", None, 2)]


# -- the gateway --------------------------------------------------------------------------------


def load(base_model: str) -> ModelLoad:
    return ModelLoad(replicas=1, slots=256)


def ask(config: AppConfig, text: str, *, auto: bool = True) -> RouteAsk:
    body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
    infos = config.model_infos()
    return RouteAsk(
        "req_1",
        parse_request(Operation.CHAT, json.dumps(body).encode()),
        infos if auto else infos[1:],
        auto,
        "hr",
        "key",
        "standard",
    )


async def test_a_gateway_scores_in_its_own_process(tmp_path: Path) -> None:
    config, notes = app_config(*BOTH), list[str]()
    routing = GatewayRouter(plan(tmp_path, config), config.router, config.model_infos())
    await routing.open(None, lambda result, _: notes.append(result))
    router = routing.port(load, lambda: lambda base: COLD, lambda: 0)
    assert isinstance(router, AutoRouting)
    assert "'auto' among small, large" in routing.announce
    route = await router.route(ask(config, "Prove that the square root of 2 is irrational."))
    assert route.auto
    assert route.model.id in ("small", "large")
    assert notes == ["scored"]
    assert routing.batcher is not None
    assert routing.batcher.stats.items == 1
    named = await router.route(ask(config, "Hi", auto=False))
    assert (named.model.id, named.reason) == ("large", "named")
    assert [each.department for each in routing.achieved()] == ["hr"]
    await routing.close()
    after = await router.route(ask(config, "Hi"))
    assert after.reason == "auto:small default scorer unreachable"


async def test_without_cards_callers_name_their_model(tmp_path: Path) -> None:
    config = app_config(*BOTH)
    made = plan(tmp_path, config, "models: []\n")
    routing = GatewayRouter(made, config.router, config.model_infos())
    await routing.open(None, lambda result, _: None)

    def no_prices() -> Any:
        raise AssertionError("nobody needs them")

    router = routing.port(load, no_prices, lambda: 0)
    assert isinstance(router, FixedRouter)
    await routing.close()


async def test_a_dead_deployment_leaves_the_default_tier(tmp_path: Path) -> None:
    config = app_config(*BOTH, place="deployment")
    routing = GatewayRouter(plan(tmp_path, config), config.router, config.model_infos())

    class Dead:
        class score:
            @staticmethod
            async def remote(prompt: str, timeout_ms: int) -> str:
                return "failed"

    await routing.open(Dead, lambda result, _: None)
    assert routing.batcher is None
    assert routing.announce.endswith("in the deployment Router")
    router = routing.port(load, lambda: lambda base: COLD, lambda: 0)
    route = await router.route(ask(config, "Prove it."))
    assert route.reason == "auto:small default scorer failed"


# -- metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", list(Reason))
def test_each_reason_is_a_label(reason: Reason) -> None:
    assert reason_of(f"auto:large {reason}") == reason


@pytest.mark.parametrize("reason", list(Instead))
def test_what_stands_in_for_a_named_model_is_counted_by_its_reason(reason: Instead) -> None:
    registry = Registry()
    counts = RouteCounts(registry, ["small", "large"])
    stood_in = turn(auto=False)
    assert stood_in.route is not None
    stood_in.route = replace(stood_in.route, reason=reason, instead_of="large")
    counts.ended(stood_in, "hr")
    assert registry.counter(names.ROUTES).totals == {("large", "hr", reason.value): 1}


@pytest.mark.parametrize("reason", ["named", "", "auto:large", "auto:small what a client says"])
def test_nothing_else_is_a_label(reason: str) -> None:
    assert reason_of(reason) == "other"


def turn(auto: bool) -> Turn:
    model = ModelInfo("large", "large", frozenset({Operation.CHAT}), 1024, "large")
    made = Turn("req_1", "dec_1", 0, Operation.CHAT, principal=principal())
    made.route = Route(model, f"auto:small {Reason.GAIN_BELOW}" if auto else "named", auto)
    made.gpu_us, made.charged = 70, Amount(700, 7)
    if auto:
        made.earlier = (
            Attempt("small", "cascade", 30, Amount(60, 3)),
            Attempt("small", "engine_failed", None, None),
        )
    return made


def test_choices_and_what_was_given_up_are_counted() -> None:
    registry = Registry()
    counts = RouteCounts(registry, ["small", "large"])
    superseded = registry.counter(names.SUPERSEDED).totals
    assert superseded == {("small", "cascade"): 0, ("large", "cascade"): 0}
    counts.ended(turn(auto=True), "hr")
    counts.ended(turn(auto=False), "hr")
    counts.ended(Turn("req_2", "dec_2", 0, Operation.CHAT), "hr")
    assert registry.counter(names.ROUTES).totals == {("large", "hr", "gain below threshold"): 1}
    assert superseded["small", "cascade"] == 1
    assert superseded["small", "engine_failed"] == 1


def test_time_spent_in_vain_is_counted_for_the_model_that_spent_it() -> None:
    registry = Registry()
    TurnObserver(registry, ["small", "large"]).ended(turn(auto=True))
    assert registry.counter(names.GPU).totals == {("large", "hr"): 70, ("small", "hr"): 30}
    assert registry.counter(names.CHARGED).totals == {("large", "hr"): 700, ("small", "hr"): 60}


def test_scores_are_counted_by_what_became_of_them() -> None:
    registry = Registry()
    note = ScoreNote(registry)
    note("scored", 9_000)
    note("late", 100_000)
    scores = registry.counter(names.SCORES).totals
    assert (scores["scored",], scores["late",], scores["spared",]) == (1, 1, 0)
    assert registry.histogram(names.SCORE).of().sum == 9_000


def test_shares_are_kept_by_department() -> None:
    registry = Registry()
    kept = [Achieved("hr", "large_share=0.300", 10, 400, 8, 250, 300)]
    source = ShareSource(registry, lambda: kept)
    source()
    levels = registry.gauge(names.ROUTE_LARGE).levels
    assert levels == {("hr", "all"): 400, ("hr", "free"): 250, ("hr", "aimed"): 300}
    kept[:] = [Achieved("it", "large_share=0.000", 1, 0, 0, 0, 0)]
    source()
    assert levels == {("it", "all"): 0}


async def test_figures_of_a_batcher_are_taken_over(tmp_path: Path) -> None:
    config, registry = app_config(*BOTH), Registry()
    routing = GatewayRouter(plan(tmp_path, config), config.router, config.model_infos())
    await routing.open(None, lambda result, _: None)
    assert routing.batcher is not None
    source = BatcherSource(registry, routing.batcher)
    await routing.batcher.submit("Hi", 30)
    source()
    assert registry.counter(names.SCORER_PROMPTS).totals == {(): 1}
    assert registry.counter(names.SCORER_BUSY).totals[()] > 0
    assert registry.counter(names.SCORER_UNUSED).totals["dropped",] == 0
    await routing.close()
