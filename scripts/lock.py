"""Regenerate the lock files in ``requirements/`` (``make lock``).

Three files, each a full closure with sha256 hashes, installed by plain pip with ``--no-deps``:
``runtime-cpu.txt`` (all but torch), ``runtime-gpu.txt`` (torch and CUDA libraries included) and
``dev.txt`` (held to the versions of ``runtime-cpu.txt``). Versions already locked are kept unless
``--upgrade`` is given.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
UV_VERSION = "0.13.9"
HEADER = """\
# Written by `make lock`; do not edit.
# Install with: pip install --require-hashes --no-deps -r requirements/{name}
"""


def find_uv() -> str:
    """Path of uv: the one on PATH, or one installed under ``build/``."""
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found:
        return found
    home = ROOT / "build" / "uv"
    if not (home / "bin" / "uv").exists():
        venv.create(home, with_pip=True)
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"uv=={UV_VERSION}"], check=True)  # noqa: S603
    return str(home / "bin" / "uv")


def pins(text: str) -> list[str]:
    """``name==version`` of each requirement in a lock file, without markers and hashes."""
    return re.findall(r"^[A-Za-z0-9][A-Za-z0-9._-]*==[^\s;\\]+", text, flags=re.MULTILINE)


def compile_lock(uv: str, name: str, arguments: list[str], upgrade: bool) -> None:
    """Resolve one lock file for Python 3.11 and 3.12 and write it."""
    target = LOCKS / name
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / name
        if target.exists() and not upgrade:
            shutil.copy(target, output)
        command = [uv, "pip", "compile", *arguments, "--output-file", str(output)]
        command += ["--universal", "--python-version", "3.11", "--generate-hashes", "--quiet"]
        command += ["--no-emit-index-url", "--no-emit-find-links", "--no-annotate", "--no-header"]
        command += ["--overrides", str(LOCKS / "overrides.txt")]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)  # noqa: S603
        text = output.read_text()
    target.write_text(HEADER.format(name=name) + text)
    print(f"{target.relative_to(ROOT)}: {len(pins(text))} packages")


def main() -> int:
    """Write all three files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take newer versions")
    upgrade = parser.parse_args().upgrade
    uv = find_uv()
    without_torch = ["--excludes", str(LOCKS / "cpu-excludes.txt")]
    project = ["pyproject.toml", "--extra", "local"]
    needs = str(LOCKS / "cpu-needs.in")
    cpu = [*project, "--extra", "cpu", needs, *without_torch]
    compile_lock(uv, "runtime-cpu.txt", cpu, upgrade)
    compile_lock(uv, "runtime-gpu.txt", [*project, "--extra", "gpu"], upgrade)
    with tempfile.TemporaryDirectory() as scratch:
        held = Path(scratch) / "held.txt"
        held.write_text("\n".join(_constraints((LOCKS / "runtime-cpu.txt").read_text())))
        dev = ["--group", "dev", "--constraints", str(held), *without_torch]
        compile_lock(uv, "dev.txt", dev, upgrade)
    return 0


def _constraints(text: str) -> list[str]:
    """Pins with their markers, so that a package locked twice by Python version stays so."""
    lines = (line.rstrip(" \\") for line in text.splitlines())
    return [line for line in lines if pins(line)]


if __name__ == "__main__":
    sys.exit(main())
