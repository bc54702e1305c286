"""What ``auto`` would do with one prompt, and what would change it; without a running platform.

The same code chooses as in a gateway, with what a gateway does not know yet: the department has no
traffic of its own, so that the scorer's reference stands for it; every model is permitted and idle;
there is no conversation. Nothing is remembered and nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deployments.routing.scoring import ScoreMany, ScorerFacts, shortened
from governance.budget.prices import COLD, KIB
from governance.models_file import eligible
from governance.types import ModelInfo
from routing.auto import AutoAsk, AutoChoice, AutoRouter, Candidate
from routing.cards import OTHERS, ModelCard, ModelsFile
from routing.need import Need, names_languages
from routing.recent import thousandths
from routing.scoring import milli
from routing.types import ModelLoad, Score

_IDLE = ModelLoad(replicas=1, slots=1)
_ANSWER_TOKENS = 256
_NO_CARD_NAMES = "zz"
"""Stands for a language that no card names."""


class NothingToChoose(Exception):
    """No served model has a card: ``auto`` is not offered."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """One thing that would be different, and the choice then."""

    condition: str
    """Such as ``the request has tools``."""
    model: str
    tier: str
    reason: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """A choice with everything that it rests on; fractions in thousandths."""

    department: str
    target: str
    model: str
    tier: str
    reason: str
    fallbacks: tuple[str, ...]
    weak_milli: int
    """Chance that the small model answers correctly, as the scorer sees it."""
    strong_milli: int
    gain_milli: int
    trust_milli: int
    """How far the prompt's own estimate counts; the rest is the mean of the training data."""
    similarity_milli: int
    """Cosine to the nearest centre of the training data."""
    cluster: int
    scorer: str
    threshold_milli: int | None
    """From which gain on it is large; ``None`` where the gain does not matter."""
    easier_milli: int
    """Share of ordinary prompts with a smaller gain."""
    language: str | None
    lacks: str | None
    """What even the chosen model lacks for the request."""
    cascade: bool
    """The answer would be judged before it is released."""
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """A scorer that has made up its mind."""

    found: Score

    async def score(self, prompt: str) -> Score:
        """See ``routing.types.Scorer``."""
        return self.found


