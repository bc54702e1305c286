"""Shadow traffic: now and then the large model answers what the small one answered, unseen.

Routing by predicted gain is a bet that the large model would not have helped. A sample of the
requests that were answered by the small model is run again on the large one while that is idle,
and how far the answers agree (``routing.agreement``) is recorded with the predicted gain.

Users come first. ``offer`` takes microseconds, never raises and never waits; answers are read and
compared in threads. A run starts only while the large model has room to spare, has the priority of
batches, gives way as soon as anybody waits, and is paid from an account of its own. What does not
fit is dropped and counted: the sample therefore speaks for quiet hours more than for busy ones.

The caller's permission, not the caller's token, counts: the policy decides anew, for the same
verified caller, whether the large model may be used; the answer goes nowhere, so a token that was
revoked meanwhile gains nobody anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from governance.errors import GatehouseError
from governance.ports import AuditLog, Clock, Engine, Ledger, Policy
from governance.request import question
from governance.shadow_exchange import NotRun, Offer, ShadowAnswer, ShadowExchange
from governance.shadow_record import shadow_event
from governance.tracebacks import without_messages
from governance.types import InferenceRequest, ModelInfo, Operation, Outcome, Turn
from routing.agreement import Agreement, Similarity, agreement
from routing.types import ModelLoad

log = logging.getLogger("gatehouse.shadow")

MAX_QUEUED = 32
"""Offers that wait at most; each keeps its request and answer in memory."""
MAX_QUEUED_BYTES = 16 << 20
"""Of answers that wait to be read."""
MAX_REQUEST_BYTES = 64 << 10
MAX_ANSWER_CHARS = 64 << 10
STALE_S = 600.0
"""An offer for which there was no idle moment in this time is dropped."""
RUN_S = 300.0
"""Longest run, up to the end of the answer."""
COMPARE_S = 30.0
"""Longest comparison that is waited for. It runs in a thread, which nothing can stop; what ends it
is that request and answers are bounded, and that it takes time in proportion to them."""
POLL_S = 0.5
"""How often an idle moment is looked for while something waits."""
PAUSE_S = 60.0
"""Rest after the account, the audit trail or the engine refused."""
BUSY_MOST = 1
"""Requests that the large model may be running when a shadow starts."""


class ShadowLog(Protocol):
    """Where comparisons are recorded."""

    async def shadow(self, event: Mapping[str, Any]) -> None:
        """Record ``route.shadow``; values by column, as in ``governance.audit.schema``.

        Raises:
            AuditUnavailable: It cannot be written.
        """
        ...


@dataclass(slots=True)
class ShadowStats:
    """What became of offers, since the start."""

    offered: int = 0
    sampled: int = 0
    compared: int = 0
    """Runs whose comparison is on record."""
    agreement_milli: int = 0
    """Sum over those."""
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason; each sampled offer is compared, dropped, or still here."""


