"""How a pipeline is cut anew: who holds what before and after, what has to move, and when nothing does."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elastic.domain import LayerMove, LayerProfile, Member, Plan, Stage
from elastic.pipeline.actions import Schedule
from elastic.pipeline.moves import fill, handovers, moves
from recovery.dealing import deal_afresh
from recovery.pipelines import Layout, Model, NoLayout, as_it_is, held_in, lay_out, rerouted

MIB = 1 << 20
Held = dict[int, range]
Situation = tuple[Model, int, Held, dict[int, float]]


def model_of(seconds: Sequence[float], *, slots: int = 8, memory: int = 0, stages: int = 0) -> Model:
    """Layers of 10 MiB of state and one of activations; memory of a worker in MiB."""
    layers = [LayerProfile(second, 2 * second, 10 * MIB, MIB) for second in seconds]
    return Model(tuple(layers), slots, min(2, slots), stages, memory * MIB)


def laid_out(model: Model, ranks: int, held: Held | None = None, speeds: Mapping[int, float] | None = None) -> Layout:
    layout = lay_out(model, ranks, held, speeds)
    assert isinstance(layout, Layout)
    return layout


def held_of(stages: Sequence[Stage]) -> Held:
    return {rank: range(stage.first, stage.last) for stage in stages for rank in stage.ranks}


def cuts_of(layout: Layout) -> list[int]:
    return [0, *(stage.last for stage in layout.stages)]


def members_of(names: Sequence[str]) -> tuple[Member, ...]:
    return tuple(Member(worker=name, rank=rank) for rank, name in enumerate(names))


def check(layout: Layout, model: Model, ranks: int) -> None:
    """Each layer in one stage, each rank in one, and each slot's way through a rank of each."""
    stages = layout.stages
    assert [layer for s in stages for layer in range(s.first, s.last)] == list(range(len(model.layers)))
    assert all(stage.first < stage.last and stage.ranks for stage in stages)
    assert sorted(rank for stage in stages for rank in stage.ranks) == list(range(ranks))
    for number, stage in enumerate(stages):
        visits = Counter(route[number] for route in layout.routes)
        loads = [visits[rank] for rank in stage.ranks]
        assert sum(loads) == len(layout.routes) == model.slots
        assert layout.dealing or max(loads) - min(loads) <= 1
    assert Plan(owners=layout.owners, stages=stages, routes=layout.flat_routes).all_routes() == layout.routes


@st.composite
def models(draw: st.DrawFn) -> Model:
    cost, size = st.integers(1, 9), st.integers(0, 9)
    layer = st.builds(LayerProfile, cost.map(float), cost.map(float), size, size, size)
    layers, slots = draw(st.lists(layer, min_size=1, max_size=7)), draw(st.integers(1, 8))
    replicas, stages = draw(st.integers(1, slots)), draw(st.integers(0, 4))
    return Model(tuple(layers), slots, replicas, stages, schedule=draw(st.sampled_from(Schedule)))


@st.composite
def stagings(draw: st.DrawFn, layers: int, ranks: int) -> tuple[Stage, ...]:
    """Any stages of so many ranks."""
    count = draw(st.integers(1, min(layers, ranks)))
    inner = draw(st.permutations(range(1, layers)))[: count - 1]
    order = draw(st.permutations(range(ranks)))
    seats = [[rank] for rank in order[:count]]
    for rank in order[count:]:
        draw(st.sampled_from(seats)).append(rank)
    runs = pairwise([0, *sorted(inner), layers])
    return tuple(Stage(*run, tuple(sorted(ranks))) for run, ranks in zip(runs, seats, strict=True))


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """What is to be cut, among how many, what some of them hold, and how fast some are."""
    model, ranks = draw(models()), draw(st.integers(1, 6))
    before = held_of(draw(stagings(len(model.layers), ranks)))
    held = {rank: before[rank] for rank in draw(st.sets(st.sampled_from(range(ranks))))}
    return model, ranks, held, draw(st.dictionaries(st.integers(0, ranks - 1), st.sampled_from([0.5, 2.0])))


