-- Question: Is the small model's answer good enough where it was chosen, and does the gain tell?
-- Grain: one row per UTC day, department and bucket of predicted gain with shadow comparisons or
-- cascades, and such rows for wider groups; level says which: day department gain, department gain,
-- gain, department, all.
-- Units: gain_from_milli is the lower end of a bucket of 50 thousandths, null without a score;
-- agreement in thousandths; *_percent of pairs, firm pairs or cascades; *_low and *_high 95 %
-- intervals (Wilson 1927), which take requests as independent and are too narrow where they repeat.
-- below_half counts pairs that agree by less than half; firm ones compare numbers, letters, equal
-- texts and refusals. escalated counts answers that a cascade gave up, of those that it judged.
-- Agreement is not correctness: it says where the large model would have said the same. A share that
-- rises with the gain says that the gain means something; one that does not, that it does not.
CREATE MACRO wilson_percent(hits, trials, side) AS round(
    100 * (hits + 1.9208 + side * 1.96 * sqrt(hits * (trials - hits) / nullif(trials, 0) + 0.9604))
    / (trials + 3.8416),
    1
);

CREATE VIEW v_route_quality AS
WITH facts AS (
    SELECT
        ts::DATE AS day,
        department,
        gain_milli,
        agreement_milli,
        firm,
        NULL::BOOLEAN AS escalated
    FROM v_shadow_pairs
    WHERE agreement_milli IS NOT NULL
    UNION ALL
    SELECT
        ts::DATE AS day,
        department,
        gain_milli,
        NULL AS agreement_milli,
        NULL AS firm,
        escalated
    FROM v_routes
    WHERE cascade AND ts_end IS NOT NULL
),

bucketed AS (
    SELECT
        *,
        (floor(gain_milli / 50) * 50)::INTEGER AS gain_from_milli
    FROM facts
),

counted AS (
    SELECT
        trim(
            CASE WHEN grouping(day) = 0 THEN 'day ' ELSE '' END
            || CASE WHEN grouping(department) = 0 THEN 'department ' ELSE '' END
            || CASE WHEN grouping(gain_from_milli) = 0 THEN 'gain' ELSE '' END
        ) AS level,
        day,
        department,
        gain_from_milli,
        count(agreement_milli) AS pairs,
        round(avg(agreement_milli))::INTEGER AS agreement_milli,
        count(*) FILTER (WHERE agreement_milli < 500) AS below_half,
        count(*) FILTER (WHERE firm) AS firm_pairs,
        count(*) FILTER (WHERE firm AND agreement_milli < 500) AS firm_below_half,
        count(escalated) AS cascades,
        count(*) FILTER (WHERE escalated) AS escalated
    FROM bucketed
    GROUP BY GROUPING SETS (
        (day, department, gain_from_milli),
        (department, gain_from_milli),
        (gain_from_milli),
        (department),
        ()
    )
    HAVING count(*) > 0
)

SELECT
    CASE WHEN level = '' THEN 'all' ELSE level END AS level,
    day,
    department,
    gain_from_milli,
    pairs,
    agreement_milli,
    below_half,
    round(100 * below_half / nullif(pairs, 0), 1) AS below_half_percent,
    wilson_percent(below_half, pairs, -1) AS below_half_low,
    wilson_percent(below_half, pairs, 1) AS below_half_high,
    firm_pairs,
    firm_below_half,
    round(100 * firm_below_half / nullif(firm_pairs, 0), 1) AS firm_below_half_percent,
    wilson_percent(firm_below_half, firm_pairs, -1) AS firm_below_half_low,
    wilson_percent(firm_below_half, firm_pairs, 1) AS firm_below_half_high,
    cascades,
    escalated,
    round(100 * escalated / nullif(cascades, 0), 1) AS escalated_percent,
    wilson_percent(escalated, cascades, -1) AS escalated_low,
    wilson_percent(escalated, cascades, 1) AS escalated_high
FROM counted
ORDER BY level, day, department, gain_from_milli;
