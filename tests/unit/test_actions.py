"""The lists of actions: whole, in order, matched, and without a wait for ever, for any widths and any routes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.domain import Stage
from elastic.pipeline.actions import Action, ActionKind, Schedule, in_flight_max, make_actions

Routes = tuple[tuple[int, ...], ...]
Pipeline = tuple[tuple[Stage, ...], Routes, frozenset[int]]
Lists = Mapping[int, Sequence[Action]]

PASSES = {
    ActionKind.RECEIVE_INPUT: ActionKind.SEND_OUTPUT,
    ActionKind.RECEIVE_GRADIENT: ActionKind.SEND_GRADIENT,
}
both = pytest.mark.parametrize("schedule", list(Schedule))


def staged(widths: Sequence[int], order: Sequence[int] | None = None) -> tuple[Stage, ...]:
    """Stages of a layer each, with so many of the ranks."""
    left = iter(range(sum(widths)) if order is None else order)
    return tuple(Stage(i, i + 1, tuple(sorted(next(left) for _ in range(width)))) for i, width in enumerate(widths))


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """Stages, routes, empty slots."""
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    stages = staged(widths, draw(st.permutations(range(sum(widths)))))
    slots = draw(st.integers(1, 10))
    routes = tuple(tuple(draw(st.sampled_from(stage.ranks)) for stage in stages) for _ in range(slots))
    empty = draw(st.one_of(st.just(set[int]()), st.sets(st.integers(0, slots - 1))))
    return stages, routes, frozenset(empty)


def slots_of(actions: Sequence[Action], kind: ActionKind) -> list[int]:
    return [action.slot for action in actions if action.kind is kind]


def computed(actions: Sequence[Action]) -> str:
    """Forwards and backwards in words: F0 F1 B0."""
    letters = {ActionKind.FORWARD: "F", ActionKind.BACKWARD: "B"}
    return " ".join(f"{letters[action.kind]}{action.slot}" for action in actions if action.kind in letters)


def left_over(lists: Lists, stages: Sequence[Stage]) -> dict[int, Action]:
    """Let all ranks run until each has ended or waits; returns what is waited for. Nothing may be done before its time."""
    at = dict.fromkeys(lists, 0)
    done: set[tuple[int, Action]] = set()
    waits: dict[int, Action] = {}
    is_moving = True
    while is_moving:
        is_moving, waits = False, {}
        for rank, actions in lists.items():
            for action in actions[at[rank] :]:
                slot, number = action.slot, action.stage
                sent = Action(PASSES.get(action.kind, action.kind), slot, stages_of(stages)[action.peer], rank)
                if action.kind in PASSES and (action.peer, sent) not in done:
                    waits[rank] = action
                    break
                before = {earlier.kind for who, earlier in done if (who, earlier.slot) == (rank, slot)}
                match action.kind:
                    case ActionKind.FORWARD:
                        assert number == 0 or ActionKind.RECEIVE_INPUT in before
                    case ActionKind.BACKWARD:
                        assert ActionKind.FORWARD in before
                        assert number == len(stages) - 1 or ActionKind.RECEIVE_GRADIENT in before
                    case ActionKind.SEND_OUTPUT:
                        assert ActionKind.FORWARD in before
                    case ActionKind.SEND_GRADIENT:
                        assert ActionKind.BACKWARD in before
                done.add((rank, action))
                at[rank] += 1
                is_moving = True
    return waits


def stages_of(stages: Sequence[Stage]) -> dict[int, int]:
    """The number of each rank's stage; -1 of nobody's."""
    return {-1: -1} | {rank: number for number, stage in enumerate(stages) for rank in stage.ranks}


@both
@given(pipeline=pipelines())
def test_every_rank_runs_each_of_its_slots_once_and_then_takes_part_in_the_sum(
    schedule: Schedule, pipeline: Pipeline
) -> None:
    stages, routes, empty = pipeline
    lists = make_actions(stages, routes, schedule, empty)
    assert sorted(lists) == sorted(rank for stage in stages for rank in stage.ranks)
    for rank, actions in lists.items():
        number = stages_of(stages)[rank]
        own = [slot for slot, route in enumerate(routes) if route[number] == rank and slot not in empty]
        assert slots_of(actions, ActionKind.FORWARD) == own
        assert slots_of(actions, ActionKind.BACKWARD) == own, "the order of the sum is the order of the slots"
        assert {action.stage for action in actions} == {number}
        assert actions[-1] == Action(ActionKind.REDUCE, -1, number)
        assert slots_of(actions, ActionKind.REDUCE) == [-1]


@both
@given(pipeline=pipelines())
def test_what_is_sent_is_received_by_the_next_rank_on_the_slots_way(schedule: Schedule, pipeline: Pipeline) -> None:
    stages, routes, empty = pipeline
    lists = make_actions(stages, routes, schedule, empty)
    for receive, send in PASSES.items():
        is_input = receive is ActionKind.RECEIVE_INPUT
        sent = Counter((a.slot, rank, a.peer) for rank, actions in lists.items() for a in actions if a.kind is send)
        got = Counter((a.slot, a.peer, rank) for rank, actions in lists.items() for a in actions if a.kind is receive)
        hops = [
            (slot, *((behind, ahead) if is_input else (ahead, behind)))
            for slot, route in enumerate(routes)
            for behind, ahead in zip(route, route[1:], strict=False)
            if slot not in empty
        ]
        assert sent == got == Counter(hops)


@both
@given(pipeline=pipelines())
def test_all_ranks_come_to_the_end_of_their_lists(schedule: Schedule, pipeline: Pipeline) -> None:
    stages, routes, empty = pipeline
    assert left_over(make_actions(stages, routes, schedule, empty), stages) == {}


def test_the_check_above_sees_lists_that_wait_for_each_other() -> None:
    stages = staged([1, 1])
    lists = {rank: list(actions) for rank, actions in make_actions(stages, [(0, 1)], Schedule.GPIPE).items()}
    lists[0].insert(0, lists[0].pop(2))  # the gradient is waited for before the output is sent
    assert left_over(lists, stages) == {
        0: Action(ActionKind.RECEIVE_GRADIENT, 0, 0, 1),
        1: Action(ActionKind.RECEIVE_INPUT, 0, 1, 0),
    }


@given(pipelines())
def test_1f1b_never_has_more_slots_in_flight_than_it_may(pipeline: Pipeline) -> None:
    stages, routes, empty = pipeline
    for actions in make_actions(stages, routes, Schedule.ONE_F_ONE_B, empty).values():
        in_flight = 0
        for action in actions:
            in_flight += (action.kind is ActionKind.FORWARD) - (action.kind is ActionKind.BACKWARD)
            assert 0 <= in_flight <= in_flight_max(stages, action.stage, Schedule.ONE_F_ONE_B)


@given(pipelines())
def test_gpipe_does_all_forwards_first(pipeline: Pipeline) -> None:
    stages, routes, empty = pipeline
    for actions in make_actions(stages, routes, Schedule.GPIPE, empty).values():
        own = slots_of(actions, ActionKind.FORWARD)
        assert computed(actions).split() == [f"F{slot}" for slot in own] + [f"B{slot}" for slot in own]


@pytest.mark.parametrize("stages", range(1, 6))
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 9])
def test_1f1b_warms_up_as_long_as_the_stages_ahead_and_then_alternates(stages: int, slots: int) -> None:
    lists = make_actions(staged([1] * stages), [tuple(range(stages))] * slots, Schedule.ONE_F_ONE_B)
    for number, actions in lists.items():
        warm_up = min(slots, stages - number - 1)
        expected = [f"F{slot}" for slot in range(warm_up)]
        for slot in range(slots - warm_up):
            expected += [f"F{slot + warm_up}", f"B{slot}"]
        expected += [f"B{slot}" for slot in range(slots - warm_up, slots)]
        assert computed(actions) == " ".join(expected)


def test_two_stages_in_words() -> None:
    first, second = make_actions(staged([1, 1]), [(0, 1)] * 3, Schedule.ONE_F_ONE_B, empty=[1]).values()
    assert [f"{action.kind} {action.slot}" for action in first] == [
        *("forward 0", "send output 0", "forward 2", "send output 2"),
        *("receive gradient 0", "backward 0", "receive gradient 2", "backward 2", "reduce -1"),
    ]
    assert [f"{action.kind} {action.slot}" for action in second] == [
        *("receive input 0", "forward 0", "backward 0", "send gradient 0"),
        *("receive input 2", "forward 2", "backward 2", "send gradient 2", "reduce -1"),
    ]


@pytest.mark.parametrize(
    ("widths", "limits"),
    [([1, 1, 1, 1], [4, 3, 2, 1]), ([2, 2], [2, 1]), ([2, 1], [2, 2]), ([1, 3], [6, 1]), ([3, 2, 3], [3, 3, 1])],
)
def test_a_stage_with_fewer_ranks_may_have_more_slots_in_flight(widths: list[int], limits: list[int]) -> None:
    stages = staged(widths)
    assert [in_flight_max(stages, i, Schedule.ONE_F_ONE_B) for i in range(len(widths))] == limits
    assert all(in_flight_max(stages, i, Schedule.GPIPE) > 1_000_000 for i in range(len(widths)))
