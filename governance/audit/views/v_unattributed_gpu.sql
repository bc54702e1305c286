-- Question: Which device time went to nobody: idle, or lost with an engine?
-- Grain: one row per engine replica and UTC day on which the metering interval ended.
-- Units: device-seconds: elapsed (devices times time), busy, attributed to requests, idle,
-- unattributed (busy for nobody, lost engines included); unattributed_percent of busy and lost;
-- lost counts engines that ended without a last report.
CREATE VIEW v_unattributed_gpu AS
WITH intervals AS (
    -- The ledger writes an event again if it died before it knew that it was written.
    SELECT DISTINCT
        ts_us,
        ts_end_us,
        coalesce(replica_id, entity_id) AS replica_id,
        response_model,
        reason_code,
        coalesce(ts_end, ts)::DATE AS day,
        event_type,
        -- A detail that is no JSON counts for nothing, and does not break the view.
        CASE WHEN json_valid(detail) THEN detail END::JSON AS detail
    FROM audit
    WHERE event_type IN ('meter.interval', 'engine.lost')
),

figures AS (
    SELECT
        replica_id,
        day,
        event_type,
        coalesce(response_model, detail ->> '$.base_model') AS base_model,
        detail ->> '$.accelerator' AS accelerator,
        coalesce(try_cast(detail ->> '$.elapsed_us' AS BIGINT), 0) AS elapsed_us,
        coalesce(try_cast(detail ->> '$.busy_us' AS BIGINT), 0) AS busy_us,
        coalesce(try_cast(detail ->> '$.attributed_us' AS BIGINT), 0) AS attributed_us,
        coalesce(try_cast(detail ->> '$.idle_us' AS BIGINT), 0) AS idle_us,
        CASE
            -- An engine that told of its own death has it in its last interval already.
            WHEN event_type = 'engine.lost' AND reason_code = 'dead' THEN 0
            ELSE coalesce(try_cast(detail ->> '$.unattributed_us' AS BIGINT), 0)
        END AS unattributed_us
    FROM intervals
)

SELECT
    day,
    replica_id,
    any_value(base_model) AS base_model,
    any_value(accelerator) AS accelerator,
    round(sum(elapsed_us) / 1e6, 3) AS elapsed_seconds,
    round(sum(busy_us) / 1e6, 3) AS busy_seconds,
    round(sum(attributed_us) / 1e6, 3) AS attributed_seconds,
    round(sum(idle_us) / 1e6, 3) AS idle_seconds,
    round(sum(unattributed_us) / 1e6, 3) AS unattributed_seconds,
    round(
        100 * sum(unattributed_us) / nullif(sum(attributed_us) + sum(unattributed_us), 0), 2
    ) AS unattributed_percent,
    count(*) FILTER (WHERE event_type = 'engine.lost') AS lost
FROM figures
GROUP BY day, replica_id
ORDER BY day, replica_id;
