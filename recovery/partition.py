"""Cut a sequence of layers into stages so that the slowest one is as fast as can be: a minimax dynamic programme.

D[s][j] = min over i of max(D[s-1][i], cost of layers i .. j-1 on stage s), with stages that differ in width and speed and
have only so much memory (ElasWave's graph planner; PipeDream's partitioner, SOSP'19). Among cuts that are as good within a
tolerance, a second pass takes the one that moves the fewest bytes. Exact: the tests hold it against brute force.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elastic.domain import LayerProfile

Cuts = tuple[int, ...]
"""Where stages begin and end: S+1 numbers of layers, from 0 to the number of layers."""


@dataclass(frozen=True, slots=True)
class StageRoom:
    """What a stage has.

    Attributes:
        power: its workers' speeds together; 1.0 is one worker like that which measured the layers.
        memory_bytes: of each worker, for state and activations; 0: enough.
        in_flight: slots whose activations a worker holds at a time.
    """

    power: float
    memory_bytes: int = 0
    in_flight: int = 1


class Costs:
    """Sums over runs of layers."""

    def __init__(self, layers: Sequence[LayerProfile], shares: Sequence[float] | None = None) -> None:
        """`shares`: of the slots, how many pass each layer; None: all pass all."""
        self.count = len(layers)
        shares = shares or [1.0] * len(layers)
        self._seconds = _sums([s * (layer.forward_s + layer.backward_s) for layer, s in zip(layers, shares, strict=True)])
        self._state = _sums([layer.state_bytes for layer in layers])
        self._activations = _sums([layer.activation_bytes for layer in layers])

    def seconds(self, first: int, last: int) -> float:
        """Forward and backward of one slot."""
        return self._seconds[last] - self._seconds[first]

    def state_bytes(self, first: int, last: int) -> float:
        """Bytes of state."""
        return self._state[last] - self._state[first]

    def memory_bytes(self, first: int, last: int, in_flight: int) -> float:
        """Bytes of state, and of activations of some slots."""
        return self.state_bytes(first, last) + in_flight * (self._activations[last] - self._activations[first])


def partition(
    costs: Costs,
    rooms: Sequence[StageRoom],
    moved: Callable[[int, int, int], float] | None = None,
    tolerance: float = 0.02,
) -> Cuts | None:
    """Return the best cuts; None if the layers do not fit.

    Args:
        costs: of the layers, at least as many as stages. rooms: of the stages, in order.
        moved: (stage, first, last) -> bytes that have to be moved there if it gets these layers. None: the best cuts of all.
        tolerance: by which the slowest stage may be slower if that saves bytes.
    """
    limit = _best(costs, rooms)
    if limit is None:
        return None
    seconds, cuts = limit
    if moved is None:
        return cuts
    return _least_moved(costs, rooms, moved, seconds * (1 + tolerance)) or cuts


def _best(costs: Costs, rooms: Sequence[StageRoom]) -> tuple[float, Cuts] | None:
    """The least possible time of the slowest stage, and cuts that have it."""
    count, stages = costs.count, len(rooms)
    before: list[float] = [0.0] + [math.inf] * count
    choices: list[list[int]] = []
    for number, room in enumerate(rooms):
        now = [math.inf] * (count + 1)
        chosen = [0] * (count + 1)
        for last in range(number + 1, count - (stages - number - 1) + 1):
            for first in range(last - 1, number - 1, -1):
                cost = costs.seconds(first, last) / room.power
                if cost >= now[last] or _is_too_large(costs, room, first, last):
                    break  # and so is every longer run
                worst = max(before[first], cost)
                if worst < now[last]:
                    now[last], chosen[last] = worst, first
        before = now
        choices.append(chosen)
    if math.isinf(before[count]):
        return None
    return before[count], _traced(choices, count)


def _least_moved(
    costs: Costs, rooms: Sequence[StageRoom], moved: Callable[[int, int, int], float], limit_s: float
) -> Cuts | None:
    """Cuts that move the fewest bytes, with no stage slower than a limit; the faster one of equals."""
    count, stages = costs.count, len(rooms)
    before: list[tuple[float, float]] = [(0.0, 0.0)] + [(math.inf, math.inf)] * count
    choices: list[list[int]] = []
    for number, room in enumerate(rooms):
        now = [(math.inf, math.inf)] * (count + 1)
        chosen = [0] * (count + 1)
        for last in range(number + 1, count - (stages - number - 1) + 1):
            for first in range(last - 1, number - 1, -1):
                cost = costs.seconds(first, last) / room.power
                if cost > limit_s or _is_too_large(costs, room, first, last):
                    break
                total, worst = before[first]
                if math.isinf(total):
                    continue
                found = (total + moved(number, first, last), max(worst, cost))
                if found < now[last]:
                    now[last], chosen[last] = found, first
        before = now
        choices.append(chosen)
    return None if math.isinf(before[count][0]) else _traced(choices, count)


def _is_too_large(costs: Costs, room: StageRoom, first: int, last: int) -> bool:
    return bool(room.memory_bytes) and costs.memory_bytes(first, last, room.in_flight) > room.memory_bytes


def _traced(choices: Sequence[Sequence[int]], count: int) -> Cuts:
    cuts = [count]
    for chosen in reversed(choices):
        cuts.append(chosen[cuts[-1]])
    return tuple(reversed(cuts))


def _sums(values: Sequence[float]) -> list[float]:
    return list(itertools.accumulate(values, initial=0.0))
