-- Question: How fast does each account burn its budget within the day, week and month?
-- Grain: one row per account and UTC hour in which requests of it ended; a request counts at the
-- account that was charged and at all above it, so that rows of one department do not add up.
-- Units: charged_us weighted device-microseconds and tokens of that hour; day_*, week_*, month_*
-- the same since the UTC day, week (from Monday) and month began, that hour included.
CREATE VIEW v_budget_burn AS
WITH hourly AS (
    SELECT
        account,
        date_trunc('hour', ended_ts) AS hour,
        sum(charged_us)::BIGINT AS charged_us,
        sum(tokens)::BIGINT AS tokens
    FROM (
        SELECT unnest(path) AS account, ended_ts, charged_us, tokens
        FROM v_usage
        WHERE account IS NOT NULL
    )
    GROUP BY account, hour
)

SELECT
    account,
    hour,
    charged_us,
    tokens,
    sum(charged_us) OVER day::BIGINT AS day_charged_us,
    sum(tokens) OVER day::BIGINT AS day_tokens,
    sum(charged_us) OVER week::BIGINT AS week_charged_us,
    sum(tokens) OVER week::BIGINT AS week_tokens,
    sum(charged_us) OVER month::BIGINT AS month_charged_us,
    sum(tokens) OVER month::BIGINT AS month_tokens
FROM hourly
WINDOW
    day AS (PARTITION BY account, date_trunc('day', hour) ORDER BY hour),
    week AS (PARTITION BY account, date_trunc('week', hour) ORDER BY hour),
    month AS (PARTITION BY account, date_trunc('month', hour) ORDER BY hour)
ORDER BY account, hour;
