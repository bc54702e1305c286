"""Decides, by rules compiled to an index.

Semantics, in full:

1. A credential that is itself limited to models or operations is blocked outside of them, before
   any rule is looked at (``credential:models``, ``credential:operations``).
2. Default deny: without a matching ``allow`` rule the effect is ``block``. Only ``allow`` grants;
   a rule of any other effect restricts, so adding one never widens what anybody may do.
3. Otherwise the strictest effect among the matching rules wins: block, require_approval, reroute,
   redact, allow. Its rules, in file order, are the responsible ones.
4. Each limit is the least that a matching ``allow`` rule sets, and the priority class the least
   urgent that one sets, so that a further rule about the same people cannot loosen the first. So
   it is with ``on_exhaustion``: ``refuse`` wins over ``small``.

A decision is total: any principal, model and operation, known or not, gives exactly one effect.

Data structure: for each dimension, and each value that rules name, one integer whose bit *i* says
whether rule *i* matches that value. A decision ANDs one integer a dimension and ANDs the result
with one integer an effect: its cost hardly grows with the number of rules. Decisions are also kept
by (roles, department, kind, model, operation) in a table of bounded size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from governance.classes import PRIORITY_CLASSES
from governance.policy.model import TIER_PREFIX, PolicyConfig, Rule
from governance.types import Decision, Effect, Inspection, Limits, ModelInfo, Principal

CREDENTIAL_MODELS = "credential:models"
CREDENTIAL_OPERATIONS = "credential:operations"
"""Ids that decisions carry where the credential's own limits decided; no rule can have them."""

_MAX_REMEMBERED = 16_384


class _Dimension:
    """Which rules match a value of one dimension."""

    def __init__(self) -> None:
        self.any = 0
        """Rules that do not name the dimension."""
        self.by_value: defaultdict[str, int] = defaultdict(int)

    def add(self, rule: int, values: Iterable[str] | None) -> None:
        """Index the values that rule number ``rule`` names."""
        if values is None:
            self.any |= 1 << rule
            return
        for value in values:
            self.by_value[value] |= 1 << rule

    def matching(self, value: str) -> int:
        """Rules that match one value."""
        return self.any | self.by_value.get(value, 0)


class RuleIndex:
    """Rules as bits; answers which rules match a cell."""

    def __init__(self, config: PolicyConfig) -> None:
        self.roles = _Dimension()
        self.departments = _Dimension()
        self.kinds = _Dimension()
        self.models = _Dimension()
        self.operations = _Dimension()
        self.by_effect = dict.fromkeys(Effect, 0)
        for i, rule in enumerate(config.rules):
            when = rule.when
            self.roles.add(i, when.roles)
            self.departments.add(i, when.departments)
            self.kinds.add(i, when.kinds)
            self.models.add(i, when.models)
            self.operations.add(i, when.operations)
            self.by_effect[rule.effect] |= 1 << i

    def matching(
        self, roles: Iterable[str], department: str, kind: str, model: ModelInfo, operation: str
    ) -> int:
        """Rules that match, as bits."""
        by_role = self.roles.any
        for role in roles:
            by_role |= self.roles.by_value.get(role, 0)
        return (
            by_role
            & self.departments.matching(department)
            & self.kinds.matching(kind)
            & self.for_model(model)
            & self.operations.matching(operation)
        )

    def for_model(self, model: ModelInfo) -> int:
        """Rules that match a model, by id or by tier."""
        by_tier = self.models.by_value.get(TIER_PREFIX + model.tier, 0)
        if model.base != model.id:
            by_tier &= ~self.by_effect[Effect.ALLOW]
        return self.models.matching(model.id) | by_tier


def bits(number: int) -> Iterator[int]:
    """Positions of the ones, lowest first."""
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


