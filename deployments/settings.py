"""The environment, read in one place.

``GATEHOUSE_STATE``  block volume for what must survive a restart (default ``./data/state``)
``GATEHOUSE_CONFIG_ROOT``  directory that relative config paths start from (default: the working
directory)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """Roots that this process works with; absolute."""

    state: Path
    config_root: Path

    @property
    def control_db(self) -> Path:
        """SQLite file of the control plane."""
        return self.state / "control" / "control.sqlite"

    @property
    def keys(self) -> Path:
        """Directory of key files, mode 0700."""
        return self.state / "keys"


def from_environment(environ: dict[str, str] | None = None) -> Settings:
    """Read the roots; defaults lie under the working directory."""
    env = os.environ if environ is None else environ
    root = Path(env.get("GATEHOUSE_CONFIG_ROOT") or Path.cwd()).resolve()
    state = Path(env.get("GATEHOUSE_STATE") or root / "data" / "state")
    return Settings(state=state.expanduser().resolve(), config_root=root)
