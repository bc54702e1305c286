"""Metrics of budgets, of their alerts, and of fairness at peak; part of ``names.METRICS``.

``account`` is a department, a part of one (``hr/recruiting``) or a further window (``hr@hour``): as
many as the budgets file names, at most ``MAX_ACCOUNTS``. Accounts of single users are never
exported; what they hold counts in their department's leases.
"""

from __future__ import annotations

from deployments.telemetry.spec import Kind, Spec

_C, _G = Kind.COUNTER, Kind.GAUGE

MAX_ACCOUNTS = 1000
"""Accounts that are exported; departments before others, then those that used most."""

LEASE = "gatehouse_lease_gpu_seconds"
LEASE_TOKENS = "gatehouse_lease_tokens"
RENEW = "gatehouse_lease_renew_seconds"
RENEWALS = "gatehouse_lease_renewals_total"
LEASE_WAITING = "gatehouse_lease_waiting"
RENEW_FAILURES = "gatehouse_lease_renew_failures_total"
LEDGER_AGE = "gatehouse_ledger_age_seconds"
STOPS = "gatehouse_budget_stops_total"
SHED = "gatehouse_shed_requests_total"

BUDGET_GPU = "gatehouse_budget_gpu_seconds"
BUDGET_TOKENS = "gatehouse_budget_tokens"
BUDGET_USED = "gatehouse_budget_used_ratio"
BUDGET_RESET = "gatehouse_budget_reset_seconds"
SPENT_GPU = "gatehouse_budget_spent_gpu_seconds_total"
SPENT_TOKENS = "gatehouse_budget_spent_tokens_total"
COHORT_GPU = "gatehouse_cohort_gpu_seconds"
COHORT_TOKENS = "gatehouse_cohort_tokens"
LEDGER_QUEUED = "gatehouse_ledger_queued"
LEDGER_FAULTS = "gatehouse_ledger_faults_total"
WEIGHT = "gatehouse_budget_weight_ratio"
ALERTS = "gatehouse_alerts_total"
ALERTS_WAITING = "gatehouse_alerts_waiting"
ALERTS_AGE = "gatehouse_alerts_oldest_seconds"

CLASS_WAITING = "gatehouse_engine_class_waiting"
CLASS_WAIT = "gatehouse_engine_class_wait_seconds"
SERVED = "gatehouse_engine_served_seconds_total"

GATEWAY_METRICS: tuple[Spec, ...] = (
    Spec(
        LEASE,
        _G,
        "seconds",
        "Charged device time that this gateway holds of a department's accounts. `state` is `hold` "
        "(all of it), `open` (reserved by running requests) or `free`.",
        ("department", "state"),
    ),
    Spec(
        LEASE_TOKENS,
        _G,
        "tokens",
        "Tokens that this gateway holds of a department's accounts; as above.",
        ("department", "state"),
    ),
    Spec(LEASE_WAITING, _G, "requests", "Requests that wait for the ledger to lend more."),
    Spec(RENEW, _G, "seconds", "Time that the last answered renewal of leases took."),
    Spec(RENEWALS, _C, "renewals", "Renewals of leases that the ledger answered."),
    Spec(RENEW_FAILURES, _C, "renewals", "Renewals of leases that the ledger did not answer."),
    Spec(
        LEDGER_AGE,
        _G,
        "seconds",
        "Since the last answered renewal was sent: the age of what a gateway knows of budgets; "
        "leases end after 10 s.",
    ),
    Spec(
        STOPS,
        _C,
        "answers",
        "Answers that ended at the limit of a budget before they were complete.",
        ("model", "department"),
    ),
    Spec(
        SHED,
        _C,
        "requests",
        "Requests that were refused before they waited, because their class may not use that much "
        "of the queue (`queue`) or would have waited too long (`patience`). `class` is `critical`, "
        "`standard` or `batch`.",
        ("model", "class", "reason"),
    ),
)
"""Of each gateway."""

LEDGER_METRICS: tuple[Spec, ...] = (
    Spec(
        BUDGET_GPU,
        _G,
        "seconds",
        "Charged device time of an account in its window. `of` is `limit` (overrides, transfers "
        "and overdraft counted), `spent`, `leased` (out at gateways beyond that), `open` (of it, "
        "reserved by running requests), `moved` (transferred in, less out); where it has a cohort "
        "`borrowed`, `borrow` (the most that it may) and `lend` (the most that others may of it).",
        ("account", "of"),
    ),
    Spec(BUDGET_TOKENS, _G, "tokens", "Tokens of an account; as above.", ("account", "of")),
    Spec(
        BUDGET_USED,
        _G,
        "ratio",
        "Spent part of an account's limit in its window, above 1 where it borrows; absent where "
        "there is no limit. `quantity` is `gpu` or `tokens`.",
        ("account", "quantity"),
    ),
    Spec(BUDGET_RESET, _G, "seconds", "Time until an account's window ends.", ("account",)),
    Spec(
        SPENT_GPU,
        _C,
        "seconds",
        "Charged device time since the ledger's process started, over all windows: its rate is how "
        "fast a budget burns.",
        ("account",),
    ),
    Spec(SPENT_TOKENS, _C, "tokens", "Charged tokens; as above.", ("account",)),
    Spec(
        COHORT_GPU,
        _G,
        "seconds",
        "Charged device time that a cohort's departments lend each other. `of` is `lendable` or "
        "`lent` (used or held beyond nominal budgets, out of what the cohort itself has as well).",
        ("cohort", "of"),
    ),
    Spec(COHORT_TOKENS, _G, "tokens", "Tokens; as above.", ("cohort", "of")),
    Spec(
        WEIGHT,
        _G,
        "ratio",
        "Weight of a department at peak, by the budgets file.",
        ("department",),
    ),
    Spec(LEDGER_QUEUED, _G, "calls", "Calls that wait for the ledger's next transaction."),
    Spec(
        LEDGER_FAULTS,
        _C,
        "calls",
        "What the ledger refused or could not store. `kind` is `late` (came after its deadline), "
        "`conflicts` (named a reservation of somebody else's), `backwards` (a meter went back) or "
        "`failed_batches` (a transaction failed).",
        ("kind",),
    ),
    Spec(
        ALERTS,
        _C,
        "messages",
        "Alerts for the webhook. `result` is `delivered`, `retried` (an attempt failed), `refused` "
        "(by the receiver, for good), `expired` (not delivered in a day), `coalesced` (told by a "
        "higher threshold's message) or `unwanted` (there is no webhook).",
        ("result",),
    ),
    Spec(ALERTS_WAITING, _G, "alerts", "Alerts that wait to be delivered; 200 stands for more."),
    Spec(
        ALERTS_AGE,
        _G,
        "seconds",
        "Since the oldest alert that waits was crossed; given up after a day.",
    ),
)
"""Of each ledger; with several, each exports its own accounts."""

ENGINE_METRICS: tuple[Spec, ...] = (
    Spec(
        CLASS_WAITING,
        _G,
        "requests",
        "Requests that wait for a place in the running batch, by class.",
        ("model", "class"),
    ),
    Spec(
        CLASS_WAIT,
        _G,
        "seconds",
        "How long the longest of them has waited; 0 where none waits.",
        ("model", "class"),
    ),
    Spec(
        SERVED,
        _C,
        "seconds",
        "Device time that an engine replica gave to a department's requests. Its rate is the "
        "department's share at peak; by weight it is the rate of its virtual time, which is the "
        "same for all departments of a class that wait.",
        ("model", "department"),
    ),
)
"""Of each engine replica."""
