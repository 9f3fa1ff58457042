"""Lost stages made from their neighbours: which layer from which, with which weights, and when it cannot be."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.domain import Blend, LayerProfile, Stage
from recovery.approximation import NoBlend, aligned, blends_for, check_stages
from recovery.planner import answer

BLOCK, EMBED, HEAD = 7, 3, 5


def layers_of(*forms: int) -> list[LayerProfile]:
    return [LayerProfile(form=form) for form in forms]


def stages_of(*cuts: int) -> list[Stage]:
    return [Stage(first, last, (rank,)) for rank, (first, last) in enumerate(pairwise(cuts))]


def blended(layers: list[LayerProfile], stages: list[Stage], lost: set[int], **norms: float) -> tuple[Blend, ...]:
    found = blends_for(layers, stages, lost, {int(name[1:]): norm for name, norm in norms.items()})
    assert isinstance(found, tuple), found
    return found


GPT = layers_of(EMBED, *[BLOCK] * 6, HEAD)
SIX = stages_of(0, 1, 2, 3, 4, 5, 8)


@pytest.mark.parametrize(
    ("count", "other", "expected"),
    [(1, 1, [0]), (1, 3, [1]), (1, 4, [2]), (2, 4, [1, 3]), (4, 2, [0, 0, 1, 1]), (3, 2, [0, 1, 1]), (4, 4, [0, 1, 2, 3])],
)
def test_layers_are_aligned_by_their_depth(count: int, other: int, expected: list[int]) -> None:
    assert [aligned(position, count, other) for position in range(count)] == expected


@given(st.integers(1, 12), st.integers(1, 12))
def test_any_alignment_keeps_the_order_and_is_symmetric(count: int, other: int) -> None:
    found = [aligned(position, count, other) for position in range(count)]
    assert found == sorted(found) and found[0] >= 0 and found[-1] < other
    if count % 2 and other % 2:
        assert found[::-1] == [other - 1 - position for position in found]
    assert len(set(found)) == min(count, other) or count % 2 != other % 2 or count != other


def test_a_lost_stage_is_the_mean_of_its_neighbours_weighted_by_their_norms() -> None:
    assert blended(GPT, SIX, {2}, _1=3.0, _3=1.0) == (Blend(2, (1, 3), (0.75, 0.25)),)
    assert blended(GPT, SIX, {2}) == (Blend(2, (1, 3), (0.5, 0.5)),)
    assert blended(GPT, SIX, {2}, _1=3.0, _3=float("nan")) == (Blend(2, (1, 3), (0.5, 0.5)),)
    squared = blends_for(GPT, SIX, {2}, {1: 3.0, 3: 1.0}, 2.0)
    assert squared == (Blend(2, (1, 3), (0.9, 0.1)),)


def test_of_two_lost_in_a_row_the_nearer_neighbour_counts_twice() -> None:
    first, second = blended(GPT, SIX, {2, 3}, _1=1.0, _4=1.0)
    assert (first.layer, first.sources, second.layer, second.sources) == (2, (1, 4), 3, (1, 4))
    assert first.weights == pytest.approx((2 / 3, 1 / 3)) and second.weights == pytest.approx((1 / 3, 2 / 3))


def test_stages_of_other_lengths_and_layers_of_other_forms_are_stepped_over() -> None:
    stages = stages_of(0, 3, 5, 8)  # an embedding and two blocks, two blocks, two blocks and a head
    assert [blend.sources for blend in blended(GPT, stages, {1})] == [(1, 5), (2, 6)]
    plain = layers_of(EMBED, BLOCK, 0, BLOCK, BLOCK, HEAD)
    assert [blend.layer for blend in blended(plain, stages_of(0, 2, 4, 6), {1})] == [3], "what has no state is not lost"
    one_sided = layers_of(BLOCK, EMBED, BLOCK, HEAD)
    assert blended(one_sided, stages_of(0, 2, 3, 4), {1}) == (Blend(2, (0,), (1.0,)),)


PARTNERS = {1: 2, 2: 1, 5: 6, 6: 5}


def test_what_has_changed_places_becomes_a_copy_of_its_partner_and_what_is_kept_up_with_is_not_lost() -> None:
    stages = stages_of(0, 2, 3, 4, 5, 6, 8)
    first = blends_for(GPT, stages, {0}, {}, partners=PARTNERS, kept={0, 7})
    assert first == (Blend(1, (2,), (1.0,)),)
    assert blends_for(GPT, stages, {1}, {}, partners=PARTNERS, kept={0, 7}) == (Blend(2, (1,), (1.0,)),)
    ends = blends_for(GPT, stages, {0, 2, 5}, {}, partners=PARTNERS, kept={0, 7}, moments=True)
    assert ends == (Blend(1, (2,), (1.0,), True), Blend(3, (2, 4), (0.5, 0.5), True), Blend(6, (5,), (1.0,), True))
    assert blends_for(GPT, stages_of(0, 1, 2, 8), {0}, {}, partners=PARTNERS, kept={0}) == ()
    both = blends_for(GPT, stages, {0, 1}, {}, partners=PARTNERS, kept={0, 7})
    assert isinstance(both, NoBlend) and both.reason == "layer 1 of the first stage and its partner, layer 2, are both lost"
    alone = blends_for(GPT, stages, {0}, {}, partners=PARTNERS)
    assert isinstance(alone, NoBlend) and "(layer 0 has no partner)" in alone.reason
    assert check_stages(GPT, stages, PARTNERS, {0, 7}) == ""
    assert "layer 0 has no partner" in check_stages(GPT, stages, PARTNERS)


@pytest.mark.parametrize(
    ("layers", "cuts", "lost", "words"),
    [
        (GPT, (0, 1, 2, 8), {0}, "the first stage has one neighbour only"),
        (GPT, (0, 1, 2, 8), {2}, "the last stage has one neighbour only"),
        (GPT, (0, 1, 2, 8), {0, 1}, "the first stage has one neighbour only"),
        (layers_of(BLOCK, EMBED, BLOCK), (0, 1, 2, 3), {1}, "layer 1 has no like in the neighbouring stages"),
    ],
)
def test_what_cannot_be_made_is_named(
    layers: list[LayerProfile], cuts: tuple[int, ...], lost: set[int], words: str
) -> None:
    found = blends_for(layers, stages_of(*cuts), lost, {})
    assert isinstance(found, NoBlend) and found.reason.startswith(words)


def test_what_a_job_asks_for_is_checked_before_it_trains() -> None:
    assert check_stages(GPT, SIX) == ""
    assert "there are 2 stage(s)" in check_stages(GPT, stages_of(0, 4, 8))
    assert "layer 1 has no like" in check_stages(layers_of(BLOCK, EMBED, BLOCK), stages_of(0, 1, 2, 3))


@given(st.data())
def test_weights_are_positive_and_add_up_to_one(data: st.DataObject) -> None:
    count = data.draw(st.integers(3, 8))
    lost = data.draw(st.sets(st.integers(1, count - 2), min_size=1))
    norms = {number: data.draw(st.floats(1e-3, 1e3)) for number in range(count)}
    layers = layers_of(*[BLOCK] * count)
    found = blends_for(layers, stages_of(*range(count + 1)), lost, norms, data.draw(st.sampled_from([0.0, 1.0, 2.0])))
    assert isinstance(found, tuple) and [blend.layer for blend in found] == sorted(lost)
    for blend in found:
        assert len(blend.sources) == 2 and sum(blend.weights) == pytest.approx(1.0) and min(blend.weights) > 0
        assert not set(blend.sources) & lost and blend.sources[0] < blend.layer < blend.sources[1]


def losses(**recovery: object) -> dict[str, dict[str, object]]:
    costs = {"forward_s": 1.0, "backward_s": 2.0, "state_bytes": 8}
    layers = [costs | {"form": form} for form in (EMBED, BLOCK, BLOCK, BLOCK, HEAD)]
    question = {"model": {"layers": layers, "slots": 4}, "workers": 5, "nodes": {"a": [0], "b": [2]}, "recovery": recovery}
    return {loss["node"]: loss for loss in answer(question)["losses"]}


def test_the_rung_that_a_loss_leads_to_is_explained_with_all_that_are_passed_over() -> None:
    nothing = losses()["b"]
    assert nothing["rung"] == "stop" and nothing["costs"] == "everything is done again, from step 0"
    assert nothing["passed_over"] == [
        "live replica (nobody else holds stage 2)",
        "snapshots (none are taken (--snapshot-every))",
        "neighbour average (not allowed)",
        "checkpoint (none are written)",
    ]
    allowed = losses(snapshots=True, checkpoints=True, approximates=True, norms=[1.0, 3.0, 1.0, 1.0, 1.0])
    assert allowed["b"]["rung"] == "neighbour average" and "2 = 0.750 x 1 + 0.250 x 3" in str(allowed["b"]["costs"])
    assert "snapshots (no parity of it is kept (--redundancy))" in str(allowed["b"]["passed_over"])
    assert allowed["a"]["rung"] == "checkpoint" and "the first stage has one neighbour only" in str(allowed["a"]["passed_over"])
    assert losses(snapshots=True, parity=1)["a"]["rung"] == "erasure decode"
