"""What an answer says about itself, and which answers are given up for it: the cascade.

A cascade lets the small model answer first and asks the large one where that answer looks bad
(L. Chen et al., FrugalGPT, arXiv 2305.05176, with a trained scorer of answers; P. Aggarwal et al.,
AutoMix, arXiv 2310.12963, with the small model's verification of its own answer). Neither judge is
for free: a scorer must be trained on the organisation's own answers, a verification is another
call. What costs nothing is how sure the model was of its own tokens. Their mean log-probability
favours short answers, and the least sure tokens tell more (N. Gupta et al., "Language Model
Cascades: Token-level uncertainty and beyond", arXiv 2404.10136), so answers are ranked by the
geometric mean over the least sure tenth; the mean over all is recorded beside it.

Nobody has measured here how well that ranks the answers of the models that are served; the stated
share bounds what it may cost, and the shadow comparison shows what it is worth.

Which answers are given up is a quantile of the department's recent ones, held at the share as in
``routing.targets``. A refusal, an empty answer, one that was cut without the client's asking, and
text where JSON was wanted are given up without comparison, and count towards the share: the more of
them, the fewer unsure ones. What makes a model refuse is in the hands of whoever writes the prompt,
so they are bounded too: of any ``n`` answers of a department that one gateway judges in a row, at
most ``2 * share * n + 8`` are given up, for whatever reason, whatever is asked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from routing.final_answer import refuses
from routing.reasons import Judgement
from routing.recent import Recent
from routing.targets import Correction
from routing.types import Verdict

MAX_CHARS = 65_536
"""Of an answer that are kept; whether more is JSON is not asked."""
MAX_TOKENS = 8_192
"""Of an answer whose log-probabilities are kept."""
_LEAST_LOGPROB = -20.0
"""Engines write minus infinity and huge numbers for what they hold to be impossible."""
_LEARN = 32
"""Answers that must have been seen before the least sure of them are given up."""
_WINDOW = 512
_MOST = 2
"""Times the share is what may be given up at most."""
_BURST = 8
"""Answers that may be given up beyond that, after a time in which fewer were."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an answer, or its beginning, says about itself."""

    confidence_milli: int | None
    """Geometric mean of the probabilities of its tokens, in thousandths; ``None`` where the engine
    gave none."""
    weakest_milli: int | None
    """The same over the least sure tenth of them, one at least."""
    tokens: int
    """Tokens whose probability is known."""
    refusal: bool
    """It begins by declining to answer."""
    empty: bool
    """It has ended, and neither text nor a token of it was seen, but for the one that ends it. The
    tokens of an answer that is all reasoning are seen, and its text is not."""
    broken_json: bool
    """It has ended, JSON was asked for, and it is none."""
    ended: str
    """``stop``, ``length``, another reason of the engine's, or ``held`` where it goes on."""

    @property
    def detail(self) -> Mapping[str, int | str | bool | None]:
        """For the record."""
        return {
            "confidence_milli": self.confidence_milli,
            "weakest_milli": self.weakest_milli,
            "draft_tokens": self.tokens,
            "draft_ended": self.ended,
        }


