"""What an answer comes down to: its number, its letters, or that it is none.

Reads what people and models usually write; where it is not sure it says ``None``. It never judges
whether an answer is right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_LOOKED_AT_CHARS = 2048
_OPENING_CHARS = 400
"""Of those, with spacing collapsed, that a refusal is looked for in."""

# NOTE: answers are whatever a caller can make a model write, and some are read on the event loop.
# Every pattern here takes time that is linear in the text: no two neighbouring parts of unbounded
# length match the same characters, and what is scanned lazily has a bound.
_REFUSAL = re.compile(
    r"[\W_]*+(?:(?:unfortunately|regrettably)[\W_]++)?+"
    r"(?:(?:(?:i\s?['’]?\s?a?m|we\s?['’]?\s?a?re)\s?)?+(?:(?:so|very|really|truly)\s)?+"
    r"(?:sorry|afraid)\W[^.!?\n]{0,80}?|(?:i\s)?+apologi[sz]e\W[^.!?\n]{0,60}?)?"
    r"(?:as an? [^.!?\n]{1,60}?,\s?)?(?<![^\W_])i\s?(?:['’]m|am)?\s?(?:simply|just|really)?\s?"
    r"(?:can\s?['’]?t|can\s?not|could\s?n['’]?t|won['’]?t|will not|(?:not able|unable) to|"
    r"not comfortable|do not feel comfortable|must (?:decline|refuse)|have to (?:decline|refuse)|"
    r"decline|refuse)\b"
    r"(?P<rest>[^.!?\n]{0,120})",
    re.IGNORECASE,
)
_REFUSED_ACT = re.compile(
    r"\A\W*+\Z|\b(?:help|assist|provid\w*|compl(?:y|ies)|fulfil\w*|answer\w*|do (?:that|this|so)|"
    r"shar\w*|creat\w*|discuss\w*|giv\w*|support\w*|continu\w*|engag\w*|generat\w*|writ\w*|offer\w*|"
    r"request)\b",
    re.IGNORECASE,
)
_GERMAN_REFUSAL = re.compile(
    r"[\W_]*+(?:(?:es\s)?+tut mir leid\b[^.!?\n]{0,40}?|leider\s)?"
    r"(?<![^\W_])(?:ich kann|kann ich)\b"
    r"[^.!?\n]{0,60}?\bnicht\s(?:weiter)?(?:helfen|beantworten|bereitstellen|nachkommen|dienen)\b",
    re.IGNORECASE,
)

_OPTION_LINE = re.compile(r"(?m)^[ \t]*\(?([A-J])[.):][ \t]+(\S.*)$")
_LETTERS = r"[A-J](?:\s?(?:,|and|&|or|,\s?and)\s?[A-J])*"
_MARKED_LETTERS = re.compile(
    rf"(?:[Aa]nswer|ANSWER|[Oo]ption|[Cc]hoice)s?\s?(?:is|are|:|=|would be)?\s?:?\s?"
    rf"[\"'(\[]*({_LETTERS})(?![\w'’-]|\s[a-z])"
)
_BARE_LETTERS = re.compile(rf"\W*(?:[Oo]ption\s)?({_LETTERS})\W*")
_LOWER_LETTER = re.compile(r"\W*([a-j])\W*")
_LEADING_LETTER = re.compile(r"\W{0,3}([A-J])\s?[.):\]](?:\s|$)")
_CORRECT_LETTER = re.compile(r"\b([A-J])\W{0,3}\s(?:is|would be) (?:the )?(?:correct|right|best)\b")

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]{0,200}\}){0,200}\}){0,400})\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d{1,15})\s*\}\s*\{\s*(\d{1,15})\s*\}")
_LATEX_NOISE = re.compile(r"\\(?:text|mathrm|mathbf|left|right|displaystyle)\b|\\[,;! ]|[{}$]|~")
_HASHES = re.compile(r"####\s*([^\n]{1,200})")
_STATED = re.compile(
    r"(?i)\b(?:answer|result|total|solution)\b[^.\n=:]{0,60}?(?:\bis\b|\bare\b|\bwas\b|:|=)"
    r"([^\n]{1,200})"
)
_QUANTITY = re.compile(
    r"(?P<sign>(?<![\w.,)\]])[-−]\s?)?(?P<money>[$€£]\s?)?(?P<inner>(?<=[$€£])[-−])?"
    r"(?P<digits>\d{1,3}(?:[,'\u00a0\u202f]\d{3}){1,8}(?!\d)(?:\.\d{1,18})?"
    r"|\d{1,24},\d{1,2}(?![\d,])|\d{1,24}(?:\.\d{1,18})?|\.\d{1,18})"
    r"(?:[eE](?P<power>[-+]?\d{1,2})\b)?(?:\s?/\s?(?P<below>\d{1,15}))?"
    r"(?P<unit>\s?(?:%|°\s?[CF]\b|[^\W\d_]{1,12}))?"
)
_ASKS = re.compile(
    r"(?i)\b(?:how (?:many|much|far|long|old|tall)|calculate|compute|what (?:is|are) the (?:"
    r"(?:total|average|final|numerical) )?(?:number|value|sum|product|cost|price|area|volume|"
    r"perimeter|probability|difference|ratio|remainder|total|amount|percentage|result))\b"
    r"|=\s?\?|\d\s?[-+*/×÷]\s?\d"
)
_SHORT_WORDS = 6

_UNITS: dict[str, tuple[str, int]] = {
    name: (dimension, factor)
    for dimension, sizes in {
        "length": {"mm": 1, "cm": 10, "m meter metre": 1_000, "km kilometer kilometre": 1_000_000},
        "mass": {"mg": 1, "g gram": 1_000, "kg kilogram": 1_000_000},
        "time": {"s sec second": 1, "min minute": 60, "h hr hour": 3_600, "day": 86_400},
        "volume": {"ml": 1, "l liter litre": 1_000},
        "per cent": {"% percent": 1},
        "dollar": {"cent": 1, "$ dollar usd": 100},
        "euro": {"€ euro eur": 1},
        "pound": {"£ gbp": 1},
    }.items()
    for names, factor in sizes.items()
    for name in names.split()
}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number as it was written."""

    value: Fraction
    decimals: int
    """Digits after the decimal point: how exact it claims to be."""
    unit: str = ""
    """Known unit, in the singular; empty for none and for words that are no known unit."""


