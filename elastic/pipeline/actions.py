"""What each worker of a pipeline does in a step, as a list of plain actions.

The lists are made by letting every worker act greedily in a step of unit costs: the next backward if its gradient is
there, else the next forward if its input is there and not too much is in flight. So an order exists in which they run
to their end, for any widths, routes and paths, and no list can wait for another for ever: slots begin in their order on every
rank, and one that has begun is never held up. Backwards come in the order of the slots, which is the order of the sum; a slot
that passes a stage by has its place in it, and adds nothing. A pure function of the plan: every worker makes the same lists.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from elastic.domain import Stage
from elastic.pipeline.paths import Path, Visit, all_visits

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
    PASS_BY = "pass by"
    """Nothing: the slot does not visit the stage. It has its place in the sum all the same."""
    REDUCE = "reduce"
    """The sum over the workers of the stage, once a step."""


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that one worker does.

    Attributes:
        slot: for which; -1 of a reduction.
        stage: the worker's.
        peer: the rank to send to or to receive from; -1 where nobody else is concerned.
        place: number of the visit on the slot's way; that of the stage where all go straight, -1 where nothing is visited.
    """

    kind: ActionKind
    slot: int
    stage: int
    peer: int = -1
    place: int = -1


def in_flight_max(stages: Sequence[Stage], number: int, schedule: Schedule, visits: int = 0) -> int:
    """How many slots a rank of a stage may have begun forward and not ended backward.

    With equal widths it is the number of stages from this one on (Megatron's 1F1B); a stage with fewer ranks than others
    serves more slots at a time. `visits` is how many the longest way has, where that is more than there are stages.
    """
    if schedule is Schedule.GPIPE:
        return 1 << 30
    widest = max(len(stage.ranks) for stage in stages)
    return math.ceil((max(visits, len(stages)) - number) * widest / len(stages[number].ranks))


@dataclass(slots=True)
class _Rank:
    """One worker while the lists are being made.

    Attributes:
        to_begin: the slots that it has not begun, in order. begun: visits of slots that it has begun, still to come.
        backwards: (slot, place) still to be done, in the order of the sum; place -1 of a slot that passes by.
        forwards_left: how many there still are.
    """

    stage: int
    to_begin: deque[int] = field(default_factory=deque)
    begun: list[tuple[int, int]] = field(default_factory=list)
    backwards: deque[tuple[int, int]] = field(default_factory=deque)
    forwards_left: int = 0
    in_flight: int = 0
    busy_until: int = 0
    actions: list[Action] = field(default_factory=list)


