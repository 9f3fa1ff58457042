"""The fold's terms, against the plain double loop in one process."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.folds import Fold, Term, TermKind, blocks, plan_fold, plan_shares

Vector = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@st.composite
def assignments(draw: st.DrawFn) -> tuple[tuple[int, ...], int, frozenset[int]]:
    """Owners of up to 16 slots, a number of virtual replicas, and some empty slots."""
    slots = draw(st.integers(1, 16))
    owners = tuple(draw(st.lists(st.integers(0, 4), min_size=slots, max_size=slots)))
    replicas = draw(st.integers(1, slots))
    empty = draw(st.frozensets(st.integers(0, slots - 1)))
    return owners, replicas, empty


def wild_values(count: int, seed: int) -> list[Vector]:
    """float32 vectors over the whole range of exponents, so that every change of order shows."""
    generator = np.random.default_rng(seed)
    mantissas = generator.standard_normal((count, 64))
    exponents = generator.integers(-20, 20, (count, 64))
    return list(np.ldexp(mantissas, exponents).astype(np.float32))


def plain_double_fold(values: list[Vector], replicas: int, empty: frozenset[int]) -> Vector | None:
    """The dumb twin: two loops in one process, which know no owners."""
    total: Vector | None = None
    for block in blocks(len(values), replicas):
        part: Vector | None = None
        for slot in block:
            if slot not in empty:
                part = values[slot] if part is None else part + values[slot]
        if part is not None:
            total = part if total is None else total + part
    return total


def add(a: Vector, b: Vector) -> Vector:
    return a + b


def value_of(term: Term, values: list[Vector]) -> Vector:
    """What the term's owner computes: a left fold over its parts, each a left fold over its slots."""
    one_part_each = Fold((), term.parts)
    return one_part_each.evaluate(values, add)


@given(assignments(), st.integers(0, 2**32 - 1))
def test_any_assignment_gives_the_bits_of_the_plain_double_fold(
    assignment: tuple[tuple[int, ...], int, frozenset[int]], seed: int
) -> None:
    owners, replicas, empty = assignment
    values = wild_values(len(owners), seed)
    fold = plan_fold(owners, replicas, empty)
    expected = plain_double_fold(values, replicas, empty)
    if expected is None:
        assert fold == Fold((), ())
        return
    result = fold.evaluate([value_of(term, values) for term in fold.terms], add)
    assert result.tobytes() == expected.tobytes()


@given(assignments())
def test_every_slot_with_samples_is_in_exactly_one_term_of_its_owner(
    assignment: tuple[tuple[int, ...], int, frozenset[int]],
) -> None:
    owners, replicas, empty = assignment
    fold = plan_fold(owners, replicas, empty)
    assert [slot for term in fold.terms for slot in term.slots] == [
        slot for slot in range(len(owners)) if slot not in empty
    ]
    assert all(owners[slot] == term.owner for term in fold.terms for slot in term.slots)
    assert [term.index for term in fold.terms] == list(range(len(fold.terms)))
    assert [index for group in fold.groups for index in group] == list(range(len(fold.terms)))
    for rank in range(5):
        assert fold.owned_by(rank) == tuple(term for term in fold.terms if term.owner == rank)


@given(assignments())
def test_no_two_neighbouring_terms_could_have_been_one(
    assignment: tuple[tuple[int, ...], int, frozenset[int]],
) -> None:
    owners, replicas, empty = assignment
    fold = plan_fold(owners, replicas, empty)
    for group in fold.groups:
        first, *rest = (fold.terms[index] for index in group)
        assert all(len(term.parts) == 1 for term in rest)
        assert not rest or rest[0].owner != first.owner
    if len(fold.groups) > 1 and len(fold.groups[0]) == 1 and len(fold.groups[1]) == 1:
        assert fold.terms[0].owner != fold.terms[1].owner


@given(st.integers(1, 40), st.data())
def test_blocks_are_contiguous_and_differ_by_at_most_one(slots: int, data: st.DataObject) -> None:
    replicas = data.draw(st.integers(1, slots))
    result = blocks(slots, replicas)
    assert [slot for block in result for slot in block] == list(range(slots))
    sizes = [len(block) for block in result]
    assert len(sizes) == replicas and max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("slots", "replicas"), [(3, 4), (0, 0), (4, 0), (0, 1)])
def test_more_replicas_than_slots_or_none_are_refused(slots: int, replicas: int) -> None:
    with pytest.raises(ValueError, match="cannot be divided"):
        blocks(slots, replicas)


TOTAL, PREFIX, SINGLE = TermKind.TOTAL, TermKind.PREFIX, TermKind.SINGLE


@pytest.mark.parametrize(
    ("owners", "replicas", "empty", "terms", "groups"),
    [
        pytest.param([0] * 4, 2, [], [(0, TOTAL, [(0, 1), (2, 3)])], [(0,)], id="one worker, one term"),
        pytest.param(
            [0, 0, 1, 1],
            2,
            [],
            [(0, TOTAL, [(0, 1)]), (1, PREFIX, [(2, 3)])],
            [(0,), (1,)],
            id="each runs its own replica",
        ),
        pytest.param(
            [0, 0, 0, 0, 1, 0, 1, 1],
            4,
            [],
            [
                (0, TOTAL, [(0, 1), (2, 3)]),
                (1, PREFIX, [(4,)]),
                (0, SINGLE, [(5,)]),
                (1, PREFIX, [(6, 7)]),
            ],
            [(0,), (1, 2), (3,)],
            id="a dead worker's replica dealt out slot by slot",
        ),
        pytest.param(
            [1, 0, 0, 0],
            2,
            [],
            [(1, PREFIX, [(0,)]), (0, SINGLE, [(1,)]), (0, PREFIX, [(2, 3)])],
            [(0, 1), (2,)],
            id="no total where the first replica is shared",
        ),
        pytest.param(
            [1, 0, 1, 0],
            2,
            [0, 1],
            [(1, PREFIX, [(2,)]), (0, SINGLE, [(3,)])],
            [(0, 1)],
            id="an empty replica vanishes",
        ),
        pytest.param(
            [0, 1, 0, 1],
            2,
            [1, 3],
            [(0, TOTAL, [(0,), (2,)])],
            [(0,)],
            id="an empty slot ends no run",
        ),
        pytest.param([0, 1], 1, [0, 1], [], [], id="nothing to add"),
    ],
)
def test_terms(
    owners: list[int],
    replicas: int,
    empty: list[int],
    terms: list[tuple[int, TermKind, list[tuple[int, ...]]]],
    groups: list[tuple[int, ...]],
) -> None:
    fold = plan_fold(owners, replicas, empty)
    assert [(term.owner, term.kind, list(term.parts)) for term in fold.terms] == terms
    assert list(fold.groups) == groups


def test_shares_are_one_term_for_each_rank_that_has_a_slot() -> None:
    fold = plan_shares([2, 0, 2, 1, 0], empty=[3])
    assert [(term.owner, term.kind, term.parts) for term in fold.terms] == [
        (0, TermKind.SHARE, ((1, 4),)),
        (2, TermKind.SHARE, ((0, 2),)),
    ]
    assert fold.groups == ((0,), (1,))
    assert plan_shares([0, 1], empty=[0, 1]) == Fold((), ())
