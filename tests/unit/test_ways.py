"""Which way each slot takes: swapped ends and their partners, stages that are passed by, and what is kept in duplicate."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.domain import LayerCopy, LayerProfile, Stage
from elastic.pipeline.paths import fault_of
from recovery.pipelines import Layout, Model, NoLayout, Ways, as_it_is, copies_of, lay_out
from recovery.ways import SKIPPED_MAX, skipping_ways, swapped_ways

BLOCK, EMBED, HEAD = 7, 3, 5


def model_of(*forms: int, slots: int = 8, outputs: int = 10) -> Model:
    layers = tuple(LayerProfile(0.001, 0.002, 1000, 100, outputs, form) for form in forms)
    return Model(layers, slots)


def stages_of(*cuts: int) -> tuple[Stage, ...]:
    return tuple(Stage(first, last, (rank,)) for rank, (first, last) in enumerate(pairwise(cuts)))


GPT = model_of(EMBED, *[BLOCK] * 6, HEAD)
SIX = stages_of(0, 2, 3, 4, 5, 6, 8)


def test_every_other_slot_swaps_the_blocks_at_both_ends() -> None:
    ways = swapped_ways(GPT, 6)
    assert isinstance(ways, Ways)
    assert ways.paths == ((0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 1, 3, 4, 6, 5, 7)) and ways.path_of == (0, 1) * 4
    assert ways.partners == {1: 2, 2: 1, 5: 6, 6: 5}
    assert copies_of(GPT.layers, SIX, ways.partners) == (LayerCopy(0, 1, (1,)), LayerCopy(7, 8, (4,)))
    # However it is cut, what has no partner in another stage is kept in duplicate.
    assert [copy.first for copy in copies_of(GPT.layers, stages_of(0, 3, 5, 8), ways.partners)] == [0, 1, 2, 5, 6, 7]
    normed = [replace(layer, changes_buffers=number == 5) for number, layer in enumerate(GPT.layers)]
    assert [copy.first for copy in copies_of(normed, stages_of(0, 3, 5, 8), ways.partners)] == [0, 1, 2, 6, 7]
    assert Ways().partners == {} == Ways(((0, 3), (0, 1, 2, 3)), (0, 1)).partners


def test_a_stage_of_several_blocks_swaps_them_as_a_whole_with_as_many_behind_it() -> None:
    ways = swapped_ways(model_of(EMBED, *[BLOCK] * 8, HEAD), 4)
    assert isinstance(ways, Ways) and ways.paths[1] == (0, 3, 4, 1, 2, 7, 8, 5, 6, 9)
    pairs = swapped_ways(model_of(EMBED, *[BLOCK, HEAD + 1] * 6, HEAD), 6)  # a block of two layers
    assert isinstance(pairs, Ways) and pairs.paths[1] == (0, 3, 4, 1, 2, 5, 6, 7, 8, 11, 12, 9, 10, 13)
    few = swapped_ways(GPT, 4)  # two blocks in some stages, but then the pairs would overlap
    assert isinstance(few, Ways) and few.partners == {1: 2, 2: 1, 5: 6, 6: 5}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (model_of(EMBED, *[BLOCK] * 3, HEAD), "of 3 like layers the first and the last cannot change places"),
        (model_of(*range(1, 7)), "of 0 like layers"),
        (replace(GPT, slots=1), "a step has one slot only"),
    ],
)
def test_what_cannot_be_swapped_is_said(model: Model, words: str) -> None:
    found = swapped_ways(model, 6)
    assert isinstance(found, NoLayout) and found.reason.startswith(words), found


def test_only_what_is_given_as_much_changes_places_or_is_left_out() -> None:
    odd = replace(GPT, layers=tuple(replace(layer, output_bytes=n) for n, layer in enumerate(GPT.layers)))
    assert isinstance(swapped_ways(odd, 6), NoLayout)
    found = skipping_ways(odd, 6, 0.3)
    assert isinstance(found, NoLayout) and "pass on different amounts" in found.reason


@settings(deadline=None)
@given(st.integers(3, 7), st.integers(2, 9), st.floats(0.05, 0.95))
def test_each_slot_passes_its_share_by_and_no_stage_is_left_out_more_than_others(
    count: int, slots: int, ratio: float
) -> None:
    model = model_of(EMBED, *[BLOCK] * count, HEAD, slots=slots)
    skipped = round(ratio * count)
    ways = skipping_ways(model, count, ratio)
    if not 1 <= skipped <= count - 3:
        assert isinstance(ways, NoLayout) and "never left out" in ways.reason
        return
    if isinstance(ways, NoLayout):
        assert (skipped > SKIPPED_MAX or slots < 4) and "in a row" in ways.reason
        return
    assert len(ways.path_of) == slots and not ways.copies_ends
    for path in ways.of_slots:
        assert fault_of(path, count + 2) == "" and len(path) == count + 2 - skipped and list(path) == sorted(path)
        assert max(after - before for before, after in pairwise(path)) <= SKIPPED_MAX + 1
    times = Counter(layer for path in ways.of_slots for layer in path)
    inner = [times[layer] for layer in range(2, count)]
    assert min(inner) > 0 and (skipped > SKIPPED_MAX or max(inner) - min(inner) <= 2)
    assert ways.shares(count + 2)[0] == 1.0 and sum(ways.shares(count + 2)) == pytest.approx(count + 2 - skipped)


def test_a_step_that_skips_a_third_of_the_stages_is_cut_for_it_and_about_a_third_shorter() -> None:
    model = model_of(EMBED, *[BLOCK] * 24, HEAD, slots=12)
    straight = lay_out(model, 6)
    assert isinstance(straight, Layout)
    ways = skipping_ways(model, 6, 1 / 3)
    assert isinstance(ways, Ways)
    skipping = lay_out(replace(model, ways=ways), 6)
    assert isinstance(skipping, Layout) and skipping.ways == ways
    sizes = [stage.last - stage.first for stage in skipping.stages]
    assert sizes[0] < min(sizes[1:-1]), "what all slots pass is less for each worker"
    assert skipping.prediction.step_s < 0.8 * straight.prediction.step_s
    first = replace(ways, path_of=(0,) * 12)  # all slots leave out the same stages: some workers have nothing to do
    assert as_it_is(replace(model, ways=first), skipping.stages, skipping.routes, {}).step_s > skipping.prediction.step_s
