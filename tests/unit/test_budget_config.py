"""Budgets files that are refused, with line, place and reason; and the one that is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from governance.budget.config import BudgetsConfig, load_budgets
from governance.yaml_config import ConfigError

ROOT = Path(__file__).parents[2]
HEAD = "version: 1\n"


def refusal(tmp_path: Path, text: str) -> ConfigError:
    path = tmp_path / "budgets.yaml"
    path.write_text(HEAD + text)
    with pytest.raises(ConfigError) as caught:
        load_budgets(path)
    return caught.value


@pytest.mark.parametrize(
    ("text", "line", "place", "reason"),
    [
        ("accounts: {}", 1, "", "has no accounts"),
        ("accounts:\n  hr: {window: day}", 3, "accounts.hr", "sets no limit"),
        ("accounts:\n  hr: {tokens: -1}", 3, "accounts.hr.tokens", "greater than or equal"),
        ("accounts:\n  hr: {tokens: 1.5}", 3, "accounts.hr.tokens", "integer"),
        ("accounts:\n  hr: {tokens: 5, window: year}", 3, "accounts.hr.window", "'hour'"),
        ("accounts:\n  hr: {tokens: 5, timezone: Mars}", 3, "accounts.hr.timezone", "IANA"),
        ("accounts:\n  hr: {tokens: 5, parent: x}", 3, "accounts.hr.parent", "not permitted"),
        ("accounts:\n  hr: {tokens: 5}\n  hr: {tokens: 6}", 4, "accounts.hr", "given twice"),
        ("accounts: {hr: {tokens: 5}}\nchunk_tokens: 0", 3, "chunk_tokens", "greater"),
        ("accounts: {hr: {tokens: 5}}\naccelerators: {L4: 0}", 3, "accelerators", "0.001"),
        ("accounts: {hr: {tokens: 5}}\naccelerators: {L4: 0.12345}", 3, "accelerators", "steps"),
        ("accounts: {hr: {tokens: 5}}\nlease: {ttl_s: 5, renew_s: 2}", 3, "lease", "three times"),
        ("default_account: {window: day}", 2, "default_account", "sets no limit"),
    ],
)
def test_a_wrong_file_is_refused(
    tmp_path: Path, text: str, line: int, place: str, reason: str
) -> None:
    error = refusal(tmp_path, text)
    assert (error.line, error.place) == (line, place)
    assert reason in error.reason


@pytest.mark.parametrize("name", ["", "a b", "../etc", "x" * 65, "-a"])
def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path, f"accounts: {{'{name}': {{tokens: 5}}}}").line == 2


def test_the_shipped_file_names_the_departments_of_the_policy() -> None:
    budgets = load_budgets(ROOT / "config" / "budgets.yaml")
    policy = yaml.safe_load((ROOT / "config" / "policy.yaml").read_text())
    assert set(budgets.accounts) == set(policy["departments"])
    assert budgets.default_account is None
    assert budgets.account("nobody") is None


def test_weights_are_thousandths_and_one_by_default() -> None:
    budgets = BudgetsConfig.model_validate(
        {"default_account": {"tokens": 1}, "accelerators": {"L4": 0.3, "H200": 1.201}}
    )
    weights = [budgets.weight_milli(kind) for kind in ("L4", "H200", "B300")]
    assert weights == [300, 1201, 1000]


def test_the_digest_is_of_what_the_file_says() -> None:
    one = {"accounts": {"a": {"tokens": 5}, "b": {"gpu_seconds": 5}}, "accelerators": {"L4": 1}}
    two = {"accelerators": {"L4": 1.0}, "accounts": {"b": {"gpu_seconds": 5}, "a": {"tokens": 5}}}
    digest = BudgetsConfig.model_validate(one).digest
    assert digest == BudgetsConfig.model_validate(two).digest
    assert digest != BudgetsConfig.model_validate({**two, "chunk_tokens": 64}).digest
    assert len(digest) == 64