@st.composite
def changes(draw: st.DrawFn) -> tuple[Plan, Plan]:
    """A world and the next one, of which at least one worker is in both; any stages, any order of ranks."""
    layers = draw(st.integers(1, 8))
    staying = draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True))
    leaving = draw(st.lists(st.sampled_from("efgh"), unique=True))
    joining = draw(st.lists(st.sampled_from("ijkl"), unique=True))
    plans = []
    for names in (staying + leaving, staying + joining):
        members = members_of(draw(st.permutations(names)))
        plans.append(Plan(members=members, stages=draw(stagings(layers, len(members)))))
    return plans[0], plans[1]


def carried(before: Plan, after: Plan) -> dict[str, set[int]]:
    """All that each worker of the next world has had in hand once the layers have gone their way; nothing goes twice."""
    hands = {member.worker: set(before.layers_of(member.rank)) for member in before.members}
    hands |= {worker: set() for worker in after.workers() - before.workers()}
    for world, found in ((before, handovers(before, after)), (after, moves(before, after))):
        for move in found:
            layers = set(range(move.first, move.last))
            assert layers and move.sources and move.targets
            assert all(layers <= hands[world.members[rank].worker] for rank in move.sources), "gives what it has not"
            for rank in move.targets:
                worker = world.members[rank].worker
                assert worker in after.workers(), "goes to one who leaves"
                assert not layers & hands[worker], "has it already"
                assert world is before or layers <= set(after.layers_of(rank)), "moves for nothing"
                hands[worker] |= layers
    return {worker: hands[worker] for worker in after.workers()}


@example((model_of([1.0] * 4, slots=4), 6, {}, {}))  # two layouts that are as good
@given(situations())
def test_whatever_is_held_each_layer_and_each_rank_is_in_one_stage(situation: Situation) -> None:
    model, ranks, held, speeds = situation
    layout = laid_out(model, ranks, held, speeds)
    check(layout, model, ranks)
    gets = held_of(layout.stages).items() if held else ()
    missing = [layer for rank, layers in gets for layer in layers if layer not in held.get(rank, ())]
    assert layout.moved_bytes == sum(model.layers[layer].state_bytes for layer in missing)


def test_a_slow_rank_gets_fewer_layers() -> None:
    model = model_of([1.0] * 9)
    assert cuts_of(laid_out(model, 3)) == [0, 3, 6, 9]
    assert cuts_of(laid_out(model, 3, None, {1: 0.25})) == [0, 4, 5, 9]


@pytest.mark.parametrize("slow", range(4))
def test_with_a_slow_rank_no_cut_is_much_faster_than_the_one_taken(slow: int) -> None:
    """Many have a slowest stage that is as slow; a slot passes some of them sooner."""
    model, speeds = model_of([1.0 + 0.01 * (number % 3) for number in range(12)]), {slow: 0.5}
    layout = laid_out(model, 4, {rank: range(3 * rank, 3 * rank + 3) for rank in range(4)}, speeds)

    def step_s(cuts: Iterable[int]) -> float:
        runs = enumerate(pairwise((0, *cuts, 12)))
        return as_it_is(model, [Stage(*run, (rank,)) for rank, run in runs], layout.routes, speeds).step_s

    best_s = min(map(step_s, itertools.combinations(range(1, 12), 3)))
    assert layout.prediction.step_s <= 1.03 * best_s


def test_a_slow_rank_keeps_enough_for_its_speed_to_be_measured() -> None:
    model = model_of([0.01, *([1.0] * 12), 0.01])
    held = {0: range(0, 4), 1: range(4, 7), 2: range(7, 10), 3: range(10, 14)}
    assert cuts_of(laid_out(model, 4, held, {3: 0.5})) == [0, 5, 9, 12, 14], "not the last layer alone"


@given(models(), st.data())
def test_slots_are_dealt_anew_and_stages_stay(model: Model, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 8))
    stages = data.draw(stagings(len(model.layers), ranks))
    layout = rerouted(model, stages, "b is lost")
    check(layout, model, ranks)
    assert layout.stages == stages and layout.moved_bytes == 0
    assert layout.reason.startswith(f"b is lost; {len(stages)} stage(s) of layers 0-{stages[0].last - 1}")


