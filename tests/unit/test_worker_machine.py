"""Transcripts of the worker's machine: what is fed to it, what must be done."""

from __future__ import annotations

import pytest

from elastic.domain import (
    Abandon,
    Admitted,
    CollectiveFailed,
    Commit,
    Finish,
    Leaving,
    Member,
    Plan,
    PlanKind,
    Prepare,
    Prepared,
    PrepareFailed,
    Registered,
    Resumed,
    Switched,
    TrainingSpec,
    Warm,
)
from elastic.protocol import (
    Applied,
    AskCommit,
    AskVote,
    AskWorld,
    BuildGroup,
    CollectiveBroke,
    Dealt,
    DropGroup,
    Effect,
    EnterWorld,
    Event,
    Exit,
    Finished,
    FinishStep,
    GoOn,
    GroupFell,
    GroupStands,
    HandOver,
    Heard,
    LoopEnded,
    MayCommit,
    MayVote,
    MustRegroup,
    Register,
    Send,
    StateReceived,
    StateSpoilt,
    Wait,
    WakeMain,
    Warmed,
    Word,
    WorkerMachine,
)


def plan(generation: int, kind: PlanKind, *workers: str) -> Plan:
    members = tuple(Member(worker, "n", rank) for rank, worker in enumerate(workers))
    return Plan(generation, kind, members, (0,) * len(members), len(members), reason=f"reason of {generation}")


def feed(machine: WorkerMachine, *events: Event) -> list[Effect]:
    """Effects of the last event."""
    effects: list[Effect] = []
    for event in events:
        effects = machine.step(event)
    return effects


def founder(committed: int = 0) -> WorkerMachine:
    """Worker a, training with b in generation 1."""
    machine = WorkerMachine("a")
    feed(
        machine,
        Heard(Admitted(2, 2)),
        Heard(Prepare(plan(1, PlanKind.FOUND, "a", "b"))),
        GroupStands(1),
        Heard(Commit(1)),
        AskWorld(),
    )
    for step in range(1, committed + 1):
        feed(machine, AskVote(step), AskCommit(step, 1), Applied(step))
    return machine


def joiner() -> WorkerMachine:
    """Worker j, warm and prepared for generation 2, which b is training without it."""
    machine = WorkerMachine("j")
    feed(machine, Heard(Admitted(2, 2, committed=5, joins_running_world=True)), Warmed())
    feed(machine, Heard(Prepare(plan(2, PlanKind.SWITCH, "b", "j"))), GroupStands(2))
    return machine


def test_a_joiner_is_prepared_when_its_group_stands_and_it_is_warm() -> None:
    switch = Heard(Prepare(plan(2, PlanKind.SWITCH, "b", "j")))
    prepared = Send(Prepared(2, 0, 0, has_state=False))
    for first, then, said in (
        (GroupStands(2), Warmed(), [Send(Warm()), prepared]),
        (Warmed(), GroupStands(2), [prepared]),
    ):
        machine = WorkerMachine("j")
        feed(machine, Heard(Admitted(2, 2, committed=5, joins_running_world=True)), switch)
        assert prepared not in machine.step(first)
        assert machine.step(then) == said


FENCE = plan(2, PlanKind.FENCE, "a")
SWITCH = plan(2, PlanKind.SWITCH, "a", "b", "j")


def test_the_first_world_forms() -> None:
    machine = WorkerMachine("a")
    world = plan(1, PlanKind.FOUND, "a", "b")
    transcript: list[tuple[Event, list[Effect]]] = [
        (Register(TrainingSpec(seed=3)), [Send(Registered(TrainingSpec(seed=3)))]),
        (AskWorld(), [Wait("the first world has not formed yet")]),
        (Heard(Admitted(2, 2)), [WakeMain()]),
        (Heard(Prepare(world)), [BuildGroup(world), WakeMain()]),
        (AskWorld(), [Wait("a newer generation is being prepared")]),
        (GroupStands(1), [Send(Prepared(1, 0, 0, has_state=True))]),
        (Heard(Commit(1)), [WakeMain()]),
        (AskWorld(), [Send(Switched(1, 0)), EnterWorld(world, 0, 0, ())]),
        (AskWorld(), [GoOn()]),
        (AskVote(1), [MayVote(1, 1)]),
        (AskCommit(1, 1), [MayCommit()]),
        (Applied(1), [Send(Resumed(1, 1))]),
        (AskVote(2), [MayVote(1, 1)]),
        (AskCommit(2, 1), [MayCommit()]),
        (Applied(2), []),
    ]
    for event, effects in transcript:
        assert machine.step(event) == effects, event


