"""Of the permitted models, those that can do a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from routing.cards import ModelCard
from routing.need import Need, fits, language_of, names_languages, severity
from routing.reasons import Reason
from routing.tiers import Candidate


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The models that lack nothing for a request; where there are none, that lack the least."""

    able: tuple[Candidate, ...]
    """In catalogue order; at least one."""
    need: Need
    """What is needed, with the language that was found."""
    lack: str | None
    """What even these lack."""
    only: Reason | None
    """Why there is no choice between tiers; ``None`` where there is one."""


def shortlist(
    candidates: Sequence[Candidate], cards: Mapping[str, ModelCard], need: Need, text: str
) -> Shortlist:
    """Keep what fits.

    Args:
        candidates: Models that policy permits, in catalogue order; at least one.
        cards: By model id.
        need: What the request needs.
        text: The request, for its language.
    """
    known = tuple(model for model in candidates if model.id in cards)
    if not known:
        return Shortlist(tuple(candidates), need, None, Reason.NO_CARD)
    if need.language is None and names_languages([cards[model.id] for model in known]):
        need = replace(need, language=language_of(text))
    lacks = [fits(cards[model.id], model.context_tokens, need) for model in known]
    least = min(map(severity, lacks))
    able = tuple(m for m, lack in zip(known, lacks, strict=True) if severity(lack) == least)
    only: Reason | None = None
    if len({model.tier for model in able}) == 1:
        others = [lack for m, lack in zip(known, lacks, strict=True) if m.tier != able[0].tier]
        closest = min(others, key=severity, default=None)
        only = Reason.ONLY_TIER if closest is None else Reason(f"capability {closest}")
    lacking = next(lack for lack in lacks if severity(lack) == least)
    return Shortlist(able, need, lacking, only)
