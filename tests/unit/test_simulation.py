"""The simulated step: what a closed form says where there is one, and what must hold where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.domain import LayerProfile, Stage
from elastic.pipeline.actions import Action, ActionKind, Schedule, make_actions
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
    ranks = iter(range(sum(widths)))
    return [Stage(i, i + 1, tuple(next(ranks) for _ in range(width))) for i, width in enumerate(widths)]


@both
@given(stages=counts, slots=st.integers(1, 12), forward_s=costs, backward_s=costs)
def test_equal_stages_take_a_slots_time_for_each_slot_and_each_further_stage(
    schedule: Schedule, stages: int, slots: int, forward_s: float, backward_s: float
) -> None:
    prediction = predicted(schedule, [1] * stages, slots, LayerProfile(forward_s, backward_s))
    assert prediction.step_s == (slots + stages - 1) * (forward_s + backward_s)
    assert prediction.busy_s == (slots * (forward_s + backward_s),) * stages
    assert prediction.bubble == pytest.approx((stages - 1) / (slots + stages - 1))


@given(counts, st.integers(1, 12), st.data())
def test_all_at_half_the_speed_take_twice_as_long_and_one_sets_the_pace(
    stages: int, slots: int, data: st.DataObject
) -> None:
    for schedule in Schedule:
        halved = predicted(schedule, [1] * stages, slots, LayerProfile(1.0, 2.0), dict.fromkeys(range(stages), 0.5))
        assert halved.step_s == 2 * (slots + stages - 1) * 3.0
    slow = data.draw(st.integers(0, stages - 1))
    prediction = predicted(Schedule.GPIPE, [1] * stages, slots, LayerProfile(1.0, 2.0), {slow: 0.5})
    assert prediction.step_s == (2 * slots + stages - 1) * 3.0
    assert prediction.busy_s[slow] == 2 * slots * 3.0


@given(counts, st.integers(1, 12))
def test_1f1b_keeps_the_activations_of_as_many_slots_as_there_are_stages_ahead(stages: int, slots: int) -> None:
    layer = LayerProfile(1.0, 2.0, state_bytes=1000, activation_bytes=7)
    held = predicted(Schedule.ONE_F_ONE_B, [1] * stages, slots, layer).memory_bytes
    assert held == tuple(1000 + 7 * min(slots, stages - number) for number in range(stages))
    assert predicted(Schedule.GPIPE, [1] * stages, slots, layer).memory_bytes == (1000 + 7 * slots,) * stages


@both
@given(stages=counts, slots=st.integers(1, 8), latency_s=costs)
def test_a_slow_link_makes_a_step_longer(schedule: Schedule, stages: int, slots: int, latency_s: float) -> None:
    layer = LayerProfile(1.0, 2.0, output_bytes=8)
    near = predicted(schedule, [1] * stages, slots, layer)
    far = predicted(schedule, [1] * stages, slots, layer, link=Link(latency_s, 4.0))
    way_s = 2 * (stages - 1) * (latency_s + 8 / 4.0)  # of one slot, there and back
    assert far.step_s == near.step_s + way_s if slots == 1 else far.step_s >= near.step_s + way_s
    assert far.busy_s == near.busy_s


def test_a_message_has_the_size_of_the_boundary_it_crosses_both_ways() -> None:
    layers = [LayerProfile(1.0, 1.0, output_bytes=size) for size in (100, 8, 100, 100)]
    stages = [Stage(0, 2, (0,)), Stage(2, 4, (1,))]
    actions = make_actions(stages, [(0, 1)], Schedule.GPIPE)
    assert simulate(stages, actions, layers, link=Link(0.0, 4.0)).step_s == 8 * 1.0 + 2 * (8 / 4.0)


def test_the_workers_of_a_stage_take_a_ring_to_sum_up() -> None:
    layer = LayerProfile(1.0, 2.0, state_bytes=4 * 60)  # 60 of parameters, of gradients, and twice for Adam
    for width, sum_s in ((1, 0.0), (2, 0.5 + 2 * 60 / 2 / 10), (3, 0.5 + 2 * 60 * 2 / 3 / 10)):
        assert predicted(Schedule.GPIPE, [width], 6, layer, link=Link(0.5, 10.0)).step_s == 6 / width * 3.0 + sum_s


def test_lists_that_wait_for_each_other_are_refused() -> None:
    stages = staged([1, 1])
    actions = {
        0: [Action(ActionKind.RECEIVE_GRADIENT, 3, 0, 1), Action(ActionKind.SEND_OUTPUT, 3, 0, 1)],
        1: [Action(ActionKind.RECEIVE_INPUT, 3, 1, 0), Action(ActionKind.SEND_GRADIENT, 3, 1, 0)],
    }
    with pytest.raises(ValueError, match="rank 0 waits for ever to receive gradient of slot 3"):
        simulate(stages, actions, [LayerProfile()] * 2)
