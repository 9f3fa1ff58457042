"""The recovery ladder when no replica lives: cases as a table, and a twin that tries every choice of blocks."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.snapshots import SnapshotId
from recovery.ladder import Holding, Restore, Rung, SnapshotWorld, choose_restore
from recovery.placement import ProtectionGroup, Site, make_groups

NODES = ("a", "b", "c", "d")
WORLD = SnapshotWorld(  # two workers on each of four nodes, (2,2)
    generation=3,
    slices=tuple((node, 2 * i + local) for i, node in enumerate(NODES) for local in (0, 1)),
    groups=(ProtectionGroup(NODES, 2, 2),),
)
SLICES = {node: tuple(index for owner, index in WORLD.slices if owner == node) for node in NODES}


def holding(node: str, step: int, *, generation: int = 3, parity: bool = True) -> Holding:
    return Holding(node, SnapshotId(step, generation), SLICES[node], parity)


def all_at(step: int, nodes: str = "abcd") -> list[Holding]:
    return [holding(node, step) for node in nodes]


def choose(holdings: list[Holding], checkpoint_step: int | None = None, committed: int = 100) -> Restore:
    return choose_restore(holdings, [WORLD], committed=committed, checkpoint_step=checkpoint_step)


def test_a_snapshot_that_is_whole_is_taken_from_where_it_lies() -> None:
    restore = choose([*all_at(98), *all_at(97)])
    assert restore == Restore(
        rung=Rung.OWN_SNAPSHOT,
        snapshot=SnapshotId(98, 3),
        sources=((0, "a"), (1, "a"), (2, "b"), (3, "b"), (4, "c"), (5, "c"), (6, "d"), (7, "d")),
        decoded=(),
        reason="No live replica holds the state. The snapshot of step 98 (generation 3) is restored: every slice is "
        "in the memory of a node that is here. 2 committed steps are redone.",
    )


def test_nodes_that_are_lost_are_decoded() -> None:
    restore = choose(all_at(100, "bd"), checkpoint_step=100)
    assert restore == Restore(
        rung=Rung.ERASURE_DECODE,
        snapshot=SnapshotId(100, 3),
        sources=((2, "b"), (3, "b"), (6, "d"), (7, "d")),
        decoded=("a", "c"),
        reason="No live replica holds the state. The snapshot of step 100 (generation 3) is restored: a, c are lost; "
        "what is missing is decoded with (2,2), k bytes read for each. No committed step is redone.",
    )


def test_a_newer_snapshot_that_must_be_decoded_beats_an_older_one_that_is_whole() -> None:
    assert choose([*all_at(99, "abc"), *all_at(98)]).snapshot == SnapshotId(99, 3)


def test_slices_of_two_snapshots_are_not_mixed() -> None:
    """Of step 99 only a's slices are left, of step 98 all others: together every slice, but of no one step."""
    restore = choose([*all_at(99, "a"), *all_at(98, "bcd"), *all_at(97)])
    assert (restore.snapshot, restore.rung) == (SnapshotId(98, 3), Rung.ERASURE_DECODE)
    assert restore.reason == (
        "No live replica holds the state. The snapshot of step 99 (generation 3) cannot be had: b, c, d hold nothing "
        "of it, 1 more than the 2 of 4 that the protection group survives. The snapshot of step 98 (generation 3) is "
        "restored: a holds nothing of it; what is missing is decoded with (2,2), k bytes read for each. 2 committed "
        "steps are redone."
    )


def test_two_attempts_at_a_step_are_two_snapshots_and_the_newer_generation_is_tried_first() -> None:
    older = SnapshotWorld(2, WORLD.slices, WORLD.groups)
    mixed = [holding(node, 9, generation=2 if node in "ab" else 3, parity=False) for node in NODES]
    assert choose_restore(mixed, [WORLD, older], committed=9, checkpoint_step=None).rung is Rung.STOP
    both = [*all_at(9), *(holding(node, 9, generation=2) for node in NODES)]
    assert choose_restore(both, [older, WORLD], committed=9, checkpoint_step=None).snapshot == SnapshotId(9, 3)


def test_a_world_that_the_ledger_does_not_offer_is_passed_over() -> None:
    restore = choose([*(holding(node, 99, generation=4) for node in NODES), *all_at(98)])
    assert restore.snapshot == SnapshotId(98, 3)
    assert "step 99 (generation 4) is of a world that the ledger does not offer" in restore.reason


def test_one_missing_slice_spoils_the_blocks_of_its_node_but_not_its_other_slice() -> None:
    partly = Holding("a", SnapshotId(99, 3), (0,), parity=True)
    restore = choose([partly, *all_at(99, "bc")])
    assert (restore.rung, restore.decoded) == (Rung.ERASURE_DECODE, ("a", "d"))
    assert restore.sources == ((0, "a"), (2, "b"), (3, "b"), (4, "c"), (5, "c"))
    assert "d is lost and a holds only a part; what is missing is decoded" in restore.reason
    assert choose([partly, *all_at(99, "b")]).rung is Rung.STOP


