"""Time, order and chance: the only clock of a simulated cluster, and what it remembers for people."""

from __future__ import annotations

import dataclasses
import heapq
from collections import deque
from collections.abc import Callable
from typing import Any

from elastic.domain import AgentHello, Plan

TRACE_KEPT = 60


class Violation(AssertionError):
    """A promise was broken; the text says which."""


class Clock:
    """Calls functions at their time; equal times in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def after(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        self.at(self.now + delay_s, call, *args)

    def at(self, time_s: float, call: Callable[..., None], *args: Any) -> None:
        self._count += 1
        heapq.heappush(self._heap, (time_s, self._count, call, args))

    def run(self, until_s: float, over: Callable[[], bool]) -> None:
        """Run until that time, or until `over` says so."""
        heap = self._heap
        while heap and heap[0][0] <= until_s and not over():
            self.now, _, call, args = heapq.heappop(heap)
            self.events += 1
            call(*args)


class Trace:
    """The last things that happened, formatted only if somebody wants to read them."""

    def __init__(self, clock: Clock, *, verbose: bool = False) -> None:
        self._clock = clock
        self._verbose = verbose
        self._kept: deque[tuple[float, str, tuple[Any, ...]]] = deque(maxlen=TRACE_KEPT)

    def note(self, text: str, *args: Any) -> None:
        if self._verbose:
            print(_line(self._clock.now, text, args))
        self._kept.append((self._clock.now, text, args))

    def lines(self) -> list[str]:
        return [_line(*entry) for entry in self._kept]


def _line(now: float, text: str, args: tuple[Any, ...]) -> str:
    return f"{now:9.4f}  {text % tuple(brief(arg) for arg in args) if args else text}"


def brief(value: Any) -> Any:
    """A message as a person would write it down: what is at its default is left out, plans are shortened."""
    if isinstance(value, Plan):
        members = " ".join(member.worker for member in value.members)
        return f"g{value.generation} {value.kind.name} [{members}]"
    if isinstance(value, AgentHello):
        return f"Hello({', '.join(str(brief(worker)) for worker in value.workers)})"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    shown = []
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        if field.name in ("spec", "loss", "samples", "pid", "local_rank") or content == field.default:
            continue
        shown.append(f"{field.name}={brief(content)}")
    return f"{type(value).__name__}({', '.join(shown)})"
