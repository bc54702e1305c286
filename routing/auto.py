"""The choice behind ``model: "auto"``.

    models that are permitted  ->  those that can do the request        (need)
    both tiers left?           ->  score of the prompt                  (complexity)
    department's threshold     ->  wanted tier                          (targets)
    conversation               ->  stay, unless clearly otherwise       (conversations)
    load                       ->  not where nobody can answer          (tiers)

Where one tier is left, or a target of 0 or 1 leaves nothing to weigh, no score is asked for. A
choice is total: no score, no replica and no model that fits lead to a stated second best, and never
to an error. Gains are rounded to thousandths before anything is compared with them, so that a
record repeats the comparison exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from routing.cards import ModelCard, RoutingConfig
from routing.conversations import Stay
from routing.departments import Department, Departments
from routing.evidence import CascadeDraft
from routing.need import Need, names_languages, warm_up
from routing.reasons import Reason
from routing.scoring import described, milli, score_or_reason
from routing.shortlist import Shortlist, shortlist
from routing.targets import Aim
from routing.tiers import LARGE, Candidate, Placement, State, place, state
from routing.types import Score, Scorer

__all__ = ["Achieved", "AutoAsk", "AutoChoice", "AutoRouter", "Candidate"]

Detail = dict[str, int | str | bool | None]

_SMALL = "small"
_MAX_PRESSURE_MILLI = 1_000_000


@dataclass(frozen=True, slots=True)
class AutoAsk:
    """What the choice may know of a request."""

    text: str
    """What its complexity is judged by."""
    need: Need
    candidates: tuple[Candidate, ...]
    """Models that policy permits, in catalogue order; never empty."""
    department: str
    conversation: str
    """Key that all requests of a conversation share; empty for none."""
    request_id: str
    pressure_milli: int
    """Use of the department's budget against its pace; 1000 is on pace, 0 no limit."""
    priority_class: str
    """``critical``, ``standard`` or ``batch``."""


@dataclass(frozen=True, slots=True)
class AutoChoice:
    """The model, and what it rests on."""

    model_id: str
    reason: str
    """``auto:<tier> <reason>``; see ``routing.reasons``."""
    fallbacks: tuple[str, ...]
    """Models to try next, in order; each does what the request needs as well as the first does."""
    draft: CascadeDraft | None
    """Judges the answer before it is released, where there is a cascade."""
    detail: Mapping[str, int | str | bool | None] = field(default_factory=dict)
    """For the record; fractions in thousandths."""
    may_rise: bool = True
    """Whether a large model may answer because the small ones turn out to be full."""


