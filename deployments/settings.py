"""The environment, read in one place.

``GATEHOUSE_STATE``  block volume for what must survive a restart (default ``./data/state``)
``GATEHOUSE_EVIDENCE``  folder of the sealed audit trail (default ``./data/evidence``)
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
    evidence: Path

    def dump(self) -> dict[str, str]:
        """The roots as text, for a process on another node."""
        return {name: str(getattr(self, name)) for name in self.__slots__}

    @classmethod
    def load(cls, roots: dict[str, str]) -> Settings:
        """What ``dump`` gave."""
        return cls(**{name: Path(root) for name, root in roots.items()})

    @property
    def control_db(self) -> Path:
        """SQLite file of the control plane."""
        return self.state / "control" / "control.sqlite"

    @property
    def ledger_db(self) -> Path:
        """SQLite file of the budget ledger; of several the first's."""
        return self.ledger_shard(0)

    def ledger_shard(self, shard: int) -> Path:
        """SQLite file of one of several budget ledgers, counted from 0."""
        name = f"ledger-{shard}.sqlite" if shard else "ledger.sqlite"
        return self.state / "ledger" / name

    @property
    def wal(self) -> Path:
        """Write-ahead logs of the audit trail, one directory a writer."""
        return self.state / "wal"

    @property
    def keys(self) -> Path:
        """Directory of key files, mode 0700."""
        return self.state / "keys"


def from_environment(environ: dict[str, str] | None = None) -> Settings:
    """Read the roots; defaults lie under the working directory."""
    env = os.environ if environ is None else environ
    root = Path(env.get("GATEHOUSE_CONFIG_ROOT") or Path.cwd()).resolve()
    state = Path(env.get("GATEHOUSE_STATE") or root / "data" / "state")
    evidence = Path(env.get("GATEHOUSE_EVIDENCE") or root / "data" / "evidence")
    return Settings(
        state=state.expanduser().resolve(),
        config_root=root,
        evidence=evidence.expanduser().resolve(),
    )
