"""Usage as rows for other tools, by the column names of FOCUS where they fit.

FOCUS is the FinOps Open Cost and Usage Specification. What it has no name for begins with ``x_``,
as it asks. Columns, by what they mean here:

| column | meaning |
|---|---|
| BillingAccountId, BillingAccountName | the organisation, as given to the command |
| SubAccountId, SubAccountName | the department |
| BillingPeriodStart, BillingPeriodEnd | calendar month, UTC, end exclusive |
| ChargePeriodStart, ChargePeriodEnd | hour or day of the row, UTC, end exclusive |
| ChargeCategory, ChargeFrequency | ``Usage``, ``Usage-Based`` |
| ChargeDescription | account and model, for people |
| ServiceCategory, ServiceName | ``AI and Machine Learning``, ``Gatehouse`` |
| ProviderName, PublisherName, InvoiceIssuerName | ``Gatehouse``: what is shown back is internal |
| ResourceId, ResourceType | the model, ``Model`` |
| ConsumedQuantity, ConsumedUnit | charged device-seconds, ``Seconds`` |
| PricingQuantity, PricingUnit | the same in ``Hours`` |
| ListUnitPrice | price of a charged device-hour; empty where none was given |
| BilledCost, EffectiveCost, ListCost, ContractedCost | that times the hours; empty likewise |
| BillingCurrency | of the price; empty likewise |
| x_Account, x_Part, x_Application | account that was charged, part, application |
| x_Requests | requests, each attempt at a model counted |
| x_MeteredSeconds | device-seconds before they are weighted by accelerator |
| x_InputTokens, x_OutputTokens | tokens |

Names and meanings follow FOCUS; conformance has not been certified. It wants costs and a currency
in every row: without a price they are empty, because none is made up.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from governance.finops.showback import Price

if TYPE_CHECKING:
    import duckdb

Row = dict[str, Any]

COLUMNS: Final = (
    "BillingAccountId",
    "BillingAccountName",
    "SubAccountId",
    "SubAccountName",
    "BillingPeriodStart",
    "BillingPeriodEnd",
    "ChargePeriodStart",
    "ChargePeriodEnd",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ServiceCategory",
    "ServiceName",
    "ProviderName",
    "PublisherName",
    "InvoiceIssuerName",
    "ResourceId",
    "ResourceType",
    "ConsumedQuantity",
    "ConsumedUnit",
    "PricingQuantity",
    "PricingUnit",
    "ListUnitPrice",
    "BilledCost",
    "EffectiveCost",
    "ListCost",
    "ContractedCost",
    "BillingCurrency",
    "x_Account",
    "x_Part",
    "x_Application",
    "x_Requests",
    "x_MeteredSeconds",
    "x_InputTokens",
    "x_OutputTokens",
)
TIMES: Final = frozenset(name for name in COLUMNS if name.endswith(("PeriodStart", "PeriodEnd")))
COUNTS: Final = frozenset({"x_Requests", "x_InputTokens", "x_OutputTokens"})
DECIMALS: Final = frozenset(
    {
        "ConsumedQuantity",
        "PricingQuantity",
        "ListUnitPrice",
        "BilledCost",
        "EffectiveCost",
        "ListCost",
        "ContractedCost",
        "x_MeteredSeconds",
    }
)
GRAINS: Final = {"hour": timedelta(hours=1), "day": timedelta(days=1)}
_HOUR_US: Final = Decimal(3_600_000_000)
_PLACES: Final = Decimal("0.000000001")
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a spreadsheet may take for a formula at the beginning of a cell (OWASP, CSV injection)."""