class Explainer:
    """Explains choices.

    Args:
        models: The models file.
        served: All served models.
        facts: What is known of the scorer.
        score: The scorer.

    Raises:
        NothingToChoose: No served model has a card.
    """

    def __init__(
        self,
        models: ModelsFile,
        served: Sequence[ModelInfo],
        facts: ScorerFacts,
        score: ScoreMany,
    ) -> None:
        self._models = models
        self._facts = facts
        self._score = score
        infos = eligible(models, served)
        if not infos:
            raise NothingToChoose
        self._candidates = tuple(Candidate(m.id, m.tier, m.context_tokens, _IDLE) for m in infos)
        cards = {card.id: card for card in models.models}
        self._cards = tuple(cards[model.id] for model in infos)

    async def explain(self, prompt: str, department: str) -> Explanation:
        """Explain the choice for a prompt.

        Args:
            prompt: The last question of a request.
            department: Whose target counts.
        """
        (score,) = self._score([shortened(prompt)])
        router = AutoRouter(
            self._cards,
            self._models.routing,
            _Known(score),
            self._facts.quantiles,
            lambda: 0.0,
        )
        ask = self._ask(prompt, department)
        choice = await router.explain(ask)
        alternatives = []
        for condition, other in self._others(ask):
            changed = await router.explain(other)
            if changed.model_id != choice.model_id:
                alternatives.append(_alternative(condition, changed))
        alternatives += await self._by_language(router, ask, choice.model_id)
        return self._explanation(department, score, choice, tuple(alternatives))

    def _ask(self, prompt: str, department: str) -> AutoAsk:
        tokens = len(prompt.encode("utf-8", "replace")) * COLD.prompt_tokens_per_kib_p50 // KIB
        return AutoAsk(
            text=prompt,
            need=Need(prompt_tokens_estimate=tokens, answer_tokens=_ANSWER_TOKENS),
            candidates=self._candidates,
            department=department,
            conversation="",
            request_id="explain",
            pressure_milli=0,
            priority_class="standard",
        )

    def _others(self, ask: AutoAsk) -> list[tuple[str, AutoAsk]]:
        """The same request, and one thing about it or its surroundings different."""
        full = self._models.routing.pressure.full_milli
        others = [
            ("the request has tools", replace(ask, need=replace(ask.need, tools=True))),
            ("JSON is asked for", replace(ask, need=replace(ask.need, json_mode=True))),
            (
                f"the department uses its budget up at {full / 1000:g} times its pace",
                replace(ask, pressure_milli=full),
            ),
        ]
        for tier in ("small", "large"):
            down = tuple(
                replace(c, load=ModelLoad()) if c.tier == tier else c for c in self._candidates
            )
            others.append((f"no replica of the {tier} tier is up", replace(ask, candidates=down)))
        for tokens in sorted({_context(c, self._cards) for c in self._candidates})[:-1]:
            need = replace(ask.need, prompt_tokens_estimate=tokens)
            others.append(
                (f"prompt and answer need more than {tokens} tokens", replace(ask, need=need))
            )
        return others

    async def _by_language(
        self, router: AutoRouter, ask: AutoAsk, chosen: str
    ) -> list[Alternative]:
        """What the same request gets in other languages, those with one outcome together."""
        if not names_languages(self._cards):
            return []
        named = {code for card in self._cards for code in card.languages} - {OTHERS}
        found: dict[str, tuple[list[str], AutoChoice]] = {}
        for code in (*sorted(named), _NO_CARD_NAMES):
            need = replace(ask.need, language=code)
            choice = await router.explain(replace(ask, need=need))
            if choice.model_id != chosen:
                found.setdefault(choice.model_id, ([], choice))[0].append(code)
        return [
            _alternative(f"the request is in {_listed(codes)}", choice)
            for codes, choice in found.values()
        ]

    def _explanation(
        self,
        department: str,
        score: Score,
        choice: AutoChoice,
        alternatives: tuple[Alternative, ...],
    ) -> Explanation:
        gain, detail = milli(score.gain), choice.detail
        ordinary = thousandths(self._facts.quantiles)
        easier = sum(value < gain for value in ordinary) / max(1, len(ordinary))
        return Explanation(
            department=department,
            target=str(detail["target"]),
            model=choice.model_id,
            tier=str(detail["tier"]),
            reason=choice.reason,
            fallbacks=choice.fallbacks,
            weak_milli=milli(score.weak),
            strong_milli=milli(score.strong),
            gain_milli=gain,
            trust_milli=milli(score.trust),
            similarity_milli=milli(score.similarity),
            cluster=score.cluster,
            scorer=score.scorer,
            threshold_milli=_integer(detail, "threshold_milli"),
            easier_milli=milli(easier),
            language=_text(detail, "language"),
            lacks=_text(detail, "lacks"),
            cascade=bool(detail.get("cascade")),
            alternatives=alternatives,
        )


def _alternative(condition: str, choice: AutoChoice) -> Alternative:
    return Alternative(condition, choice.model_id, str(choice.detail["tier"]), choice.reason)


def _context(candidate: Candidate, cards: Sequence[ModelCard]) -> int:
    card = next(card for card in cards if card.id == candidate.id)
    return min(candidate.context_tokens, card.context_tokens or candidate.context_tokens)


def _listed(codes: Sequence[str]) -> str:
    return ", ".join("any other language" if code == _NO_CARD_NAMES else code for code in codes)


def _integer(detail: Mapping[str, Any], key: str) -> int | None:
    value = detail.get(key)
    return value if type(value) is int else None


def _text(detail: Mapping[str, Any], key: str) -> str | None:
    value = detail.get(key)
    return value if isinstance(value, str) else None
