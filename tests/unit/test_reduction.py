"""Sums of gradients: the same bits for every world, whatever users do to `p.grad` and whoever dies."""

from __future__ import annotations

import functools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore, Store

from elastic.errors import CollectiveAborted, ConfigError
from elastic.flat import Layout
from elastic.folds import blocks
from elastic.group import Group
from elastic.reduction import Reduced, Reducer, Reduction
from elastic.verdict import Decision, Vote, cast
from tests.unit.worlds import after, connect, in_processes, in_threads, two_groups

Report = Callable[[Any], None]
Gradients = list[Tensor | None]

SHAPES = ((7, 5), (5,), (3, 4, 2, 2), (1,), (33,), (2, 3))
SOMETIMES, NEVER = 3, 5
"""The parameters that only every third slot, and none, has a gradient for."""
EXTRAS = 2


def parameters_of(dtypes: Sequence[torch.dtype] = (torch.float32,)) -> list[nn.Parameter]:
    made = [torch.ones(shape, dtype=dtypes[i % len(dtypes)]) for i, shape in enumerate(SHAPES)]
    made[2] = made[2].to(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in made]


def gradients_of(slot: int, parameters: Sequence[nn.Parameter]) -> Gradients:
    """Over the whole range of exponents, so that every change of order shows; some are -0.0."""
    generator = torch.Generator().manual_seed(slot)
    gradients: Gradients = []
    for index, parameter in enumerate(parameters):
        if index == NEVER or (index == SOMETIMES and slot % 3):
            gradients.append(None)
            continue
        mantissa = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        exponent = torch.randint(-12, 12, parameter.shape, generator=generator)
        value = torch.ldexp(mantissa, exponent).to(parameter.dtype)
        if not parameter.is_complex():
            value.flatten()[0] = -0.0
        gradients.append(value)
    return gradients


def extras_of(slot: int) -> Tensor:
    return torch.tensor([slot + 0.1, 1.0], dtype=torch.float64)


def back_propagate(parameters: Sequence[nn.Parameter], gradients: Gradients) -> None:
    """Give the parameters these gradients, through autograd."""
    pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    torch.autograd.backward([p for p, _ in pairs], [g for _, g in pairs])


def compute(reducer: Reducer, parameters: Sequence[nn.Parameter], slot: int) -> bool:
    reducer.begin_slot(slot)
    reducer.arm()
    back_propagate(parameters, gradients_of(slot, parameters))
    return reducer.end_slot(extras_of(slot))


def compute_all(reducer: Reducer, parameters: Sequence[nn.Parameter]) -> None:
    while remaining := reducer.remaining_slots():
        compute(reducer, parameters, remaining[0])


def plain_fold(values: Sequence[Tensor | None], replicas: int, empty: frozenset[int]) -> Tensor | None:
    """The dumb twin: two loops in one process; a missing gradient is passed over."""
    total: Tensor | None = None
    for block in blocks(len(values), replicas):
        part: Tensor | None = None
        for slot in block:
            value = values[slot]
            if slot not in empty and value is not None:
                part = value.clone() if part is None else part + value
        if part is not None:
            total = part if total is None else total + part
    return total


def expected(
    parameters: Sequence[nn.Parameter],
    slots: int,
    replicas: int,
    divisor: float,
    empty: frozenset[int] = frozenset(),
) -> Gradients:
    by_slot = [gradients_of(slot, parameters) for slot in range(slots)]
    sums = [plain_fold([g[i] for g in by_slot], replicas, empty) for i in range(len(parameters))]
    return [None if total is None else total / divisor for total in sums]


def bits(tensors: Sequence[Tensor | None]) -> list[bytes | None]:
    return [
        None if t is None else t.detach().contiguous().view(torch.uint8).numpy().tobytes() if t.dim() else b""
        for t in tensors
    ]


def bits_of_gradients(parameters: Sequence[nn.Parameter]) -> list[bytes | None]:
    return bits([p.grad for p in parameters])


def finish(reducer: Reducer, divisor: float | Callable[[Tensor], float] = 12.0) -> Reduced:
    reduced = reducer.finish(divisor)
    assert reducer._group is not None
    reducer._group.settle()  # in place of the verdict
    reducer.install(reducer.presence_after_reduction())
    return reduced


