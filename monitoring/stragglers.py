"""Which workers are slow, and whether it pays to relieve them: from how long each computed, beside what that should take.

What a worker computes in a step is known from the plan, so the expected time of its layers and slots is divided out first;
what is left is compared with the median of its peers. A worker is slow only if it has been so over a whole window of steps,
and relieved only once what it has cost equals what the move costs (ski rental); each move makes those soon after it dearer.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

WINDOW_STEPS = 11
"""So many steps in a row are looked at; the median of them counts. Odd, so that it is no mean of a slow one and another."""
SEEN_STEPS = WINDOW_STEPS // 2 + 1
"""For so many steps, at least, what the median shows has been so when it is first seen."""
LOOK_STEPS = 4
"""So often it is looked whether anything is to be gained, in steps; and at once when others are slow than before."""
BOUGHT_MAX = 10
CALM_STEPS = 100
"""After so many steps without a move one of those before is forgotten."""
UNREMARKABLE = 1.25
"""A worker that takes less than this times as long as its peers, or more than its inverse, is as fast as they."""


@dataclass(slots=True)
class ComputeClock:
    """How long one worker has computed in each of its newest steps in one world."""

    generation: int = 0
    step: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))

    def note(self, generation: int, step: int, seconds: float) -> None:
        """Take what a step took; of an older world nothing counts any more."""
        if generation != self.generation:
            self.generation = generation
            self.seconds.clear()
        elif step <= self.step:
            return
        self.step = step
        if seconds > 0:
            self.seconds.append(seconds)

    def median_s(self, generation: int) -> float | None:
        """The median over a whole window; None before there is one in this world."""
        if generation != self.generation or len(self.seconds) < WINDOW_STEPS:
            return None
        return statistics.median(self.seconds)

    def newest_s(self) -> float:
        """The median of the newest steps: what a worker takes that has become slow, once the window shows it."""
        return statistics.median(list(self.seconds)[-SEEN_STEPS:])


def speeds(measured_s: Mapping[int, float], expected_s: Mapping[int, float]) -> dict[int, float]:
    """Return the speed of each rank beside that of the median one; those that are unremarkable are left out.

    Args:
        measured_s, expected_s: for each rank, what a step has taken it, and what it should take.
    """
    slowness = {rank: measured_s[rank] / expected for rank, expected in expected_s.items() if expected > 0}
    if len(slowness) < 2:
        return {}
    usual = statistics.median_low(slowness.values())
    relative = {rank: value / usual for rank, value in slowness.items()}
    return {rank: 1 / value for rank, value in relative.items() if not 1 / UNREMARKABLE < value < UNREMARKABLE}


@dataclass(slots=True)
class Rental:
    """What goes on being paid, until buying would have been as cheap.

    Attributes:
        since_step: since when it has been paid; None while there is nothing to be gained.
        measured_step, looked_step: at which speeds were last measured, and at which that was last looked at.
        bought: how often it was of late; each time it costs twice as much, so that noise is not followed for ever.
        bought_step: when it was the last time.
    """

    since_step: int | None = None
    measured_step: int = 0
    looked_step: int = 0
    bought: int = 0
    bought_step: int = 0

    def measures(self, step: int) -> bool:
        """Whether there is another step to be measured."""
        if step == self.measured_step:
            return False
        self.measured_step = step
        return True

    def looks(self, step: int, *, is_news: bool = False) -> bool:
        """Whether enough steps have passed for another look, or there is news."""
        if not is_news and 0 <= step - self.looked_step < LOOK_STEPS:
            return False
        self.looked_step = step
        return True

    def is_due(self, step: int, gain_s: float, cost_s: float, seen_steps: int = 0) -> bool:
        """Whether the loss has reached the cost.

        Args:
            step: the newest. gain_s: what each step could save. cost_s: of buying.
            seen_steps: for how many steps there had been a loss already when it was first seen.
        """
        if self.since_step is None:
            self.since_step = step - seen_steps
        return (step - self.since_step) * gain_s >= cost_s * (1 << min(self._remembered(step), BOUGHT_MAX))

    def buy(self, step: int) -> None:
        """It is bought."""
        self.bought, self.bought_step = self._remembered(step) + 1, step
        self.since_step = None

    def _remembered(self, step: int) -> int:
        return max(0, self.bought - max(0, step - self.bought_step) // CALM_STEPS)

    def end(self) -> None:
        """There is nothing to be gained any more."""
        self.since_step = None
