"""What ``gatehouse route`` prints for people.

NOTE: values of the trail were partly chosen by callers, so they pass through ``printable``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from deployments.cli.output import print_table, printable

if TYPE_CHECKING:
    from deployments.route_explain import Explanation
    from deployments.route_report import DriftFound, Report

_FAR = 0.5
"""Trust below which the mean of the training data counts for more than the prompt."""

_VERDICTS = {
    "too_few": "too few prompts to say",
    "stable": "like the training data, as far as chance tells",
    "moving": "moving away from the training data",
    "moved": "not like the training data: measure the scorer on outcomes of your own, retrain it",
}


def print_explanation(found: Explanation) -> None:
    """A choice, what it rests on, what would change it."""
    _line("model", f"{found.model} ({found.tier} tier)")
    _line("reason", found.reason)
    if found.fallbacks:
        _line("then", ", ".join(found.fallbacks))
    _line("chance of a right answer", f"small {_share(found.weak_milli)}, ", end="")
    click.echo(f"large {_share(found.strong_milli)}")
    _line("gain of the large model", f"{_signed(found.gain_milli)}, ", end="")
    click.echo(f"more than that of {_percent(found.easier_milli)} of ordinary prompts")
    _line("threshold", _threshold(found))
    far = "; far from everything seen in training" if found.trust_milli < 1000 * _FAR else ""
    _line("trust", f"{_share(found.trust_milli)} (similarity to the nearest ", end="")
    click.echo(f"training prompts {_signed(found.similarity_milli)}, centre {found.cluster}){far}")
    if found.language is not None:
        _line("language", found.language)
    if found.lacks is not None:
        _line("lacking", f"{found.lacks}: no permitted model has it")
    if found.cascade:
        _line("cascade", "the answer is judged before it is released")
    _line("scorer", found.scorer)
    click.echo("what would change it:")
    share = _percent(1000 - found.easier_milli)
    if found.threshold_milli is not None and found.tier == "small":
        click.echo(f"  a target with a large share above {share}, for ordinary traffic")
    elif found.threshold_milli is not None:
        click.echo(f"  a target with a large share below {share}, for ordinary traffic")
    for other in found.alternatives:
        click.echo(f"  {other.condition}: {other.model} ({other.reason})")


def _threshold(found: Explanation) -> str:
    if found.threshold_milli is None:
        return f"none: the gain does not decide here ({found.target})"
    if abs(found.threshold_milli) > 1000:
        return f"{'never' if found.threshold_milli > 0 else 'always'} large ({found.target})"
    return f"{_signed(found.threshold_milli)} for {found.target}, of ordinary traffic"


def print_report(found: Report) -> None:
    """All sections, each with what it does not say."""
    period, total = found.period, found.total
    click.echo(
        f"{period['requests']} requests left to the platform, "
        f"{period['first']:%Y-%m-%d %H:%MZ} to {period['last']:%Y-%m-%d %H:%MZ}"
    )
    departments = [*found.departments, {**total, "department": "all"}] if total else []
    _heading("Shares of the large tier")
    print_table(
        ("department", "target", "requests", "large", "of free", "aimed", "escalated", "fell back",
         "unscored"),
        [_shares(row) for row in departments],
        "no request has ended yet",
    )  # fmt: skip
    _note(
        "'of free': of the requests that could go either way, the share that was sent to the large "
        "tier; the target is about those."
    )
    _heading("What that saved")
    print_table(
        ("department", "charged s", "all large s", "saved", "corrected", "unpriced"),
        [_savings(row) for row in departments],
        "no request has ended yet",
    )
    _note(
        "'all large s' is an estimate: the same tokens at the large model's price. "
        + _correction(total)
    )
    if total.get("shadow_us"):
        _note(f"Comparisons cost {_seconds(total['shadow_us'])} s besides.")
    _heading("Why a model was chosen")
    print_table(
        ("reason", "requests"),
        [(printable(str(row["reason"])), str(row["requests"])) for row in found.reasons],
    )
    _heading("Other models that were tried")
    print_table(
        ("reason", "model", "attempts"),
        [
            (printable(str(row["reason"])), printable(str(row["model"])), str(row["attempts"]))
            for row in found.moves
        ],
        "none",
    )
    _scores(found.scores)
    _quality(found)
    _heading("Prompts against the training data of the scorer")
    _print_drift(found.drift)


def _shares(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        printable(str(row["department"])),
        printable(str(row.get("target") or "")),
        str(row["requests"]),
        _rate(row["large_percent"]),
        _rate(row["free_large_percent"]),
        _rate(row["aimed_percent"]),
        str(row["escalated"]),
        str(row["fallbacks"]),
        str(row["unscored"]),
    )


def _savings(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        printable(str(row["department"])),
        _seconds(row["charged_us"]),
        _seconds(row["all_large_us"]),
        _rate(row["saved_percent"]),
        _rate(row["saved_corrected_percent"]),
        str(row["unpriced"]),
    )


def _correction(total: Mapping[str, Any]) -> str:
    ratio = total.get("length_ratio")
    if ratio is None:
        return "Its answers might be longer or shorter; no comparisons say by how much."
    return f"'corrected' takes its answers {ratio:g} times as long, as comparisons found."


def _scores(scores: Mapping[str, Any]) -> None:
    if scores["p50_us"] is not None:
        times = (scores["p50_us"], scores["p95_us"], scores["p99_us"])
        half, most, worst = (f"{us / 1000:.1f}" for us in times)
        click.echo(f"{scores['scored']} scores; waited p50 {half} ms, p95 {most}, p99 {worst}")


def _quality(found: Report) -> None:
    _heading("Comparisons with the large model, and cascades")
    print_table(
        ("", "pairs", "agreement", "differ", "firm pairs", "differ", "judged", "given up"),
        [_evidence(row) for row in found.quality],
        "no evidence: neither shadow comparisons nor cascades are on record",
    )
    if found.methods:
        by = ", ".join(f"{printable(str(row['method']))} {row['pairs']}" for row in found.methods)
        _note(f"Compared by: {by}.")
    if found.quality:
        _note(
            "'differ': pairs that agree by less than half; in brackets 95 % intervals, which take "
            "requests as independent. Agreement is not correctness. Where 'differ' does not rise "
            "with the gain, the gain means little for this traffic."
        )


def _evidence(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["level"] == "gain":
        low = row["gain_from_milli"]
        what = "gain unknown" if low is None else f"gain {_signed(low)} to {_signed(low + 50)}"
    else:
        what = "all" if row["level"] == "all" else printable(str(row["department"]))
    agreement = row["agreement_milli"]
    return (
        what,
        str(row["pairs"]),
        "" if agreement is None else _share(agreement),
        _bounded(row, "below_half"),
        str(row["firm_pairs"]),
        _bounded(row, "firm_below_half"),
        str(row["cascades"]),
        _bounded(row, "escalated"),
    )


def _print_drift(found: DriftFound) -> None:
    click.echo(f"{found.prompts} prompts of scorer {found.scorer}: {_VERDICTS[found.verdict]}")
    if found.psi_cluster is not None:
        click.echo(
            f"stability index: subjects {found.psi_cluster} (by chance {found.expected_psi}), "
            f"similarity {found.psi_similarity}"
        )
    others = [row for row in found.scorers if row["scorer"] != found.scorer]
    if others:
        names = ", ".join(f"{printable(str(row['scorer']))} {row['prompts']}" for row in others)
        _note(f"Prompts of other scorers, not compared: {names}. Name theirs with --artefact.")


def _heading(text: str) -> None:
    click.echo()
    click.secho(text, bold=True)


def _line(name: str, text: str, end: str = "\n") -> None:
    click.echo(f"{name:<26}{printable(text)}", nl=end == "\n")


def _note(text: str) -> None:
    click.echo(click.wrap_text(text, 100))


def _share(milli: int) -> str:
    return f"{milli / 1000:.2f}"


def _signed(milli: int) -> str:
    return f"{milli / 1000:+.3f}" if milli else "0"


def _percent(milli: int) -> str:
    return f"{milli / 10:.0f} %"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


def _bounded(row: Mapping[str, Any], name: str) -> str:
    """A share with its interval."""
    share, low, high = row[f"{name}_percent"], row[f"{name}_low"], row[f"{name}_high"]
    return "" if share is None else f"{share:.0f} % ({low:.0f} to {high:.0f})"


def _seconds(value: int) -> str:
    return f"{value / 1_000_000:.1f}"
