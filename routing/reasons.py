"""Why ``auto`` chose what it chose: every reason that can stand in headers, metrics and records.

A choice says ``auto:<tier> <reason>``, such as ``auto:small gain below threshold``; what stands in
for a model that was named says ``Instead``. There are no others, so a reason can be the label of a
metric.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """What a choice of ``auto`` rested on last."""

    GAIN_ABOVE = "gain above threshold"
    """The large model is expected to do better by enough for the department's target."""
    GAIN_BELOW = "gain below threshold"
    """It is not."""
    CONVERSATION = "conversation kept"
    """The prompt alone would have gone to the other tier, but not clearly, and the conversation
    keeps its model."""
    BUDGET = "budget ahead of pace"
    """Without the pressure on the department's budget the request would have gone to the large
    tier."""
    TARGET_NONE = "target never large"
    """The department's target is 0."""
    TARGET_ALL = "target always large"
    """The department's target is a large share of 1."""

    CAPABILITY_CONTEXT = "capability context"
    """No model of the other tier has room for prompt and answer."""
    CAPABILITY_TOOLS = "capability tools"
    """No model of the other tier can be given tools."""
    CAPABILITY_JSON = "capability json"
    """No model of the other tier can be held to JSON."""
    CAPABILITY_LANGUAGE = "capability language"
    """No model of the other tier is said to be good at the language of the request."""
    CAPABILITY_DATA_CLASS = "capability data_class"
    """No model of the other tier may be sent this class of data."""
    ONLY_TIER = "only tier permitted"
    """Policy permits models of one tier, or cards name models of one tier."""
    NO_CARD = "only models without card"
    """Every permitted model lacks a card: nothing is known of any, and the first is taken."""

    DEFAULT_LATE = "default scorer late"
    """No score in time; the default tier."""
    DEFAULT_UNREACHABLE = "default scorer unreachable"
    """The scorer cannot be reached; the default tier."""
    DEFAULT_FAILED = "default scorer failed"
    """The scorer failed, or its score is no number; the default tier."""

    LOAD_DOWN = "other tier down"
    """The tier that was wanted has no replica that takes requests."""
    LOAD_SATURATED = "other tier saturated"
    """The tier that was wanted has no free slot at this gateway."""
    LOAD_QUEUES = "other tier queues"
    """Requests wait in the tier that was wanted, none in this one, and the request is critical."""


class Instead(StrEnum):
    """Why a model of the small tier answers, where policy permits it, and a large one was named."""

    BUDGET = "budget:small instead of large"
    """The budget cannot cover the request at the large model."""
    LOAD = "load:small instead of large"
    """The large model's queue has no room for it."""


class Judgement(StrEnum):
    """Why an answer of the small model was kept or given up in a cascade."""

    SURE = "sure"
    """Kept: among the surer answers of the department."""
    LEARNING = "learning"
    """Kept: too little has been seen of the department to say what is sure."""
    NO_EVIDENCE = "no_evidence"
    """Kept: the engine gave no log-probabilities."""
    SHARE_USED = "share_used"
    """Kept: it would have been given up, but the department has used up what ``escalate_share``
    permits for the moment."""
    UNSURE = "unsure"
    """Given up: among the least sure answers, as many as ``escalate_share`` says."""
    REFUSAL = "refusal"
    """Given up: it declines to answer."""
    EMPTY = "empty"
    """Given up: it has ended, and it has no text."""
    LENGTH = "length"
    """Given up: it was cut by a length that the client had not asked for."""
    JSON = "json"
    """Given up: JSON was asked for, and it is none."""