def test_parity_that_is_not_complete_is_not_counted_on() -> None:
    assert choose([holding(node, 99, parity=False) for node in "abcd"]).rung is Rung.OWN_SNAPSHOT
    assert choose([holding(node, 99, parity=False) for node in "abc"]).rung is Rung.STOP
    assert choose([holding("a", 99, parity=False), *all_at(99, "bc")]).rung is Rung.ERASURE_DECODE


def test_a_slice_that_another_node_holds_need_not_be_decoded() -> None:
    restore = choose(
        [*all_at(99, "bc"), holding("a", 99, parity=False), Holding("x", SnapshotId(99, 3), (6, 7), False)]
    )
    assert (restore.rung, restore.sources[-2:]) == (Rung.OWN_SNAPSHOT, ((6, "x"), (7, "x")))


def test_a_slice_is_taken_from_its_own_node_or_else_from_the_first_by_name() -> None:
    spare = [Holding(node, SnapshotId(99, 3), (0, 7), False) for node in ("y", "Z", "x")]
    sources = dict(choose([*spare, *all_at(99, "abc"), Holding("d", SnapshotId(99, 3), (6,), True)]).sources)
    assert (sources[0], sources[6], sources[7]) == ("a", "d", "Z")


def test_a_stripe_without_data_of_a_node_that_must_be_decoded_may_be_broken() -> None:
    """Stripe 2 (data a, b; parity c, d) lacks three blocks, but all of b's slices are somewhere, and d has no data there."""
    b = Holding("b", SnapshotId(99, 3), (3,), parity=True)
    a = Holding("a", SnapshotId(99, 3), (0, 1, 2), parity=True)
    restore = choose([a, b, holding("c", 99, parity=False)])
    assert (restore.rung, restore.decoded) == (Rung.ERASURE_DECODE, ("d",))


@pytest.mark.parametrize(
    ("checkpoint_step", "rung"), [(97, Rung.OWN_SNAPSHOT), (98, Rung.OWN_SNAPSHOT), (99, Rung.CHECKPOINT)]
)
def test_a_snapshot_is_preferred_to_a_checkpoint_that_is_not_newer(checkpoint_step: int, rung: Rung) -> None:
    assert choose(all_at(98), checkpoint_step).rung is rung


def test_why_a_checkpoint_is_read_is_said() -> None:
    assert choose([*all_at(99, "a"), *all_at(60)], checkpoint_step=80) == Restore(
        rung=Rung.CHECKPOINT,
        snapshot=None,
        sources=(),
        decoded=(),
        reason="No live replica holds the state. The snapshot of step 99 (generation 3) cannot be had: b, c, d hold "
        "nothing of it, 1 more than the 2 of 4 that the protection group survives. The snapshot of step 60 "
        "(generation 3) is older than the checkpoint. The checkpoint of step 80 is read. 20 committed steps are "
        "redone.",
    )


def test_what_was_lost_is_said_when_the_job_stops() -> None:
    assert choose(all_at(99, "a")) == Restore(
        rung=Rung.STOP,
        snapshot=None,
        sources=(),
        decoded=(),
        reason="No live replica holds the state. The snapshot of step 99 (generation 3) cannot be had: b, c, d are "
        "lost, 1 more than the 2 of 4 that the protection group survives. There is no checkpoint: the state after "
        "step 100 is lost, and the job stops.",
    )
    assert choose([]).reason == (
        "No live replica holds the state. No node that is here holds a snapshot. There is no checkpoint: the state "
        "after step 100 is lost, and the job stops."
    )


def test_without_a_protection_group_one_lost_node_is_too_many() -> None:
    alone = SnapshotWorld(3, WORLD.slices, ())
    restore = choose_restore(all_at(99, "abc"), [alone], committed=99, checkpoint_step=None)
    assert restore.rung is Rung.STOP
    assert "d is lost, and no protection group has parity of it" in restore.reason


