"""Turns requests away early, least urgent classes first, where an engine's queue grows too long.

A request that will not be served in time is better told so at once: it costs nothing, and the
caller can go elsewhere. Per base model, and by class of service:

    counted in the queue  >=  share of the class x bound  ->  shed, reason ``queue``
    estimated wait        >   patience of the class       ->  shed, reason ``patience``

The bound is a number of waiting requests per replica; the shares rise with urgency, so that batch
work is shed first, standard next and critical work last, and what is shed for one class keeps room
for the next. Everybody who waits is counted, but other departments of the same class for no more
than their part of the room, by weight among those that wait: who floods a queue is shed, and not
who comes after. For that, of k departments of equal weight, 1 + 1/2 + ... + 1/k times the room may
wait. Who waits longer than its patience all the same is ended by the engine
(``Dispatch.patience_ms``).

The wait is what is served before, over the rate at which the model completes requests:

    wait  = ahead / rate
    ahead = more urgent + min(same class, department's own x all weights / its weight)

since engines are shared fairly among the departments of a class. How many wait is what the replicas
reported last, and what this gateway has sent since, where there was a queue then. Whose they are is
known of this gateway's own requests only; others are taken to have the same mix. The rate is
measured while something waits, since a model that is not busy completes only what it is asked; it
halves its memory every ``HALF_LIFE_S`` and counts a silence that goes on. Each gateway sees its
share of the completions (``share``).

Not thread-safe: it belongs to one event loop, and no method awaits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil
from types import TracebackType

from governance.classes import PRIORITY_CLASSES
from governance.errors import Overloaded
from governance.types import Shed
from routing.types import ModelLoad

QUEUE, PATIENCE = "queue", "patience"
REASONS = (QUEUE, PATIENCE)
"""Why a request is shed."""
HALF_LIFE_S = 30.0
"""Memory of the completion rate."""
MIN_COMPLETIONS = 8
"""With fewer of them nothing is said of the rate, and nobody is shed for a wait."""
REPORT_S = 0.25
"""What was sent this lately may not be in the replicas' reports yet; they come every 0.1 s."""
UNKNOWN_RETRY_S = 2
"""``Retry-After`` while nothing is known of the rate."""
MOST_RETRY_S = 600


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of one model's queue."""

    waiting: int = 128
    """Requests that may wait for one replica, of all classes."""
    share_percent: Mapping[str, int] = field(
        default_factory=lambda: {"critical": 100, "standard": 80, "batch": 50}
    )
    """By class: how much of that the class may use, counting everybody who waits."""
    patience_ms: Mapping[str, int] = field(
        default_factory=lambda: {"critical": 10_000, "standard": 60_000, "batch": 600_000}
    )
    """By class: longest wait for an engine to begin."""


class Rate:
    """Completions a second of one model, learned while it has a queue.

    Args:
        half_life_s: After so long an observation counts half.
    """

    def __init__(self, half_life_s: float = HALF_LIFE_S) -> None:
        self._half_life_s = half_life_s
        self._count = 0.0
        self._time_s = 0.0
        self._since_s: float | None = None
        """When the last completion was, if there was a queue then."""

    def completed(self, now_s: float, *, queued: bool) -> None:
        """A request has completed; ``queued`` says whether others wait."""
        if self._since_s is not None:
            passed_s = max(0.0, now_s - self._since_s)
            keep = 0.5 ** (passed_s / self._half_life_s)
            self._count = keep * self._count + 1
            self._time_s = keep * self._time_s + passed_s
        self._since_s = now_s if queued else None

    def per_second(self, now_s: float) -> float | None:
        """The rate; ``None`` while too little has been seen.

        A silence that goes on counts once it is longer than the usual time between completions.
        """
        if self._count < MIN_COMPLETIONS:
            return None
        time_s = self._time_s
        if self._since_s is not None:
            silent_s = now_s - self._since_s
            time_s += max(0.0, silent_s - time_s / self._count)
        return self._count / time_s if time_s > 0 else None


@dataclass(frozen=True, slots=True)
class Applicant:
    """Whose request it is."""

    priority_class: str
    department: str
    weight_milli: int = 1000


