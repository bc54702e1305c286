"""Make ``.venv`` ready: what ``make serve`` and ``make test`` do first.

Runs on the system's Python and the standard library alone. Each stage (locked packages, torch,
this project, development tools) is stamped with a hash of what it installs, so a second run takes
a fraction of a second; a stage that was cut short is done again in a fresh environment. pip's
output goes to ``build/`` and is shown, with a remedy, only where it fails.

``TORCH_INDEX_URL`` names the index that torch comes from; unset, pip's own configuration holds.
``GATEHOUSE_PYTHON`` names the interpreter to use.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ((3, 11), (3, 12))
TORCH = "torch==2.13.0"
STAMP = ".gatehouse-installed.json"
INSTALLING = ".gatehouse-installing"
NEEDED_GB = {"cpu": 5, "gpu": 20}
"""Free disk that a first install needs, measured with headroom; CUDA libraries are most of gpu."""
HEARTBEAT_S = 30.0

REMEDIES = (
    (r"No space left on device", "The disk is full. Free some space and run the command again."),
    (
        r"Temporary failure in name resolution|Name or service not known|Connection refused"
        r"|Network is unreachable|ConnectTimeout|Max retries exceeded|Read timed out|ProxyError"
        r"|NewConnectionError|NameResolutionError",
        "The package index cannot be reached. Check the network, or point pip at a mirror "
        "(`pip config set global.index-url ...`), and run the command again.",
    ),
    (
        r"DO NOT MATCH THE HASHES|Hashes are required",
        "The index offers other files than those that were locked. Use an unmodified mirror, or "
        "run `make lock` if you trust this index.",
    ),
    (
        r"No matching distribution found for torch",
        "The index has no torch for this Python and platform. Set TORCH_INDEX_URL to PyTorch's "
        "CPU wheel index and run the command again.",
    ),
    (
        r"No matching distribution found|is not a supported wheel",
        "The index lacks a package for this Python and platform. Gatehouse needs Linux on x86_64 "
        "or aarch64 with glibc 2.31 or later.",
    ),
    (r"Permission denied", "Files of .venv belong to another user. Remove .venv and run again."),
)


class BootstrapError(Exception):
    """Something the user can put right; the message says what and how."""


def say(line: str) -> None:
    """Print one line at once, also into a pipe."""
    print(line, flush=True)


class Step:
    """A line with elapsed time: rewritten on a terminal, a heartbeat line elsewhere."""

    def __init__(self, label: str) -> None:
        self.label = label

    def __enter__(self) -> Step:
        self._start = time.monotonic()
        self._done = threading.Event()
        self._tty = sys.stdout.isatty()
        if not self._tty:
            say(f"- {self.label} ...")
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._done.set()
        self._thread.join()
        mark = "ok" if kind is None else "FAILED"
        clear = "\r\x1b[K" if self._tty else ""
        say(f"{clear}- {self.label}: {mark} ({self._elapsed()} s)")

    def _elapsed(self) -> int:
        return round(time.monotonic() - self._start)

    def _tick(self) -> None:
        while not self._done.wait(1.0 if self._tty else HEARTBEAT_S):
            if self._tty:
                print(f"\r\x1b[K- {self.label} ... {self._elapsed()} s", end="", flush=True)
            else:
                say(f"  still at it, {self._elapsed()} s")


def probe(command: str) -> tuple[int, int] | None:
    """Version of an interpreter, or ``None`` if it does not run or cannot make environments."""
    code = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
    try:
        answer = subprocess.run(  # noqa: S603
            [command, "-I", "-c", code], capture_output=True, text=True, timeout=30
        )
        major, minor = answer.stdout.split()
        return int(major), int(minor)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def find_python(candidates: list[str] | None = None) -> str:
    """An interpreter of a supported version.

    Raises:
        BootstrapError: There is none; names the versions that were found.
    """
    named = os.environ.get("GATEHOUSE_PYTHON")
    if candidates is None:
        candidates = [named] if named else [sys.executable, "python3.11", "python3.12", "python3"]
    found = []
    for candidate in candidates:
        version = probe(candidate)
        if version in SUPPORTED:
            return candidate
        if version:
            found.append(f"{candidate} is {version[0]}.{version[1]}")
        elif shutil.which(candidate):
            found.append(f"{candidate} does not run or lacks venv")
    raise BootstrapError(
        f"Gatehouse needs Python 3.11 or 3.12 with venv ({'; '.join(found) or 'none found'}).\n"
        "  Install one (Debian, Ubuntu: `apt install python3.11 python3.11-venv`), or name it: "
        "`GATEHOUSE_PYTHON=/path/to/python3.12 make serve`."
    )


class Environment:
    """The virtual environment, and the record of what was installed into it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / ".venv"
        self.python = self.path / "bin" / "python"

    @property
    def stamp(self) -> dict[str, str]:
        """Hash by stage; empty where nothing is recorded."""
        try:
            value = json.loads((self.path / STAMP).read_text())
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def record(self, **entries: str) -> None:
        """Add to the stamp, atomically."""
        scratch = self.path / (STAMP + ".new")
        scratch.write_text(json.dumps({**self.stamp, **entries}, indent=1, sort_keys=True))
        scratch.replace(self.path / STAMP)

    @property
    def ours(self) -> bool:
        """Whether this script made the environment, and so may remove it."""
        return "made_by" in self.stamp

    @property
    def half_done(self) -> bool:
        """Whether an install of ours was cut short."""
        return (self.path / INSTALLING).exists()

    def prepare(self, profile: str) -> None:
        """Create the environment, or start afresh where it cannot be trusted.

        Raises:
            BootstrapError: ``.venv`` is not ours and not usable.
        """
        if self.path.exists() and (reason := self._unusable(profile)):
            if not (self.ours or self.half_done):
                raise BootstrapError(
                    f".venv cannot be used: {reason}.\n"
                    "  It was not made by this script; remove it (`rm -rf .venv`) and run again."
                )
            with Step(f"remove .venv ({reason})"):
                shutil.rmtree(self.path)
        if not self.path.exists():
            check_disk(self.root, NEEDED_GB[profile])
            interpreter = find_python()
            with Step("create .venv"):
                self._create(interpreter)

    def _unusable(self, profile: str) -> str:
        """Why the environment cannot be built upon, or nothing."""
        if self.half_done:
            return "an earlier install was cut short"
        if probe(str(self.python)) not in SUPPORTED:
            return "its Python is missing, or not 3.11 or 3.12"
        # The CPU and the CUDA build of vLLM share one name.
        found = self.stamp.get("profile", profile)
        return "" if found == profile else f"it is for profile {found}"

    def _create(self, interpreter: str) -> None:
        self.path.mkdir()
        (self.path / INSTALLING).touch()
        command = [interpreter, "-m", "venv", str(self.path)]
        run_logged(command, self.root / "build" / "bootstrap-venv.log")
        self.record(made_by="scripts/bootstrap.py")

    def finish(self) -> None:
        """Everything is installed: forget that an install was under way."""
        (self.path / INSTALLING).unlink(missing_ok=True)

    def begin(self) -> None:
        """Note that an install is under way, where the environment is ours to remove."""
        if self.ours:
            (self.path / INSTALLING).touch()