class CompiledPolicy:
    """A policy ready to decide; implements ``governance.ports.Policy``."""

    def __init__(self, config: PolicyConfig, models: Sequence[ModelInfo]) -> None:
        """Compile.

        Args:
            config: A policy that ``governance.policy.load`` accepted.
            models: All served models.

        Raises:
            ValueError: A model id starts with ``tier:`` and would be taken for a tier.
        """
        if any(model.id.startswith(TIER_PREFIX) for model in models):
            raise ValueError(f"a model id must not start with {TIER_PREFIX!r}")
        self.config = config
        self.digest = config.digest
        self._models = {model.id: model for model in models}
        self._index = RuleIndex(config)
        self._ids = [rule.id for rule in config.rules]
        self._messages = [rule.message for rule in config.rules]
        self._grants = [_grant(rule) for rule in config.rules]
        self._administration = {
            permission.value: frozenset(roles)
            for permission, roles in config.administration.items()
        }
        self._remembered: dict[tuple[frozenset[str], str, str, ModelInfo, str], Decision] = {}

    def permits(self, principal: Principal, permission: str) -> bool:
        """Whether the principal may act in administration; an unknown permission is nobody's."""
        return not principal.roles.isdisjoint(self._administration.get(permission, ()))

    def visible(self, principal: Principal, model: ModelInfo) -> bool:
        """Whether the principal may use the model for at least one operation it answers.

        A model that is blocked altogether does not exist for the caller; one that asks for
        approval, or restricts what goes in, does.
        """
        return any(
            self.decide(principal, model, operation.value).effect is not Effect.BLOCK
            for operation in model.operations
        )

    def decide(
        self,
        principal: Principal,
        model: ModelInfo,
        operation: str,
        inspection: Inspection | None = None,
    ) -> Decision:
        """Exactly one effect for the request; never raises.

        Args:
            principal: Who asks.
            model: What is asked; need not be one of the served models.
            operation: Value of an ``Operation``; anything else matches rules for any only.
            inspection: Not looked at: rules of this format have no condition on findings.
        """
        if principal.models is not None and not (
            model.id in principal.models or TIER_PREFIX + model.tier in principal.models
        ):
            return self._blocked((CREDENTIAL_MODELS,))
        if principal.operations is not None and operation not in principal.operations:
            return self._blocked((CREDENTIAL_OPERATIONS,))
        cell = (principal.roles, principal.department, principal.kind.value, model, operation)
        decision = self._remembered.get(cell)
        if decision is None:
            decision = self._decide(self._index.matching(*cell))
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[cell] = decision
        return decision

    def _decide(self, matching: int) -> Decision:
        by_effect = self._index.by_effect
        if blocking := matching & by_effect[Effect.BLOCK]:
            return self._explained(Effect.BLOCK, blocking)
        granting = matching & by_effect[Effect.ALLOW]
        if not granting:
            return self._blocked(())
        for effect in Effect:  # strictest first
            if responsible := matching & by_effect[effect]:
                return self._explained(effect, responsible, granting)
        raise AssertionError("an allow rule matched")  # pragma: no cover

    def _blocked(self, rule_ids: tuple[str, ...]) -> Decision:
        return Decision(Effect.BLOCK, rule_ids, self.digest, message=self.config.default_message)

    def _explained(self, effect: Effect, responsible: int, granting: int = 0) -> Decision:
        ids, message = [], None
        for i in bits(responsible):
            ids.append(self._ids[i])
            message = message or self._messages[i]
        least: dict[str, int] = {}
        urgency = -1
        exhausted: str | None = None
        for i in bits(granting):
            bounds, rule_urgency, on_exhaustion = self._grants[i]
            if on_exhaustion is not None and exhausted != "refuse":
                exhausted = on_exhaustion
            for bound, value in bounds:
                if value < least.get(bound, value + 1):
                    least[bound] = value
            if rule_urgency > urgency:
                urgency = rule_urgency
        priority = None if urgency < 0 else PRIORITY_CLASSES[urgency]
        return Decision(
            effect, tuple(ids), self.digest, Limits(**least), priority, exhausted, message
        )


def _grant(rule: Rule) -> tuple[tuple[tuple[str, int], ...], int, str | None]:
    """Bounds that a rule sets, the place of its priority class or -1, and ``on_exhaustion``."""
    bounds = tuple(rule.limits.model_dump(exclude_none=True).items())
    urgency = -1 if rule.priority is None else PRIORITY_CLASSES.index(rule.priority)
    return bounds, urgency, rule.on_exhaustion