def test_a_sealed_worker_neither_votes_nor_writes() -> None:
    machine = founder()
    assert feed(machine, Heard(Prepare(FENCE))) == [DropGroup(1), BuildGroup(FENCE), WakeMain()]
    assert feed(machine, AskVote(1)) == [MustRegroup("reason of 2")]
    assert feed(machine, AskCommit(1, 1)) == [MustRegroup("reason of 2")]
    assert feed(machine, AskWorld()) == [Wait("reason of 2")]


def test_a_fence_between_vote_and_verdict_wins_and_the_step_is_redone() -> None:
    machine = founder()
    feed(machine, AskVote(1), Heard(Prepare(FENCE)))
    assert feed(machine, GroupStands(2)) == [Send(Prepared(2, 0, 1, has_state=True))]
    assert feed(machine, Heard(Commit(2, restore_step=0)), AskWorld()) == [
        Send(Switched(2, 0)),
        EnterWorld(FENCE, 0, 0, ()),
    ]
    assert machine.voted == 0, "the reduced gradient of an interrupted attempt is no vote any more"
    assert feed(machine, AskVote(1)) == [MayVote(2, 2)]


def test_a_write_that_has_begun_ends_before_it_is_reported() -> None:
    machine = founder()
    feed(machine, AskVote(1), AskCommit(1, 1), Heard(Prepare(FENCE)))
    assert machine.word is Word.COMMITTING
    assert feed(machine, GroupStands(2)) == []
    assert feed(machine, Applied(1)) == [Send(Prepared(2, 1, 1, has_state=True))]


def test_who_voted_finishes_the_step_that_another_committed() -> None:
    machine = founder()
    feed(machine, AskVote(1), Heard(Prepare(FENCE)), GroupStands(2), Heard(Commit(2, restore_step=1)))
    assert feed(machine, AskWorld()) == [FinishStep(1)]
    assert machine.word is Word.COMMITTING
    assert feed(machine, Applied(1)) == []
    assert feed(machine, AskWorld()) == [Send(Switched(2, 1)), EnterWorld(FENCE, 0, 1, ())]


def test_a_fence_while_finishing_a_step_is_reported_with_that_step() -> None:
    machine = founder()
    feed(machine, AskVote(1), Heard(Prepare(FENCE)), GroupStands(2), Heard(Commit(2, restore_step=1)), AskWorld())
    newer = plan(3, PlanKind.FENCE, "a")
    assert feed(machine, Heard(Prepare(newer))) == [DropGroup(2), DropGroup(1), BuildGroup(newer), WakeMain()]
    assert feed(machine, GroupStands(3)) == []
    assert feed(machine, Applied(1)) == [Send(Prepared(3, 1, 1, has_state=True))]


def test_a_state_that_cannot_be_brought_to_the_restore_step_is_given_up() -> None:
    machine = founder()
    (effect,) = feed(machine, Heard(Prepare(FENCE)), GroupStands(2), Heard(Commit(2, restore_step=1)), AskWorld())
    assert isinstance(effect, Exit) and "cannot be brought there" in effect.reason


def test_it_is_given_the_state_where_the_order_says_so() -> None:
    machine = founder(committed=1)
    world = plan(2, PlanKind.FENCE, "b", "a")
    feed(machine, Heard(Prepare(world)), GroupStands(2), Heard(Commit(2, restore_step=4, joiner_ranks=(1,))))
    assert feed(machine, AskWorld()) == [Send(Switched(2, 1)), EnterWorld(world, 1, 1, (1,))]
    newer = plan(3, PlanKind.FENCE, "a")
    feed(machine, Heard(Prepare(newer)))
    assert feed(machine, GroupStands(3)) == [Send(Prepared(3, 1, 1, has_state=False))], "it may be half overwritten"


