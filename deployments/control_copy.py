"""A gateway's or engine replica's copy of the control plane, kept fresh in the background.

Requests read ``snapshot`` and ``age_s()``; both are plain memory and never fail. One task keeps a
watch call open and replaces the copy. When the control plane restarts or cannot be reached, the
task finds it again; meanwhile the copy grows old, and whoever depends on its freshness decides
what that means (``ServiceKeyChecker`` refuses after ten seconds).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from deployments.control_calls import CALL_TIMEOUT_S, ControlCalls, ControlLink
from governance.control.registry import REGISTRATION_TTL_S, Registration, registration_id
from governance.control.snapshot import ControlSnapshot
from governance.errors import ControlUnavailable

log = logging.getLogger("gatehouse.control")

WATCH_TIMEOUT_S = 2.0
FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 1.0
DEREGISTER_TIMEOUT_S = 2.0
USE_REPORT_INTERVAL_S = 30.0
"""How often the last uses of keys are reported, in seconds."""

Listener = Callable[[ControlSnapshot], None]


class ControlCopy(ControlCalls):
    """See the module; administrative calls go through it too.

    Args:
        resolve: Finds the control plane anew; may raise anything.
        monotonic: Seconds of a clock that never goes back.
        clock: Wall clock in microseconds, for the last use of keys.
        random_bytes: Cryptographic randomness, for new keys.
    """

    def __init__(
        self,
        resolve: Callable[[], Awaitable[ControlLink]],
        *,
        monotonic: Callable[[], float] = time.monotonic,
        clock: Callable[[], int] = lambda: time.time_ns() // 1000,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        super().__init__(resolve, random_bytes)
        self._monotonic = monotonic
        self._clock = clock
        self._registration: Registration | None = None
        self._task: asyncio.Task[None] | None = None
        self._listeners: list[Listener] = []
        self._received = ControlSnapshot()
        self._snapshot = self._received
        self._remembered: ControlSnapshot | None = None
        self._remember_until_s = 0.0
        self._confirmed_s = float("-inf")
        self._first = asyncio.Event()
        self._used_us: dict[str, int] = {}
        self._use_reported_s = monotonic()

    @property
    def snapshot(self) -> ControlSnapshot:
        """The copy; empty (``epoch`` is ``""``) until the first answer."""
        return self._snapshot

    def age_s(self) -> float:
        """Seconds since the copy was certainly the latest; infinite before the first answer.

        Counted from when the confirmed call was sent, so that a slow answer makes the copy look
        older than it is and never younger.
        """
        return self._monotonic() - self._confirmed_s

    def note_key_used(self, key_id: str) -> None:
        """Remember that a key was used now; reported in batches."""
        self._used_us[key_id] = self._clock()

    def on_change(self, listener: Listener) -> None:
        """Call a function with every new copy, and with the present one if there is one.

        It runs in the event loop and must be quick; what it raises is logged.
        """
        self._listeners.append(listener)
        if self._snapshot.epoch:
            self._tell(listener)

    async def start(self, registration: Registration | None = None) -> None:
        """Register and watch in the background; ``ready`` waits for the first copy.

        Args:
            registration: Who this is; ``None`` for a viewer such as the CLI.
        """
        await self.set_registration(registration)
        self._watch_on()

    async def ready(self, timeout_s: float) -> None:
        """Wait for the first copy.

        Raises:
            ControlUnavailable: It did not come in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._first.wait()
        except TimeoutError:
            raise ControlUnavailable from None

    async def stop(self) -> None:
        """Stop watching and deregister, as far as the control plane can be reached."""
        await self._watch_off()
        await self._report_use()
        await self.set_registration(None)

    async def set_registration(self, registration: Registration | None) -> None:
        """Become someone else, or nobody: a draining engine replica withdraws with ``None``."""
        running = await self._watch_off()
        before, self._registration = self._registration, registration
        if before is not None and (
            registration is None or registration_id(before) != registration_id(registration)
        ):
            with suppress(ControlUnavailable):
                await self._call(DEREGISTER_TIMEOUT_S, "deregister", registration_id(before))
        if running:
            self._watch_on()

    def _watch_on(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="control-watch")

    async def _watch_off(self) -> bool:
        """Stop the task; says whether it ran."""
        task, self._task = self._task, None
        if task is None:
            return False
        task.cancel()
        await asyncio.wait((task,))
        return True

    async def _watch(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        lost = False
        while True:
            sent_s = self._monotonic()
            known = (self._received.epoch, self._received.version)
            try:
                answer = await self._call(
                    WATCH_TIMEOUT_S + CALL_TIMEOUT_S,
                    "watch",
                    *known,
                    self._registration,
                    WATCH_TIMEOUT_S,
                )
                self._take(answer)
            except Exception as error:
                if not lost:
                    log.warning("control plane lost (%s)", type(error).__name__)
                lost = True
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, LAST_BACKOFF_S)
                continue
            self._confirmed_s = sent_s
            self._first.set()
            if lost:
                log.warning("control plane found again")
            lost, backoff_s = False, FIRST_BACKOFF_S
            if self._monotonic() - self._use_reported_s >= USE_REPORT_INTERVAL_S:
                await self._report_use()

    def _take(self, answer: ControlSnapshot | None) -> None:
        """Adopt an answer; ``None`` means that the last one still holds.

        A control plane that has just restarted knows only those who have registered again so far.
        For the life of a registration its list is completed with who was there before, so that
        its restart never makes a gateway drop a healthy engine.
        """
        now_s = self._monotonic()
        if answer is not None:
            if self._received.epoch and answer.epoch != self._received.epoch:
                self._remembered = self._snapshot
                self._remember_until_s = now_s + REGISTRATION_TTL_S
            self._received = answer
        forgets = self._remembered is not None and now_s >= self._remember_until_s
        if forgets:
            self._remembered = None
        if answer is None and not forgets:
            return
        self._snapshot = _complete(self._received, self._remembered)
        for listener in self._listeners:
            self._tell(listener)

    def _tell(self, listener: Listener) -> None:
        try:
            listener(self._snapshot)
        except Exception:
            log.exception("a listener of the control plane failed")

    async def _report_use(self) -> None:
        self._use_reported_s = self._monotonic()
        used_us, self._used_us = self._used_us, {}
        if not used_us:
            return
        try:
            await self._call(CALL_TIMEOUT_S, "touch_keys", used_us)
        except Exception as error:
            log.warning("last use of keys not reported (%s)", type(error).__name__)
            self._used_us = {**used_us, **self._used_us}


def _complete(snapshot: ControlSnapshot, before: ControlSnapshot | None) -> ControlSnapshot:
    """A snapshot with the registrations of an earlier one that it lacks."""
    if before is None:
        return snapshot
    replicas = {r.replica_id: r for r in (*before.replicas, *snapshot.replicas)}
    gateways = {g.gateway_id: g for g in (*before.gateways, *snapshot.gateways)}
    return replace(
        snapshot,
        replicas=tuple(replicas[key] for key in sorted(replicas)),
        gateways=tuple(gateways[key] for key in sorted(gateways)),
    )