def test_a_slow_one_of_a_stage_gets_fewer_slots() -> None:
    """Where its layers cannot go elsewhere, since another worker holds the same."""
    model, stages = model_of([1.0] * 4, slots=9), (Stage(0, 2, (0, 1)), Stage(2, 4, (2, 3)))
    layout = rerouted(model, stages, "measured anew", {0: 0.5})
    loads = Counter(route[0] for route in layout.routes)
    assert (loads[0], loads[1]) == (3, 6) and layout.dealing == "slots are dealt by speed"
    even = as_it_is(model, stages, rerouted(model, stages, "even").routes, {0: 0.5})
    assert layout.prediction.step_s < 0.85 * even.step_s


@pytest.mark.parametrize("widths", [(2, 1), (1, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("seconds", [(4.0, 1.0), (1.0, 4.0), (1.0, 1.0)])
def test_of_all_ways_to_deal_slots_the_one_that_is_simulated_fastest_is_taken(
    seconds: tuple[float, float], widths: tuple[int, int]
) -> None:
    """Evenly in runs, in turns, or to the replicas that are whole, so that somebody has none."""
    model = model_of(seconds, slots=6)
    stages = (Stage(0, 1, tuple(range(widths[0]))), Stage(1, 2, tuple(range(widths[0], sum(widths)))))
    layout = rerouted(model, stages, "b is lost")
    ways = [[deal_afresh(6, 2, stage.ranks[:width]) for stage in stages] for width in (max(widths), min(widths))]
    ways.append([tuple(stage.ranks[slot % len(stage.ranks)] for slot in range(6)) for stage in stages])
    best_s = min(as_it_is(model, stages, tuple(zip(*dealt, strict=True)), {}).step_s for dealt in ways)
    assert layout.prediction.step_s <= best_s * 1.02


@pytest.mark.parametrize(
    ("seconds", "ranks", "stages"),
    [
        *(([1.0] * 8, 4, 4), ([1.0] * 9, 3, 3), ([1.0] * 6, 6, 3), ([1.0] * 12, 8, 4), ([1.0] * 100, 2, 2)),
        ([1.0] * 8 + [8.0] * 2, 3, 3),
    ],
)
def test_nothing_moves_if_the_present_cut_is_nearly_the_best(seconds: list[float], ranks: int, stages: int) -> None:
    first = laid_out(model_of(seconds, stages=stages), ranks)
    measured_anew = [second * (1.03 if 2 * layer < len(seconds) else 1.0) for layer, second in enumerate(seconds)]
    anew = model_of(measured_anew, stages=stages)
    layout = laid_out(anew, ranks, held_of(first.stages))
    assert layout.stages == first.stages and layout.reason.endswith("; 0.0 MiB of state move")


@given(changes())
def test_after_all_moves_everybody_holds_what_is_its_own(change: tuple[Plan, Plan]) -> None:
    before, after = change
    for worker, layers in carried(before, after).items():
        own = set(after.layers_of(after.rank_of(worker) or 0))
        assert own <= layers
        assert own == layers or worker in before.workers(), "a joiner is given its own and nothing else"


@given(changes())
def test_leavers_hand_over_what_nobody_else_has_to_one_who_needs_it_if_any_does(change: tuple[Plan, Plan]) -> None:
    before, after = change
    stays = {old.rank: new.rank for old in before.members for new in after.members if old.worker == new.worker}
    orphans = [stage for stage in before.stages if not set(stage.ranks) & set(stays)]
    handed = [(layer, *move.targets) for move in handovers(before, after) for layer in range(move.first, move.last)]
    assert [layer for layer, _ in handed] == [layer for s in orphans for layer in range(s.first, s.last)]
    for layer, target in handed:
        needy = [old for old, new in stays.items() if layer in after.layers_of(new)]
        assert target in (needy or stays)


def test_layers_that_go_the_same_way_go_as_one() -> None:
    before = Plan(members=members_of("a"), stages=(Stage(0, 6, (0,)),))
    after = Plan(members=members_of("abc"), stages=(Stage(0, 2, (0,)), Stage(2, 6, (1, 2))))
    assert (handovers(before, after), moves(before, after)) == ((), (LayerMove(2, 6, (0,), (1, 2)),))
    assert (handovers(after, before), moves(after, before)) == ((LayerMove(2, 6, (1, 2), (0,)),), ())


@given(st.data())
def test_within_each_stage_those_who_hold_nothing_are_given_all_of_it(data: st.DataObject) -> None:
    stages = data.draw(stagings(data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))))
    order = data.draw(st.permutations([rank for stage in stages for rank in stage.ranks[1:]]))
    without = order[: data.draw(st.integers(0, len(order)))]  # of each stage one is left
    filled = fill(Plan(stages=stages), without)
    assert sorted(rank for move in filled for rank in move.targets) == sorted(without)
    for move in filled:
        assert move.sources and not set(move.sources) & set(without)
        assert Stage(move.first, move.last, tuple(sorted(move.sources + move.targets))) in stages


def planned(model: Model, names: str, before: Plan | None = None) -> Plan:
    held = held_in(before, names) if before is not None else None
    return Plan(members=members_of(names), stages=laid_out(model, len(names), held).stages)


@pytest.mark.parametrize("worlds", ["abc bcd", "ab abcde", "abcd d", "abcdef fedcba", "abc cxy", "abcde ace acef"])
def test_worlds_that_follow_each_other_hold_what_is_theirs(worlds: str) -> None:
    model, (first, *others) = model_of([1.0, 2.0, 1.5, 0.5, 3.0, 1.0, 2.5]), worlds.split()
    plan = planned(model, first)
    for names in others:
        before, plan = plan, planned(model, names, plan)
        for worker, layers in carried(before, plan).items():
            assert set(plan.layers_of(names.index(worker))) <= layers


def test_layers_too_large_for_one_worker_wait_for_more_and_one_that_fits_nowhere_is_named() -> None:
    model = model_of([1.0] * 4, memory=25)
    assert lay_out(model, 1) == NoLayout(
        "4 layers do not fit into 1 stage(s) of workers with 25 MiB: more workers are needed"
    )
    assert laid_out(model, 4).prediction.memory_bytes == (14 * MIB, 13 * MIB, 12 * MIB, 11 * MIB)
    layers = (LayerProfile(1.0, 2.0, 5 * MIB), LayerProfile(1.0, 2.0, 25 * MIB, MIB))
    layout = lay_out(replace(model, layers=layers), 2)
    assert isinstance(layout, NoLayout) and layout.is_final
    assert layout.reason.startswith("layer 1 needs 26 MiB with one slot's activations, and a worker has 25: it fits no")


def test_what_fits_at_rest_and_not_while_layers_move_is_no_layout() -> None:
    model = model_of([1.0] * 6, memory=38)  # three layers and two slots in flight are 36 MiB
    held = {0: range(2, 4), 1: range(4, 6)}  # whoever had 0 and 1 has left: 0, 1 come to rank 0 before 3 goes
    assert cuts_of(laid_out(model, 2)) == [0, 3, 6]
    why = "layers 0 to 2 need 46 MiB on one worker while layers move, and it has 38: more workers are needed"
    assert lay_out(model, 2, held) == NoLayout(why)
    assert laid_out(model_of([1.0] * 6, memory=46), 2, held).moved_bytes == 30 * MIB


def test_a_faster_cut_that_does_not_fit_while_layers_move_is_passed_over() -> None:
    layers = [LayerProfile(s, s, m * MIB) for s, m in [(4, 1), (2, 1), (2, 3), (1, 3), (1, 1), (2, 1)]]
    present = {0: range(0, 2), 1: range(2, 4), 2: range(4, 6)}
    roomy, tight = (Model(tuple(layers), 8, memory_bytes=size * MIB // 2) for size in (14, 13))
    assert cuts_of(laid_out(roomy, 3, present)) == [0, 1, 3, 6]
    assert cuts_of(laid_out(tight, 3)) == [0, 1, 3, 6]
    assert cuts_of(laid_out(tight, 3, present)) == [0, 2, 4, 6]


def test_whoever_passes_layers_on_has_room_for_them() -> None:
    model = model_of([1.0] * 4, memory=30)
    before = planned(model, "ab")
    layout = lay_out(model, 2, held_in(before, "ac"))  # b leaves, c joins: a is handed all that b has
    if isinstance(layout, Layout):
        hands = carried(before, planned(model, "ac", before))
        assert max(map(len, hands.values())) * 10 * MIB <= model.memory_bytes


def test_layers_that_fit_into_no_cut_of_the_stages_asked_for_wait_for_nobody() -> None:
    layout = lay_out(model_of([1.0] * 4, memory=15, stages=2), 2)
    assert isinstance(layout, NoLayout) and layout.is_final
