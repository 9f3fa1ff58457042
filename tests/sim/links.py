"""Streams between two processes: first in, first out, late, and liable to be cut, silenced, or (hostile) garbled."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from tests.sim.clock import Clock


class End(Protocol):
    """A process at one end of a stream."""

    def run(self, call: Any, *args: Any) -> None: ...

    def on_message(self, stream: Stream, message: Any) -> None: ...

    def on_reset(self, stream: Stream, reason: str) -> None: ...


@dataclass(frozen=True)
class LinkQuality:
    """How bad a network is.

    Attributes:
        delay_s: Typical one-way time; single messages take up to twenty times as long.
        spike: Share of messages that are late.
        garbled: Share of messages of one stream that are lost; as many are doubled, and twice as many reordered.
    """

    delay_s: float = 0.002
    spike: float = 0.01
    garbled: float = 0.0


class Stream:
    """One connection; `ends` are told of its end at most once each."""

    def __init__(self, clock: Clock, random: Random, quality: LinkQuality, first: End, second: End) -> None:
        self.clock = clock
        self.random = random
        self.quality = quality
        self.ends = (first, second)
        self.open = [True, True]
        self.silent = False
        self._deaf: int | None = None  # the end to which nothing passes any more, while the other one is still heard
        self._arrives_at = [0.0, 0.0]  # the newest arrival at each end

    def _side(self, end: End) -> int:
        return 0 if end is self.ends[0] else 1

    def send(self, sender: End, message: Any) -> None:
        """Send to the other end; what is sent on a closed or silent stream is lost."""
        mine = self._side(sender)
        if self.silent or not self.open[mine] or self._deaf == 1 - mine:
            return
        copies = 1
        if self.quality.garbled:
            dice = self.random.random()
            copies = 0 if dice < self.quality.garbled else 2 if dice < 2 * self.quality.garbled else 1
        for _ in range(copies):
            self.clock.at(self._arrival(1 - mine), self._arrive, 1 - mine, message)

    def _arrival(self, to: int) -> float:
        """When what is sent now arrives; not before what was sent earlier, unless the stream is hostile."""
        delay_s = self.quality.delay_s * (0.5 + self.random.random())
        if self.random.random() < self.quality.spike:
            delay_s *= 20
        if self.quality.garbled:
            return self.clock.now + (delay_s * 10 if self.random.random() < 2 * self.quality.garbled else delay_s)
        self._arrives_at[to] = max(self._arrives_at[to], self.clock.now + delay_s)
        return self._arrives_at[to]

    def _arrive(self, to: int, message: Any) -> None:
        if self.open[to] and not self.silent:
            self.ends[to].run(self._hand_over, to, message)

    def _hand_over(self, to: int, message: Any) -> None:
        if self.open[to]:
            self.ends[to].on_message(self, message)

    def close(self, closer: End) -> None:
        """One end closes in order: the other gets everything that was sent, then the end."""
        mine = self._side(closer)
        if not self.open[mine]:
            return
        self.open[mine] = False
        lost = self.silent or self._deaf == 1 - mine
        at = self.clock.now + self.random.uniform(3.0, 12.0) if lost else self._arrival(1 - mine)
        self.clock.at(at, self._reset, 1 - mine, "closed by the other side")

    def die(self, dead: End) -> None:
        """The process at one end died: the other gets some of what was sent, then the end."""
        mine = self._side(dead)
        if self.random.random() < 0.5:
            self.close(dead)
            return
        self.open[mine] = False
        lost = self.silent or self._deaf == 1 - mine
        delay_s = self.random.uniform(3.0, 12.0) if lost else self.random.uniform(0.0, 0.02)
        self.clock.after(delay_s, self._reset, 1 - mine, "reset by the other side")

    def vanish(self, dead: End) -> None:
        """The machine at one end lost its power: the other end hears nothing at all for a long time."""
        self.silence(None)
        self.open[self._side(dead)] = False

    def cut(self) -> None:
        """Both ends see a reset, each in its own time."""
        for side in (0, 1):
            self.clock.after(self.random.uniform(0.0, 0.1), self._reset, side, "reset by the network")

    def silence(self, reset_after_s: float | None) -> None:
        """Nothing passes from now on; at last each end sees a reset."""
        self.silent = True
        for side in (0, 1):
            wait_s = (
                self.random.uniform(5.0, 20.0) if reset_after_s is None else reset_after_s * self.random.uniform(1, 2)
            )
            self.clock.after(wait_s, self._reset, side, "timed out")

    def deafen(self, side: int, reset_after_s: float) -> None:
        """Nothing reaches one end from now on, but it is heard; at last each end sees a reset."""
        self._deaf = side
        for end in (0, 1):
            self.clock.after(reset_after_s * self.random.uniform(1, 2), self._reset, end, "timed out")

    def hold(self, until_s: float) -> None:
        """Nothing arrives before that time, but nothing is lost: a short partition under TCP."""
        for side in (0, 1):
            self._arrives_at[side] = max(self._arrives_at[side], until_s)

    def _reset(self, side: int, reason: str) -> None:
        if self.open[side]:
            self.ends[side].run(self._tell_reset, side, reason)

    def _tell_reset(self, side: int, reason: str) -> None:
        if self.open[side]:
            self.open[side] = False
            self.ends[side].on_reset(self, reason)
