"""When a worker captures, and what it says in its votes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic.cadence import AUTO
from elastic.domain import NO_STEP, Member, Plan
from elastic.errors import ConfigError
from elastic.snapshots import NO_OPINION, Ballot, SnapshotId
from elastic.snapshotter import Snapshotter

ONE = Plan(generation=1, members=(Member("a"), Member("b", rank=1)))
TWO = replace(ONE, generation=2)
GUARDED = replace(ONE, data_shards=1, parity_shards=1)


class Buffers:
    """A capturer that copies nothing."""

    def __init__(self) -> None:
        self.protected: SnapshotId | None = None
        self.cost_s = 0.0
        self.room = self.room_now = True
        self.error: Exception | None = None
        self.captured: list[tuple[int, int, int, int]] = []
        self.stable = NO_STEP

    def has_room(self, generation: int, stable: int) -> bool:
        self.show_stable(stable)
        return self.room

    def show_stable(self, step: int) -> None:
        self.stable = step

    def capture(self, step: int, generation: int, index: int, count: int) -> bool:
        if self.error is not None:
            raise self.error
        if self.room_now:
            self.captured.append((step, generation, index, count))
        return self.room_now

    def discard(self, snapshot: SnapshotId) -> None:
        self.captured = [one for one in self.captured if one[:2] != (snapshot.step, snapshot.generation)]

    def finish(self) -> None:
        return


def step(
    snapshots: Snapshotter,
    number: int,
    plan: Plan = ONE,
    *,
    others: int = NO_OPINION,
    missed: bool = False,
    at_s: float = 0.0,
) -> int:
    """Vote on a step, commit it with a verdict, end it; returns what was voted as safe.

    `others` is what the others say is safe, and `missed` whether one of them missed the last capture.
    """
    vote = snapshots.vote(number, plan, at_s)
    verdict = replace(vote, protected=min(vote.protected, others), missed=vote.missed or missed)
    snapshots.decided(number, plan, 1, verdict)
    snapshots.step_ended(number, plan.generation, at_s)
    return vote.protected


def test_each_step_is_captured_as_the_worlds_own_part() -> None:
    buffers = Buffers()
    snapshots = Snapshotter(buffers, every=1)
    assert [step(snapshots, number) for number in (1, 2, 3)] == [NO_OPINION, 1, 2]
    assert buffers.captured == [(1, 1, 1, 2), (2, 1, 1, 2), (3, 1, 1, 2)]
    assert snapshots.stable == 2


def test_only_every_nth_step_is_captured_and_the_first_one_of_a_world() -> None:
    buffers = Buffers()
    snapshots = Snapshotter(buffers, every=3)
    for number in range(1, 8):
        step(snapshots, number)
    assert [captured[0] for captured in buffers.captured] == [1, 3, 6]
    for number in range(8, 13):
        step(snapshots, number, TWO)
    assert [captured[:2] for captured in buffers.captured[3:]] == [(8, 2), (9, 2), (12, 2)]


def test_what_one_worker_cannot_capture_no_worker_captures() -> None:
    buffers = Buffers()
    snapshots = Snapshotter(buffers, every=1)
    snapshots.decided(1, ONE, 0, Ballot(NO_OPINION, False))
    snapshots.step_ended(1, 1, 0.0)
    assert buffers.captured == []


def test_without_room_a_step_is_skipped_and_counted() -> None:
    buffers = Buffers()
    buffers.room = False
    snapshots = Snapshotter(buffers, every=1)
    assert snapshots.vote(1, ONE, 0.0) == Ballot()
    assert snapshots.skipped == 1


def test_a_world_that_changed_before_the_step_ended_captures_nothing_of_it() -> None:
    buffers = Buffers()
    snapshots = Snapshotter(buffers, every=1)
    snapshots.decided(1, ONE, 0, Ballot(NO_OPINION, True))
    snapshots.step_ended(1, TWO.generation, 0.0)
    assert buffers.captured == []


def test_a_snapshot_of_an_older_world_counts_only_once_it_was_stable() -> None:
    snapshots = Snapshotter(Buffers(), every=1)
    step(snapshots, 1)
    step(snapshots, 2)  # which makes 1 stable; 2 may lack the part of somebody who died
    assert snapshots.vote(3, TWO, 0.0).protected == 1


def test_a_protected_world_counts_what_its_agent_has_protected() -> None:
    buffers = Buffers()
    snapshots = Snapshotter(buffers, every=1)
    step(snapshots, 1, GUARDED)
    assert step(snapshots, 2, GUARDED) == NO_STEP  # captured, and not safe yet
    buffers.protected = SnapshotId(1, 1)
    assert step(snapshots, 3, GUARDED) == 1
    buffers.protected = SnapshotId(9, 7)  # of another world
    assert snapshots.vote(4, GUARDED, 0.0).protected == 1


def test_the_agent_is_shown_what_is_stable_as_soon_as_the_verdict_says_so() -> None:
    buffers = Buffers()
    snapshots = Snapshotter(buffers, every=1)
    snapshots.decided(8, ONE, 0, Ballot(7, True))
    assert buffers.stable == 7
    snapshots.decided(9, ONE, 0, Ballot(NO_OPINION, True))
    snapshots.decided(10, ONE, 0, Ballot(6, True))
    assert buffers.stable == 7


def test_stable_never_goes_back_but_in_a_restore() -> None:
    snapshots = Snapshotter(Buffers(), every=1)
    step(snapshots, 1)
    step(snapshots, 2)
    step(snapshots, 3, others=NO_STEP)
    assert snapshots.stable == 1
    snapshots.restored(0)
    assert snapshots.stable == 0 and snapshots.vote(1, TWO, 0.0).protected == 0


def test_who_missed_what_others_captured_says_so_until_it_has_captured_again() -> None:
    buffers = Buffers()
    buffers.room_now = False
    snapshots = Snapshotter(buffers, every=1)
    step(snapshots, 1)
    assert snapshots.vote(2, ONE, 0.0) == Ballot(NO_STEP, True, missed=True)
    buffers.room_now = True
    assert [step(snapshots, 2, others=1), step(snapshots, 3, others=2)] == [NO_STEP, 2]
    assert snapshots.stable == 2


def test_what_one_worker_missed_all_let_go_of() -> None:
    buffers = Buffers()
    snapshots = Snapshotter(buffers, every=1)
    step(snapshots, 1)
    step(snapshots, 2)
    step(snapshots, 3, others=1, missed=True)  # another one has no slice of step 2
    assert [captured[0] for captured in buffers.captured] == [1, 3]
    assert snapshots.stable == 1
    assert step(snapshots, 4, others=1, missed=True) == 3
    assert snapshots.vote(5, ONE, 0.0).protected == 4  # captured after the verdict that dropped step 3


def test_what_was_dropped_counts_for_nothing_although_it_was_protected_here() -> None:
    buffers = Buffers()
    snapshots = Snapshotter(buffers, every=1)
    step(snapshots, 1, GUARDED)
    buffers.protected = SnapshotId(1, 1)
    step(snapshots, 2, GUARDED, others=NO_STEP, missed=True)
    assert snapshots.vote(3, GUARDED, 0.0).protected == NO_STEP


def test_who_did_not_see_a_verdict_learns_what_is_stable_from_the_next() -> None:
    snapshots = Snapshotter(Buffers(), every=1)
    snapshots.decided(7, ONE, 0, Ballot(NO_OPINION, stable=6))
    assert snapshots.stable == 6


def test_a_joiner_holds_back_nothing() -> None:
    snapshots = Snapshotter(Buffers(), every=1)
    assert snapshots.vote(8, ONE, 0.0).protected == NO_OPINION
    snapshots.decided(8, ONE, 0, Ballot(7, True))
    assert snapshots.stable == 7


@pytest.mark.parametrize("error", [ConfigError("no memory")])
def test_a_refusal_ends_snapshots_and_never_training(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    buffers = Buffers()
    snapshots = Snapshotter(buffers, every=1)
    step(snapshots, 1)
    step(snapshots, 2)
    buffers.error = error
    step(snapshots, 3)
    assert "no snapshots are taken any more: no memory" in capsys.readouterr().err
    assert snapshots.vote(4, ONE, 0.0) == Ballot(2, False, True, 2)


def test_without_memory_a_worker_has_no_part_in_it() -> None:
    for snapshots in (Snapshotter(), Snapshotter(Buffers(), every=0), Snapshotter(None, every=1)):
        assert snapshots.vote(1, ONE, 0.0) == Ballot()
        snapshots.decided(1, ONE, 0, Ballot(5, False))
        snapshots.step_ended(1, 1, 0.0)
        snapshots.finish()


def test_auto_captures_as_often_as_costs_the_least() -> None:
    buffers = Buffers()
    buffers.cost_s = 0.005  # sqrt(2 * 0.005 * 3600) = 6 s
    snapshots = Snapshotter(buffers, every=AUTO)
    snapshots.expect(1 / 3600)
    for number in range(1, 101):
        step(snapshots, number, at_s=0.25 * number)
    assert [captured[0] for captured in buffers.captured] == [1, 25, 49, 73, 97]
    snapshots.expect(4 / 3600)  # four times as often gone back to, half as far apart
    for number in range(101, 151):
        step(snapshots, number, at_s=0.25 * number)
    assert [captured[0] for captured in buffers.captured[5:]] == [109, 121, 133, 145]