class ShadowRunner:
    """Samples, queues and runs; used from one event loop.

    Args:
        share_milli: Share of offers that is sampled, in thousandths.
        account: Department whose account pays.
        max_per_minute: Runs that may start in any sixty seconds.
        max_answer_tokens: Answer tokens where neither client nor policy sets a bound.
        policy: Decides whether the caller may use the large model.
        ledger: Budget of the account.
        audit: Takes the run's records.
        shadow_log: Takes the comparison.
        engine: Runs it; says how busy models are.
        clock: Wall clock, microseconds.
        monotonic: Seconds.
        similarity: Of texts, for answers that nothing firmer can be said of; may block, since
            it runs in a thread.
    """

    def __init__(
        self,
        *,
        share_milli: int,
        account: str,
        max_per_minute: int,
        max_answer_tokens: int,
        policy: Policy,
        ledger: Ledger,
        audit: AuditLog,
        shadow_log: ShadowLog,
        engine: Engine,
        clock: Clock,
        monotonic: Callable[[], float],
        similarity: Similarity | None = None,
    ) -> None:
        self.stats = ShadowStats()
        self._share_milli = share_milli
        self._max_per_minute = max_per_minute
        self._shadow_log = shadow_log
        self._load = engine.load
        self._monotonic = monotonic
        self._similarity = similarity
        self._exchange = ShadowExchange(
            account, max_answer_tokens, policy, ledger, audit, engine, engine.load, clock
        )
        self._queue: deque[Offer] = deque()
        self._wake = asyncio.Event()
        self._starts: deque[float] = deque(maxlen=max(1, max_per_minute))
        self._paused_until_s = float("-inf")
        self._worker: asyncio.Task[None] | None = None
        self._finishing: set[asyncio.Task[None]] = set()
        self._closed = False

    # -- the request path ---------------------------------------------------------------------

    def wants(self, request_id: str) -> bool:
        """Whether an offer of this request would be looked at; always the same for one id."""
        digest = hashlib.blake2b(request_id.encode(), digest_size=8, person=b"shadow").digest()
        return int.from_bytes(digest, "big") % 1000 < self._share_milli

    def may_take(self, turn: Turn) -> bool:
        """Whether an answer to a request that was just decided may be offered; never raises.

        The answer to any other need not be kept for it.
        """
        try:
            return self.wants(turn.request_id) and isinstance(self._pair(turn), ModelInfo)
        except Exception as error:
            log.error("request %s not shadowed\n%s", turn.request_id, without_messages(error))
            return False

    def offer(self, turn: Turn, raw: bytes | bytearray) -> None:
        """Take note of a turn that ended with an answer of the small model; never raises.

        Args:
            turn: The turn.
            raw: The answer as it was released; it is read later, and must not change.
        """
        try:
            self._offer(turn, raw)
        except Exception as error:
            # Whatever is wrong here is no concern of the request.
            self.stats.dropped["broken"] += 1
            log.error("request %s not shadowed\n%s", turn.request_id, without_messages(error))

    def _offer(self, turn: Turn, raw: bytes | bytearray) -> None:
        self.stats.offered += 1
        if not self.wants(turn.request_id):
            return
        self.stats.sampled += 1
        found = self._look(turn, raw)
        if isinstance(found, Offer):
            self._queue.append(found)
            self._wake.set()
        else:
            self.stats.dropped[found] += 1

    def _pair(self, turn: Turn) -> ModelInfo | str:
        """The large model to compare with, or why there is none; known once a turn is decided."""
        route, request = turn.route, turn.request
        if self._closed or self._max_per_minute < 1:
            return "stopped"
        if route is None or request is None:
            return "not_answered"
        if not route.auto or route.model.tier != "small" or turn.earlier:
            return "not_small"
        large = next((model for model in route.fallbacks if model.tier == "large"), None)
        if large is None or turn.operation not in large.operations:
            return "no_large"
        if not _comparable(request):
            return "not_comparable"
        return "too_large" if request.body_bytes > MAX_REQUEST_BYTES else large

    def _look(self, turn: Turn, raw: bytes | bytearray) -> Offer | str:
        """The offer of a turn, or why there is none."""
        if turn.outcome is not Outcome.COMPLETED or turn.superseded or turn.stopped:
            return "not_answered"
        route, request, decided = turn.route, turn.request, turn.decided_event_id
        if route is None or request is None or turn.principal is None or decided is None:
            return "not_answered"
        large = self._pair(turn)
        if isinstance(large, str):
            return large
        unread_bytes = len(raw) + sum(len(offer.raw) for offer in self._queue)
        if len(self._queue) >= MAX_QUEUED or unread_bytes > MAX_QUEUED_BYTES:
            return "queue_full"
        return Offer(
            request_id=turn.request_id,
            decision_id=turn.decision_id,
            decided_event_id=decided,
            operation=turn.operation,
            principal=turn.principal,
            request=request,
            inspection=turn.input_inspection,
            small=route.model,
            small_tokens=turn.usage.completion_tokens if turn.usage else None,
            raw=raw,
            large=large,
            gain_milli=_milli(route.detail, "gain_milli"),
            threshold_milli=_milli(route.detail, "threshold_milli"),
            offered_s=self._monotonic(),
        )

    # -- the worker ---------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to run what is offered; needs a running event loop."""
        if self._worker is None and not self._closed:
            self._worker = asyncio.create_task(self._work(), name="shadow")

    async def close(self) -> None:
        """Stop: what waits is dropped, what runs is aborted, and everything decided gets its end.

        Call it before audit trail and ledger are closed. Repeating it is harmless.
        """
        self._closed = True
        self.stats.dropped["stopped"] += len(self._queue)
        self._queue.clear()
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        await asyncio.gather(*self._finishing, return_exceptions=True)
        await self._exchange.drain()

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            if not self._queue:
                self._wake.clear()
            elif self._monotonic() - self._queue[0].offered_s > STALE_S:
                self._queue.popleft()
                self.stats.dropped["stale"] += 1
            elif self._queue[0].raw:
                await self._read_first()
            elif self._may_start(self._queue[0]):
                await self._run(self._queue.popleft())
            else:
                await asyncio.sleep(POLL_S)

    async def _read_first(self) -> None:
        """Put the text of the first that waits in the place of what was released."""
        offer = self._queue[0]
        try:
            read = await asyncio.to_thread(offer.read)
        except Exception as error:
            # One answer that is none says nothing of the next.
            self._queue.popleft()
            self._drop("broken")
            log.error("request %s not shadowed\n%s", offer.request_id, without_messages(error))
            return
        if len(read.answer) > MAX_ANSWER_CHARS:
            self._queue.popleft()
            self._drop("too_large")
        else:
            self._queue[0] = read

    def _may_start(self, offer: Offer) -> bool:
        now_s, starts = self._monotonic(), self._starts
        if now_s < self._paused_until_s:
            return False
        if len(starts) == self._max_per_minute and now_s - starts[0] < 60:
            return False
        return idle(self._load(offer.large.base))

    async def _run(self, offer: Offer) -> None:
        self._starts.append(self._monotonic())
        try:
            async with asyncio.timeout(RUN_S):
                answer = await self._exchange.run(offer)
        except asyncio.CancelledError:
            self._drop("stopped")
            raise
        except Exception as error:
            self._broke_off(offer, error)
            return
        # Shielded: what is on record as answered is compared too.
        task = asyncio.create_task(self._finish(offer, answer))
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        await asyncio.shield(task)

    async def _finish(self, offer: Offer, answer: ShadowAnswer) -> None:
        try:
            await self._exchange.end(answer.turn)
            async with asyncio.timeout(COMPARE_S):
                found = await asyncio.to_thread(self._agreement, offer, answer.text)
            await self._shadow_log.shadow(shadow_event(offer, answer.turn, found))
        except Exception as error:
            self._broke_off(offer, error)
            return
        self.stats.compared += 1
        self.stats.agreement_milli += found.milli

    def _broke_off(self, offer: Offer, error: Exception) -> None:
        if isinstance(error, NotRun):
            self._drop(error.reason, pause=error.pause)
        elif isinstance(error, GatehouseError):
            # What one request asked for is no reason to let the next one wait.
            self._drop(error.code, pause=error.status >= 500 or error.status == 429)
        else:
            self._drop("timeout" if isinstance(error, TimeoutError) else "broken", pause=True)
            log.error("shadow of %s broke off\n%s", offer.request_id, without_messages(error))

    def _drop(self, reason: str, *, pause: bool = False) -> None:
        self.stats.dropped[reason] += 1
        if pause:
            self._paused_until_s = self._monotonic() + PAUSE_S
            log.info("shadow traffic rests for %.0f s: %s", PAUSE_S, reason)

    def _agreement(self, offer: Offer, text: str) -> Agreement:
        prompt = question(offer.request)
        try:
            return agreement(prompt, offer.answer, text, self._similarity)
        except Exception:
            if self._similarity is None:
                raise
            # The encoder failed; words in common need none.
            return agreement(prompt, offer.answer, text)


def idle(load: ModelLoad) -> bool:
    """Whether a model has room to spare: somebody is there, nobody waits, hardly anything runs."""
    running = max(load.running, load.in_flight)
    return load.replicas > 0 and load.waiting == 0 and running <= BUSY_MOST


def _comparable(request: InferenceRequest) -> bool:
    """One answer of text: several cannot be told apart, and a tool call is not compared."""
    generated = request.operation in (Operation.CHAT, Operation.COMPLETIONS)
    return generated and request.choices == 1 and not request.body.get("tools")


def _milli(detail: Mapping[str, Any], key: str) -> int | None:
    value = detail.get(key)
    return value if type(value) is int else None