class Place:
    """One request that was let in; a context manager around its work at the engine."""

    __slots__ = ("_applicant", "_base", "_completed", "_shedder", "_started")

    def __init__(self, shedder: LoadShedder, base_model: str, applicant: Applicant) -> None:
        self._shedder = shedder
        self._base = base_model
        self._applicant = applicant
        self._started = self._completed = False

    def started(self) -> None:
        """The engine has begun to answer; a second call does nothing."""
        if not self._started:
            self._started = True
            self._shedder.began(self._base, self._applicant)

    def completed(self) -> None:
        """The engine is through with it; a second call does nothing."""
        self.started()
        if not self._completed:
            self._completed = True
            self._shedder.completed(self._base)

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.started()


@dataclass(slots=True)
class _Class:
    """Requests of one class that went through this gateway and wait for the engine to begin."""

    waiting: dict[str, int] = field(default_factory=dict)
    """By department; none at 0."""
    weights: dict[str, int] = field(default_factory=dict)
    """Of those departments, in thousandths."""
    total: int = 0
    weight: int = 0
    """Sum over those departments."""

    def entered(self, applicant: Applicant) -> None:
        """A request was let in."""
        name, weight = applicant.department, applicant.weight_milli
        self.total += 1
        self.waiting[name] = self.waiting.get(name, 0) + 1
        self.weight += weight - self.weights.get(name, 0)
        self.weights[name] = weight

    def began(self, name: str) -> None:
        """A request of a department waits no longer."""
        self.total -= 1
        self.waiting[name] -= 1
        if not self.waiting[name]:
            del self.waiting[name]
            self.weight -= self.weights.pop(name)

    def part(self, applicant: Applicant) -> float:
        """The applicant's weight among the departments that wait, itself included."""
        own = applicant.weight_milli
        return own / (self.weight - self.weights.get(applicant.department, 0) + own)


@dataclass(slots=True)
class _Queue:
    """What this gateway knows of one model's queue."""

    rate: Rate = field(default_factory=Rate)
    classes: dict[str, _Class] = field(
        default_factory=lambda: {each: _Class() for each in PRIORITY_CLASSES}
    )
    known: int = 0
    """Requests of this gateway that wait; what they are stands for all that do."""
    sent_s: deque[float] = field(default_factory=deque)
    """When the latest requests were sent."""

    def entered(self, applicant: Applicant, now_s: float) -> None:
        """A request was let in."""
        self.known += 1
        self.classes[applicant.priority_class].entered(applicant)
        self.sent_s.append(now_s)

    def began(self, applicant: Applicant) -> None:
        """It waits no longer."""
        self.known -= 1
        self.classes[applicant.priority_class].began(applicant.department)

    def ahead(self, waiting: int, applicant: Applicant) -> float:
        """Of those that wait, how many are served before a new request."""
        if self.known <= 0:
            return waiting
        urgent = 0
        for each, queue in self.classes.items():
            if each == applicant.priority_class:
                break
            urgent += queue.total
        queue = self.classes[applicant.priority_class]
        scale = waiting / self.known
        own = scale * queue.waiting.get(applicant.department, 0)
        return scale * urgent + min(scale * queue.total, (own + 1) / queue.part(applicant))

    def counted(self, waiting: int, room: float, applicant: Applicant) -> float:
        """Of those that wait, how many count against a new request's room."""
        if self.known <= 0:
            return waiting
        queue = self.classes[applicant.priority_class]
        scale = waiting / self.known
        same, own = scale * queue.total, scale * queue.waiting.get(applicant.department, 0)
        return waiting - same + own + min(same - own, room * (1 - queue.part(applicant)))


