"""The lists of actions: whole, in order, matched, and without a wait for ever, for any widths and any routes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.domain import Stage
from elastic.pipeline.actions import Action, ActionKind, Schedule, in_flight_max, make_actions
from elastic.pipeline.paths import Visit, all_visits, fault_of, visits_of

Pipeline = tuple[tuple[Stage, ...], tuple[tuple[int, ...], ...], frozenset[int]]

SENT_BY = {ActionKind.RECEIVE_INPUT: ActionKind.SEND_OUTPUT, ActionKind.RECEIVE_GRADIENT: ActionKind.SEND_GRADIENT}
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
    return stages, routes, draw(st.one_of(st.just(frozenset[int]()), st.frozensets(st.integers(0, slots - 1))))


def slots_of(actions: Sequence[Action], kind: ActionKind) -> list[int]:
    return [action.slot for action in actions if action.kind is kind]


def computed(actions: Sequence[Action]) -> list[str]:
    """Forwards and backwards in words: F0 F1 B0."""
    letters = {ActionKind.FORWARD: "F", ActionKind.BACKWARD: "B"}
    return [f"{letters[action.kind]}{action.slot}" for action in actions if action.kind in letters]


def kinds_at(number: int, stages: int) -> list[ActionKind]:
    """What is done for a slot at a stage, in order; nothing comes from before the first or from behind the last."""
    first = {ActionKind.RECEIVE_INPUT, ActionKind.SEND_GRADIENT} if number == 0 else set()
    last = {ActionKind.SEND_OUTPUT, ActionKind.RECEIVE_GRADIENT} if number == stages - 1 else set()
    return [kind for kind in ActionKind if kind not in {ActionKind.PASS_BY, ActionKind.REDUCE} | first | last]


def sender_of(receives: Action) -> tuple[int, ActionKind, int, int]:
    """Rank, kind, slot and place of the action that sends what another receives."""
    from_before = receives.kind is ActionKind.RECEIVE_INPUT
    return receives.peer, SENT_BY[receives.kind], receives.slot, receives.place + (-1 if from_before else 1)


def waited_for(lists: Mapping[int, Sequence[Action]]) -> dict[int, Action]:
    """Let all ranks run until each has ended or waits; returns for what."""
    left = {rank: list(actions) for rank, actions in lists.items()}
    done: set[tuple[int, ActionKind, int, int]] = set()  # rank, kind, slot, place
    is_moving = True
    while is_moving:
        is_moving = False
        for rank, actions in left.items():
            while actions and ((a := actions[0]).kind not in SENT_BY or sender_of(a) in done):
                done.add((rank, a.kind, a.slot, a.place))
                del actions[0]
                is_moving = True
    return {rank: actions[0] for rank, actions in left.items() if actions}


@both
@given(pipeline=pipelines())
def test_every_rank_runs_each_of_its_slots_once_and_then_joins_the_sum(schedule: Schedule, pipeline: Pipeline) -> None:
    stages, routes, empty = pipeline
    lists = make_actions(stages, routes, schedule, empty)
    assert sorted(lists) == sorted(rank for stage in stages for rank in stage.ranks)
    for number, stage in enumerate(stages):
        for rank in stage.ranks:
            own = [slot for slot, route in enumerate(routes) if route[number] == rank and slot not in empty]
            assert slots_of(lists[rank], ActionKind.BACKWARD) == own, "the order of the sum is the order of the slots"
            for slot in range(len(routes)):
                done = [action.kind for action in lists[rank] if action.slot == slot]
                assert done == (kinds_at(number, len(stages)) if slot in own else [])
            assert {action.stage for action in lists[rank]} == {number}
            assert lists[rank][-1] == Action(ActionKind.REDUCE, -1, number)
            assert slots_of(lists[rank], ActionKind.REDUCE) == [-1]


@both
@given(pipeline=pipelines())
def test_what_is_sent_is_received_by_the_next_rank_and_nobody_waits_for_ever(
    schedule: Schedule, pipeline: Pipeline
) -> None:
    stages, routes, empty = pipeline
    lists = make_actions(stages, routes, schedule, empty)
    hops = [(slot, *hop) for slot, route in enumerate(routes) if slot not in empty for hop in pairwise(route)]
    for receive, send in SENT_BY.items():
        sent = Counter((a.slot, rank, a.peer) for rank, actions in lists.items() for a in actions if a.kind is send)
        got = Counter((a.slot, a.peer, rank) for rank, actions in lists.items() for a in actions if a.kind is receive)
        assert sent == got == Counter(hops)
        hops = [(slot, ahead, behind) for slot, behind, ahead in hops]  # gradients go back
    assert waited_for(lists) == {}


def test_the_check_above_sees_lists_that_wait_for_each_other() -> None:
    made = make_actions(staged([1, 1]), [(0, 1)], Schedule.GPIPE)
    first = list(made[0])
    first.insert(0, first.pop(2))  # the gradient is waited for before the output is sent
    waits = {0: Action(ActionKind.RECEIVE_GRADIENT, 0, 0, 1, 0), 1: Action(ActionKind.RECEIVE_INPUT, 0, 1, 0, 1)}
    assert waited_for({0: first, 1: made[1]}) == waits


@given(pipelines())
def test_gpipe_does_all_forwards_first_and_1f1b_never_has_more_slots_in_flight_than_it_may(pipeline: Pipeline) -> None:
    stages, routes, empty = pipeline
    for actions in make_actions(stages, routes, Schedule.GPIPE, empty).values():
        own = slots_of(actions, ActionKind.FORWARD)
        assert computed(actions) == [f"F{slot}" for slot in own] + [f"B{slot}" for slot in own]
    for actions in make_actions(stages, routes, Schedule.ONE_F_ONE_B, empty).values():
        in_flight = 0
        for action in actions:
            in_flight += (action.kind is ActionKind.FORWARD) - (action.kind is ActionKind.BACKWARD)
            assert 0 <= in_flight <= in_flight_max(stages, action.stage, Schedule.ONE_F_ONE_B)


@pytest.mark.parametrize("stages", range(1, 6))
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 9])
def test_1f1b_warms_up_as_long_as_the_stages_ahead_and_then_alternates(stages: int, slots: int) -> None:
    lists = make_actions(staged([1] * stages), [tuple(range(stages))] * slots, Schedule.ONE_F_ONE_B)
    for number, actions in lists.items():
        warm_up = min(slots, stages - number - 1)
        expected = [f"F{slot}" for slot in range(warm_up)]
        for slot in range(slots - warm_up):
            expected += [f"F{slot + warm_up}", f"B{slot}"]
        assert computed(actions) == expected + [f"B{slot}" for slot in range(slots - warm_up, slots)]


def test_a_stage_with_fewer_ranks_may_have_more_slots_in_flight() -> None:
    limits = {(1, 1, 1, 1): [4, 3, 2, 1], (2, 2): [2, 1], (2, 1): [2, 2], (1, 3): [6, 1], (3, 2, 3): [3, 3, 1]}
    for widths, expected in limits.items():
        assert [in_flight_max(staged(widths), i, Schedule.ONE_F_ONE_B) for i in range(len(widths))] == expected
        assert in_flight_max(staged(widths), 0, Schedule.GPIPE) > 1_000_000


@st.composite
def pathed(draw: st.DrawFn) -> tuple[Pipeline, tuple[tuple[int, ...], ...]]:
    """A pipeline with several layers in some stages, and a path for each slot: any layers in any order between the ends."""
    stages, routes, empty = draw(pipelines())
    counts = [draw(st.integers(1, 3)) for _ in stages]
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    cut = tuple(Stage(end - count, end, s.ranks) for s, count, end in zip(stages, counts, ends, strict=True))
    between = list(range(1, ends[-1] - 1))
    paths = []
    for _ in routes:
        chosen = draw(st.permutations(between))[: draw(st.integers(0, len(between)))] if between else []
        paths.append(tuple(dict.fromkeys((0, *chosen, ends[-1] - 1))))
    return (cut, routes, empty), tuple(paths)


def test_a_path_is_cut_into_visits() -> None:
    stages = (Stage(0, 2, (0,)), Stage(2, 4, (1,)), Stage(4, 6, (2,)))
    assert visits_of(stages) == (Visit(0, (0, 1)), Visit(1, (2, 3)), Visit(2, (4, 5)))
    swapped = visits_of(stages, (0, 2, 1, 3, 4, 5))
    assert swapped == (Visit(0, (0,)), Visit(1, (2,)), Visit(0, (1,)), Visit(1, (3,)), Visit(2, (4, 5)))
    assert visits_of(stages, (0, 1, 5)) == (Visit(0, (0, 1)), Visit(2, (5,)))
    assert visits_of(stages, (0, 1, 3, 5))[1:] == (Visit(1, (3,)), Visit(2, (5,)))
    assert fault_of((0, 2, 1, 3), 4) == fault_of((0, 3), 4) == fault_of((0,), 1) == ""
    assert "does not lead" in fault_of((1, 0, 3), 4) and "twice" in fault_of((0, 1, 1, 3), 4)


@both
@given(pathed())
def test_on_any_paths_each_visit_is_run_once_in_the_order_of_the_sum_and_nobody_waits_for_ever(
    schedule: Schedule, drawn: tuple[Pipeline, tuple[tuple[int, ...], ...]]
) -> None:
    (stages, routes, empty), paths = drawn
    lists = make_actions(stages, routes, schedule, empty, paths)
    visits = all_visits(stages, len(routes), paths)
    for rank, actions in lists.items():
        number = next(n for n, stage in enumerate(stages) if rank in stage.ranks)
        own = [slot for slot, route in enumerate(routes) if route[number] == rank and slot not in empty]
        expected = []
        for slot in own:
            places = [place for place, visit in enumerate(visits[slot]) if visit.stage == number]
            expected += [(slot, place) for place in reversed(places)] or [(slot, -1)]
        kinds = (ActionKind.BACKWARD, ActionKind.PASS_BY)
        assert [(a.slot, a.place) for a in actions if a.kind in kinds] == expected
        forwards = [(a.slot, a.place) for a in actions if a.kind is ActionKind.FORWARD]
        assert sorted(forwards) == sorted(each for each in expected if each[1] >= 0)
    assert waited_for(lists) == {}


@given(pathed())
def test_straight_paths_are_as_good_as_none(drawn: tuple[Pipeline, tuple[tuple[int, ...], ...]]) -> None:
    (stages, routes, empty), _ = drawn
    straight = [tuple(range(stages[-1].last))] * len(routes)
    for schedule in Schedule:
        assert make_actions(stages, routes, schedule, empty, straight) == make_actions(stages, routes, schedule, empty)
