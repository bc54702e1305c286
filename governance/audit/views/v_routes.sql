-- Question: Which model did the platform choose for each request, on what grounds, at what cost?
-- Grain: one row per request whose model was left to the platform (auto).
-- Units: *_milli thousandths; *_us microseconds, of device time of all attempts together for gpu_us
-- and charged_us, and of the last one for answer_charged_us; tokens of the last attempt; *_ns
-- charged device-nanoseconds per token of the large model that the caller might have used.
-- model answered, or was tried last; chosen_tier is what the router took, wanted_tier what it would
-- have taken whatever the load. free says that the request could go either way by its gain: the
-- target is about those, and aimed_milli is the share of them that was aimed at.
-- reason_class is gain, conversation, budget, target, capability, permitted, default (no score),
-- load, or fallback where the choice itself is not on record because the budget refused it.
-- cascade says that the small model's answer was judged first, escalated that it was given up.
CREATE VIEW v_routes AS
WITH folded AS (
    SELECT
        request_id,
        min(ts) AS ts,
        arg_max_null(ts_end, attempt) AS ts_end,
        arg_max_null(department, attempt) AS department,
        arg_max_null(operation, attempt) AS operation,
        arg_max_null(response_model, attempt) AS model,
        arg_min_null(route_reason, attempt) AS reason,
        arg_max_null(detail, attempt) AS detail,
        greatest(count(*), max(attempt)) AS attempts,
        coalesce(bool_or(superseded = 'cascade'), FALSE) AS escalated,
        coalesce(
            bool_or(superseded = 'fallback' OR route_reason LIKE 'fallback:%'), FALSE
        ) AS fallback,
        CASE
            WHEN arg_max_null(superseded, attempt) IS NOT NULL THEN 'aborted'
            ELSE arg_max_null(outcome, attempt)
        END AS outcome,
        CASE
            WHEN arg_max_null(superseded, attempt) IS NOT NULL THEN 499
            ELSE arg_max_null(status, attempt)
        END::SMALLINT AS status,
        arg_max_null(input_tokens, attempt) AS input_tokens,
        arg_max_null(cached_tokens, attempt) AS cached_tokens,
        arg_max_null(output_tokens, attempt) AS output_tokens,
        sum(gpu_us)::BIGINT AS gpu_us,
        sum(charged_us)::BIGINT AS charged_us,
        arg_max_null(charged_us, attempt) AS answer_charged_us
    FROM v_attempts
    WHERE auto
    GROUP BY request_id
),

told AS (
    SELECT
        * EXCLUDE (detail),
        -- Later attempts repeat the reasons of the choice, and add to them. Extracted once for all,
        -- because parsing is what takes time here.
        json_extract_string(
            detail,
            [
                '$.route.tier', '$.route.wanted_tier', '$.route.gain_milli',
                '$.route.threshold_milli', '$.route.target', '$.route.pressure_milli',
                '$.route.weak_milli', '$.route.strong_milli', '$.route.trust_milli',
                '$.route.cluster', '$.route.similarity_milli', '$.route.scorer',
                '$.route.language', '$.route.score_us', '$.route.draft_ended',
                '$.route.confidence_milli', '$.route.large_model', '$.route.large_prefill_ns',
                '$.route.large_decode_ns', '$.route.aimed_milli', '$.route.chosen_tier'
            ]
        ) AS said,
        CASE
            WHEN reason LIKE 'fallback:%' THEN 'fallback'
            WHEN reason LIKE '% gain %' THEN 'gain'
            WHEN reason LIKE '% conversation %' THEN 'conversation'
            WHEN reason LIKE '% budget %' THEN 'budget'
            WHEN reason LIKE '% target %' THEN 'target'
            WHEN reason LIKE '% capability %' THEN 'capability'
            WHEN reason LIKE '% only %' THEN 'permitted'
            WHEN reason LIKE '% default %' THEN 'default'
            WHEN reason LIKE '% other tier %' THEN 'load'
            ELSE 'other'
        END AS reason_class
    FROM folded
)

SELECT
    request_id,
    ts,
    ts_end,
    department,
    operation,
    model,
    said[1] AS tier,
    coalesce(said[21], said[1]) AS chosen_tier,
    said[2] AS wanted_tier,
    reason,
    reason_class,
    said[3] IS NOT NULL AND reason_class IN ('gain', 'conversation', 'budget') AS free,
    try_cast(said[3] AS INTEGER) AS gain_milli,
    try_cast(said[4] AS INTEGER) AS threshold_milli,
    said[5] AS target,
    try_cast(said[20] AS INTEGER) AS aimed_milli,
    try_cast(said[6] AS INTEGER) AS pressure_milli,
    try_cast(said[7] AS INTEGER) AS weak_milli,
    try_cast(said[8] AS INTEGER) AS strong_milli,
    try_cast(said[9] AS INTEGER) AS trust_milli,
    try_cast(said[10] AS INTEGER) AS cluster,
    try_cast(said[11] AS INTEGER) AS similarity_milli,
    said[12] AS scorer,
    said[13] AS language,
    try_cast(said[14] AS BIGINT) AS score_us,
    attempts,
    escalated OR coalesce(said[15], said[16]) IS NOT NULL AS cascade,
    escalated,
    try_cast(said[16] AS INTEGER) AS confidence_milli,
    fallback,
    outcome,
    status,
    input_tokens,
    cached_tokens,
    output_tokens,
    gpu_us,
    charged_us,
    answer_charged_us,
    said[17] AS large_model,
    try_cast(said[18] AS BIGINT) AS large_prefill_ns,
    try_cast(said[19] AS BIGINT) AS large_decode_ns
FROM told;