class LoadShedder:
    """Lets requests in or sheds them.

    Args:
        models: Base models.
        limits: Bounds by base model; those of ``QueueLimits()`` for one that is not named.
        monotonic: Seconds that never go back.
        load: How busy a base model is.
        share: Part of all requests that comes through this gateway, above 0 and at most 1.
    """

    def __init__(
        self,
        models: Iterable[str],
        load: Callable[[str], ModelLoad],
        monotonic: Callable[[], float],
        limits: Mapping[str, QueueLimits] | None = None,
        share: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self._limits = dict(limits or {})
        self._usual = QueueLimits()
        self._load = load
        self._monotonic = monotonic
        self._share = share
        self._queues: dict[str, _Queue] = {}
        self.stats: Counter[tuple[str, str, str]] = Counter(
            {
                (model, each, reason): 0
                for model in models
                for each in PRIORITY_CLASSES
                for reason in REASONS
            }
        )
        """Requests shed so far, by base model, class and reason."""

    def patience_ms(self, base_model: str, priority_class: str) -> int:
        """Longest wait of a class for this model's engines."""
        return self._limits.get(base_model, self._usual).patience_ms[priority_class]

    def enter(self, base_model: str, applicant: Applicant) -> Place | Shed:
        """Let one request in, or say why not; microseconds."""
        load, queue, now_s = self._load(base_model), self._queue(base_model), self._monotonic()
        shed = self._judge(base_model, applicant, load, queue, now_s)
        if shed is not None:
            self.stats[base_model, applicant.priority_class, shed.reason] += 1
            return shed
        queue.entered(applicant, now_s)
        return Place(self, base_model, applicant)

    def rate(self, base_model: str) -> float | None:
        """Completions a second of a model, over all gateways; ``None`` while unknown."""
        own = self._queue(base_model).rate.per_second(self._monotonic())
        return None if own is None else own / self._part()

    def began(self, base_model: str, applicant: Applicant) -> None:
        """For ``Place``: a request that was let in waits no longer."""
        self._queue(base_model).began(applicant)

    def completed(self, base_model: str) -> None:
        """For ``Place``: the engine is through with a request."""
        queued = self._load(base_model).waiting > 0
        self._queue(base_model).rate.completed(self._monotonic(), queued=queued)

    def _judge(
        self, base_model: str, applicant: Applicant, load: ModelLoad, queue: _Queue, now_s: float
    ) -> Shed | None:
        waiting_now = _recent(queue.sent_s, now_s)
        if load.waiting <= 0 or load.replicas <= 0:
            return None  # nobody waits, or nobody can be asked: that is told elsewhere
        limits, each = self._limits.get(base_model, self._usual), applicant.priority_class
        waiting = load.waiting + waiting_now
        rate = self.rate(base_model)
        wait_ms = None
        if rate is not None:
            wait_ms = ceil(1000 * queue.ahead(waiting, applicant) / rate)
        room = limits.waiting * load.replicas * limits.share_percent[each] // 100
        patience_ms = limits.patience_ms[each]
        again_s: float | None = None
        if waiting >= room and queue.counted(waiting, room, applicant) >= room:
            reason = QUEUE
            if rate is not None:
                again_s = (waiting - room + 1) / rate
        elif wait_ms is not None and wait_ms > patience_ms:
            reason, again_s = PATIENCE, (wait_ms - patience_ms) / 1000
        else:
            return None
        retry_s = UNKNOWN_RETRY_S if again_s is None else min(max(1, ceil(again_s)), MOST_RETRY_S)
        return Shed(reason, base_model, each, waiting, wait_ms, retry_s)

    def _part(self) -> float:
        return min(1.0, max(self._share(), 1e-6))

    def _queue(self, base_model: str) -> _Queue:
        queue = self._queues.get(base_model)
        if queue is None:
            queue = self._queues[base_model] = _Queue()
        return queue


def overloaded(shed: Shed) -> Overloaded:
    """The refusal of a request that was shed."""
    if shed.reason == QUEUE:
        message = (
            f"Too many requests wait for this model ({shed.waiting}) to take one more of class "
            f"{shed.priority_class}; try again later."
        )
    else:
        message = (
            f"A request of class {shed.priority_class} would have to wait about "
            f"{-(-(shed.wait_ms or 0) // 1000)} s for this model, which is too long; try again "
            "later."
        )
    return Overloaded(message, None, shed.retry_after_s)


def _recent(sent_s: deque[float], now_s: float) -> int:
    """Requests sent so lately that reports may not count them."""
    while sent_s and sent_s[0] <= now_s - REPORT_S:
        sent_s.popleft()
    return len(sent_s)
