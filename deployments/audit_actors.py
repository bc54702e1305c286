"""The sealer as a Ray actor, one a node: seals the logs that processes of its node write."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

import governance.audit.seal
from deployments.named_actors import NAMESPACE, START_TIMEOUT_S, find_or_start, starting
from deployments.settings import Settings
from deployments.telemetry.actors import SealerTelemetry
from governance.audit.files import Locked
from governance.audit.seal import Sealer, SealReport
from governance.tracebacks import without_messages

log = logging.getLogger("gatehouse.audit")

ACTOR_PREFIX = "gatehouse-sealer-"
INTERVAL_S = 5.0
_LOCK_RETRY_S = 0.5
_STOP_TIMEOUT_S = 30.0


class SealerStartError(RuntimeError):
    """The sealer did not start; the message is for the operator."""


@dataclass(slots=True)
class SealerStatus:
    """What the sealer has done since it started, for metrics."""

    running: bool = False
    rounds: int = 0
    records: int = 0
    cells: int = 0
    segments: int = 0
    quarantined: int = 0
    aborted: int = 0
    adopted: int = 0
    torn_bytes: int = 0
    lag_us: int = 0
    """Age of the oldest segment that should be sealed and is not."""
    last_round_us: int = 0
    """When the last round ended, wall clock; 0 before."""
    faults: list[str] = field(default_factory=list)
    """Of the last round: logs that cannot be sealed."""
    faults_seen: int = 0
    """Faults over all rounds: one that lasts counts in each."""
    identity: str = ""
    """Roots and code that it works with; see ``identity_of``."""
    created_us: int = 0
    """When somebody had it made; a restart of its process does not change that."""

    def add(self, report: SealReport) -> None:
        """Count a round."""
        self.rounds += 1
        self.records += report.records
        self.cells += report.cells
        self.segments += report.segments
        self.quarantined += report.quarantined
        self.aborted += report.aborted
        self.adopted += len(report.adopted)
        self.torn_bytes += report.torn_bytes
        self.lag_us = report.lag_us
        self.faults = [f"{f.path} at {f.offset}: {f.reason}" for f in report.faults]
        self.faults_seen += len(self.faults)
        self.last_round_us = _now_us()


class SealerLoop:
    """Runs a ``Sealer`` in a thread of its own, round after round.

    Args:
        settings: Roots.
        interval_s: Pause between rounds; ``poke`` ends one early.
        after_round: Called in the sealer's thread after each round.
    """

    def __init__(
        self,
        settings: Settings,
        interval_s: float = INTERVAL_S,
        after_round: Callable[[SealerStatus], None] = lambda status: None,
    ) -> None:
        self._after_round = after_round
        self._settings = settings
        self._interval_s = interval_s
        self._poked = threading.Event()
        self._stopping = False
        self._status = SealerStatus()
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="audit-sealer", daemon=True)
        self._thread.start()

    def poke(self) -> None:
        """Have a round now."""
        self._poked.set()

    def status(self) -> SealerStatus:
        """Counts so far."""
        with self._guard:
            self._status.running = self._thread.is_alive()
            return self._status

    def stop(self) -> None:
        """Seal what can be, and give up the lock."""
        self._stopping = True
        self._poked.set()
        self._thread.join(_STOP_TIMEOUT_S)

    def _run(self) -> None:
        sealer = self._open()
        while sealer is not None and not self._stopping:
            self._poked.clear()
            try:
                report = sealer.seal_once()
            except Exception as error:  # A loop that ends silently would be worse.
                log.error("a round of sealing failed\n%s", without_messages(error))
            else:
                with self._guard:
                    self._status.add(report)
            self._after_round(self._status)
            self._poked.wait(self._interval_s)
        if sealer is not None:
            sealer.close()

    def _open(self) -> Sealer | None:
        """The sealer, once the one of this actor's earlier process is gone for good."""
        told = False
        while not self._stopping:
            try:
                return Sealer(self._settings.wal, self._settings.evidence, _now_us)
            except (Locked, OSError) as error:
                if not told:
                    log.error("the sealer waits: %s: %s", type(error).__name__, error)
                    told = True
                self._poked.wait(_LOCK_RETRY_S)
        return None