def neighbours_of(rank: int, size: int, shared: bool) -> list[int]:
    """Whose memory a rank reads: with sharing all but the last one are on its node."""
    here = range(size - 1) if shared else range(0)
    return [peer for peer in here if peer != rank and rank in here]


sharing = pytest.mark.parametrize("shared", [False, True], ids=["sending", "sharing"])


@pytest.fixture
def alone() -> Iterator[Group]:
    group = connect(HashStore(), 0, 1)
    yield group
    group.close()


# The same bits ----------------------------------------------------------------------------------------------

BY_WORLD = {
    1: (0,) * 12,
    2: (0,) * 6 + (1,) * 6,
    3: (0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1, 2),
    4: (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3),
}


def reduce_twelve_slots(rank: int, size: int, store: Store, report: Report, *, dtypes: tuple[torch.dtype, ...]) -> None:
    parameters = parameters_of(dtypes)
    reducer = Reducer(parameters, replicas=4, extras=EXTRAS, bucket_bytes=200)
    reducer.plan(connect(store, rank, size), BY_WORLD[size])
    for _ in range(2):  # the second step uses memory again, and begins its exchange inside the backward pass
        compute_all(reducer, parameters)
        reduced = finish(reducer)
        report((bits_of_gradients(parameters), reduced.extras.tolist()))
        reducer.clear()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,), (torch.float32, torch.bfloat16, torch.float64), (torch.complex64, torch.float16)],
    ids=["float32", "three dtypes", "complex and half"],
)
def test_every_world_gets_the_bits_of_the_plain_double_fold(
    size: int, dtypes: tuple[torch.dtype, ...], tmp_path: Path
) -> None:
    right = bits(expected(parameters_of(dtypes), 12, 4, 12.0))
    extras = plain_fold([extras_of(slot) for slot in range(12)], 4, frozenset())
    assert extras is not None
    body = functools.partial(reduce_twelve_slots, dtypes=dtypes)
    with in_processes(size, body, tmp_path) as peers:
        for _ in range(2):
            for peer in peers:
                assert peer.report() == (right, extras.tolist())


