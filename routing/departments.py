"""What the choice remembers of each department; nothing is shared between two of them.

One department's prompts, however crafted, change neither another's threshold nor its conversations
nor its cascade. The memory is bounded: of more than 256 departments the one that was silent longest
begins anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from routing.cards import RoutingConfig
from routing.conversations import Conversations
from routing.evidence import EscalationGate
from routing.recent import thousandths
from routing.targets import Steering

MAX_DEPARTMENTS = 256


class Department:
    """One department's state.

    Args:
        name: Its name.
        config: Of all.
        reference: Gains in general, in thousandths.
    """

    def __init__(self, name: str, config: RoutingConfig, reference: Sequence[int]) -> None:
        self.name = name
        self.steering = Steering(config.target(name), reference)
        self.conversations = Conversations(config.hysteresis)
        self.gate: EscalationGate | None = None
        if config.cascade is not None and config.cascades(name):
            self.gate = EscalationGate(config.cascade.escalate_share)


class Departments:
    """All of them.

    Args:
        config: Of all.
        reference: Quantiles of the gains of ordinary prompts; may be empty.
    """

    def __init__(self, config: RoutingConfig, reference: Sequence[float]) -> None:
        self._config = config
        self._reference = thousandths(reference)
        self._known: OrderedDict[str, Department] = OrderedDict()

    def __len__(self) -> int:
        """Departments remembered."""
        return len(self._known)

    def __iter__(self) -> Iterator[Department]:
        """By name."""
        return iter([self._known[name] for name in sorted(self._known)])

    def peek(self, name: str) -> Department:
        """A department; one that never asked is not remembered for it."""
        found = self._known.get(name)
        return found or Department(name, self._config, self._reference)

    def get(self, name: str) -> Department:
        """A department that asks."""
        found = self._known.get(name)
        if found is None:
            found = self._known[name] = Department(name, self._config, self._reference)
            if len(self._known) > MAX_DEPARTMENTS:
                self._known.popitem(last=False)
        self._known.move_to_end(name)
        return found