def test_a_thousand_lost_nodes_are_counted_and_not_named() -> None:
    nodes = [f"n{i:04}" for i in range(1000)]
    groups = make_groups([Site(node) for node in nodes], 6, 2)
    world = SnapshotWorld(3, tuple(zip(nodes, range(1000), strict=True)), ())
    held = [Holding(nodes[0], SnapshotId(5, 3), (0,), True)]
    reason = choose_restore(held, [world], committed=5, checkpoint_step=None).reason
    assert "n0008 and 991 more are lost, and no protection group" in reason
    assert len(reason) < 400
    world = SnapshotWorld(3, world.slices, groups)
    reason = choose_restore(held, [world], committed=5, checkpoint_step=None).reason
    assert "protection group survives; 122 more protection groups are no better. There is no checkpoint" in reason
    assert len(reason) < 800
    scattered = [Holding(node, SnapshotId(step, 3), (step,), True) for step, node in enumerate(nodes[:20])]
    reason = choose_restore(scattered, [world], committed=999, checkpoint_step=None).reason
    assert "17 more snapshots are passed over. There is no checkpoint" in reason


# ----------------------------------------------------------------------------------------------------
# The twin


@st.composite
def disasters(draw: st.DrawFn) -> tuple[list[Holding], list[SnapshotWorld], int | None]:
    """What is left of a few snapshots of two worlds, and the newest checkpoint."""
    worlds = []
    for generation in (1, 2):
        nodes = [f"n{i}" for i in range(draw(st.integers(1, 7)))]
        owners = sorted(nodes * 2)[: draw(st.integers(len(nodes), 2 * len(nodes)))]
        owners = owners if set(owners) == set(nodes) else nodes
        groups = make_groups([Site(node) for node in nodes], draw(st.integers(1, 3)), draw(st.integers(0, 2)))
        worlds.append(SnapshotWorld(generation, tuple((node, i) for i, node in enumerate(owners)), groups))
    holdings = []
    for snapshot in draw(st.sets(st.builds(SnapshotId, st.integers(5, 7), st.integers(1, 3)), max_size=4)):
        world = next((world for world in worlds if world.generation == snapshot.generation), worlds[0])
        for node in sorted({node for node, _ in world.slices}):
            condition = draw(st.sampled_from(["whole", "whole", "whole", "gone", "no parity", "part", "spare"]))
            if condition == "gone":
                continue
            own = tuple(index for owner, index in world.slices if owner == node)
            some = {"part": own[1:], "spare": (*own, 0)}.get(condition, own)
            holdings.append(Holding(node, snapshot, some, condition != "no parity"))
    return draw(st.permutations(holdings)), worlds, draw(st.none() | st.integers(4, 8))


def twin_decodes(owner: str, snapshot: SnapshotId, world: SnapshotWorld, holdings: list[Holding]) -> bool:
    """Whether for each block of this node some k members of its stripe, of all choices of k, give their blocks."""
    here = {holding.node: holding for holding in holdings if holding.snapshot == snapshot}

    def gives(node: str, stripe: int, group: ProtectionGroup) -> bool:
        if node not in here:
            return False
        place = (group.nodes.index(node) - stripe) % len(group.nodes)
        own = {index for other, index in world.slices if other == node}
        return here[node].parity if place < group.m else own <= set(here[node].slices)

    for group in world.groups:
        if owner in group.nodes:
            return all(
                any(all(gives(node, stripe, group) for node in chosen) for chosen in combinations(group.nodes, group.k))
                for stripe in range(len(group.nodes))
                if (group.nodes.index(owner) - stripe) % len(group.nodes) >= group.m
            )
    return False


@given(disasters())
def test_the_choice_is_that_of_a_twin_that_tries_everything(
    disaster: tuple[list[Holding], list[SnapshotWorld], int | None],
) -> None:
    holdings, worlds, checkpoint_step = disaster
    possible = []
    for world in worlds:
        for snapshot in {holding.snapshot for holding in holdings if holding.snapshot.generation == world.generation}:
            held = {index for holding in holdings if holding.snapshot == snapshot for index in holding.slices}
            to_decode = sorted({owner for owner, index in world.slices if index not in held})
            if all(twin_decodes(owner, snapshot, world, holdings) for owner in to_decode):
                possible.append((snapshot, tuple(to_decode), held))

    restore = choose_restore(holdings, worlds, committed=7, checkpoint_step=checkpoint_step)
    if possible and max(possible)[0].step >= (checkpoint_step or 0):
        snapshot, to_decode, held = max(possible)
        assert restore.rung is (Rung.ERASURE_DECODE if to_decode else Rung.OWN_SNAPSHOT)
        assert (restore.snapshot, restore.decoded) == (snapshot, to_decode)
        assert [index for index, _ in restore.sources] == sorted(held)
        for index, node in restore.sources:
            assert any(h.node == node and h.snapshot == snapshot and index in h.slices for h in holdings)
    else:
        assert restore.rung is (Rung.STOP if checkpoint_step is None else Rung.CHECKPOINT)
        assert (restore.snapshot, restore.sources, restore.decoded) == (None, (), ())
    shuffled = choose_restore(holdings[::-1], worlds[::-1], committed=7, checkpoint_step=checkpoint_step)
    assert shuffled == restore