def random_case(seed: int, size: int) -> tuple[tuple[int, ...], int, frozenset[int]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    slots = draw(1, 14)
    owners = tuple(draw(0, size) for _ in range(slots))
    return owners, draw(1, slots + 1), frozenset(s for s in range(slots) if draw(0, 6) == 0)


def reduce_random_cases(
    rank: int, size: int, store: Store, report: Report, *, shared: bool
) -> None:
    group = connect(store, rank, size, neighbours=neighbours_of(rank, size, shared))
    for seed in range(60):
        owners, replicas, empty = random_case(seed, size)
        parameters = parameters_of()
        reducer = Reducer(
            parameters, replicas=replicas, extras=EXTRAS, bucket_bytes=100 + 50 * (seed % 4), shared=shared,
            in_place=seed % 2 == 0,
        )  # fmt: skip
        reducer.plan(group, owners, empty)
        compute_all(reducer, parameters)
        finish(reducer, 3.0)
        right = expected(parameters, len(owners), replicas, 3.0, empty)
        assert bits_of_gradients(parameters) == bits(right), (seed, owners, replicas, empty)
        reducer.close()
    report("all equal")


@sharing
def test_any_assignment_gives_the_same_bits(shared: bool, tmp_path: Path) -> None:
    with in_processes(3, functools.partial(reduce_random_cases, shared=shared), tmp_path) as peers:
        assert [peer.report() for peer in peers] == ["all equal"] * 3


def train_a_model(
    rank: int, size: int, store: Store, report: Report, *, reduction: Reduction, shared: bool = False
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    reducer = Reducer(
        list(model.parameters()), replicas=4, reduction=reduction, bucket_bytes=256, shared=shared, in_place=size == 1
    )
    group = connect(store, rank, size, neighbours=neighbours_of(rank, size, shared))
    reducer.plan(group, BY_WORLD[size])
    for step in range(3):
        for slot in reducer.remaining_slots():
            generator = torch.Generator().manual_seed(100 * step + slot)
            reducer.begin_slot(slot)
            reducer.arm()
            model(torch.randn(4, 8, generator=generator)).square().mean().backward()
            reducer.end_slot()
        reduced = reducer.finish(12.0)
        outcome = cast(
            group,
            Vote(step, 1, reduced.complete, reduced.finite, 0, 1, False, reducer.presence()),
        )
        assert outcome.decision is Decision.COMMIT
        reducer.install(outcome.presence)
        optimizer.step()
        reducer.clear()
    report((bits(list(model.parameters())), [p.tolist() for p in model.parameters()]))


@sharing
def test_a_model_trains_to_the_same_bits_in_worlds_of_one_and_three(shared: bool, tmp_path: Path) -> None:
    results = []
    for size in (1, 3):
        body = functools.partial(train_a_model, reduction=Reduction.ORDERED, shared=shared)
        with in_processes(size, body, tmp_path) as peers:
            results += [peer.report()[0] for peer in peers]
    assert all(result == results[0] for result in results)


def test_fast_reduction_gives_nearly_the_same_and_the_same_on_every_rank(tmp_path: Path) -> None:
    results = []
    for size, reduction in ((1, Reduction.ORDERED), (3, Reduction.FAST)):
        body = functools.partial(train_a_model, reduction=reduction)
        with in_processes(size, body, tmp_path) as peers:
            results += [peer.report() for peer in peers]
    (_, right), *fast = results
    assert all(encoded == fast[0][0] for encoded, _ in fast)
    for value, near in zip(right, fast[0][1], strict=True):
        torch.testing.assert_close(torch.tensor(near), torch.tensor(value), rtol=1e-3, atol=1e-4)


# A world that breaks ----------------------------------------------------------------------------------------

BEFORE = (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
AFTER = (0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1, 2)


def lose_a_rank_between_slots(
    rank: int, size: int, store: Store, report: Report, *, shared: bool
) -> None:
    parameters = parameters_of()
    reducer = Reducer(parameters, replicas=4, extras=EXTRAS, shared=shared)
    group = connect(store, rank, size, neighbours=neighbours_of(rank, size, shared))
    reducer.plan(group, BEFORE)
    for slot in reducer.remaining_slots()[:2]:
        compute(reducer, parameters, slot)
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    reducer.begin_slot(reducer.remaining_slots()[0])  # the news arrives in the middle of a slot
    back_propagate(parameters, gradients_of(3 * rank + 2, parameters))
    group.abort("rank 3 is gone")
    reducer.end_slot(extras_of(3 * rank + 2))
    left = neighbours_of(rank, size - 1, shared)
    reducer.plan(connect(store, rank, size - 1, generation=2, neighbours=left), AFTER)
    report(reducer.remaining_slots())
    compute_all(reducer, parameters)
    finish(reducer)
    report(bits_of_gradients(parameters))


@sharing
def test_finished_slots_are_kept_when_a_rank_is_lost(shared: bool, tmp_path: Path) -> None:
    right = bits(expected(parameters_of(), 12, 4, 12.0))
    with in_processes(4, functools.partial(lose_a_rank_between_slots, shared=shared), tmp_path) as peers:
        for peer in peers[:3]:
            assert peer.report() == (9 + peer.rank,)
            assert peer.report() == right


def lose_a_rank_in_the_reduction(
    rank: int, size: int, store: Store, report: Report, *, shared: bool
) -> None:
    parameters = parameters_of()
    reducer = Reducer(parameters, replicas=4, extras=EXTRAS, shared=shared)
    group = connect(store, rank, size, neighbours=neighbours_of(rank, size, shared))
    reducer.plan(group, BEFORE)
    compute_all(reducer, parameters)
    if rank == size - 1:
        report("waiting")
        time.sleep(60.0)
        return
    report("reducing")
    began = time.monotonic()
    after(0.3, lambda: group.abort("told by the controller"))
    with pytest.raises(CollectiveAborted):
        reducer.finish(12.0)
    report(time.monotonic() - began)
    left = neighbours_of(rank, size - 1, shared)
    reducer.plan(connect(store, rank, size - 1, generation=2, neighbours=left), AFTER)
    report(reducer.remaining_slots())
    compute_all(reducer, parameters)
    finish(reducer)
    report(bits_of_gradients(parameters))


@sharing
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_reduction_broken_by_a_lost_rank_is_done_again_from_what_is_finished(
    number: signal.Signals, shared: bool, tmp_path: Path
) -> None:
    right = bits(expected(parameters_of(), 12, 4, 12.0))
    with in_processes(4, functools.partial(lose_a_rank_in_the_reduction, shared=shared), tmp_path) as peers:
        assert {peer.report() for peer in peers} == {"waiting", "reducing"}
        os.kill(peers[3].pid, number)
        for peer in peers[:3]:
            assert peer.report() < 5.0
        for peer in peers[:3]:
            assert peer.report() == (9 + peer.rank,)
            assert peer.report() == right


def reduce_among_random_aborts(
    rank: int, size: int, store: Store, report: Report, *, shared: bool
) -> None:
    common, own = random.Random(0), random.Random(rank + 1)
    parameters = [nn.Parameter(torch.zeros(count)) for count in (200_000, 1000, 77)]
    reducer = Reducer(parameters, replicas=4, extras=EXTRAS, bucket_bytes=500_000, shared=shared)
    generation = aborts = 0
    for _ in range(6):
        owners = [common.randrange(size) for _ in range(12)]
        is_reduced = False
        for attempt in range(5):
            generation += 1
            group = connect(store, rank, size, generation, neighbours_of(rank, size, shared))
            reducer.plan(group, owners)
            if attempt < 4 and own.random() < 0.5:
                after(own.random() * 0.02, functools.partial(group.abort, "chaos"))
            try:
                compute_all(reducer, parameters)
                reducer.finish(12.0)
                group.settle()
                here = "done"
            except CollectiveAborted:
                here, aborts = "aborted", aborts + 1
            group.abort("the attempt is over")
            group.drain()
            group.close()
            store.set(f"{generation}/{rank}", here)
            everywhere = {store.get(f"{generation}/{peer}") for peer in range(size)}
            if everywhere == {b"done"}:
                is_reduced = True
                break
        assert is_reduced
        reducer.install(reducer.presence_after_reduction())
        assert bits_of_gradients(parameters) == bits(expected(parameters, 12, 4, 12.0))
        reducer.clear()
    report(aborts)


@sharing
def test_aborts_at_random_moments_change_no_bit(shared: bool, tmp_path: Path) -> None:
    with in_processes(3, functools.partial(reduce_among_random_aborts, shared=shared), tmp_path) as peers:
        assert sum(peer.report() for peer in peers) > 0


def test_an_abort_inside_the_backward_pass_does_not_surface_there() -> None:
    with two_groups() as groups:
        parameters = parameters_of()
        reducer = Reducer(parameters, replicas=2, bucket_bytes=100)
        reducer.plan(groups[0], (0, 0, 1, 1))
        compute_without_extras(reducer, parameters, 0)
        groups[0].abort("a peer is gone")
        compute_without_extras(reducer, parameters, 1)
        with pytest.raises(CollectiveAborted, match="a peer is gone"):
            reducer.finish(1.0)
        single = connect(HashStore(), 0, 1, generation=2)
        reducer.plan(single, (0, 0, 0, 0))
        assert reducer.remaining_slots() == (2, 3)
        for slot in (2, 3):
            compute_without_extras(reducer, parameters, slot)
        finish(reducer, 4.0)
        assert bits_of_gradients(parameters) == bits(expected(parameters, 4, 2, 4.0))


def compute_without_extras(reducer: Reducer, parameters: Sequence[nn.Parameter], slot: int) -> None:
    reducer.begin_slot(slot)
    reducer.arm()
    back_propagate(parameters, gradients_of(slot, parameters))
    assert reducer.end_slot()


def test_a_new_plan_keeps_a_beginning_and_drops_what_is_none(alone: Group) -> None:
    parameters = parameters_of()
    reducer = Reducer(parameters, replicas=2, extras=EXTRAS)
    owners = (0, 0, 0, 0, 0, 0)
    reducer.plan(alone, owners)
    for slot in (0, 1):
        compute(reducer, parameters, slot)
    reducer.plan(alone, (0, 1, 1, 0, 0, 0))  # slot 1 now belongs to another: 0+1 is no term any more
    assert reducer.remaining_slots() == (0, 3, 4, 5)
    for slot in (0, 3, 4):
        compute(reducer, parameters, slot)
    reducer.plan(alone, owners)  # 0 begins the first replica, 3+4 begin the second
    assert reducer.remaining_slots() == (1, 2, 5)
    compute_all(reducer, parameters)
    finish(reducer, 6.0)
    assert bits_of_gradients(parameters) == bits(expected(parameters, 6, 2, 6.0))


# What users do to gradients ---------------------------------------------------------------------------------


def reduce_alone(
    group: Group, slots: int, user: Callable[[Reducer, list[nn.Parameter], int], None], **options: Any
) -> list[nn.Parameter]:
    """A world of one with one virtual replica; `user` computes each slot; the gradients are installed."""
    parameters = parameters_of()
    reducer = Reducer(parameters, replicas=1, **options)
    reducer.plan(group, (0,) * slots)
    tries = 0
    while remaining := reducer.remaining_slots():
        reducer.begin_slot(remaining[0])
        user(reducer, parameters, remaining[0])
        reducer.end_slot()
        tries += 1
        assert tries < 3 * slots, "a slot is never kept"
    finish(reducer, 1.0)
    return parameters


def test_a_gradient_that_nobody_has_stays_missing(alone: Group) -> None:
    parameters = reduce_alone(
        alone, 2, lambda _, parameters, slot: back_propagate(parameters, gradients_of(slot + 1, parameters))
    )
    assert [p.grad is None for p in parameters] == [i in (SOMETIMES, NEVER) for i in range(len(SHAPES))]


def test_a_sum_of_negative_zeros_is_a_negative_zero(alone: Group) -> None:
    zeros: Gradients = [torch.full(shape, -0.0) for shape in SHAPES]
    parameters = reduce_alone(alone, 3, lambda _, parameters, slot: back_propagate(parameters, zeros))
    assert bits_of_gradients(parameters) == bits(zeros)


def test_gradients_have_the_strides_of_their_parameters(alone: Group) -> None:
    parameters = reduce_alone(
        alone, 1, lambda _, parameters, slot: back_propagate(parameters, gradients_of(slot, parameters))
    )
    assert all(p.grad is None or p.grad.stride() == p.stride() for p in parameters)
    assert not parameters[2].is_contiguous()


def zeroes_gradients(reducer: Reducer, parameters: list[nn.Parameter], slot: int) -> None:
    torch.optim.SGD(parameters).zero_grad(set_to_none=False)
    back_propagate(parameters, gradients_of(slot, parameters))
    torch.optim.SGD(parameters).zero_grad()


def assigns_gradients(reducer: Reducer, parameters: list[nn.Parameter], slot: int) -> None:
    for parameter, gradient in zip(parameters, gradients_of(slot, parameters), strict=True):
        parameter.grad = gradient


def makes_a_graph_of_gradients(reducer: Reducer, parameters: list[nn.Parameter], slot: int) -> None:
    pairs = zip(parameters, gradients_of(slot, parameters), strict=True)
    loss = torch.stack([(p * g).sum() for p, g in pairs if g is not None]).sum()
    torch.autograd.backward([loss], create_graph=True)


@pytest.mark.parametrize("user", [zeroes_gradients, assigns_gradients, makes_a_graph_of_gradients])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_are_summed_however_they_came(
    user: Callable[[Reducer, list[nn.Parameter], int], None], alone: Group
) -> None:
    parameters = reduce_alone(alone, 4, user)
    assert bits_of_gradients(parameters) == bits(expected(parameters, 4, 1, 1.0))


def test_once_all_come_in_one_piece_autograd_adds_in_place(alone: Group) -> None:
    parameters = parameters_of()
    gradients = [[torch.randn(shape) for shape in SHAPES] for _ in range(6)]
    reducer = Reducer(parameters, replicas=2, in_place=True)
    reducer.plan(alone, (0,) * 6)
    calls: list[int] = []
    for slot in range(6):
        reducer.begin_slot(slot)
        calls.append(sum(parameter.grad is not None for parameter in parameters))
        back_propagate(parameters, gradients[slot])
        reducer.end_slot()
        if slot == 4:  # a slot that breaks off takes its sum with it
            reducer.begin_slot(5)
            back_propagate(parameters, gradients[0])
            reducer.discard_slot()
            assert reducer.remaining_slots() == (3, 4, 5)
            for again in (3, 4):
                reducer.begin_slot(again)
                back_propagate(parameters, gradients[again])
                reducer.end_slot()
    assert calls == [0, len(SHAPES), len(SHAPES), 0, len(SHAPES), len(SHAPES)]
    finish(reducer, 1.0)
    right = [plain_fold([each[index] for each in gradients], 2, frozenset()) for index in range(len(SHAPES))]
    assert bits_of_gradients(parameters) == bits(right)


def in_pieces(slot: int, parameters: Sequence[nn.Parameter]) -> tuple[Gradients, Gradients]:
    return gradients_of(slot, parameters), gradients_of(slot + 500, parameters)


def sum_of_pieces(parameters: Sequence[nn.Parameter], slots: int) -> list[bytes | None]:
    """Each slot's pieces are added first, and then the slots, as in a process without a reducer."""
    sums: Gradients = []
    for index in range(len(parameters)):
        by_slot: Gradients = []
        for slot in range(slots):
            pieces = [piece[index] for piece in in_pieces(slot, parameters)]
            by_slot.append(plain_fold(pieces, 1, frozenset()))
        sums.append(plain_fold(by_slot, 1, frozenset()))
    return bits(sums)


def test_gradients_that_come_in_pieces_are_added_up_within_the_slot_first(alone: Group) -> None:
    def user(reducer: Reducer, parameters: list[nn.Parameter], slot: int) -> None:
        for piece in in_pieces(slot, parameters):
            back_propagate(parameters, piece)

    parameters = reduce_alone(alone, 4, user)
    assert bits_of_gradients(parameters) == sum_of_pieces(parameters, 4)


def test_a_slot_whose_pieces_surprise_is_computed_again(alone: Group) -> None:
    seen: list[int] = []

    def user(reducer: Reducer, parameters: list[nn.Parameter], slot: int) -> None:
        seen.append(slot)
        first, second = in_pieces(slot, parameters)
        back_propagate(parameters, first)
        if slot == 2:
            back_propagate(parameters, second)

    parameters = reduce_alone(alone, 4, user)
    assert seen == [0, 1, 2, 0, 1, 2, 3]
    by_slot = [gradients_of(slot, parameters)[0] for slot in range(4)]
    other = gradients_of(502, parameters)[0]
    assert by_slot[2] is not None and other is not None
    by_slot[2] = by_slot[2] + other
    assert bits([parameters[0].grad]) == bits([plain_fold(by_slot, 1, frozenset())])


def test_a_reset_takes_back_what_the_slot_has_produced(alone: Group) -> None:
    def user(reducer: Reducer, parameters: list[nn.Parameter], slot: int) -> None:
        # An adversarial example: a first pass for the input's gradient only.
        back_propagate(parameters, gradients_of(slot + 900, parameters))
        reducer.reset_slot()
        back_propagate(parameters, gradients_of(slot, parameters))

    parameters = reduce_alone(alone, 3, user)
    right = expected(parameters, 3, 1, 1.0)
    assert bits_of_gradients(parameters) == bits(right)


def test_sparse_gradients_become_dense(alone: Group) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    assert isinstance(table.weight, nn.Parameter)
    reducer = Reducer([table.weight], replicas=1)
    reducer.plan(alone, (0, 0))
    for slot, word in ((0, 1), (1, 3)):
        reducer.begin_slot(slot)
        table(torch.tensor([word])).sum().backward()
        reducer.end_slot()
    finish(reducer, 1.0)
    assert table.weight.grad is not None
    assert table.weight.grad.sum(1).tolist() == [0.0, 3.0, 0.0, 3.0, 0.0]


def test_weights_multiply_each_slots_gradient_before_it_is_added(alone: Group) -> None:
    parameters = parameters_of()
    reducer = Reducer(parameters, replicas=1)
    reducer.plan(alone, (0, 0, 0))
    for slot, weight in ((0, 3.0), (1, 0.7), (2, None)):
        reducer.begin_slot(slot, weight)
        back_propagate(parameters, gradients_of(slot, parameters))
        reducer.end_slot()
    finish(reducer, 3.7)
    a, b, c = (gradients_of(slot, parameters)[0] for slot in range(3))
    assert a is not None and b is not None and c is not None
    assert bits([parameters[0].grad]) == bits([(a * 3.0 + b * 0.7 + c) / 3.7])


def test_nothing_of_a_throwaway_slot_is_kept(alone: Group) -> None:
    parameters = parameters_of()
    reducer = Reducer(parameters, replicas=1)
    reducer.plan(alone, (0, 0))

    def throw_away(slot: int | None) -> None:
        reducer.begin_slot(slot)
        back_propagate(parameters, gradients_of(77, parameters))
        assert (parameters[0].grad is None) == (slot is not None)
        reducer.discard_slot()
        assert parameters[0].grad is None

    throw_away(None)
    throw_away(0)
    compute_without_extras(reducer, parameters, 0)
    throw_away(1)  # the sum that slot 0 was in is lost with it
    assert reducer.remaining_slots() == (0, 1)
    for slot in (0, 1):
        compute_without_extras(reducer, parameters, slot)
    throw_away(None)
    finish(reducer, 2.0)
    assert bits_of_gradients(parameters) == bits(expected(parameters, 2, 1, 2.0))


def test_an_error_in_a_hook_is_raised_at_the_end_of_the_slot(alone: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = parameters_of()
    reducer = Reducer(parameters, replicas=1)
    reducer.plan(alone, (0,))
    with monkeypatch.context() as patch:
        patch.setattr("elastic.partials.Partial.add", fail)
        reducer.begin_slot(0)
        back_propagate(parameters, gradients_of(0, parameters))
        with pytest.raises(MemoryError):
            reducer.end_slot()
    reducer.discard_slot()
    compute_without_extras(reducer, parameters, 0)
    finish(reducer, 1.0)
    assert bits_of_gradients(parameters) == bits(expected(parameters, 1, 1, 1.0))


def fail(*_: object) -> None:
    raise MemoryError("no room")


def test_slots_out_of_order_and_foreign_ones_are_refused(alone: Group) -> None:
    parameters = parameters_of()
    reducer = Reducer(parameters, replicas=1)
    reducer.plan(alone, (0, 0, 1, 0))
    with pytest.raises(ValueError, match="comes too early"):
        reducer.begin_slot(1)
    with pytest.raises(ValueError, match="not among the remaining slots"):
        reducer.begin_slot(2)
    compute_without_extras(reducer, parameters, 0)
    with pytest.raises(ValueError, match="not among the remaining slots"):
        reducer.begin_slot(0)
    with pytest.raises(RuntimeError, match="are not finished"):
        reducer.finish(1.0)
    reducer.begin_slot(1)
    with pytest.raises(RuntimeError, match="inside slot 1"):
        reducer.plan(alone, (0, 0))
    with pytest.raises(ValueError, match=r"extras of \(3,\)"):
        reducer.end_slot(torch.zeros(3, dtype=torch.float64))


def test_repeated_and_frozen_parameters_are_refused() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match="given twice"):
        Reducer([parameter, parameter], replicas=1)
    with pytest.raises(ConfigError, match="requires no gradient"):
        Reducer([nn.Parameter(torch.ones(2), requires_grad=False)], replicas=1)


# Finite or not, extras, memory, overlap ---------------------------------------------------------------------


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (float("inf"), False), (float("nan"), False), (3e38, True)])
def test_a_gradient_is_finite_or_not_although_its_sum_may_overflow(value: float, finite: bool, alone: Group) -> None:
    parameter = nn.Parameter(torch.ones(40))
    reducer = Reducer([parameter], replicas=1)
    reducer.plan(alone, (0,))
    reducer.begin_slot(0)
    gradient = torch.ones(40)
    gradient[7:9] = value
    back_propagate([parameter], [gradient])
    reducer.end_slot()
    assert reducer.finish(1.0).finite is finite
    assert reducer.output_is_finite() is finite


def in_a_world_of_two(body: Callable[[int, Group, Reducer, list[nn.Parameter]], Any], **options: Any) -> list[Any]:
    """Run `body` on both ranks; each computes one slot of each step."""
    with two_groups() as groups:

        def run(rank: int) -> Any:
            parameters = parameters_of()
            reducer = Reducer(parameters, replicas=2, **options)
            reducer.plan(groups[rank], (0, 1))
            return body(rank, groups[rank], reducer, parameters)

        return in_threads(2, run)


@pytest.mark.parametrize("reduction", list(Reduction))
def test_a_step_with_a_nan_anywhere_is_skipped_everywhere(reduction: Reduction) -> None:
    def body(rank: int, group: Group, reducer: Reducer, parameters: list[nn.Parameter]) -> Any:
        reducer.begin_slot(rank)
        gradients = gradients_of(rank, parameters)
        if rank == 1:
            gradients[4] = torch.full(SHAPES[4], float("nan"))
        back_propagate(parameters, gradients)
        reducer.end_slot()
        reduced = reducer.finish(2.0)
        vote = Vote(1, 1, reduced.complete, reduced.finite, 0, 1, False, reducer.presence())
        return cast(group, vote).decision

    assert in_a_world_of_two(body, reduction=reduction) == [Decision.SKIP] * 2


@pytest.mark.parametrize("reduction", list(Reduction))
def test_the_divisor_may_come_from_the_folded_extras(reduction: Reduction) -> None:
    def body(rank: int, group: Group, reducer: Reducer, parameters: list[nn.Parameter]) -> Any:
        reducer.begin_slot(rank)
        back_propagate(parameters, gradients_of(rank, parameters))
        reducer.end_slot(torch.tensor([10.0 + rank], dtype=torch.float64))
        reduced = finish(reducer, lambda extras: float(extras[0]))
        return bits_of_gradients(parameters), reduced.extras.tolist()

    right = bits(expected(parameters_of(), 2, 2, 21.0))
    assert in_a_world_of_two(body, reduction=reduction, extras=1) == [(right, [21.0])] * 2


def test_a_whole_world_needs_two_sets_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    allocate = Layout.allocate

    def count(layout: Layout) -> Any:
        made.append(threading.get_ident())
        return allocate(layout)

    monkeypatch.setattr(Layout, "allocate", count)

    def body(rank: int, group: Group, reducer: Reducer, parameters: list[nn.Parameter]) -> None:
        for _ in range(3):
            compute_without_extras(reducer, parameters, rank)
            finish(reducer, 4.0)
            reducer.clear()

    in_a_world_of_two(body)
    assert len(made) == 4


def test_the_exchange_begins_inside_the_backward_pass_from_the_second_slot_on() -> None:
    def body(rank: int, group: Group, reducer: Reducer, parameters: list[nn.Parameter]) -> list[bool]:
        began = []
        for _ in range(2):
            reducer.begin_slot(rank)
            reducer.arm()
            back_propagate(parameters, [torch.ones(shape) for shape in SHAPES])
            began.append(bool(group._works))
            reducer.end_slot()
            finish(reducer, 1.0)
            reducer.clear()
        return began

    assert in_a_world_of_two(body, bucket_bytes=100) == [[False, True]] * 2


def test_a_gradient_that_comes_after_its_bucket_left_makes_everybody_reduce_again() -> None:
    def body(rank: int, group: Group, reducer: Reducer, parameters: list[nn.Parameter]) -> Any:
        decisions = []
        for step in range(2):
            while remaining := reducer.remaining_slots():
                reducer.begin_slot(remaining[0])
                reducer.arm()
                back_propagate(parameters, [torch.ones(shape) for shape in SHAPES])
                if step == 1 and rank == 1:
                    back_propagate(parameters[-1:], [torch.ones(SHAPES[-1])])
                reducer.end_slot()
            while True:
                reduced = reducer.finish(1.0)
                vote = Vote(step, 1, reduced.complete, reduced.finite, 0, 1, False, reducer.presence())
                outcome = cast(group, vote)
                decisions.append(outcome.decision)
                if outcome.decision is not Decision.RETRY:
                    break
                reducer.plan(group, (0, 1))
                while remaining := reducer.remaining_slots():
                    reducer.begin_slot(remaining[0])
                    back_propagate(parameters, [torch.ones(shape) for shape in SHAPES])
                    back_propagate(parameters[-1:], [torch.ones(SHAPES[-1])])
                    reducer.end_slot()
            reducer.install(outcome.presence)
            reducer.clear()
        assert parameters[-1].grad is not None
        return decisions, parameters[-1].grad.flatten()[0].item()

    commit, retry = Decision.COMMIT, Decision.RETRY
    assert in_a_world_of_two(body, bucket_bytes=100) == [([commit, retry, commit], 3.0)] * 2
