"""A process that can be stopped, continued, and killed between any two things that it does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from tests.sim.clock import Clock


class Died(Exception):
    """The process ended in the middle of what it was doing."""


class Process:
    """Base of everything that runs: while it is stopped, what happens to it waits; after its end, nothing happens."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.alive = True
        self.stopped = False
        self.dies_after_effects: int | None = None
        self._waiting: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()

    def post(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        """Call later, in this process."""
        self.clock.after(delay_s, self.run, call, *args)

    def run(self, call: Callable[..., None], *args: Any) -> None:
        """Call now, or when the process is continued; never after its end."""
        if not self.alive:
            return
        if self.stopped or self._waiting:
            self._waiting.append((call, args))
            return
        try:
            call(*args)
        except Died:
            return

    def spend_effect(self) -> None:
        """Die here if this is the effect at which the process was to die. Raises Died."""
        if not self.alive:
            raise Died
        if self.dies_after_effects is None:
            return
        self.dies_after_effects -= 1
        if self.dies_after_effects < 0:
            self.die_between_effects()
            raise Died

    def die_between_effects(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        self.stopped = True

    def go_on(self) -> None:
        """Continue, with everything that has come meanwhile in its order."""
        if not self.stopped:
            return
        self.stopped = False
        self.clock.after(0.0, self._catch_up)

    def _catch_up(self) -> None:
        while self._waiting and self.alive and not self.stopped:
            call, args = self._waiting.popleft()
            try:
                call(*args)
            except Died:
                return