class AuditSealer:
    """Actor around ``SealerLoop``; the loop starts with the process, so also after a restart."""

    def __init__(
        self,
        state_dir: str,
        evidence_dir: str,
        interval_s: float = INTERVAL_S,
        created_us: int = 0,
    ) -> None:
        # As of the start of this process: what it runs, whatever is on disk later.
        self._identity = identity_of(state_dir, evidence_dir, interval_s)
        self._created_us = created_us
        settings = Settings(Path(state_dir), Path(state_dir), Path(evidence_dir))
        self._loop = SealerLoop(settings, interval_s, SealerTelemetry().round_ended)

    def poke(self) -> None:
        """Have a round now."""
        self._loop.poke()

    def status(self) -> SealerStatus:
        """Counts since the process started; also tells that it runs, and on what."""
        status = self._loop.status()
        status.identity, status.created_us = self._identity, self._created_us
        return status

    def stop(self) -> None:
        """End in order."""
        self._loop.stop()


def get_or_start_sealer(
    state_dir: Path | str,
    evidence_dir: Path | str,
    node_id: str,
    namespace: str = NAMESPACE,
    interval_s: float = INTERVAL_S,
) -> Any:
    """The sealer of a node, started if there is none. Blocks; not for an event loop.

    A sealer is detached and outlives deployments. So one that has stopped, or that works with other
    roots or other code than ours, is ended in order and replaced; but never one that was made after
    this process started, which is how an old process and a new one do not replace each other's in
    turn.

    Args:
        state_dir: State root on that node; absolute.
        evidence_dir: Evidence root as that node sees it; absolute.
        node_id: Ray's id of the node whose logs it seals.
        namespace: Ray namespace.
        interval_s: Pause between rounds.

    Returns:
        Handle of an actor that has started.

    Raises:
        SealerStartError: It does not start.
    """
    identity = identity_of(str(state_dir), str(evidence_dir), interval_s)
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        handle, status = _find_or_start(state_dir, evidence_dir, node_id, namespace, interval_s)
        if not _outdated(status, identity) or time.monotonic() > deadline:
            return handle
        log.warning("the sealer of this node is of an earlier deployment: it is replaced")
        _end(handle)


def identity_of(state_dir: str, evidence_dir: str, interval_s: float) -> str:
    """Digest of what a sealer works with: roots, pause, and the code of the audit trail."""
    return sha256(f"{state_dir}\0{evidence_dir}\0{interval_s}\0{_code()}".encode()).hexdigest()


@cache
def _code() -> str:
    digest = sha256()
    package = Path(governance.audit.seal.__file__).parent
    for path in sorted([*package.glob("*.py"), Path(__file__)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _outdated(status: Any, identity: str) -> bool:
    """Whether a sealer must be replaced. One of older code may lack the fields."""
    if not status.running:
        return True
    if getattr(status, "identity", "") == identity:
        return False
    return bool(getattr(status, "created_us", 0) < _STARTED_US)


def _end(handle: Any) -> None:
    """End a sealer in order, if it can be, and free its name."""
    try:
        ray.get(handle.stop.remote(), timeout=_STOP_TIMEOUT_S)
    except RayError as error:
        log.warning("the sealer did not end in order: %s", type(error).__name__)
    # Killed in between, it loses nothing: the next one goes on where it was.
    ray.kill(handle, no_restart=True)


def _find_or_start(
    state_dir: Path | str,
    evidence_dir: Path | str,
    node_id: str,
    namespace: str,
    interval_s: float,
) -> tuple[Any, Any]:
    """The sealer that there is, and what it says of itself."""
    handle = find_or_start(
        AuditSealer,
        f"{ACTOR_PREFIX}{node_id}",
        (str(state_dir), str(evidence_dir), interval_s, _now_us()),
        node_id=node_id,
        namespace=namespace,
    )
    with starting("the sealer", SealerStartError):
        return handle, ray.get(handle.status.remote(), timeout=START_TIMEOUT_S)


def _now_us() -> int:
    return time.time_ns() // 1000


_STARTED_US = _now_us()
"""When this process took up this module."""
