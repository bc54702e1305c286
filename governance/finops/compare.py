"""What another budgets file would change, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from governance.budget.config import BudgetsConfig

_NO_LIMIT = {"gpu_seconds", "tokens"}
"""Keys where nothing means that nothing is limited."""
_NAMED = {"accounts", "parts", "cohorts", "accelerators"}
"""Sections whose keys are names that somebody chose."""


class Kind(StrEnum):
    """What happens to a value."""

    ADDED = "added"
    REMOVED = "removed"
    RAISED = "raised"
    LOWERED = "lowered"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that differs."""

    kind: Kind
    place: str
    """Way to it from the top of the file, such as ``accounts.hr.gpu_seconds``."""
    before: Any
    after: Any


def compare(before: BudgetsConfig, after: BudgetsConfig) -> list[Difference]:
    """What differs, in the order of the places."""
    old, new = _flat(before), _flat(after)
    found: list[Difference] = []
    whole = dict.fromkeys(_sections(new) - _sections(old), Kind.ADDED)
    whole |= dict.fromkeys(_sections(old) - _sections(new), Kind.REMOVED)
    for place, kind in whole.items():
        if not any(place.startswith(f"{other}.") for other in whole if other != place):
            found.append(Difference(kind, place, None, None))
    for place in old.keys() | new.keys():
        if any(place.startswith(f"{section}.") for section in whole):
            continue
        key = place.rpartition(".")[2]
        was, will = old.get(place), new.get(place)
        if was != will:
            found.append(Difference(_kind(key, was, will), place, was, will))
    return sorted(found, key=lambda each: each.place)


def _kind(key: str, was: Any, will: Any) -> Kind:
    if key in _NO_LIMIT and (was is None or will is None):
        return Kind.RAISED if will is None else Kind.LOWERED
    if was is None:
        return Kind.ADDED
    if will is None:
        return Kind.REMOVED
    if isinstance(was, int | float) and isinstance(will, int | float):
        return Kind.RAISED if will > was else Kind.LOWERED
    return Kind.CHANGED


def _sections(flat: Mapping[str, Any]) -> set[str]:
    """Named sections: accounts, parts, cohorts."""
    found = set()
    for place in flat:
        words = place.split(".")
        for index, word in enumerate(words[:-2]):
            if word in _NAMED and word != "accelerators":
                found.add(".".join(words[: index + 2]))
    return found


def _flat(config: BudgetsConfig) -> dict[str, Any]:
    return dict(_leaves(config.model_dump(mode="json"), ""))


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            # NOTE: a name may have a dot in it; it must not look like two sections.
            name = str(key).replace(".", "\N{MIDDLE DOT}") if _parent(place) in _NAMED else str(key)
            yield from _leaves(inner, f"{place}.{name}" if place else name)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        # Further windows: at most one of a kind.
        for inner in value:
            yield from _leaves(inner, f"{place}.{inner['window']}")
    elif isinstance(value, list):
        yield place, ", ".join(str(each) for each in sorted(value))
    else:
        yield place, value


def _parent(place: str) -> str:
    return place.rpartition(".")[2]
