"""What the control plane must not forget: service keys, revocations, and who changed them when.

Every change and the event that tells of it are one transaction, on disk before the method returns.
A change may be sent again by a caller who got no answer: no key is made twice, and no revocation
is shortened.
"""

from __future__ import annotations

from pathlib import Path

from governance.control.database import Database
from governance.control.key_table import KeyTable
from governance.control.records import AdminEvent
from governance.control.revocation_table import RevocationTable
from governance.ports import Clock


class ControlStore:
    """Durable half of the control plane.

    Args:
        path: SQLite file; created with mode 0600, its directory with mode 0700.
        clock: Wall clock.

    Raises:
        StoreError: Not a database of this program, or one of another version.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self._db = Database(path, clock)
        self.keys = KeyTable(self._db)
        self.revocations = RevocationTable(self._db)

    def close(self) -> None:
        """Close the file; the store cannot be used afterwards."""
        self._db.close()

    @property
    def version(self) -> int:
        """Number of administrative acts so far; never goes back."""
        return self._db.version

    def events(self, after_seq: int = 0, limit: int = 1000) -> tuple[AdminEvent, ...]:
        """Administrative acts after a sequence number, oldest first."""
        return self._db.events(after_seq, limit)

    def changed_elsewhere(self) -> bool:
        """Whether another process has written to the file since the last call."""
        return self._db.changed_elsewhere()

    def pepper_fingerprint(self) -> str | None:
        """Fingerprint of the pepper that the stored hashes were made with, if one was bound."""
        row = self._db.execute("SELECT value FROM setting WHERE name = 'pepper'").fetchone()
        return None if row is None else str(row["value"])

    def bind_pepper(self, fingerprint: str) -> bool:
        """Tie the store to a pepper for good; false if it is tied to another one."""
        with self._db.transaction():
            self._db.execute(
                "INSERT INTO setting VALUES ('pepper', ?) ON CONFLICT DO NOTHING", (fingerprint,)
            )
        return self.pepper_fingerprint() == fingerprint
