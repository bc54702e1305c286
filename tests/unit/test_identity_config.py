"""The identity file: what it may say, and how it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from governance.identity.config import IdentityConfig, is_safe_url, load_identity
from governance.yaml_config import ConfigError
from tests.unit import forge

ROOT = Path(__file__).resolve().parents[2]

GOOD = """\
version: 1
issuers:
- name: idp
  issuer: https://idp.example.com
  audiences: [gatehouse]
mappings:
- when: {role: hr-analyst}
  grant: [employee]
  department: hr
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., IdentityConfig]:
    def load(text: str, **options: Any) -> IdentityConfig:
        path = tmp_path / "identity.yaml"
        path.write_text(text)
        return load_identity(path, **options)

    return load


Load = Callable[..., IdentityConfig]


def test_defaults(load: Load) -> None:
    issuer = load(GOOD).issuers[0]
    assert issuer.algorithms == ("RS256",)
    assert issuer.types == ("JWT", "at+jwt")
    assert issuer.subject == ("sub",)
    assert issuer.client == ("azp", "appid", "cid", "client_id")
    assert issuer.on_overage == "deny"


@pytest.mark.parametrize(
    "algorithm", ["HS256", "HS384", "HS512", "none", "None", "dir", "rs256", ""]
)
def test_only_asymmetric_algorithms(load: Load, algorithm: str) -> None:
    changed = GOOD.replace("audiences:", f"algorithms: [RS256, '{algorithm}']\n  audiences:")
    with pytest.raises(ConfigError) as caught:
        load(changed)
    assert caught.value.line == 5
    assert caught.value.place == "issuers.0.algorithms"


@pytest.mark.parametrize(
    ("old", "new", "place", "line"),
    [
        ("audiences: [gatehouse]", "audiences: []", "issuers.0.audiences", 5),
        ("audiences: [gatehouse]", "audience: [gatehouse]", "issuers.0.audiences", 3),
        (
            "issuer: https://idp.example.com",
            "issuer: http://idp.example.com",
            "issuers.0.issuer",
            4,
        ),
        ("issuer: https://idp.example.com", "issuer: ftp://idp.example", "issuers.0.issuer", 4),
        ("https://idp.example.com", "https://u:secretword@idp.example", "issuers.0.issuer", 4),
        ("name: idp", "name: gatehouse", "issuers.0.name", 3),
        ("name: idp", "name: idp\n  name: idp2", "issuers.0.name", 4),
        ("name: idp", "name: idp\n  types: [logout+jwt]", "issuers.0.types.0", 4),
        ("name: idp", "name: idp\n  types: []", "issuers.0.types", 4),
        ("name: idp", "name: idp\n  subject: []", "issuers.0.subject", 4),
        ("name: idp", "name: idp\n  on_overage: allow", "issuers.0.on_overage", 4),
        ("name: idp", f"name: idp\n  tenants: [{forge.TENANT_A}]", "issuers.0", 3),
        ("idp.example.com", "idp.example.com/{tid}", "issuers.0", 3),
        ("{role: hr-analyst}", "{}", "mappings.0.when", 7),
        ("{role: hr-analyst}", "{issuer: idp}", "mappings.0.when", 7),
        ("{role: hr-analyst}", "{claim: country}", "mappings.0.when", 7),
        ("{role: hr-analyst}", "{rolle: hr-analyst}", "mappings.0.when.rolle", 7),
        ("  grant: [employee]\n  department: hr\n", "", "mappings.0", 7),
        ("version: 1", "version: 2", "version", 1),
    ],
)
def test_mistakes_with_their_place(load: Load, old: str, new: str, place: str, line: int) -> None:
    with pytest.raises(ConfigError) as caught:
        load(GOOD.replace(old, new, 1))
    assert (caught.value.place, caught.value.line) == (place, line)
    assert "secretword" not in str(caught.value)


@pytest.mark.parametrize("tenant", ["common", "organizations", forge.TENANT_A.upper(), "-" * 36])
def test_tenants_are_ids(tenant: str) -> None:
    with pytest.raises(ValueError, match="tenants"):
        forge.identity({**forge.entra_section(), "tenants": [tenant]})


def test_every_tenant_has_its_urls() -> None:
    issuer = forge.identity(forge.entra_section()).issuers[0]
    assert issuer.key_urls() == {
        f"https://login.example.com/{tenant}/v2.0": f"https://login.example.com/{tenant}/keys"
        for tenant in (forge.TENANT_A, forge.TENANT_B)
    }


