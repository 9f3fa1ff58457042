"""Where the time of each step goes in a worker: its main thread is in exactly one phase, and says when that changes.

A change costs one reading of the clock. Nothing waits for the device: on an accelerator, kernels run behind the calls that
launch them, so that their time shows where the host first waits for them (the reduction, or the loss that is read).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Protocol


class Phase(IntEnum):
    """What the main thread does."""

    OUTSIDE = 0  # user code between one step and the next fetch: evaluation, saving, logging
    DATA = 1  # waits for the batch of a slot
    FORWARD = 2  # from the batch to the end of the first forward of a prepared model
    BACKWARD = 3  # from there to optimizer.step()
    REDUCE = 4  # sums gradients with the others, as far as that was not hidden behind backwards
    VOTE = 5  # the verdict, and changes of the world
    OPTIMIZER = 6  # the update


class Aside(IntEnum):
    """What user code between two steps is known to be; the rest (schedulers, logging) is part of training."""

    EVALUATION = 0  # a prepared model ran forward
    BUSY = 1  # it was announced with session.busy(), or is a callback of on_commit


class Sink(Protocol):
    """Where times go: a `ProgressPage`."""

    def timed(self, step: int, seconds: Sequence[float]) -> None:
        """Take a step that is over, with its seconds by phase."""

    def went_aside(self, evaluated_s: float, busy_s: float) -> None:
        """Take the seconds so far that were spent aside."""


class StepTimer:
    """Adds up one step's time by phase.

    Args:
        sink: Takes what was measured; None: nobody does.
        clock: In seconds; monotonic.
    """

    def __init__(self, sink: Sink | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._sink = sink
        self._clock = clock
        self._seconds = [0.0] * len(Phase)
        self._aside_s = [0.0] * len(Aside)
        self._aside: Aside | None = None
        self._since = clock()
        self.phase = Phase.OUTSIDE

    def enter(self, phase: Phase) -> None:
        """The main thread does this from now on."""
        now = self._clock()
        self._seconds[self.phase] += now - self._since
        if self._aside is not None:
            self._aside_s[self._aside] += now - self._since
            self._aside = None
            if self._sink is not None:
                self._sink.went_aside(*self._aside_s)
        self._since = now
        self.phase = phase

    def goes_aside(self, aside: Aside) -> None:
        """User code says, or shows, what it does, if it is between two steps; an evaluation stays one."""
        if self.phase is Phase.OUTSIDE and self._aside is not Aside.EVALUATION:
            self._aside = aside

    def ran_forward(self) -> None:
        """A prepared model ran forward."""
        if self.phase is Phase.FORWARD:
            self.enter(Phase.BACKWARD)
        else:
            self.goes_aside(Aside.EVALUATION)

    def committed(self, step: int) -> None:
        """The step in progress is over."""
        self.enter(Phase.OUTSIDE)
        if self._sink is not None:
            self._sink.timed(step, self._seconds)
        self._seconds = [0.0] * len(Phase)