@pytest.mark.parametrize("generation", [0, 1])
def test_an_older_generation_is_not_heard(generation: int) -> None:
    machine = founder()
    assert feed(machine, Heard(Prepare(plan(generation, PlanKind.FENCE, "a")))) == []
    assert feed(machine, Heard(Commit(generation))) == []
    assert feed(machine, Heard(Abandon(generation))) == []
    assert feed(machine, AskWorld()) == [GoOn()]


def test_a_fence_without_it_ends_it() -> None:
    (effect,) = feed(founder(), Heard(Prepare(plan(2, PlanKind.FENCE, "b"))))
    assert effect == Exit("generation 2 leaves this worker out: reason of 2")


def test_a_group_that_stands_too_late_is_dropped() -> None:
    machine = founder()
    newer = plan(3, PlanKind.FENCE, "a")
    feed(machine, Heard(Prepare(FENCE)))
    assert feed(machine, Heard(Prepare(newer))) == [DropGroup(2), DropGroup(1), BuildGroup(newer), WakeMain()]
    assert feed(machine, GroupStands(2)) == [DropGroup(2)]
    assert feed(machine, GroupFell(2, "late")) == []
    assert feed(machine, GroupFell(3, "refused")) == [Send(PrepareFailed(3, "refused"))]


def test_a_switch_is_built_aside_and_adopted_at_the_step_whose_verdict_decides_it() -> None:
    machine = founder()
    transcript: list[tuple[Event, list[Effect]]] = [
        (Heard(Prepare(SWITCH)), [BuildGroup(SWITCH), WakeMain()]),
        (AskWorld(), [GoOn()]),
        (AskVote(1), [MayVote(1, 1)]),
        (GroupStands(2), [Send(Prepared(2, 0, 1, has_state=True))]),
        (AskCommit(1, 1), [MayCommit()]),
        (Applied(1), [Send(Resumed(1, 1))]),
        (Heard(Commit(2, joiner_ranks=(2,))), [WakeMain()]),
        (AskWorld(), [GoOn()]),
        (AskVote(2), [MayVote(1, 2)]),
        (AskCommit(2, 1), [MayCommit()]),  # another worker had not heard the commit yet
        (Applied(2), []),
        (AskWorld(), [GoOn()]),
        (AskVote(3), [MayVote(1, 2)]),
        (AskCommit(3, 2), [MayCommit()]),
        (Applied(3), []),
        (AskWorld(), [Send(Switched(2, 3)), EnterWorld(SWITCH, 0, 3, (2,))]),
        (AskVote(4), [MayVote(2, 2)]),
        (AskCommit(4, 2), [MayCommit()]),
        (Applied(4), [DropGroup(1), Send(Resumed(2, 4))]),
    ]
    for event, effects in transcript:
        assert machine.step(event) == effects, event


def test_an_abandoned_switch_is_forgotten_unless_it_was_committed() -> None:
    machine = founder()
    assert feed(machine, Heard(Prepare(SWITCH)), Heard(Abandon(2))) == [DropGroup(2)]
    newer = plan(3, PlanKind.SWITCH, "a", "b")
    feed(machine, Heard(Prepare(newer)), GroupStands(3), Heard(Commit(3)))
    assert feed(machine, Heard(Abandon(3))) == []
    assert feed(machine, AskVote(1)) == [MayVote(1, 3)]


def test_a_fence_beats_a_decided_switch() -> None:
    machine = founder()
    feed(machine, Heard(Prepare(SWITCH)), GroupStands(2), Heard(Commit(2)), AskVote(1), AskCommit(1, 2))
    fence = plan(3, PlanKind.FENCE, "a", "j")
    assert feed(machine, Heard(Prepare(fence))) == [DropGroup(2), DropGroup(1), BuildGroup(fence), WakeMain()]
    assert feed(machine, Applied(1), AskWorld()) == [Wait("reason of 3")]
    assert feed(machine, GroupStands(3)) == [Send(Prepared(3, 1, 1, has_state=True))]