def two(**when: str) -> IdentityConfig:
    return forge.identity(
        forge.issuer_section(),
        forge.issuer_section(name="other", issuer="https://other.example.com", roles_claim=None),
        mappings=[{"when": when, "department": "hr"}],
    )


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        ({"role": "admin"}, "name the issuer"),
        ({"issuer": "unknown", "role": "admin"}, "not declared"),
        ({"issuer": "other", "role": "admin"}, "no roles_claim"),
    ],
)
def test_mappings_that_match_nothing_or_the_wrong_issuer(when: dict[str, str], reason: str) -> None:
    assert two(issuer="idp", role="admin")
    with pytest.raises(ValueError, match=reason):
        two(**when)


def test_a_group_needs_a_groups_claim() -> None:
    with pytest.raises(ValueError, match="no groups_claim"):
        forge.identity(
            forge.issuer_section(groups_claim=None),
            mappings=[{"when": {"group": "g"}, "department": "hr"}],
        )


def test_issuers_are_told_apart() -> None:
    for other in (
        forge.issuer_section(issuer="https://other.example.com"),
        forge.issuer_section(name="other"),
    ):
        with pytest.raises(ValueError, match="two issuers"):
            forge.identity(
                forge.issuer_section(),
                other,
                mappings=[{"when": {"issuer": "idp", "role": "a"}, "department": "hr"}],
            )


@pytest.mark.parametrize("field", ["issuer", "jwks_uri"])
def test_loopback_is_for_local_mode(load: Load, field: str) -> None:
    text = GOOD.replace("  audiences", "  jwks_uri: https://idp.example.com/keys\n  audiences")
    url = {"issuer": "https://idp.example.com\n", "jwks_uri": "https://idp.example.com/keys\n"}
    text = text.replace(f"{field}: {url[field]}", f"{field}: http://127.0.0.1:8100\n")
    with pytest.raises(ConfigError, match="mode: local only") as caught:
        load(text)
    assert caught.value.place == f"issuers.0.{field}"
    assert caught.value.line == {"issuer": 4, "jwks_uri": 5}[field]
    assert load(text, local=True)


@pytest.mark.parametrize(
    ("url", "safe", "local"),
    [
        ("https://idp.example.com/keys", True, True),
        ("http://127.0.0.1:8100/keys", False, True),
        ("http://[::1]:8100/keys", False, True),
        ("http://localhost/keys", False, False),
        ("http://127.0.0.1.example.com/keys", False, False),
        ("http://127.0.0.1@attacker.example/keys", False, False),
        ("http://10.0.0.1/keys", False, False),
        ("file:///etc/hostname", False, False),
        ("https://", False, False),
        ("https://u:p@idp.example.com", False, False),
        ("https://idp.example.com/#x", False, False),
        ("https://[::1", False, False),
        ("idp.example.com", False, False),
        ("", False, False),
    ],
)
def test_urls_that_keys_may_come_from(url: str, safe: bool, local: bool) -> None:
    assert is_safe_url(url, allow_loopback_http=False) is safe
    assert is_safe_url(url, allow_loopback_http=True) is local


def test_the_file_for_one_machine_is_refused_elsewhere() -> None:
    path = ROOT / "config" / "identity.local.yaml"
    config = load_identity(path, local=True)
    assert config.issuers[0].types == ("at+jwt",)
    with pytest.raises(ConfigError, match="mode: local only"):
        load_identity(path)


def test_the_sample_file_takes_the_tokens_its_providers_send() -> None:
    config = load_identity(ROOT / "config" / "identity.yaml")
    by_name = {issuer.name: issuer for issuer in config.issuers}
    # Entra sends typ JWT; Okta's custom authorization servers send no typ at all.
    assert "JWT" in by_name["entra"].types
    assert "absent" in by_name["okta"].types
    # v2.0 tokens of Entra name the API by its client id, never by its URI.
    assert by_name["entra"].issuer.endswith("/v2.0")
    assert all("://" not in audience for audience in by_name["entra"].audiences)


def test_both_files_grant_the_same_roles() -> None:
    local = load_identity(ROOT / "config" / "identity.local.yaml", local=True)
    sample = load_identity(ROOT / "config" / "identity.yaml")
    assert set(local.roles()) == set(sample.roles())


def test_a_dump_gives_the_same_configuration() -> None:
    """Replicas get the configuration as a plain dict."""
    config = load_identity(ROOT / "config" / "identity.yaml")
    assert IdentityConfig.model_validate(config.model_dump()) == config