def refuses(answer: str) -> bool:
    """Whether the answer begins by declining to answer; only its beginning is looked at."""
    opening = _opening(answer)
    if _GERMAN_REFUSAL.match(opening):
        return True
    found = _REFUSAL.match(opening)
    return bool(found and _REFUSED_ACT.search(found["rest"]))


def _opening(text: str) -> str:
    """The first characters, with one space or one line break for every run of spacing."""
    lines = (" ".join(line.split()) for line in text[:_LOOKED_AT_CHARS].splitlines())
    return "\n".join(line for line in lines if line)[:_OPENING_CHARS]


def options(prompt: str) -> dict[str, str]:
    """Letter and text of the options that a prompt offers; empty unless there are two or more."""
    # The last of each letter: examples come before the question.
    found = {letter: body.strip() for letter, body in _OPTION_LINE.findall(prompt)}
    return found if len(found) > 1 and "A" in found else {}


def letters(answer: str, offered: dict[str, str]) -> frozenset[str] | None:
    """The options that an answer names; ``None`` where it names none, or none that is offered."""
    named = _named(answer)
    if named is None:
        text = _bare(answer)
        same = {letter for letter, body in offered.items() if _bare(body) == text}
        return frozenset(same) if len(same) == 1 else None
    return named if named <= offered.keys() else None


def _named(answer: str) -> frozenset[str] | None:
    text = answer.replace("*", "")
    boxed = _BOXED.findall(text)
    if boxed:
        text = _LATEX_NOISE.sub("", boxed[-1])
    if found := _BARE_LETTERS.fullmatch(text):
        return _split(found[1])
    if found := _LOWER_LETTER.fullmatch(text):
        return frozenset(found[1].upper())
    if marked := _MARKED_LETTERS.findall(text):
        return _split(marked[-1])
    if stated := _CORRECT_LETTER.findall(text):
        return frozenset(stated[-1])
    if found := _LEADING_LETTER.match(text):
        return frozenset(found[1])
    return None


