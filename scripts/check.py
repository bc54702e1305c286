"""Every check in order, each with its time: what ``make test`` runs.

Linters, types and import rules first, all of them even after one fails; then one pytest session
over unit, property, contract, documentation and serve tests, so that it ends in a single line and
starts at most one cluster. Fails if anything fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LINTERS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "import rules": ["lint-imports"],
}
FAST = ("tests/unit", "tests/property", "tests/contract")
ALL = (*FAST, "tests/docs", "tests/serve")


def lint() -> list[str]:
    """Run all linters.

    Returns:
        Names of those that failed; their output has been shown.
    """
    failed = []
    for name, command in LINTERS.items():
        start_s = time.monotonic()
        program = str(BIN / command[0])
        result = subprocess.run(  # noqa: S603
            [program, *command[1:]],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "NO_COLOR": "1"},
        )
        mark = "ok" if result.returncode == 0 else "FAILED"
        print(f"- {name}: {mark} ({time.monotonic() - start_s:.0f} s)", flush=True)
        if result.returncode:
            failed.append(name)
            print(result.stdout, flush=True)
    return failed


def test(folders: tuple[str, ...], arguments: list[str]) -> int:
    """One pytest session; its exit status."""
    command = [sys.executable, "-m", "pytest", "-p", "scripts.pytest_groups", "-q"]
    return subprocess.run([*command, *folders, *arguments], cwd=ROOT).returncode  # noqa: S603


def main() -> int:
    """0 if everything holds, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="leave out docs and serve tests")
    parser.add_argument("--lint-only", action="store_true", help="no tests")
    options, pytest_arguments = parser.parse_known_args()
    failed = lint()
    if options.lint_only:
        return 1 if failed else 0
    status = test(FAST if options.fast else ALL, pytest_arguments)
    if failed:
        # Last, so that a closing line of passed tests does not hide it.
        print(f"FAILED before the tests: {', '.join(failed)}")
    return 1 if failed or status else 0


if __name__ == "__main__":
    sys.exit(main())
