"""The cutting of layers into stages, held against every cut that there is."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.domain import LayerProfile
from recovery.partition import Costs, Cuts, StageRoom, partition
from recovery.pipelines import Layout, Model, lay_out


@dataclass(frozen=True)
class Case:
    """What is to be cut; `moved` are the bytes of each layer at each stage."""

    layers: tuple[LayerProfile, ...]
    rooms: tuple[StageRoom, ...]
    moved: tuple[tuple[int, ...], ...]

    def slowest(self, cuts: Cuts) -> float:
        return max(
            sum(layer.forward_s + layer.backward_s for layer in self.layers[first:last]) / room.power
            for (first, last), room in zip(pairwise(cuts), self.rooms, strict=True)
        )

    def moved_at(self, stage: int, first: int, last: int) -> int:
        return sum(self.moved[stage][first:last])

    def moved_bytes(self, cuts: Cuts) -> int:
        return sum(self.moved_at(stage, *run) for stage, run in enumerate(pairwise(cuts)))

    def fitting(self) -> list[Cuts]:
        """Every way to cut so that each stage has a layer at least and fits."""
        count = len(self.layers)
        every = [(0, *inner, count) for inner in combinations(range(1, count), len(self.rooms) - 1)]
        return [cuts for cuts in every if all(map(self._fits, self.rooms, pairwise(cuts)))]

    def _fits(self, room: StageRoom, run: tuple[int, int]) -> bool:
        own = self.layers[slice(*run)]
        needed = sum(layer.state_bytes + room.in_flight * layer.activation_bytes for layer in own)
        return room.memory_bytes == 0 or needed <= room.memory_bytes


small = st.integers(0, 9)
layers = st.builds(LayerProfile, small.map(float), small.map(float), small, st.integers(0, 4), small)
rooms = st.builds(
    StageRoom,
    st.sampled_from([0.5, 1.0, 1.0, 1.5, 2.0, 3.0]),
    st.one_of(st.just(0), st.integers(1, 80)),
    st.integers(1, 4),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(1, 8))
    stages = draw(st.integers(1, min(count, 4)))
    return Case(
        tuple(draw(layers) for _ in range(count)),
        tuple(draw(rooms) for _ in range(stages)),
        tuple(tuple(draw(small) for _ in range(count)) for _ in range(stages)),
    )


@given(cases())
def test_no_cut_has_a_faster_slowest_stage_and_none_means_that_nothing_fits(case: Case) -> None:
    cuts = partition(Costs(case.layers), case.rooms)
    fitting = case.fitting()
    assert (cuts is None) == (not fitting)
    if cuts is not None:
        assert cuts in fitting
        assert case.slowest(cuts) == min(map(case.slowest, fitting))


@given(cases(), st.sampled_from([0.0, 0.02, 0.25, 1.0]))
def test_no_cut_that_is_nearly_as_fast_moves_fewer_bytes(case: Case, tolerance: float) -> None:
    cuts = partition(Costs(case.layers), case.rooms, case.moved_at, tolerance)
    fitting = case.fitting()
    assert (cuts is None) == (not fitting)
    if cuts is not None:
        assert cuts in fitting
        limit = min(map(case.slowest, fitting)) * (1 + tolerance)
        assert case.slowest(cuts) <= limit
        near = [other for other in fitting if case.slowest(other) <= limit]
        fewest = min(map(case.moved_bytes, near))
        assert case.moved_bytes(cuts) == fewest
        assert case.slowest(cuts) == min(case.slowest(other) for other in near if case.moved_bytes(other) == fewest)


@pytest.mark.parametrize(
    ("seconds", "stages", "cuts"),
    [
        ([1, 1, 1, 1], [StageRoom(1.0)] * 2, (0, 2, 4)),
        ([1, 1, 1, 5], [StageRoom(1.0)] * 2, (0, 3, 4)),
        ([1, 1, 1, 1], [StageRoom(1.0), StageRoom(3.0)], (0, 1, 4)),
        ([2, 2, 2, 2], [StageRoom(1.0, 50, 4), StageRoom(1.0, 50, 1)], (0, 1, 4)),  # four in flight: 10 + 4 * 5 each
        ([2, 2, 2, 2], [StageRoom(1.0, 29, 4), StageRoom(1.0, 50, 1)], None),
        ([7], [StageRoom(0.5)], (0, 1)),
    ],
)
def test_cuts_that_can_be_checked_by_eye(seconds: list[int], stages: list[StageRoom], cuts: Cuts | None) -> None:
    costs = Costs([LayerProfile(0.0, float(second), state_bytes=10, activation_bytes=5) for second in seconds])
    assert partition(costs, stages) == cuts


def layers_of(count: int) -> tuple[LayerProfile, ...]:
    """Layers like those that are measured: no two alike."""
    chance = random.Random(7)
    return tuple(
        LayerProfile(chance.uniform(1e-3, 2e-3), chance.uniform(2e-3, 4e-3), 1 << 20, 1 << 16, 1 << 14)
        for _ in range(count)
    )


@pytest.mark.parametrize("held", [{}, {rank: range(6 * rank, 6 * rank + 6) for rank in range(16)}])
def test_a_large_pipeline_is_laid_out_before_anybody_waits(held: dict[int, range]) -> None:
    model = Model(layers_of(96), slots=32, stages=16)
    took_s: Sequence[float] = []
    for _ in range(5):
        began = time.process_time()  # not of the neighbours
        layout = lay_out(model, 16, held)
        took_s = [*took_s, time.process_time() - began]
        assert isinstance(layout, Layout) and len(layout.stages) == 16
    assert median(took_s) <= 0.150