class _Maker:
    """Lets the workers act."""

    def __init__(
        self,
        stages: Sequence[Stage],
        routes: Sequence[Route],
        schedule: Schedule,
        empty: Collection[int],
        visits: Sequence[tuple[Visit, ...]],
    ) -> None:
        self._routes, self._schedule, self._visits = routes, schedule, visits
        self._ranks = {rank: _Rank(number) for number, stage in enumerate(stages) for rank in stage.ranks}
        longest = max((len(each) for each in visits), default=0)
        self._limits = [in_flight_max(stages, number, schedule, longest) for number in range(len(stages))]
        ways = {
            way: [tuple(place for place, visit in enumerate(way) if visit.stage == n) for n in range(len(stages))]
            for way in set(visits)
        }
        self._places_of = [ways[way] for way in visits]
        self._forward_at: dict[tuple[int, int], int] = {}  # (slot, place) -> when it is done
        self._backward_at: dict[tuple[int, int], int] = {}
        for slot, route in enumerate(routes):
            for number, rank in enumerate(route) if slot not in empty else ():
                places = self._places(slot, number)
                worker = self._ranks[rank]
                worker.backwards.extend((slot, place) for place in reversed(places or (-1,)))
                worker.forwards_left += len(places)
                if places:
                    worker.to_begin.append(slot)

    def _places(self, slot: int, stage: int) -> tuple[int, ...]:
        """The places at which a slot visits a stage."""
        return self._places_of[slot][stage]

    def run(self) -> dict[int, tuple[Action, ...]]:
        events = [(0, rank) for rank in sorted(self._ranks)]
        while events:
            now, rank = heapq.heappop(events)
            if self._ranks[rank].busy_until > now:
                continue
            for event in self._act(rank, now):
                heapq.heappush(events, event)
        for worker in self._ranks.values():
            assert not worker.backwards, "a pipeline's actions cannot be ordered: a fault of the runtime"
            worker.actions.append(Action(ActionKind.REDUCE, -1, worker.stage))
        return {rank: tuple(worker.actions) for rank, worker in sorted(self._ranks.items())}

    def _act(self, rank: int, now: int) -> list[tuple[int, int]]:
        """Do one thing if anything can be done; returns when to look at whom again."""
        worker = self._ranks[rank]
        while worker.backwards and worker.backwards[0][1] < 0:
            worker.actions.append(Action(ActionKind.PASS_BY, worker.backwards.popleft()[0], worker.stage))
        backward = self._next_backward(worker, now)
        if backward is not None:
            slot, place = backward
            worker.backwards.popleft()
            worker.in_flight -= place == self._places(slot, worker.stage)[0]
            worker.busy_until = self._backward_at[slot, place] = now + BACKWARD_COST
            worker.actions += self._around_backward(slot, place)
            behind = [self._rank_at(slot, place - 1)] if place else []
            return [(worker.busy_until, other) for other in (rank, *behind)]
        forward = self._next_forward(worker, now)
        if forward is None:
            return []
        slot, place = forward
        if (slot, place) in worker.begun:
            worker.begun.remove((slot, place))
        else:
            worker.to_begin.popleft()
            worker.begun += [(slot, later) for later in self._places(slot, worker.stage)[1:]]
            worker.in_flight += 1
        worker.forwards_left -= 1
        worker.busy_until = self._forward_at[slot, place] = now + FORWARD_COST
        worker.actions += self._around_forward(slot, place)
        ahead = [self._rank_at(slot, place + 1)] if place + 1 < len(self._visits[slot]) else []
        return [(worker.busy_until, other) for other in (rank, *ahead)]

    def _next_backward(self, worker: _Rank, now: int) -> tuple[int, int] | None:
        if not worker.backwards or (self._schedule is Schedule.GPIPE and worker.forwards_left):
            return None
        slot, place = worker.backwards[0]
        is_last = place + 1 == len(self._visits[slot])
        ready_at = self._forward_at.get((slot, place)) if is_last else self._backward_at.get((slot, place + 1))
        return (slot, place) if ready_at is not None and ready_at <= now else None

    def _next_forward(self, worker: _Rank, now: int) -> tuple[int, int] | None:
        """The next visit of a slot that has begun here, or the first one of the next slot."""
        for slot, place in worker.begun:
            if self._forward_at.get((slot, place - 1), now + 1) <= now:
                return slot, place
        if worker.to_begin and worker.in_flight < self._limits[worker.stage]:
            slot = worker.to_begin[0]
            place = self._places(slot, worker.stage)[0]
            if place == 0 or self._forward_at.get((slot, place - 1), now + 1) <= now:
                return slot, place
        return None

    def _rank_at(self, slot: int, place: int) -> int:
        return self._routes[slot][self._visits[slot][place].stage]

    def _around_forward(self, slot: int, place: int) -> list[Action]:
        number = self._visits[slot][place].stage
        actions = [Action(ActionKind.FORWARD, slot, number, -1, place)]
        if place:
            actions.insert(0, Action(ActionKind.RECEIVE_INPUT, slot, number, self._rank_at(slot, place - 1), place))
        if place + 1 < len(self._visits[slot]):
            actions.append(Action(ActionKind.SEND_OUTPUT, slot, number, self._rank_at(slot, place + 1), place))
        return actions

    def _around_backward(self, slot: int, place: int) -> list[Action]:
        number = self._visits[slot][place].stage
        actions = [Action(ActionKind.BACKWARD, slot, number, -1, place)]
        if place + 1 < len(self._visits[slot]):
            actions.insert(0, Action(ActionKind.RECEIVE_GRADIENT, slot, number, self._rank_at(slot, place + 1), place))
        if place:
            actions.append(Action(ActionKind.SEND_GRADIENT, slot, number, self._rank_at(slot, place - 1), place))
        return actions


def make_actions(
    stages: Sequence[Stage],
    routes: Sequence[Route],
    schedule: Schedule,
    empty: Collection[int] = (),
    paths: Sequence[Path] = (),
) -> dict[int, tuple[Action, ...]]:
    """Return the actions of each rank in one step.

    Args:
        stages: in order. routes: of each slot, the rank at each stage. schedule: how forwards and backwards alternate.
        empty: slots without samples, which are left out. paths: of each slot through the layers; none: straight.
    """
    visits = all_visits(stages, len(routes), paths)
    return _Maker(stages, routes, schedule, frozenset(empty), visits).run()
