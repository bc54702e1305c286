-- Question: How does each model do, hour by hour: load, speed, errors, price of a token?
-- Grain: one row per model and UTC hour in which admitted requests began; open ones are left out.
-- Units: requests, of which one that several models were tried for counts under each; *_us
-- microseconds at the 50th and 95th percentile (of requests that got that far, and had not been
-- tried elsewhere before); tokens; output_tokens_per_s is the median over requests after the first
-- piece; gpu_us_per_token is metered device time by prompt and answer tokens, over metered requests.
CREATE VIEW v_model_ops AS
SELECT
    coalesce(response_model, request_model) AS model,
    date_trunc('hour', ts) AS hour,
    count(*) AS requests,
    count(*) FILTER (WHERE outcome = 'failed') AS failed,
    count(*) FILTER (WHERE outcome = 'aborted') AS aborted,
    count(*) FILTER (WHERE outcome = 'refused') AS refused,
    quantile_disc(ttft_us, 0.5) FILTER (WHERE attempt = 1) AS ttft_p50_us,
    quantile_disc(ttft_us, 0.95) FILTER (WHERE attempt = 1) AS ttft_p95_us,
    quantile_disc(latency_us, 0.5) FILTER (WHERE attempt = 1) AS latency_p50_us,
    quantile_disc(latency_us, 0.95) FILTER (WHERE attempt = 1) AS latency_p95_us,
    sum(input_tokens)::BIGINT AS input_tokens,
    sum(output_tokens)::BIGINT AS output_tokens,
    round(
        median(output_tokens * 1e6 / (latency_us - ttft_us))
            FILTER (WHERE output_tokens > 0 AND latency_us > ttft_us),
        1
    ) AS output_tokens_per_s,
    round(
        sum(gpu_us) / nullif(
            sum(coalesce(input_tokens, 0) + coalesce(output_tokens, 0))
                FILTER (WHERE gpu_us IS NOT NULL),
            0
        ),
        1
    ) AS gpu_us_per_token
FROM v_attempts
WHERE admitted AND outcome <> 'open'
GROUP BY model, hour
ORDER BY hour, model;