def rows(
    connection: duckdb.DuckDBPyConnection,
    grain: str,
    from_us: int,
    until_us: int,
    *,
    organisation: str = "organisation",
    price: Price | None = None,
) -> Iterator[Row]:
    """One row per period, account, application and model, by time.

    Args:
        connection: As ``governance.audit.query.connect`` gives it.
        grain: One of ``GRAINS``, of UTC.
        from_us: Beginning of the period.
        until_us: End of the period.
        organisation: Name of the billing account.
        price: Of a charged device-hour; ``None`` leaves costs empty.
    """
    result = connection.execute(
        """
        SELECT
            date_trunc($grain, ended_ts) AS start,
            department, account, part, application, model,
            count(*),
            sum(gpu_us)::BIGINT, sum(charged_us)::BIGINT,
            sum(input_tokens)::BIGINT, sum(output_tokens)::BIGINT
        FROM v_usage
        WHERE epoch_us(ended_ts) >= $from AND epoch_us(ended_ts) < $until
        GROUP BY ALL ORDER BY ALL
        """,
        {"grain": grain, "from": from_us, "until": until_us},
    )
    while found := result.fetchmany(10_000):
        for values in found:
            yield _row(values, GRAINS[grain], organisation, price)


def _row(values: Any, span: timedelta, organisation: str, price: Price | None) -> Row:
    start, department, account, part, application, model, *figures = values
    requests, gpu_us, charged_us, input_tokens, output_tokens = figures
    start = datetime.combine(start, datetime.min.time()) if not hasattr(start, "hour") else start
    month = start.replace(day=1, hour=0)
    hours = (Decimal(charged_us) / _HOUR_US).quantize(_PLACES)
    cost = None
    if price is not None:
        cost = (Decimal(charged_us) * price.per_hour / _HOUR_US).quantize(_PLACES)
    return {
        "BillingAccountId": organisation,
        "BillingAccountName": organisation,
        "SubAccountId": department,
        "SubAccountName": department,
        "BillingPeriodStart": month,
        "BillingPeriodEnd": (month + timedelta(days=32)).replace(day=1),
        "ChargePeriodStart": start,
        "ChargePeriodEnd": start + span,
        "ChargeCategory": "Usage",
        "ChargeClass": None,
        "ChargeDescription": f"{account} on {model}",
        "ChargeFrequency": "Usage-Based",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "Gatehouse",
        "ProviderName": "Gatehouse",
        "PublisherName": "Gatehouse",
        "InvoiceIssuerName": "Gatehouse",
        "ResourceId": model,
        "ResourceType": "Model",
        "ConsumedQuantity": _seconds(charged_us),
        "ConsumedUnit": "Seconds",
        "PricingQuantity": hours,
        "PricingUnit": "Hours",
        "ListUnitPrice": None if price is None else price.per_hour,
        "BilledCost": cost,
        "EffectiveCost": cost,
        "ListCost": cost,
        "ContractedCost": cost,
        "BillingCurrency": None if price is None else price.currency,
        "x_Account": account,
        "x_Part": part,
        "x_Application": application,
        "x_Requests": requests,
        "x_MeteredSeconds": _seconds(gpu_us),
        "x_InputTokens": input_tokens,
        "x_OutputTokens": output_tokens,
    }


def write_csv(found: Iterator[Row], out: IO[str]) -> int:
    """Write a header and all rows; how many there were."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    count = 0
    for row in found:
        writer.writerow([cell(row[name]) for name in COLUMNS])
        count += 1
    return count


def write_parquet(found: Iterator[Row], path: Path) -> int:
    """Write all rows, exact decimals and UTC times; how many there were."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def kind(name: str) -> Any:
        if name in TIMES:
            return pa.timestamp("us", "UTC")
        if name in COUNTS:
            return pa.int64()
        return pa.decimal128(28, 9) if name in DECIMALS else pa.string()

    schema = pa.schema([(name, kind(name)) for name in COLUMNS])
    kept = list(found)
    arrays = []
    for field in schema:
        values = [row[field.name] for row in kept]
        if field.name in DECIMALS:
            values = [None if value is None else value.quantize(_PLACES) for value in values]
        arrays.append(pa.array(values, field.type))
    pq.write_table(pa.table(arrays, schema=schema), path)
    return len(kept)


def cell(value: Any) -> str:
    """A value as a cell of CSV: times ISO 8601, and no text that a spreadsheet would execute."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%dT%H:%M:%SZ}"
    if isinstance(value, Decimal):
        return f"{value:f}"
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _seconds(amount_us: int) -> Decimal:
    return Decimal(amount_us).scaleb(-6)
