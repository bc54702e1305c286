-- Question: Where the small model answered, how far does the large one's answer agree?
-- Grain: one row per comparison: a sampled request that the small model had answered, and its
-- repetition on the large one in idle time.
-- Units: *_milli thousandths; tokens of the answers; gpu_us metered device-microseconds of the
-- repetition, and null where they were not known yet. firm says that what was compared is right or
-- wrong (numbers, letters, equal texts, refusals), not merely similar.
-- Agreement is not correctness: both may be wrong alike, or right in different words. And quiet
-- hours are sampled more than busy ones.
CREATE VIEW v_shadow_pairs AS
SELECT
    ts,
    request_id,
    department,
    operation,
    shadow ->> '$.small_model' AS small_model,
    shadow ->> '$.large_model' AS large_model,
    shadow ->> '$.method' AS method,
    (shadow ->> '$.method') NOT IN ('cosine', 'words') AS firm,
    try_cast(shadow ->> '$.agreement_milli' AS INTEGER) AS agreement_milli,
    try_cast(shadow ->> '$.gain_milli' AS INTEGER) AS gain_milli,
    try_cast(shadow ->> '$.threshold_milli' AS INTEGER) AS threshold_milli,
    try_cast(shadow ->> '$.small_tokens' AS BIGINT) AS small_tokens,
    try_cast(shadow ->> '$.large_tokens' AS BIGINT) AS large_tokens,
    gpu_us,
    shadow ->> '$.run_request_id' AS run_request_id
FROM (
    SELECT
        *,
        CASE WHEN json_valid(detail) THEN detail -> '$.shadow' END AS shadow
    FROM audit
    WHERE event_type = 'route.shadow'
);
