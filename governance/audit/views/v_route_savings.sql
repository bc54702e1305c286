-- Question: What did it save not to send everything to the large model?
-- Grain: one row per UTC day on which requests ended and department, and such rows for days,
-- departments and everything; level says which: day department, day, department, all.
-- Units: requests left to the platform (auto) that have ended; large by the tier that answered or
-- was tried last; free could go either way, free_large of them were sent to the large tier, and
-- aimed_percent were meant to be; unscored went to the default tier; *_us charged
-- device-microseconds of requests whose price is known, unpriced counts the others.
-- charged_us is what was really charged, answers that were given up or failed included.
-- all_large_us is an estimate: where the small tier answered, computed prompt tokens and answer
-- tokens at the large model's price of that time; where the large one did, what its answer cost.
-- Bias: the large model's answer might have been longer or shorter, and would have met other load.
-- The *_corrected columns take answers length_ratio times as long, as shadow comparisons found (of
-- the department where it has 30, else of all); null without any. shadow_us, what comparisons cost,
-- is not taken off.
CREATE VIEW v_route_savings AS
WITH lengths AS (
    SELECT
        department,
        count(*) AS pairs,
        sum(large_tokens) / sum(small_tokens) AS ratio
    FROM v_shadow_pairs
    WHERE small_tokens > 0 AND large_tokens > 0
    GROUP BY department
),

everyone AS (
    SELECT sum(large_tokens) / nullif(sum(small_tokens), 0) AS ratio
    FROM v_shadow_pairs
    WHERE small_tokens > 0 AND large_tokens > 0
),

routes AS (
    SELECT
        v_routes.*,
        ts_end::DATE AS day,
        (input_tokens - coalesce(cached_tokens, 0)) * nullif(large_prefill_ns, 0) AS prefill_ns,
        output_tokens * nullif(large_decode_ns, 0) AS decode_ns,
        CASE WHEN lengths.pairs >= 30 THEN lengths.ratio ELSE everyone.ratio END AS ratio
    FROM v_routes
    LEFT JOIN lengths ON v_routes.department = lengths.department
    CROSS JOIN everyone
    WHERE ts_end IS NOT NULL
),

priced AS (
    SELECT
        *,
        CASE
            WHEN tier = 'small' THEN (prefill_ns + decode_ns) / 1000 ELSE answer_charged_us
        END AS large_us,
        CASE
            WHEN tier = 'small' THEN (prefill_ns + decode_ns * ratio) / 1000
            WHEN ratio IS NOT NULL THEN answer_charged_us
        END AS large_corrected_us
    FROM routes
),

facts AS (
    SELECT
        *,
        charged_us IS NOT NULL AND large_us IS NOT NULL AS compared,
        0 AS run_us
    FROM priced
    UNION ALL BY NAME
    -- What comparisons cost, under the department that they are about.
    SELECT
        ts_end::DATE AS day,
        department,
        charged_us AS run_us
    FROM v_attempts
    WHERE route_reason = 'shadow' AND ts_end IS NOT NULL
),

summed AS (
    SELECT
        trim(
            CASE WHEN grouping(day) = 0 THEN 'day ' ELSE '' END
            || CASE WHEN grouping(department) = 0 THEN 'department' ELSE '' END
        ) AS level,
        day,
        department,
        count(request_id) AS requests,
        count(*) FILTER (WHERE tier = 'large') AS large,
        count(*) FILTER (WHERE free) AS free,
        count(*) FILTER (WHERE free AND chosen_tier = 'large') AS free_large,
        avg(aimed_milli) FILTER (WHERE free) AS aimed_milli,
        count(*) FILTER (WHERE cascade) AS cascades,
        count(*) FILTER (WHERE escalated) AS escalated,
        count(*) FILTER (WHERE fallback) AS fallbacks,
        count(*) FILTER (WHERE reason_class = 'default') AS unscored,
        count(*) FILTER (WHERE NOT compared) AS unpriced,
        coalesce(sum(charged_us) FILTER (WHERE compared), 0)::BIGINT AS charged_us,
        coalesce(sum(large_us) FILTER (WHERE compared), 0)::BIGINT AS all_large_us,
        sum(large_corrected_us) FILTER (WHERE compared)::BIGINT AS all_large_corrected_us,
        round(
            sum(output_tokens * ratio) FILTER (WHERE compared AND tier = 'small')
            / nullif(sum(output_tokens) FILTER (WHERE compared AND tier = 'small'), 0),
            3
        ) AS length_ratio,
        coalesce(sum(run_us), 0)::BIGINT AS shadow_us
    FROM facts
    GROUP BY GROUPING SETS ((day, department), (day), (department), ())
    HAVING count(*) > 0
)

SELECT
    CASE WHEN level = '' THEN 'all' ELSE level END AS level,
    day,
    department,
    requests,
    large,
    round(100 * large / nullif(requests, 0), 1) AS large_percent,
    free,
    free_large,
    round(100 * free_large / nullif(free, 0), 1) AS free_large_percent,
    round(aimed_milli / 10, 1) AS aimed_percent,
    cascades,
    escalated,
    fallbacks,
    unscored,
    unpriced,
    charged_us,
    all_large_us,
    all_large_us - charged_us AS saved_us,
    round(100 * (all_large_us - charged_us) / nullif(all_large_us, 0), 1) AS saved_percent,
    length_ratio,
    all_large_corrected_us,
    all_large_corrected_us - charged_us AS saved_corrected_us,
    round(
        100 * (all_large_corrected_us - charged_us) / nullif(all_large_corrected_us, 0), 1
    ) AS saved_corrected_percent,
    shadow_us
FROM summed
ORDER BY level, day, department;
