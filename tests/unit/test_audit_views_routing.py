"""The views of routing, on a trail whose answers were worked out by hand."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest

from governance.audit.query import connect, views
from governance.audit.turn_record import decided_event, ended_event
from governance.audit.ulid import new_ulid
from governance.drafts import Escalated
from governance.fallback import Fallbacks
from governance.selection import Option
from governance.shadow_exchange import REASON, Offer
from governance.shadow_record import shadow_event
from governance.types import (
    Amount,
    Decision,
    Effect,
    InferenceRequest,
    ModelInfo,
    Operation,
    Outcome,
    Reservation,
    Route,
    Turn,
    Usage,
)
from routing.agreement import Agreement
from routing.reasons import Reason
from routing.types import Verdict
from tests.doubles import principal
from tests.routed_trail import HIGH, LOW, PRICE, Asked, pair, routed, scored, used
from tests.trail import Trail, sample, today, us

NOW_US = us("2026-11-24 10:00:00")
D24, D25 = date(2026, 11, 24), date(2026, 11, 25)
TOTALS = "('all', 'department', 'day')"


@pytest.fixture(scope="module", params=["sealed", "in logs"])
def trail(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Trail(tmp_path_factory.mktemp("trail"))
    routed(made)
    # Requests that named their model are beside them, and change nothing.
    sample(made)
    today(made)
    if request.param == "sealed":
        made.seal()
    with connect(made.evidence, made.state, unsealed=made.unsealed) as connection:
        yield connection


def rows(connection: duckdb.DuckDBPyConnection, sql: str) -> list[tuple[Any, ...]]:
    return connection.execute(sql).fetchall()


def asked(root: Path) -> Trail:
    root.mkdir(exist_ok=True)
    return Trail(root)


# -- requests, attempts, charges --------------------------------------------------------------


def test_v_requests_keeps_one_row_and_the_last_attempt(trail: duckdb.DuckDBPyConnection) -> None:
    sql = """SELECT request_id, attempts, routed, response_model, outcome, status, input_tokens,
        output_tokens, gpu_us, charged_us, events FROM v_requests
        WHERE request_id IN ('a1', 'a3', 'a5', 'a7', 'a8', 'a9', 'a10', 'r1') ORDER BY request_id"""
    assert rows(trail, sql) == [
        ("a1", 1, True, "small", "completed", 200, 100, 50, 200_000, 400_000, 2),
        ("a10", 1, True, "small", "open", None, None, None, None, None, 1),
        # Both answers were paid for; the second was released.
        ("a3", 2, True, "large", "completed", 200, 100, 60, 900_000, 1_800_000, 4),
        # No replica took the first: nothing was metered, nothing charged.
        ("a5", 2, True, "large", "completed", 200, 30, 10, 450_000, 900_000, 4),
        # Of the first attempt the ledger's figure holds, which is the larger one.
        ("a7", 2, True, "small", "completed", 200, 20, 20, 240_000, 480_000, 5),
        # The budget refused the first: tried, and not on record.
        ("a8", 2, True, "small", "completed", 200, 20, 5, 30_000, 60_000, 2),
        # The second was refused before it was decided: so ended the request.
        ("a9", 2, True, "large", "refused", 429, None, None, None, 0, 3),
        ("r1", 1, False, "small", "completed", 200, 100, 30, 400_000, 400_000, 2),
    ]
    sql = """SELECT route_reason, error_code, admitted, ts_end FROM v_requests
        WHERE request_id = 'a9'"""
    assert rows(trail, sql) == [
        (
            "fallback:engine_unavailable",
            "budget_exhausted",
            True,
            datetime.fromisoformat("2026-11-25 10:00:06"),
        )
    ]


def test_v_attempts_has_each_model_that_was_tried(trail: duckdb.DuckDBPyConnection) -> None:
    sql = """SELECT request_id, attempt, response_model, superseded, outcome, charged_us
        FROM v_attempts WHERE request_id IN ('a3', 'a7', 'a8') ORDER BY ALL"""
    assert rows(trail, sql) == [
        ("a3", 1, "small", "cascade", "completed", 300_000),
        ("a3", 2, "large", None, "completed", 1_500_000),
        ("a7", 1, "large", "fallback", "failed", 400_000),
        ("a7", 2, "small", None, "completed", 80_000),
        ("a8", 2, "small", None, "completed", 60_000),
    ]


def test_what_was_spent_adds_up_over_attempts(trail: duckdb.DuckDBPyConnection) -> None:
    spent = rows(trail, "SELECT sum(charged_us), sum(gpu_us) FROM v_requests")
    assert spent == rows(trail, "SELECT sum(charged_us), sum(gpu_us) FROM v_charges")
    assert spent == rows(trail, "SELECT sum(charged_us), sum(gpu_us) FROM v_spend_daily")


def test_a_comparison_is_spent_by_who_pays_for_it(trail: duckdb.DuckDBPyConnection) -> None:
    sql = "SELECT department, model, requests, charged_us FROM v_spend WHERE department {}"
    assert rows(trail, sql.format("= 'platform'")) == [("platform", "large", 1, 1_200_000)]
    assert rows(trail, sql.format("= 'legal'") + " ORDER BY model") == [
        ("legal", "large", 3, 4_200_000),  # a2, a3, a11; not the comparison
        ("legal", "small", 3, 800_000),
    ]


def test_v_model_ops_counts_failures_that_another_model_made_good(
    trail: duckdb.DuckDBPyConnection,
) -> None:
    sql = """SELECT model, requests, failed FROM v_model_ops
        WHERE hour = '2026-11-25 10:00:00' ORDER BY model"""
    assert rows(trail, sql) == [("large", 2, 1), ("small", 5, 2)]


# -- choices ----------------------------------------------------------------------------------


def test_v_routes_says_what_was_chosen_and_what_became_of_it(
    trail: duckdb.DuckDBPyConnection,
) -> None:
    sql = """SELECT request_id, model, tier, chosen_tier, reason_class, free, gain_milli, attempts,
        cascade, escalated, confidence_milli, fallback, charged_us FROM v_routes
        ORDER BY length(request_id), request_id"""
    yes, no = True, False
    assert rows(trail, sql) == [
        ("a1", "small", "small", "small", "gain", yes, 80, 1, no, no, None, no, 400_000),
        ("a2", "large", "large", "large", "gain", yes, 200, 1, no, no, None, no, 2_000_000),
        ("a3", "large", "large", "small", "gain", yes, 100, 2, yes, yes, 412, no, 1_800_000),
        ("a4", "small", "small", "small", "gain", yes, 90, 1, yes, no, 950, no, 100_000),
        ("a5", "large", "large", "small", "gain", yes, 60, 2, no, no, None, yes, 900_000),
        ("a6", "small", "small", "small", "default", no, None, 1, no, no, None, no, 50_000),
        ("a7", "small", "small", "large", "gain", yes, 300, 2, no, no, None, yes, 480_000),
        ("a8", "small", "small", "large", "fallback", no, 250, 2, no, no, None, yes, 60_000),
        ("a9", "large", "large", "small", "gain", yes, 20, 2, no, no, None, yes, 0),
        ("a10", "small", "small", "small", "gain", yes, 70, 1, no, no, None, no, None),
        ("a11", "large", "large", "large", "capability", no, None, 1, no, no, None, no, 700_000),
    ]


def test_v_routes_repeats_what_the_choice_rested_on(trail: duckdb.DuckDBPyConnection) -> None:
    sql = """SELECT target, aimed_milli, threshold_milli, weak_milli, strong_milli, trust_milli,
        cluster, similarity_milli, scorer, score_us, pressure_milli, large_model, large_prefill_ns,
        large_decode_ns FROM v_routes WHERE request_id = 'a3'"""
    assert rows(trail, sql) == [
        ("large_share=0.300", 300, 140, 600, 700, 900, 17, 640, "abcdef012345", 9000, 0, "large",
         1_000_000, 20_000_000)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "found", "free"),
    [
        ("auto:small gain below threshold", "gain", True),
        ("auto:large conversation kept", "conversation", True),
        ("auto:small budget ahead of pace", "budget", True),
        ("auto:small target never large", "target", False),
        ("auto:large capability data_class", "capability", False),
        ("auto:small only tier permitted", "permitted", False),
        ("auto:small only models without card", "permitted", False),
        ("auto:small default scorer failed", "default", False),
        ("auto:large other tier saturated", "load", False),
        ("something else", "other", False),
    ],
)
def test_every_reason_has_a_class(tmp_path: Path, reason: str, found: str, free: bool) -> None:
    trail = asked(tmp_path)
    Asked(trail, "q", "2026-11-24 10:00:00", "hr", reason, **scored(1)).attempt("small")
    with connect(trail.evidence, trail.state, unsealed=trail.unsealed) as connection:
        assert rows(connection, "SELECT reason_class, free FROM v_routes") == [(found, free)]


def test_every_reason_of_the_router_is_known() -> None:
    first = {reason.value.split(" ")[0] for reason in Reason}
    assert first == {
        "gain", "conversation", "budget", "target", "capability", "only", "default", "other",
    }  # fmt: skip


# -- savings ----------------------------------------------------------------------------------


def test_v_route_savings_by_hand(trail: duckdb.DuckDBPyConnection) -> None:
    sql = f"""SELECT level, day, department, requests, large, free, free_large, free_large_percent,
        aimed_percent, charged_us, all_large_us, saved_us, saved_percent, unpriced
        FROM v_route_savings WHERE level NOT IN {TOTALS}"""
    level = "day department"
    assert rows(trail, sql) == [
        # a1: 80 prompt tokens that were computed and 50 of the answer at the large model's price:
        # 80,000 + 1,000,000. a4: 50,000 + 200,000. a2, a11 and the kept answer of a3 as they cost.
        (level, D24, "legal", 5, 3, 4, 1, 25.0, 30.0, 5_000_000, 5_530_000, 530_000, 9.6, 0),
        # a5 900,000; a6 210,000; a7 420,000; a8 120,000. a9 had no answer, and no price.
        (level, D25, "research", 5, 2, 3, 1, 33.3, 30.0, 1_490_000, 1_650_000, 160_000, 9.7, 1),
    ]


def test_v_route_savings_corrects_by_the_length_of_answers(
    trail: duckdb.DuckDBPyConnection,
) -> None:
    # 50 and 20 answer tokens of the small model, 75 and 30 of the large one: 1.5 times.
    sql = """SELECT department, length_ratio, all_large_corrected_us, saved_corrected_us,
        saved_corrected_percent, shadow_us FROM v_route_savings WHERE level = 'department'"""
    assert rows(trail, sql) == [
        ("legal", 1.5, 6_130_000, 1_130_000, 18.4, 1_200_000),
        ("research", 1.5, 2_000_000, 510_000, 25.5, 0),
    ]


def test_v_route_savings_adds_up_at_every_level(trail: duckdb.DuckDBPyConnection) -> None:
    sql = """SELECT sum(requests), sum(large), sum(charged_us), sum(all_large_us), sum(saved_us),
        sum(fallbacks), sum(escalated), sum(cascades), sum(unscored), sum(shadow_us)
        FROM v_route_savings GROUP BY level"""
    assert set(rows(trail, sql)) == {(10, 5, 6_490_000, 7_180_000, 690_000, 4, 1, 2, 1, 1_200_000)}


def test_a_department_with_enough_comparisons_has_a_ratio_of_its_own(tmp_path: Path) -> None:
    trail = asked(tmp_path)
    for number in range(30):
        pair(trail, f"p{number}", "2026-11-24 10:00:00", "hr", "words", 700, 10, 10, 8)
    pair(trail, "p", "2026-11-24 10:00:00", "it", "words", 700, 10, 100, 400)
    for who in ("hr", "it"):
        Asked(trail, who, "2026-11-24 10:00:00", who, LOW, **scored(1)).attempt(
            "small", **used(0, 100, 1)
        )
    with connect(trail.evidence, trail.state, unsealed=trail.unsealed) as connection:
        sql = "SELECT department, length_ratio FROM v_route_savings WHERE level = 'department'"
        assert rows(connection, sql) == [("hr", 0.8), ("it", 1.6)]


def test_without_comparisons_nothing_is_corrected(tmp_path: Path) -> None:
    trail = asked(tmp_path)
    Asked(trail, "q", "2026-11-24 10:00:00", "hr", HIGH, **scored(200)).attempt(
        "large", **used(1, 1, 9)
    )
    with connect(trail.evidence, trail.state, unsealed=trail.unsealed) as connection:
        sql = "SELECT saved_us, length_ratio, saved_corrected_us FROM v_route_savings"
        assert set(rows(connection, sql)) == {(0, None, None)}


def test_without_a_price_nothing_is_saved(tmp_path: Path) -> None:
    """Unknown is not zero."""
    trail = asked(tmp_path)
    for name, more in (("q1", {"large_decode_ns": None}), ("q2", {"large_decode_ns": 0})):
        Asked(trail, name, "2026-11-24 10:00:00", "hr", LOW, **scored(1), **more).attempt(
            "small", **used(10, 10, 9)
        )
    Asked(trail, "q3", "2026-11-24 10:00:00", "hr", LOW, **scored(1)).attempt(
        "small", input_tokens=1, output_tokens=1, gpu_us_method="none"
    )
    with connect(trail.evidence, trail.state, unsealed=trail.unsealed) as connection:
        sql = "SELECT requests, unpriced, charged_us, saved_us, saved_percent FROM v_route_savings"
        assert set(rows(connection, sql)) == {(3, 3, 0, 0, None)}


# -- quality ----------------------------------------------------------------------------------


def test_v_shadow_pairs(trail: duckdb.DuckDBPyConnection) -> None:
    sql = """SELECT request_id, department, method, firm, agreement_milli, gain_milli, small_tokens,
        large_tokens, run_request_id FROM v_shadow_pairs ORDER BY 1"""
    assert rows(trail, sql) == [
        ("a1", "legal", "number", True, 1000, 80, 50, 75, "a1-shadow"),
        ("a5", "research", "choice", True, 0, 60, None, None, "a5-shadow"),
        ("a6", "research", "cosine", False, 480, None, 20, 30, "a6-shadow"),
    ]


def test_v_route_quality_by_bucket_of_gain(trail: duckdb.DuckDBPyConnection) -> None:
    sql = """SELECT gain_from_milli, pairs, agreement_milli, below_half, below_half_percent,
        firm_pairs, firm_below_half, cascades, escalated
        FROM v_route_quality WHERE level = 'gain'"""
    assert rows(trail, sql) == [
        # 60 and 80 are of one bucket: a1 agreed, a5 did not; a4 was judged and kept.
        (50, 2, 500, 1, 50.0, 2, 1, 1, 0),
        (100, 0, None, 0, None, 0, 0, 1, 1),
        (None, 1, 480, 1, 100.0, 0, 0, 0, 0),
    ]
    sql = """SELECT level, department, pairs, firm_pairs, cascades, escalated_percent
        FROM v_route_quality WHERE level IN ('all', 'department')"""
    assert rows(trail, sql) == [
        ("all", None, 3, 2, 2, 50.0),
        ("department", "legal", 1, 1, 2, 50.0),
        ("department", "research", 2, 1, 0, None),
    ]


def test_gains_below_zero_have_buckets_of_their_own(tmp_path: Path) -> None:
    trail = asked(tmp_path)
    for gain in (-50, -1, 0, 49):
        pair(trail, f"p{gain}", "2026-11-24 10:00:00", "hr", "number", 1000, gain, 1, 1)
    with connect(trail.evidence, trail.state, unsealed=trail.unsealed) as connection:
        sql = "SELECT gain_from_milli, pairs FROM v_route_quality WHERE level = 'gain'"
        assert rows(connection, sql) == [(-50, 2), (0, 2)]


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    # The figures are those of R. G. Newcombe, Statistics in Medicine 17 (1998), 857-872, table I,
    # method 3.
    [(81, 263, 25.5, 36.6), (15, 148, 6.2, 16.0), (0, 20, 0.0, 16.1), (1, 29, 0.6, 17.2)],
)
def test_intervals_are_wilsons(
    trail: duckdb.DuckDBPyConnection, hits: int, trials: int, low: float, high: float
) -> None:
    sql = f"SELECT wilson_percent({hits}, {trials}, -1), wilson_percent({hits}, {trials}, 1)"
    assert rows(trail, sql) == [(low, high)]


def test_of_nothing_there_is_no_interval(trail: duckdb.DuckDBPyConnection) -> None:
    assert rows(trail, "SELECT wilson_percent(0, 0, 1)") == [(None,)]


def test_a_detail_that_nobody_can_read_breaks_no_view(tmp_path: Path) -> None:
    trail = asked(tmp_path)
    for kind, detail in (
        ("inference.completed", "{"),
        ("inference.completed", '{"route":7}'),
        ("inference.completed", '{"route":{"auto":true,"attempt":"x","gain_milli":"y"}}'),
        ("route.shadow", "["),
        ("route.shadow", '{"shadow":{"agreement_milli":"much"}}'),
    ):
        trail.write(kind, "2026-11-24 10:00:00", request_id="q", detail=detail)
    with connect(trail.evidence, trail.state, unsealed=trail.unsealed) as connection:
        for view in ("v_requests", "v_routes", "v_route_savings", "v_route_quality"):
            assert rows(connection, f"SELECT count(*) FROM {view}")


# -- as the platform writes them --------------------------------------------------------------

GENERATE = frozenset({Operation.CHAT})
SMALL = ModelInfo("small", "small", GENERATE, 512, "small")
LARGE = ModelInfo("large", "large", GENERATE, 1024, "large")
ASKED = InferenceRequest(
    Operation.CHAT, "auto", {"messages": [{"role": "user", "content": "Hi"}]}, False, False, None
)


def turn(request: str) -> Turn:
    detail = {**scored(100), **PRICE, "tier": "small", "wanted_tier": "small", "cascade": True}
    return Turn(
        request_id=request, decision_id="dec", started_us=NOW_US, operation=Operation.CHAT,
        principal=principal(), request=ASKED,
        route=Route(SMALL, LOW, auto=True, fallbacks=(LARGE,), detail=detail),
    )  # fmt: skip


def attempt(trail: Trail, tried: Turn, number: int, charged_us: int) -> None:
    """What the gateway does of one: decide, answer, end."""
    tried.reservation = Reservation(f"rsv-{number}", "hr")
    tried.decided_event_id = new_ulid(NOW_US + number)
    keep(trail, decided_event(tried, tried.decided_event_id))
    tried.usage = Usage(10, 10)
    tried.gpu_us, tried.charged = charged_us, Amount(charged_us)
    tried.outcome, tried.status, tried.ended_us = Outcome.COMPLETED, 200, NOW_US + number


def keep(trail: Trail, event: dict[str, Any]) -> None:
    trail.write(event.pop("event_type"), "2026-11-24 10:00:00", **event)


def test_a_cascade_as_the_gateway_records_it(tmp_path: Path) -> None:
    trail, tried = asked(tmp_path), turn("q")
    attempt(trail, tried, 1, 100)
    tried.superseded = "cascade"
    keep(trail, ended_event(tried, new_ulid(NOW_US)))
    tried.begin_again(NOW_US + 2)
    options = [Option(model, _decision()) for model in (SMALL, LARGE)]
    found = {"confidence_milli": 400, "draft_ended": "stop"}
    tried.route = Fallbacks(tried.route, options).after(Escalated(Verdict(True, "unsure", found)))
    attempt(trail, tried, 2, 250_000)
    keep(trail, ended_event(tried, new_ulid(NOW_US)))
    with connect(trail.evidence, trail.state, unsealed=trail.unsealed) as connection:
        sql = """SELECT model, tier, chosen_tier, reason, attempts, cascade, escalated,
            confidence_milli, charged_us, answer_charged_us FROM v_routes"""
        assert rows(connection, sql) == [
            ("large", "large", "small", LOW, 2, True, True, 400, 250_100, 250_000)
        ]
        assert rows(connection, "SELECT attempts, routed, charged_us FROM v_requests") == [
            (2, True, 250_100)
        ]


def test_a_comparison_as_it_is_recorded(tmp_path: Path) -> None:
    trail = asked(tmp_path)
    offer = Offer(
        request_id="q", decision_id="dec", decided_event_id=new_ulid(NOW_US),
        operation=Operation.CHAT, principal=principal(), request=ASKED, inspection=None,
        small=SMALL, small_tokens=8, answer="5", large=LARGE, gain_milli=80, threshold_milli=140,
        offered_s=0.0,
    )  # fmt: skip
    run = Turn("q-shadow", "dec-shadow", NOW_US, Operation.CHAT, route=Route(LARGE, REASON))
    run.usage, run.ended_us, run.gpu_us = Usage(10, 12), NOW_US + 1, 500
    event = {**shadow_event(offer, run, Agreement(1.0, "number")), "event_id": new_ulid(NOW_US)}
    keep(trail, event)
    with connect(trail.evidence, trail.state, unsealed=trail.unsealed) as connection:
        sql = """SELECT request_id, method, firm, agreement_milli, gain_milli, small_tokens,
            large_tokens, run_request_id, gpu_us FROM v_shadow_pairs"""
        assert rows(connection, sql) == [("q", "number", True, 1000, 80, 8, 12, "q-shadow", 500)]
        # What it cost is found by the reason of its own request's records.
        assert f"route_reason = '{REASON}'" in next(
            view.sql for view in views() if view.name == "v_route_savings"
        )


def _decision() -> Decision:
    return Decision(Effect.ALLOW, ("all",), "ab" * 32)
