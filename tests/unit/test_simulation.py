"""The simulated step: what a closed form says where there is one, and what must hold where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.domain import LayerProfile, Stage
from elastic.pipeline.actions import Action, ActionKind, Schedule, in_flight_max, make_actions
from recovery.simulation import Link, Prediction, simulate

both = pytest.mark.parametrize("schedule", list(Schedule))
counts = st.integers(1, 6)
costs = st.sampled_from([0.25, 1.0, 2.0, 3.0])  # binary fractions: sums are exact
FREE = Link(0.0, float("inf"))


def predicted(
    schedule: Schedule,
    widths: Sequence[int],
    slots: int,
    layer: LayerProfile,
    speeds: Mapping[int, float] | None = None,
    link: Link = FREE,
) -> Prediction:
    """Stages of one such layer each; the ranks of each take turns."""
    stages = staged(widths)
    routes = [tuple(stage.ranks[slot % len(stage.ranks)] for stage in stages) for slot in range(slots)]
    actions = make_actions(stages, routes, schedule)
    return simulate(stages, actions, [layer] * len(stages), speeds=speeds, link=link)


def staged(widths: Sequence[int]) -> list[Stage]:
    begins = [sum(widths[:number]) for number in range(len(widths))]
    return [
        Stage(i, i + 1, tuple(range(begin, begin + width)))
        for i, (begin, width) in enumerate(zip(begins, widths, strict=True))
    ]


@both
@given(stages=counts, slots=st.integers(1, 12), forward_s=costs, backward_s=costs)
def test_equal_stages_take_a_slots_time_for_each_slot_and_each_further_stage(
    schedule: Schedule, stages: int, slots: int, forward_s: float, backward_s: float
) -> None:
    prediction = predicted(schedule, [1] * stages, slots, LayerProfile(forward_s, backward_s))
    assert prediction.step_s == (slots + stages - 1) * (forward_s + backward_s)
    assert prediction.busy_s == (slots * (forward_s + backward_s),) * stages
    assert prediction.bubble == pytest.approx((stages - 1) / (slots + stages - 1))


@both
@given(stages=counts, slots=st.integers(1, 12), speed=st.sampled_from([0.25, 0.5, 2.0]))
def test_workers_of_half_the_speed_take_twice_as_long(schedule: Schedule, stages: int, slots: int, speed: float) -> None:
    layer = LayerProfile(1.0, 2.0)
    base = predicted(schedule, [1] * stages, slots, layer)
    scaled = predicted(schedule, [1] * stages, slots, layer, dict.fromkeys(range(stages), speed))
    assert scaled.step_s == base.step_s / speed


@given(counts, st.integers(1, 12), st.data())
def test_one_slow_worker_sets_the_pace_of_all(stages: int, slots: int, data: st.DataObject) -> None:
    slow = data.draw(st.integers(0, stages - 1))
    prediction = predicted(Schedule.GPIPE, [1] * stages, slots, LayerProfile(1.0, 2.0), {slow: 0.5})
    assert prediction.step_s == (2 * slots + stages - 1) * 3.0
    assert prediction.busy_s[slow] == 2 * slots * 3.0


@given(counts, st.integers(1, 12))
def test_1f1b_keeps_the_activations_of_as_many_slots_as_there_are_stages_ahead(stages: int, slots: int) -> None:
    layer = LayerProfile(1.0, 2.0, state_bytes=1000, activation_bytes=7)
    held = predicted(Schedule.ONE_F_ONE_B, [1] * stages, slots, layer).memory_bytes
    assert held == tuple(1000 + 7 * min(slots, stages - number) for number in range(stages))
    held = predicted(Schedule.GPIPE, [1] * stages, slots, layer).memory_bytes
    assert held == (1000 + 7 * slots,) * stages


@both
@given(stages=counts, slots=st.integers(1, 8), latency_s=costs)
def test_a_slow_link_makes_a_step_longer(schedule: Schedule, stages: int, slots: int, latency_s: float) -> None:
    layer = LayerProfile(1.0, 2.0, output_bytes=8)
    base = predicted(schedule, [1] * stages, slots, layer)
    late = predicted(schedule, [1] * stages, slots, layer, link=Link(latency_s, float("inf")))
    slow = predicted(schedule, [1] * stages, slots, layer, link=Link(latency_s, 4.0))
    hops = 2 * (stages - 1)
    assert late.step_s >= base.step_s + hops * latency_s  # the last slot's way at least
    assert slow.step_s >= late.step_s + hops * 2.0
    if slots == 1:
        assert slow.step_s == base.step_s + hops * (latency_s + 2.0)
    assert late.busy_s == slow.busy_s == base.busy_s


def test_a_message_has_the_size_of_the_boundary_it_crosses_both_ways() -> None:
    layers = [LayerProfile(1.0, 1.0, output_bytes=size) for size in (100, 8, 100, 100)]
    stages = [Stage(0, 2, (0,)), Stage(2, 4, (1,))]
    actions = make_actions(stages, [(0, 1)], Schedule.GPIPE)
    assert simulate(stages, actions, layers, link=Link(0.0, 4.0)).step_s == 8 * 1.0 + 2 * (8 / 4.0)


def test_the_workers_of_a_stage_take_a_ring_to_sum_up() -> None:
    layer = LayerProfile(1.0, 2.0, state_bytes=4 * 60)  # 60 of parameters, of gradients, and twice for Adam
    link = Link(0.5, 10.0)
    assert predicted(Schedule.GPIPE, [1], 6, layer, link=link).step_s == 6 * 3.0
    assert predicted(Schedule.GPIPE, [2], 6, layer, link=link).step_s == 3 * 3.0 + 0.5 + 2 * 60 / 2 / 10
    assert predicted(Schedule.GPIPE, [3], 6, layer, link=link).step_s == 2 * 3.0 + 0.5 + 2 * 60 * 2 / 3 / 10


@both
@given(widths=st.lists(st.integers(1, 3), min_size=1, max_size=4), slots=st.integers(1, 9))
def test_nobody_computes_longer_than_the_step_or_holds_more_than_may_be_in_flight(
    schedule: Schedule, widths: list[int], slots: int
) -> None:
    prediction = predicted(schedule, widths, slots, LayerProfile(1.0, 2.0, activation_bytes=1))
    assert max(prediction.busy_s) <= prediction.step_s
    assert sum(prediction.busy_s) == slots * len(widths) * 3.0
    assert 0 <= prediction.bubble < 1
    stages = staged(widths)
    for number, stage in enumerate(stages):
        most = min(in_flight_max(stages, number, schedule), -(-slots // len(stage.ranks)))
        assert all(prediction.memory_bytes[rank] <= most for rank in stage.ranks)


def test_lists_that_wait_for_each_other_are_refused() -> None:
    stages = staged([1, 1])
    actions = {
        0: [Action(ActionKind.RECEIVE_GRADIENT, 3, 0, 1), Action(ActionKind.SEND_OUTPUT, 3, 0, 1)],
        1: [Action(ActionKind.RECEIVE_INPUT, 3, 1, 0), Action(ActionKind.SEND_GRADIENT, 3, 1, 0)],
    }
    with pytest.raises(ValueError, match="rank 0 waits for ever to receive gradient of slot 3"):
        simulate(stages, actions, [LayerProfile()] * 2)