def check_disk(root: Path, needed_gb: float) -> None:
    """Refuse to start an install that cannot finish.

    Raises:
        BootstrapError: Less than ``needed_gb`` is free under ``root``.
    """
    free_gb = shutil.disk_usage(root).free / 1e9
    if free_gb < needed_gb:
        raise BootstrapError(
            f"The install needs about {needed_gb:g} GB of disk here; {free_gb:.1f} GB is free.\n"
            "  Free some space, or clone to a larger disk, and run the command again."
        )


def run_logged(command: list[str], log: Path) -> None:
    """Run quietly; on failure show the end of the log and the remedy.

    Raises:
        BootstrapError: The command failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as sink:
        code = subprocess.run(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
        ).returncode
    if code == 0:
        return
    text = log.read_text(errors="replace")
    tail = "\n".join("    " + line for line in text.splitlines()[-12:])
    raise BootstrapError(f"{remedy_for(text)}\n  End of {log}:\n{tail}")


def remedy_for(log: str) -> str:
    """What to do about a failed install, judged by pip's output."""
    for pattern, remedy in REMEDIES:
        if re.search(pattern, log):
            return remedy
    return "pip failed for a reason not known to this script; its log says more."


def digest(*parts: bytes) -> str:
    """SHA-256 over the parts, each with its length."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()


def stages(root: Path, profile: str, dev: bool) -> list[tuple[str, str, list[str], str]]:
    """What to install in order: name, label, pip arguments, hash of the content."""
    locked = ["--require-hashes", "--no-deps", "-r"]
    lock = root / "requirements" / f"runtime-{profile}.txt"
    project = root / "pyproject.toml"
    plan = [("lock", f"install packages ({lock.name})", [*locked, str(lock)], lock.read_bytes())]
    if profile == "cpu":
        index = os.environ.get("TORCH_INDEX_URL")
        # NOTE: after the lock, so that what torch needs is already there, at locked versions.
        torch = [TORCH, *(["--index-url", index] if index else [])]
        plan.append(("torch", f"install {TORCH}", torch, TORCH.encode()))
    here = ["--no-deps", "--no-build-isolation", "-e", str(root)]
    plan.append(("project", "install gatehouse", here, project.read_bytes() + bytes(root)))
    if dev:
        tools = root / "requirements" / "dev.txt"
        plan.append(("dev", "install test tools", [*locked, str(tools)], tools.read_bytes()))
    return [(name, label, arguments, digest(content)) for name, label, arguments, content in plan]


def install(root: Path, profile: str, dev: bool) -> None:
    """Bring the environment up to date.

    Raises:
        BootstrapError: With the remedy.
    """
    env = Environment(root)
    env.prepare(profile)
    todo = [stage for stage in stages(root, profile, dev) if env.stamp.get(stage[0]) != stage[3]]
    if not todo and not env.half_done:
        return
    env.begin()
    for name, label, arguments, content in todo:
        with Step(label):
            pip = [str(env.python), "-m", "pip", "install", "--disable-pip-version-check"]
            run_logged([*pip, *arguments], root / "build" / f"bootstrap-{name}.log")
        env.record(profile=profile, **{name: content})
    env.finish()


def main(argv: list[str] | None = None) -> int:
    """Install; 0 when ready, 1 with a clear line when not, 130 when interrupted."""
    parser = argparse.ArgumentParser(description="Make .venv ready.")
    parser.add_argument("--profile", choices=sorted(NEEDED_GB), default="cpu")
    parser.add_argument("--dev", action="store_true", help="also the tools of `make test`")
    options = parser.parse_args(argv)
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "bootstrap.lock").open("w") as guard:
        try:
            try:
                fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with Step("wait for another install in this folder"):
                    fcntl.flock(guard, fcntl.LOCK_EX)
            install(ROOT, options.profile, options.dev)
        except BootstrapError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\ninterrupted; the next run starts the install afresh", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
