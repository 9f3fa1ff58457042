"""How fast steps go, and what an incident cost: from its fault to the first commit of a step never committed before, less
one median step (which would have been needed anyway).
"""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class StepClock:
    """Median seconds per step, from moments at which a number of committed steps was known."""

    marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=64))

    def note(self, at_s: float, committed: int) -> None:
        """Take one observation; observations that bring nothing new are dropped."""
        if not self.marks or committed > self.marks[-1][1]:
            self.marks.append((at_s, committed))

    def median_s(self) -> float:
        """Return the median seconds per step; 0 while unknown."""
        spans = [
            (later - earlier) / (more - less) for (earlier, less), (later, more) in itertools.pairwise(self.marks)
        ]
        return statistics.median(spans) if spans else 0.0


def incident_cost_s(began_at_s: float, resumed_at_s: float, step_s: float) -> float:
    """Return the seconds that an incident cost, at least 0."""
    return max(0.0, resumed_at_s - began_at_s - step_s)