def test_who_leaves_waits_for_the_word_to_finish() -> None:
    machine = founder()
    world = plan(2, PlanKind.SWITCH, "b")
    assert feed(machine, Heard(Prepare(world))) == [WakeMain(), Send(Prepared(2, 0, 0, has_state=True))]
    feed(machine, Heard(Commit(2)), AskVote(1), AskCommit(1, 2), Applied(1))
    assert feed(machine, AskWorld()) == [Send(Switched(2, 1)), Wait("reason of 2")]
    assert feed(machine, Heard(Finish("drained"))) == [WakeMain()]
    assert feed(machine, AskWorld()) == [Finished("drained")]


def test_who_leaves_can_be_called_back_by_a_fence() -> None:
    machine = founder()
    feed(machine, Heard(Prepare(plan(2, PlanKind.SWITCH, "b"))), Heard(Commit(2)))
    feed(machine, AskVote(1), AskCommit(1, 2), Applied(1), AskWorld())
    fence = plan(3, PlanKind.FENCE, "a")
    feed(machine, Heard(Prepare(fence)))
    assert feed(machine, GroupStands(3)) == [Send(Prepared(3, 1, 1, has_state=True))]
    assert feed(machine, Heard(Commit(3, restore_step=1)), AskWorld())[-1] == EnterWorld(fence, 0, 1, ())


def test_who_leaves_a_state_that_is_cut_hands_its_part_over_first() -> None:
    machine = founder()
    machine.holds_parts = True
    world = plan(2, PlanKind.SWITCH, "b")
    feed(machine, Heard(Prepare(world)), Heard(Commit(2)), AskVote(1), AskCommit(1, 2), Applied(1))
    assert feed(machine, AskWorld()) == [Send(Switched(2, 1)), HandOver(world)]
    assert feed(machine, AskWorld())[-1] == Wait("the first world has not formed yet")
    feed(machine, Heard(Finish("drained")))
    assert feed(machine, AskWorld()) == [Finished("drained")]


def test_who_leaves_hands_its_part_over_though_all_others_have_switched_long_ago() -> None:
    machine = founder()
    machine.holds_parts = True
    world = plan(2, PlanKind.SWITCH, "b")
    feed(machine, Heard(Prepare(world)), Heard(Commit(2)), AskVote(1), AskCommit(1, 2), Applied(1))
    feed(machine, Heard(Finish("drained")))
    assert feed(machine, AskWorld()) == [Send(Switched(2, 1)), HandOver(world)]
    assert feed(machine, AskWorld()) == [Finished("drained")]


def test_an_update_that_is_never_completed_leaves_no_state_and_does_not_wait() -> None:
    machine = founder(committed=2)
    feed(machine, AskVote(3), AskCommit(3, 1))
    assert feed(machine, StateSpoilt("reset")) == [DropGroup(1), Send(CollectiveFailed(1, 3, "reset"))]
    feed(machine, Heard(Prepare(FENCE)))
    assert feed(machine, GroupStands(FENCE.generation)) == [Send(Prepared(FENCE.generation, 2, 3, has_state=False))]


def test_an_update_that_a_fence_cut_off_is_reported_as_soon_as_it_is_over() -> None:
    machine = founder(committed=2)
    feed(machine, AskVote(3), AskCommit(3, 1), Heard(Prepare(FENCE)))
    assert feed(machine, GroupStands(FENCE.generation)) == [], "its main thread is writing"
    assert Send(Prepared(FENCE.generation, 2, 3, has_state=False)) in feed(machine, StateSpoilt("reset"))


def test_a_joiner_enters_as_soon_as_the_switch_is_committed() -> None:
    machine = joiner()
    assert feed(machine, AskWorld()) == [Wait("the first world has not formed yet")]
    feed(machine, Heard(Commit(2, joiner_ranks=(1,))))
    assert feed(machine, AskWorld()) == [
        Send(Switched(2, 0)),
        EnterWorld(plan(2, PlanKind.SWITCH, "b", "j"), 1, 0, (1,)),
    ]
    feed(machine, StateReceived(7))
    assert feed(machine, AskVote(8)) == [MayVote(2, 2)]


def test_a_joiner_says_warm_and_that_it_holds_nothing() -> None:
    machine = WorkerMachine("j")
    feed(machine, Heard(Admitted(2, 2, joins_running_world=True)))
    assert feed(machine, Warmed()) == [Send(Warm())]
    feed(machine, Heard(Prepare(plan(2, PlanKind.FENCE, "b", "j"))))
    assert feed(machine, GroupStands(2)) == [Send(Prepared(2, 0, 0, has_state=False))]


