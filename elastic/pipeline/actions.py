"""What each worker of a pipeline does in a step, as a list of plain actions.

The lists are made by letting every worker act greedily in a step of unit costs: the next backward if its gradient is
there, else the next forward if its input is there and not too much is in flight. So an order exists in which they run
to their end, for any widths and routes, and no list can wait for another for ever. Backwards come in the order of the
slots, which is the order of the sum. A pure function of the plan: every worker makes the same lists.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from elastic.domain import Stage

Route = Sequence[int]
"""The rank that runs a slot at each stage, in order."""

FORWARD_COST, BACKWARD_COST = 1, 2


class Schedule(enum.StrEnum):
    """In which order a worker does the forwards and backwards of its slots."""

    GPIPE = "gpipe"
    """All forwards, then all backwards: the memory for every slot."""
    ONE_F_ONE_B = "1f1b"
    """A backward as soon as there is one: no more slots in flight than it takes to keep all stages busy."""


class ActionKind(enum.StrEnum):
    """What is done."""

    RECEIVE_INPUT = "receive input"
    FORWARD = "forward"
    SEND_OUTPUT = "send output"
    RECEIVE_GRADIENT = "receive gradient"
    BACKWARD = "backward"
    SEND_GRADIENT = "send gradient"
    REDUCE = "reduce"
    """The sum over the workers of the stage, once a step."""


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that one worker does.

    Attributes:
        slot: for which; -1 of a reduction.
        stage: the worker's.
        peer: the rank to send to or to receive from; -1 where nobody else is concerned.
    """

    kind: ActionKind
    slot: int
    stage: int
    peer: int = -1


def in_flight_max(stages: Sequence[Stage], number: int, schedule: Schedule) -> int:
    """How many slots a rank of a stage may have begun forward and not ended backward.

    With equal widths it is the number of stages from this one on (Megatron's 1F1B); a stage with fewer ranks than others
    serves more slots at a time.
    """
    if schedule is Schedule.GPIPE:
        return 1 << 30
    widest = max(len(stage.ranks) for stage in stages)
    return math.ceil((len(stages) - number) * widest / len(stages[number].ranks))


@dataclass(slots=True)
class _Rank:
    """One worker while the lists are being made."""

    stage: int
    slots: list[int] = field(default_factory=list)
    forwards: int = 0
    backwards: int = 0
    busy_until: int = 0
    actions: list[Action] = field(default_factory=list)


class _Maker:
    """Lets the workers act."""

    def __init__(
        self, stages: Sequence[Stage], routes: Sequence[Route], schedule: Schedule, empty: Collection[int]
    ) -> None:
        self._stages, self._routes, self._schedule = stages, routes, schedule
        self._ranks = {rank: _Rank(number) for number, stage in enumerate(stages) for rank in stage.ranks}
        for slot, route in enumerate(routes):
            for rank in route if slot not in empty else ():
                self._ranks[rank].slots.append(slot)
        self._limits = [in_flight_max(stages, number, schedule) for number in range(len(stages))]
        self._forward_at: dict[tuple[int, int], int] = {}  # (stage, slot) -> when it is done
        self._backward_at: dict[tuple[int, int], int] = {}

    def run(self) -> dict[int, tuple[Action, ...]]:
        events = [(0, rank) for rank in sorted(self._ranks)]
        while events:
            now, rank = heapq.heappop(events)
            if self._ranks[rank].busy_until > now:
                continue
            for event in self._act(rank, now):
                heapq.heappush(events, event)
        for worker in self._ranks.values():
            assert worker.backwards == len(worker.slots), (
                "a pipeline's actions cannot be ordered: a fault of the runtime"
            )
            worker.actions.append(Action(ActionKind.REDUCE, -1, worker.stage))
        return {rank: tuple(worker.actions) for rank, worker in sorted(self._ranks.items())}

    def _act(self, rank: int, now: int) -> list[tuple[int, int]]:
        """Do one thing if anything can be done; returns when to look at whom again."""
        worker = self._ranks[rank]
        number = worker.stage
        if worker.backwards < len(worker.slots):
            slot = worker.slots[worker.backwards]
            is_open = self._schedule is not Schedule.GPIPE or worker.forwards == len(worker.slots)
            ready = self._backward_at if number + 1 < len(self._stages) else self._forward_at
            key = (min(number + 1, len(self._stages) - 1), slot)
            if is_open and worker.forwards > worker.backwards and ready.get(key, now + 1) <= now:
                worker.backwards += 1
                worker.busy_until = self._backward_at[number, slot] = now + BACKWARD_COST
                route = self._routes[slot]
                worker.actions += self._around_backward(slot, number, route)
                behind = [route[number - 1]] if number else []
                return [(worker.busy_until, other) for other in (rank, *behind)]
        if worker.forwards < len(worker.slots) and worker.forwards - worker.backwards < self._limits[number]:
            slot = worker.slots[worker.forwards]
            if number == 0 or self._forward_at.get((number - 1, slot), now + 1) <= now:
                worker.forwards += 1
                worker.busy_until = self._forward_at[number, slot] = now + FORWARD_COST
                route = self._routes[slot]
                worker.actions += self._around_forward(slot, number, route)
                ahead = [route[number + 1]] if number + 1 < len(route) else []
                return [(worker.busy_until, other) for other in (rank, *ahead)]
        return []

    def _around_forward(self, slot: int, number: int, route: Route) -> list[Action]:
        actions = [Action(ActionKind.FORWARD, slot, number)]
        if number:
            actions.insert(0, Action(ActionKind.RECEIVE_INPUT, slot, number, route[number - 1]))
        if number + 1 < len(route):
            actions.append(Action(ActionKind.SEND_OUTPUT, slot, number, route[number + 1]))
        return actions

    def _around_backward(self, slot: int, number: int, route: Route) -> list[Action]:
        actions = [Action(ActionKind.BACKWARD, slot, number)]
        if number + 1 < len(route):
            actions.insert(0, Action(ActionKind.RECEIVE_GRADIENT, slot, number, route[number + 1]))
        if number:
            actions.append(Action(ActionKind.SEND_GRADIENT, slot, number, route[number - 1]))
        return actions


def make_actions(
    stages: Sequence[Stage], routes: Sequence[Route], schedule: Schedule, empty: Collection[int] = ()
) -> dict[int, tuple[Action, ...]]:
    """Return the actions of each rank in one step.

    Args:
        stages: in order. routes: of each slot, through all of them. schedule: how forwards and backwards alternate.
        empty: slots without samples, which are left out.
    """
    return _Maker(stages, routes, schedule, frozenset(empty)).run()
