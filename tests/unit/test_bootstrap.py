"""``scripts/bootstrap.py``: what it installs again, what it refuses, what it says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def boot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Project:
    """A project whose pip calls are recorded, not made."""

    def __init__(self, root: Path, boot: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.boot = boot
        self.calls: list[list[str]] = []
        self.fails_at: str | None = None
        (root / "requirements").mkdir()
        for name in ("runtime-cpu.txt", "runtime-gpu.txt", "dev.txt"):
            (root / "requirements" / name).write_text(f"# {name}\n")
        (root / "pyproject.toml").write_text("[project]\n")
        monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
        monkeypatch.setattr(boot, "find_python", lambda: sys.executable)
        monkeypatch.setattr(boot, "run_logged", self._run)

    def _run(self, command: list[str], log: Path) -> None:
        if "venv" in command:
            python = self.root / ".venv" / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.symlink_to(sys.executable)
            return
        step = " ".join(command[command.index("install") + 2 :])
        if self.fails_at and self.fails_at in step:
            raise self.boot.BootstrapError("no network")
        self.calls.append(command)

    def install(self, profile: str = "cpu", dev: bool = False) -> list[str]:
        """What was installed, the last word of each pip call."""
        self.calls.clear()
        self.boot.install(self.root, profile, dev)
        return [Path(call[-1]).name for call in self.calls]


@pytest.fixture
def project(tmp_path: Path, boot: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Project:
    root = tmp_path / "project"
    root.mkdir()
    return Project(root, boot, monkeypatch)


TORCH = "torch==2.13.0"


def test_first_install_then_nothing_to_do(project: Project) -> None:
    assert project.install() == ["runtime-cpu.txt", TORCH, "project"]
    assert project.install() == []
    assert project.install(dev=True) == ["dev.txt"]
    assert project.install(dev=True) == project.install() == []


def test_locked_packages_are_installed_with_hashes_and_nothing_else(project: Project) -> None:
    project.install(dev=True)
    for call in project.calls:
        assert "--no-deps" in call or call[-1] == TORCH
        assert ("--require-hashes" in call) == call[-1].endswith(".txt")


def test_a_changed_lock_file_is_installed_again(project: Project) -> None:
    project.install()
    (project.root / "requirements" / "runtime-cpu.txt").write_text("# newer\n")
    assert project.install() == ["runtime-cpu.txt"]


def test_the_gpu_lock_brings_its_own_torch(project: Project) -> None:
    assert project.install("gpu") == ["runtime-gpu.txt", "project"]


def test_an_install_cut_short_starts_afresh(project: Project) -> None:
    project.fails_at = "torch"
    with pytest.raises(project.boot.BootstrapError):
        project.install()
    half_written = project.root / ".venv" / "half-written"
    half_written.touch()
    project.fails_at = None
    assert project.install() == ["runtime-cpu.txt", TORCH, "project"]
    assert not half_written.exists()
    assert project.install() == []


def test_an_update_cut_short_starts_afresh(project: Project) -> None:
    project.install()
    (project.root / "requirements" / "runtime-cpu.txt").write_text("# newer\n")
    project.fails_at = "runtime-cpu"
    with pytest.raises(project.boot.BootstrapError):
        project.install()
    project.fails_at = None
    assert project.install() == ["runtime-cpu.txt", TORCH, "project"]


def test_another_profile_starts_afresh_because_both_builds_are_called_vllm(
    project: Project,
) -> None:
    project.install("cpu")
    assert project.install("gpu") == ["runtime-gpu.txt", "project"]


def test_an_environment_made_by_somebody_else_is_completed_and_never_removed(
    project: Project,
) -> None:
    python = project.root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    theirs = project.root / ".venv" / "theirs"
    theirs.touch()
    project.fails_at = "torch"
    for _ in range(3):
        with pytest.raises(project.boot.BootstrapError):
            project.install()
    project.fails_at = None
    assert project.install() == [TORCH, "project"]
    assert theirs.exists()
    with pytest.raises(project.boot.BootstrapError, match="profile cpu"):
        project.install("gpu")
    assert theirs.exists()


def test_a_broken_environment_made_by_somebody_else_is_named(project: Project) -> None:
    (project.root / ".venv").mkdir()
    with pytest.raises(project.boot.BootstrapError, match=r"rm -rf \.venv"):
        project.install()
    assert (project.root / ".venv").is_dir()


def test_too_little_disk_is_said_before_anything_is_written(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = int(1.5e9)

    monkeypatch.setattr(project.boot.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(project.boot.BootstrapError, match=r"5 GB .* 1\.5 GB is free"):
        project.install()
    assert not (project.root / ".venv").exists()


def test_torch_comes_from_the_index_that_the_user_names(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_INDEX_URL", "https://example.org/cpu")
    assert [*project.install()][1] == "cpu"
    assert project.calls[1][-3:] == [TORCH, "--index-url", "https://example.org/cpu"]


def test_no_suitable_python_names_those_found(boot: ModuleType, tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho 3 9\n")
    old.chmod(0o755)
    broken = tmp_path / "python3.12"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(boot.BootstrapError) as refused:
        boot.find_python([str(old), str(broken), "/no/such/python"])
    assert f"{old} is 3.9" in str(refused.value)
    assert f"{broken} does not run or lacks venv" in str(refused.value)
    assert "GATEHOUSE_PYTHON" in str(refused.value)
    assert boot.find_python([str(old), sys.executable]) == sys.executable


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("Max retries exceeded with url: /simple/ray/", "index cannot be reached"),
        ("THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "make lock"),
        ("ERROR: No matching distribution found for torch==2.13.0", "TORCH_INDEX_URL"),
        ("ERROR: No matching distribution found for ray==2.60.0", "glibc"),
        # An index that cannot be reached also ends in this line.
        ("Network is unreachable\nNo matching distribution found for torch", "cannot be reached"),
        ("Segmentation fault", "not known"),
    ],
)
def test_pip_failures_come_with_a_remedy(boot: ModuleType, log: str, words: str) -> None:
    assert words in boot.remedy_for(log)


def test_a_failed_command_shows_the_end_of_its_log(boot: ModuleType, tmp_path: Path) -> None:
    noisy = "for i in range(40): print(f'line {i};')\nraise SystemExit('No space left on device')"
    with pytest.raises(boot.BootstrapError) as failed:
        boot.run_logged([sys.executable, "-c", noisy], tmp_path / "log" / "pip.log")
    text = str(failed.value)
    assert text.startswith("The disk is full.")
    assert "line 39;" in text
    assert "line 3;" not in text
    boot.run_logged([sys.executable, "-c", "pass"], tmp_path / "log" / "pip.log")


def test_errors_end_the_script_with_one_line_and_status_1(tmp_path: Path) -> None:
    copy = tmp_path / "scripts" / "bootstrap.py"
    copy.parent.mkdir()
    copy.write_text((ROOT / "scripts" / "bootstrap.py").read_text())
    environment = {"PATH": "", "GATEHOUSE_PYTHON": "/no/such/python"}
    result = subprocess.run(
        [sys.executable, str(copy)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: Gatehouse needs Python 3.11 or 3.12")
    assert "Traceback" not in result.stderr


def _names(lock: str) -> set[str]:
    text = (ROOT / "requirements" / lock).read_text()
    return {line.split("==")[0] for line in text.splitlines() if "==" in line}


def test_lock_files_are_complete_hashed_and_name_no_index() -> None:
    for lock in ("runtime-cpu.txt", "runtime-gpu.txt", "dev.txt"):
        text = (ROOT / "requirements" / lock).read_text()
        assert "://" not in text
        assert "--index-url" not in text
        lines = [line for line in text.splitlines() if line and not line.startswith(("#", " "))]
        assert all("==" in line for line in lines)
        # One at least for each requirement.
        assert text.count("--hash=sha256:") >= len(lines)
    assert not _names("runtime-cpu.txt") & {"torch", "torchvision", "torchaudio", "torchcodec"}
    assert {"torch", "vllm"} <= _names("runtime-gpu.txt")


def test_test_tools_are_locked_to_the_versions_that_run(boot: Any) -> None:
    def pins(lock: str) -> dict[str, str]:
        lines = (ROOT / "requirements" / lock).read_text().splitlines()
        found = (line.split(" ")[0].split("==") for line in lines if "==" in line)
        return dict(found)

    runtime, dev = pins("runtime-cpu.txt"), pins("dev.txt")
    assert {n: v for n, v in dev.items() if n in runtime} == {
        n: v for n, v in runtime.items() if n in dev
    }