def test_admission_is_heard_once() -> None:
    machine = founder(committed=1)
    assert feed(machine, Heard(Admitted(2, 2, joins_running_world=True))) == []
    assert machine.has_state


def test_a_broken_collective_is_told_once_and_only_if_no_fence_is_known() -> None:
    machine = founder(committed=2)
    assert feed(machine, CollectiveBroke("reset")) == [DropGroup(1), Send(CollectiveFailed(1, 3, "reset"))]
    assert feed(machine, CollectiveBroke("again")) == []
    assert feed(machine, AskWorld()) == [Wait("reset")]
    fenced = founder()
    assert feed(fenced, Heard(Prepare(FENCE)), CollectiveBroke("reset")) == []


def test_the_end_of_the_loop() -> None:
    machine = founder(committed=3)
    assert feed(machine, LoopEnded("d", 6)) == [Send(Leaving(3, "d", 6))]
    assert feed(machine, AskWorld()) == [GoOn()]
    assert feed(machine, Heard(Finish(""))) == [WakeMain()]
    assert feed(machine, AskWorld()) == [Finished("the job is over")]


def test_a_vote_out_of_order_ends_the_worker() -> None:
    (effect,) = feed(founder(committed=1), AskVote(3))
    assert isinstance(effect, Exit) and "a fault of the runtime" in effect.reason


def test_a_stop_is_of_one_step_and_waits_until_that_is_done_again() -> None:
    machine = founder(6)
    feed(machine, AskVote(7), AskCommit(7, 1, True))
    assert not machine.stopping, "the step is not over"
    feed(machine, Applied(7))
    assert machine.stopping
    # All go back to step 6: whoever is left has to do step 7 again before it leaves.
    feed(machine, Heard(Prepare(plan(2, PlanKind.FENCE, "a", "c"))))
    (prepared,) = [e.message for e in feed(machine, GroupStands(2)) if isinstance(e, Send)]
    assert isinstance(prepared, Prepared) and prepared.stop_after == 7
    feed(machine, Heard(Commit(2, 6, (0, 1), stop_after=7, snapshot_generation=1)), AskWorld(), StateReceived(6))
    assert not machine.stopping
    newcomer = WorkerMachine("c")
    feed(newcomer, Heard(Admitted(joins_running_world=True)), Heard(Prepare(plan(2, PlanKind.FENCE, "a", "c"))), GroupStands(2))
    feed(newcomer, Heard(Commit(2, 6, (0, 1), stop_after=7, snapshot_generation=1)), AskWorld(), StateReceived(6))
    feed(newcomer, AskVote(7), AskCommit(7, 2, False), Applied(7))
    assert newcomer.stopping


def test_how_a_step_is_dealt_is_reported_as_long_as_it_is_that_of_the_next_step() -> None:
    def dealt(machine: WorkerMachine, generation: int) -> int:
        feed(machine, Heard(Prepare(plan(generation, PlanKind.FENCE, "a"))))
        (prepared,) = [e.message for e in feed(machine, GroupStands(generation)) if isinstance(e, Send)]
        assert isinstance(prepared, Prepared)
        return prepared.dealt

    machine = founder(6)
    feed(machine, Dealt(7, 1))
    assert dealt(machine, 2) == 1
    feed(machine, Heard(Commit(2, 6, kept_deal=1)))
    (entered,) = [effect for effect in feed(machine, AskWorld()) if isinstance(effect, EnterWorld)]
    assert entered.kept_deal == 1
    assert dealt(machine, 3) == 1, "it is kept, and the next fence comes before the main thread says so again"
    feed(machine, Heard(Commit(3, 6)), AskWorld())
    assert dealt(machine, 4) == 0, "the main thread is about to deal it anew"
    feed(machine, Heard(Commit(4, 6)), AskWorld(), Dealt(7, 4), AskVote(7), AskCommit(7, 4, False), Applied(7))
    assert dealt(machine, 5) == 0, "that was step 7, and step 8 has not been dealt"