@dataclass(frozen=True, slots=True)
class Achieved:
    """What became of a department's newest 2,048 requests at this gateway."""

    department: str
    target: str
    requests: int
    large_milli: int
    """Share that went to the large tier, for whatever reason."""
    free: int
    """Requests that could go either way: both tiers fit and could serve, and there was a score."""
    free_large_milli: int
    """Share of those that went to the large tier; this is what the target is about."""
    aimed_milli: int
    """Share that was aimed at for those, on average: the target, less the budget's pressure."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """The tier that a request should go to, before load is looked at."""

    tier: str
    reason: Reason
    may_rise: bool = True
    """Load may send it up to the large tier."""
    aim: Aim | None = None
    """Where the score decided: what was aimed at."""
    stay: Stay | None = None
    """Where the score decided: what becomes of the conversation."""


class AutoRouter:
    """Chooses; used from one event loop.

    Args:
        cards: What the served models can do; one without a card is chosen only where none of
            those permitted has one.
        config: Targets and the rest.
        scorer: Says how much better a large model would answer.
        reference: 101 quantiles of the gains of ordinary prompts (0 %, 1 %, ... 100 %), which
            count until a department has traffic of its own; may be empty.
        clock_s: Seconds that do not jump (monotonic).
    """

    def __init__(
        self,
        cards: Sequence[ModelCard],
        config: RoutingConfig,
        scorer: Scorer,
        reference: Sequence[float],
        clock_s: Callable[[], float],
    ) -> None:
        self._cards = {card.id: card for card in cards}
        self._config = config
        self._scorer = scorer
        self._clock_s = clock_s
        self._departments = Departments(config, reference)
        if names_languages(cards):
            warm_up()

    async def choose(self, ask: AutoAsk) -> AutoChoice:
        """Pick a model for a request, and remember the outcome for the next ones."""
        return await self._choose(ask, remember=True)

    async def explain(self, ask: AutoAsk) -> AutoChoice:
        """What ``choose`` would say; nothing is remembered."""
        return await self._choose(ask, remember=False)

    def achieved(self) -> tuple[Achieved, ...]:
        """Of each department that asked lately, by name."""
        return tuple(_achieved(department) for department in self._departments)

    async def _choose(self, ask: AutoAsk, *, remember: bool) -> AutoChoice:
        if not ask.candidates:
            raise ValueError("no model is permitted; that is for the policy to say")
        short = shortlist(ask.candidates, self._cards, ask.need, ask.text)
        detail: Detail = {"pressure_milli": min(ask.pressure_milli, _MAX_PRESSURE_MILLI)}
        if short.need.language is not None:
            detail["language"] = short.need.language
        if short.lack is not None:
            detail["lacks"] = short.lack
        wish = self._without_score(ask, short)
        if wish is not None:
            department = self._department(ask, remember)
        else:
            began_s = self._clock_s()
            score = await score_or_reason(self._scorer, ask.text, self._config.score_timeout_ms)
            detail["score_us"] = max(0, round((self._clock_s() - began_s) * 1_000_000))
            # Only now, because others decide while a score is waited for.
            department = self._department(ask, remember)
            if isinstance(score, Reason):
                detail["default"] = score.value
                wish = _Wish(self._config.default_tier, score)
            else:
                wish = self._by_score(ask, department, score, detail, remember)
        return self._placed(ask, short, department, wish, detail, remember)

    def _department(self, ask: AutoAsk, remember: bool) -> Department:
        known = self._departments
        return known.get(ask.department) if remember else known.peek(ask.department)

    def _without_score(self, ask: AutoAsk, short: Shortlist) -> _Wish | None:
        """The wish where no score can change it."""
        if short.only is not None:
            return _Wish(short.able[0].tier, short.only)
        target = self._config.target(ask.department)
        if target.never_large:
            return _Wish(_SMALL, Reason.TARGET_NONE, may_rise=False)
        pressure = self._config.pressure.share(ask.pressure_milli)
        if pressure >= 1:
            return _Wish(_SMALL, Reason.BUDGET, may_rise=False)
        if target.always_large and pressure <= 0:
            return _Wish(LARGE, Reason.TARGET_ALL)
        return None

    def _by_score(
        self, ask: AutoAsk, department: Department, score: Score, detail: Detail, remember: bool
    ) -> _Wish:
        steering, gain = department.steering, milli(score.gain)
        aim = steering.aim(self._config.pressure.share(ask.pressure_milli))
        draw = _draw(ask.request_id, b"auto")
        stay = department.conversations.judge(
            ask.conversation, gain, aim.cut, draw, self._clock_s()
        )
        detail |= described(score, gain, aim)
        if remember:
            steering.saw(gain)
        if stay.kept:
            reason = Reason.CONVERSATION
        elif stay.large:
            reason = Reason.GAIN_ABOVE
        elif aim.free_cut.admits(gain, draw):
            reason = Reason.BUDGET
        else:
            reason = Reason.GAIN_BELOW
        return _Wish(LARGE if stay.large else _SMALL, reason, True, aim, stay)

    def _placed(
        self,
        ask: AutoAsk,
        short: Shortlist,
        department: Department,
        wish: _Wish,
        detail: Detail,
        remember: bool,
    ) -> AutoChoice:
        """The model of the wanted tier, or of the other one where load says so."""
        placed = place(wish.tier, short.able, ask.priority_class, may_rise=wish.may_rise)
        tier, fallbacks = placed.model.tier, placed.fallbacks
        draft = self._draft(ask, department, wish, placed)
        if draft is not None:
            fallbacks = tuple(sorted(fallbacks, key=lambda other: other.tier != LARGE))
            detail["cascade"] = True
        if remember:
            department.steering.went(tier == LARGE, wish.aim if placed.free else None)
            if wish.stay is not None:
                department.conversations.remember(ask.conversation, wish.stay, self._clock_s())
        detail |= {"target": department.steering.text, "tier": tier, "wanted_tier": wish.tier}
        return AutoChoice(
            model_id=placed.model.id,
            reason=f"auto:{tier} {placed.passed or wish.reason}",
            fallbacks=tuple(other.id for other in fallbacks),
            draft=draft,
            detail=detail,
            may_rise=wish.may_rise and ask.priority_class != "batch",
        )

    def _draft(
        self, ask: AutoAsk, department: Department, wish: _Wish, placed: Placement
    ) -> CascadeDraft | None:
        """A judge, where the score said small, and a large model could answer instead."""
        cascade, gate, need = self._config.cascade, department.gate, ask.need
        if cascade is None or gate is None or wish.aim is None or placed.model.tier == LARGE:
            return None
        if wish.tier == LARGE or need.choices != 1 or need.tools:
            return None
        if not any(m.tier == LARGE and state(m) < State.SATURATED for m in placed.fallbacks):
            return None
        return CascadeDraft(
            gate,
            cascade.hold_tokens,
            _draw(ask.request_id, b"cascade"),
            1 - self._config.pressure.share(ask.pressure_milli),
            json_mode=need.json_mode,
            cut_asked=need.answer_tokens > 0,
        )


def _draw(request_id: str, purpose: bytes) -> float:
    """Number from 0 to 1 that belongs to a request: nobody can choose it, and it repeats."""
    name = request_id.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "big") / 2**64


def _achieved(department: Department) -> Achieved:
    requests, large, free, free_large, aimed = department.steering.outcomes()
    return Achieved(
        department=department.name,
        target=department.steering.text,
        requests=requests,
        large_milli=1000 * large // max(1, requests),
        free=free,
        free_large_milli=1000 * free_large // max(1, free),
        aimed_milli=aimed // max(1, free),
    )