class AnswerEvidence:
    """Takes in an answer piece by piece.

    Args:
        json_mode: Whether JSON was asked for.
    """

    def __init__(self, json_mode: bool = False) -> None:
        self._json_mode = json_mode
        self._parts: list[str] = []
        self._chars = 0
        self._logprobs: list[float] = []

    def feed(self, text: str, logprobs: Sequence[float]) -> None:
        """Take in a piece, with the log-probability of each of its tokens."""
        left = MAX_CHARS - self._chars
        if text and left > 0:
            self._parts.append(text[:left])
        self._chars += len(text)
        for value in logprobs[: MAX_TOKENS - len(self._logprobs)]:
            if not math.isnan(value):
                self._logprobs.append(max(_LEAST_LOGPROB, min(0.0, value)))

    def verdict(self, finish_reason: str | None) -> Evidence:
        """What is known so far.

        Args:
            finish_reason: Why the answer ended; ``None`` where it goes on.
        """
        text = "".join(self._parts)
        worst = sorted(self._logprobs)[: -(-len(self._logprobs) // 10)]
        ended = finish_reason == "stop" and self._chars <= MAX_CHARS
        return Evidence(
            confidence_milli=_geometric_milli(self._logprobs),
            weakest_milli=_geometric_milli(worst),
            tokens=len(self._logprobs),
            refusal=refuses(text),
            empty=finish_reason is not None and not text.strip() and len(self._logprobs) <= 1,
            broken_json=self._json_mode and ended and not _is_json(text),
            ended=finish_reason or "held",
        )


class EscalationGate:
    """Decides which answers of one department are given up.

    Args:
        escalate_share: Share of the answers, 0 to 1; at most twice that share where so many refuse,
            are empty, cut or no JSON.
    """

    def __init__(self, escalate_share: float) -> None:
        self._share = escalate_share
        self._recent = Recent(size=_WINDOW)
        self._correction = Correction()
        self._room = float(_BURST)

    def judge(self, evidence: Evidence, draw: float, left: float, *, cut_asked: bool) -> Verdict:
        """Whether the large model shall answer instead.

        Args:
            evidence: Of the answer.
            draw: Number of the request, 0 to 1, for answers that are as sure as the threshold.
            left: What the budget leaves of the share, 0 to 1.
            cut_asked: The client asked for the length at which the answer was cut.
        """
        share = self._share * left
        if share <= 0:
            return Verdict(False, Judgement.SURE.value, evidence.detail)
        self._room = min(float(_BURST), self._room + _MOST * share)
        detail = dict(evidence.detail)
        fault = _at_once(evidence, cut_asked)
        judgement = fault or self._ranked(evidence, draw, share, detail)
        if judgement not in _KEPT and self._room < 1:
            detail["draft_kept"] = judgement.value
            judgement = Judgement.SHARE_USED
        escalate = judgement not in _KEPT
        if escalate:
            self._room -= 1
        if fault is None:
            self._saw(evidence, judgement, share)
        elif self._correction.applied(share) > 0:
            # Once nothing is left for unsure answers, more must not make them wait when it is over.
            self._correction.learn(share, escalate)
        return Verdict(escalate, judgement.value, detail)

    def _saw(self, evidence: Evidence, judgement: Judgement, share: float) -> None:
        """Learn from an answer that was compared; the others are not what answers compare with."""
        if judgement is not Judgement.NO_EVIDENCE and judgement is not Judgement.LEARNING:
            self._correction.learn(share, judgement is Judgement.UNSURE)
        if evidence.weakest_milli is not None:
            self._recent.add(1000 - evidence.weakest_milli)

    def _ranked(
        self,
        evidence: Evidence,
        draw: float,
        share: float,
        detail: dict[str, int | str | bool | None],
    ) -> Judgement:
        if evidence.weakest_milli is None:
            return Judgement.NO_EVIDENCE
        if len(self._recent) < _LEARN:
            return Judgement.LEARNING
        cut = self._recent.cut(self._correction.applied(share))
        detail["unsure_below_milli"] = 1000 - cut.level
        unsure = cut.admits(1000 - evidence.weakest_milli, draw)
        return Judgement.UNSURE if unsure else Judgement.SURE


_KEPT = frozenset({Judgement.SURE, Judgement.LEARNING, Judgement.NO_EVIDENCE, Judgement.SHARE_USED})


def _at_once(evidence: Evidence, cut_asked: bool) -> Judgement | None:
    """What needs no comparison with other answers."""
    if evidence.empty:
        return Judgement.EMPTY
    if evidence.refusal:
        return Judgement.REFUSAL
    if evidence.ended == "length" and not cut_asked:
        return Judgement.LENGTH
    return Judgement.JSON if evidence.broken_json else None


class CascadeDraft:
    """Judges one answer as it is generated; implements ``governance.ports.Draft``.

    Args:
        gate: The department's.
        hold_tokens: Answer tokens that are held back at most.
        draw: Number of the request, 0 to 1.
        left: What the budget leaves of the share that is given up, 0 to 1.
        json_mode: JSON was asked for.
        cut_asked: The client asked for a longest answer.
    """

    def __init__(
        self,
        gate: EscalationGate,
        hold_tokens: int,
        draw: float,
        left: float,
        *,
        json_mode: bool,
        cut_asked: bool,
    ) -> None:
        self.hold_tokens = hold_tokens
        self._gate = gate
        self._draw = draw
        self._left = left
        self._cut_asked = cut_asked
        self._evidence = AnswerEvidence(json_mode)

    def feed(self, text: str, logprobs: Sequence[float]) -> None:
        """Take in a piece of the answer."""
        self._evidence.feed(text, logprobs)

    def verdict(self, finish_reason: str | None) -> Verdict:
        """Whether the large model shall answer instead; asked once."""
        evidence = self._evidence.verdict(finish_reason)
        return self._gate.judge(evidence, self._draw, self._left, cut_asked=self._cut_asked)


def _geometric_milli(logprobs: Sequence[float]) -> int | None:
    if not logprobs:
        return None
    return round(1000 * math.exp(math.fsum(logprobs) / len(logprobs)))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