def _split(named: str) -> frozenset[str]:
    return frozenset(re.findall(r"\b[A-J]\b", named))


def _bare(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().casefold()


def boxed(answer: str) -> str | None:
    """Content of the last LaTeX box, without its typesetting; ``None`` where there is none."""
    found = _BOXED.findall(answer)
    if not found:
        return None
    text = _LATEX_NOISE.sub("", _FRACTION.sub(r"\1/\2", found[-1]))
    return re.sub(r"\s+", "", text) or None


def asks_for_number(prompt: str) -> bool:
    """Whether a prompt looks like one that a single number answers."""
    return bool(_ASKS.search(prompt))


def final_number(answer: str, asked: bool) -> Quantity | None:
    """The number that an answer ends in.

    A boxed number, one after ``####``, or one that is called the answer counts anywhere; the last
    number of a text only where the prompt asked for one, or where the text is hardly more.
    """
    text = _FRACTION.sub(r"\1/\2", answer)
    if found := _BOXED.findall(text):
        return quantity(_LATEX_NOISE.sub("", found[-1].replace("\\%", "%")))
    if hashed := _HASHES.findall(text):
        return quantity(hashed[-1])
    text = (
        _LATEX_NOISE.sub("", text.replace("\\%", "%").replace("\\$", "$")) if "\\" in text else text
    )
    for statement in reversed(_STATED.findall(text)):
        if (value := quantity(_result(statement))) is not None:
            return value
    every = list(_QUANTITY.finditer(text))
    if asked and every:
        return _read(every[-1])
    if len(every) == 1 and len(text.split()) <= _SHORT_WORDS:
        return _read(every[0])
    return None


def _result(statement: str) -> str:
    """What stands behind the last equals sign of the sentence, or the sentence."""
    sentence = re.split(r"[.!?](?:\s|$)", statement, maxsplit=1)[0]
    return sentence.rsplit("=", 1)[-1]


def quantity(text: str) -> Quantity | None:
    """The first number of a text."""
    found = _QUANTITY.search(text)
    return None if found is None else _read(found)


def _read(found: re.Match[str]) -> Quantity:
    digits = re.sub(r"['\u00a0\u202f]", "", found["digits"])
    head, _, tail = digits.rpartition(",")
    if head and "." not in tail and len(tail) != 3:
        digits = f"{head}.{tail}"  # a decimal comma
    digits = digits.replace(",", "")
    value = Fraction(digits) * Fraction(10) ** int(found["power"] or 0)
    if found["below"] and int(found["below"]):
        value /= int(found["below"])
    if found["sign"] or found["inner"]:
        value = -value
    unit = (found["unit"] or "").strip()
    value *= _SCALES.get(unit.casefold(), 1)
    decimals = len(digits.partition(".")[2]) if not found["below"] else 6
    return Quantity(value, decimals, _unit(unit) or _unit((found["money"] or "").strip()))


def _unit(word: str) -> str:
    for name in (word, word.casefold(), word.casefold().removesuffix("s")):
        if name in _UNITS:
            return name
    return ""


def same(one: Quantity, other: Quantity) -> bool:
    """Whether two numbers are equal, as exactly as the less exact of them is written.

    A unit counts where both have one; whole numbers are exact.
    """
    first, second = one.value, other.value
    if one.unit and other.unit and one.unit != other.unit:
        (dimension, factor), (its_dimension, its_factor) = _UNITS[one.unit], _UNITS[other.unit]
        return dimension == its_dimension and first * factor == second * its_factor
    if first == second:
        return True
    coarse, fine = (one, other) if one.decimals <= other.decimals else (other, one)
    if coarse.decimals == 0:
        return False
    return abs(fine.value - coarse.value) <= Fraction(1, 2 * 10**coarse.decimals)
