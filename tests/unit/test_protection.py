"""The keeper's machine: single decisions, and whole groups of machines under random orders, losses and restarts."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent import protection
from agent.protection import (
    POLL_S,
    SETS_MAX,
    AskTable,
    Command,
    Covered,
    DropParity,
    DropSlices,
    Event,
    Forgotten,
    Notify,
    ParityFailed,
    ParityHeld,
    ParityWritten,
    PeerAsked,
    Protected,
    ProtectionMachine,
    SliceHeld,
    Standing,
    StopWriting,
    TableCame,
    TableWithheld,
    Tick,
    Vulnerable,
    World,
    WorldCame,
    WriteParity,
)
from elastic.snapshots import Slice, SnapshotId
from recovery.placement import ProtectionGroup

PLENTY = 1 << 40
BUFFERS = 5
GROUP = ProtectionGroup(("a", "b", "c"), 2, 1)
SLICES = {"a": (0, 1), "b": (2, 3), "c": (4, 5)}
FIRST, SECOND, THIRD = SnapshotId(5, 1), SnapshotId(6, 1), SnapshotId(7, 1)


def world(node: str, generation: int = 1, **moved: str) -> World:
    return World(generation, node, {name: f"tcp://{name}" for name in SLICES} | moved, SLICES, (GROUP,))


def part(snapshot: SnapshotId, index: int) -> Slice:
    return Slice(snapshot, index, 6, 100 * index, 100 * (index + 1), 600, 28, 1, 1)


def table(snapshot: SnapshotId, node: str) -> tuple[Slice, ...]:
    return tuple(part(snapshot, index) for index in SLICES[node])


def machine_of(node: str, parity_bytes_max: int = PLENTY) -> ProtectionMachine:
    machine = ProtectionMachine(parity_bytes_max)
    machine.step(WorldCame(world(node)), 0.0)
    return machine


def feed(machine: ProtectionMachine, *events: Event, now: float = 1.0) -> list[Command]:
    return [command for event in events for command in machine.step(event, now)]


def hold(snapshot: SnapshotId, node: str) -> list[Event]:
    return [SliceHeld(piece) for piece in table(snapshot, node)]


def tables(snapshot: SnapshotId, written: tuple[int, ...] = ()) -> list[Event]:
    return [TableCame(node, snapshot, table(snapshot, node), written) for node in ("b", "c")]


def writes(commands: list[Command]) -> list[tuple[SnapshotId, int]]:
    return [(command.snapshot, command.stripe.number) for command in commands if isinstance(command, WriteParity)]


def test_the_others_are_asked_once_all_slices_are_here() -> None:
    machine = machine_of("a")
    first, second = hold(FIRST, "a")
    assert feed(machine, first) == []
    assert machine.standing(FIRST) is Standing.NOT_YET
    assert feed(machine, second) == [AskTable("b", FIRST), AskTable("c", FIRST)]
    assert machine.standing(FIRST) is Standing.READY
    assert machine.table(FIRST) == table(FIRST, "a")


def test_parity_is_written_once_all_tables_are_known_and_those_who_gave_are_told() -> None:
    machine = machine_of("a")
    feed(machine, *hold(FIRST, "a"))
    b, c = tables(FIRST)
    assert writes(feed(machine, b)) == []
    (write,) = [command for command in feed(machine, c) if isinstance(command, WriteParity)]
    assert write.stripe.parity[write.row] == "a"
    assert write.block_bytes == GROUP.block_bytes(2 * 192)
    number = write.stripe.number
    told = feed(machine, ParityWritten(FIRST, number))
    assert [command for command in told if isinstance(command, Notify)] == [
        Notify(node, FIRST, number) for node, _ in write.stripe.data
    ]
    assert machine.written(FIRST) == (number,)
    assert Covered(FIRST) in told


def test_a_shard_is_protected_when_all_parities_over_its_blocks_are_held() -> None:
    machine = machine_of("a")
    feed(machine, *hold(FIRST, "a"), *tables(FIRST))
    guards = [(s.number, s.parity[0]) for s in GROUP.stripes() if "a" in [node for node, _ in s.data]]
    said = [feed(machine, ParityHeld(node, FIRST, number)) for number, node in guards]
    assert [Protected(FIRST) in commands for commands in said] == [False, True]
    assert Protected(FIRST) not in feed(machine, *[ParityHeld(node, FIRST, number) for number, node in guards])


def test_a_notice_that_was_lost_is_made_good_by_asking() -> None:
    machine = machine_of("a")
    feed(machine, *hold(FIRST, "a"), *tables(FIRST))
    assert AskTable("b", FIRST) in feed(machine, Tick(), now=1.0 + 2 * POLL_S)
    assert Protected(FIRST) in feed(machine, *tables(FIRST, written=(0, 1, 2)))


def test_who_was_asked_too_early_is_asked_again_as_soon_as_it_asks() -> None:
    machine = machine_of("a")
    feed(machine, *hold(FIRST, "a"), TableWithheld("b", FIRST, False, "not yet"))
    assert feed(machine, Tick()) == []
    assert feed(machine, PeerAsked("b", FIRST)) == [AskTable("b", FIRST)]
    assert feed(machine, PeerAsked("b", FIRST)) == []  # one question is on its way


def test_a_snapshot_that_a_node_will_never_have_is_given_up_for_the_next() -> None:
    machine = machine_of("a")
    feed(machine, *hold(FIRST, "a"), *hold(SECOND, "a"), *tables(SECOND))
    assert machine.written(FIRST) == ()
    said = feed(machine, TableWithheld("b", FIRST, True, "b has a newer one"))
    assert Vulnerable(FIRST, "b has a newer one") in said
    assert {snapshot for snapshot, _ in writes(said)} == {SECOND}


def test_an_older_snapshot_is_waited_for_as_long_as_it_can_be_completed() -> None:
    machine = machine_of("a")
    feed(machine, *hold(FIRST, "a"), TableWithheld("b", FIRST, False, "not yet"))
    assert writes(feed(machine, *hold(SECOND, "a"), *tables(SECOND), Tick(), now=50.0)) == []


def test_what_is_older_than_what_a_node_has_complete_is_gone() -> None:
    machine = machine_of("a")
    feed(machine, *hold(SECOND, "a"))
    assert machine.standing(FIRST) is Standing.GONE
    assert machine.standing(THIRD) is Standing.NOT_YET
    assert machine.standing(SnapshotId(5, 2)) is Standing.NOT_YET
    feed(machine, WorldCame(world("a", 2)))
    assert machine.standing(THIRD) is Standing.GONE
    assert machine.standing(SnapshotId(5, 2)) is Standing.NOT_YET, "a step that is redone is older by its number only"


def test_a_new_world_ends_what_is_unfinished_and_keeps_what_was_protected() -> None:
    machine = machine_of("a")
    feed(machine, *hold(FIRST, "a"), *tables(FIRST, written=(0, 1, 2)))
    (mine,) = [s.number for s in GROUP.stripes() if "a" in s.parity]
    feed(machine, ParityWritten(FIRST, mine), Forgotten(FIRST.step))
    assert writes(feed(machine, *hold(SECOND, "a"), *tables(SECOND)))
    said = feed(machine, WorldCame(world("a", 2)))
    assert StopWriting(SECOND) in said and DropParity(FIRST) not in said
    later = SnapshotId(6, 2)
    said = feed(machine, *hold(later, "a"), *tables(later))
    assert DropParity(SECOND) in said, "its memory is needed"
    assert writes(said) == [(later, mine)]
    assert machine.written(FIRST) == (mine,)


def test_what_was_protected_in_an_older_world_and_is_not_stable_gives_way_to_the_present_one() -> None:
    machine = machine_of("a")
    for snapshot in (FIRST, SECOND):
        (write,) = writes(feed(machine, *hold(snapshot, "a"), *tables(snapshot, (0, 1, 2))))
        feed(machine, ParityWritten(*write))
    feed(machine, Forgotten(FIRST.step), WorldCame(world("a", 2)))
    later = SnapshotId(7, 2)
    said = feed(machine, *hold(later, "a"), *tables(later))
    assert DropParity(SECOND) in said and DropParity(FIRST) not in said
    assert {snapshot for snapshot, _ in writes(said)} == {later}
    assert machine.written(FIRST) != ()


def test_a_third_set_of_parity_waits_until_the_first_is_forgotten() -> None:
    machine = machine_of("a")
    for snapshot in (FIRST, SECOND):
        (write,) = writes(feed(machine, *hold(snapshot, "a"), *tables(snapshot, (0, 1, 2))))
        feed(machine, ParityWritten(*write))
    assert writes(feed(machine, *hold(THIRD, "a"), *tables(THIRD), Tick(), now=9.0)) == []
    said = feed(machine, Forgotten(SECOND.step))
    assert DropParity(FIRST) in said and DropSlices(FIRST) in said
    assert [snapshot for snapshot, _ in writes(said)] == [THIRD]
    assert machine.standing(FIRST) is Standing.GONE


def test_parity_beyond_the_budget_is_refused_in_a_sentence_once() -> None:
    machine = machine_of("a", parity_bytes_max=100)
    said = feed(machine, *hold(FIRST, "a"), *tables(FIRST), Tick(), Tick())
    (refusal,) = [command for command in said if isinstance(command, Vulnerable)]
    assert "takes 192 bytes beside the 0 in use, more than the 100 allowed" in refusal.reason
    assert writes(said) == []


def test_a_failed_parity_is_tried_again_later() -> None:
    machine = machine_of("a")
    (write,) = writes(feed(machine, *hold(FIRST, "a"), *tables(FIRST)))
    assert writes(feed(machine, ParityFailed(*write, False, "b does not answer"))) == []
    assert writes(feed(machine, Tick(), now=1.0 + 2 * POLL_S)) == [write]


def test_a_keeper_that_was_started_again_has_lost_its_parity() -> None:
    machine = machine_of("a")
    feed(machine, *hold(FIRST, "a"), *tables(FIRST, written=(0, 1, 2)))
    said = feed(machine, WorldCame(world("a", b="tcp://elsewhere")))
    (lost,) = [command for command in said if isinstance(command, Vulnerable)]
    assert "the keeper of b was started again" in lost.reason
    assert AskTable("b", FIRST) in said
    assert Protected(FIRST) in feed(machine, TableCame("b", FIRST, table(FIRST, "b"), (0, 1, 2)))


def test_a_table_of_other_slices_than_the_world_says_is_not_believed() -> None:
    machine = machine_of("a")
    feed(machine, *hold(FIRST, "a"))
    said = feed(machine, TableCame("b", FIRST, table(FIRST, "c"), (0, 1, 2)))
    assert [command.reason for command in said if isinstance(command, Vulnerable)] == [
        "the table of b does not name the slices that its workers capture"
    ]
    assert "b" not in machine.tables(FIRST)


def test_a_node_without_a_group_is_vulnerable_and_says_why() -> None:
    machine = ProtectionMachine(PLENTY)
    feed(machine, WorldCame(dataclasses.replace(world("a"), groups=())))
    assert feed(machine, *hold(FIRST, "a")) == [
        Vulnerable(FIRST, "its node is in no protection group of its generation")
    ]


def test_what_one_node_alone_saw_protected_does_not_stand_in_the_way_of_a_newer_world() -> None:
    machine = machine_of("a")
    for snapshot in (FIRST, SECOND):
        (write,) = writes(feed(machine, *hold(snapshot, "a"), *tables(snapshot, (0, 1, 2))))
        feed(machine, ParityWritten(*write))
    feed(machine, Forgotten(FIRST.step), WorldCame(world("a", 2)))
    said = feed(machine, *hold(SnapshotId(7, 2), "a"), *tables(SnapshotId(7, 2)))
    assert DropParity(SECOND) in said and DropParity(FIRST) not in said, "the first is the stable one"
    assert [snapshot for snapshot, _ in writes(said)] == [SnapshotId(7, 2)]


def test_what_was_given_up_makes_room_for_new_snapshots() -> None:
    machine = machine_of("a")
    for generation in range(2, protection.SNAPSHOTS_MAX + 4):
        feed(machine, *hold(SnapshotId(generation, generation - 1), "a"), WorldCame(world("a", generation)))
    newest = SnapshotId(protection.SNAPSHOTS_MAX + 9, protection.SNAPSHOTS_MAX + 3)
    assert AskTable("b", newest) in feed(machine, *hold(newest, "a"))


def test_no_more_snapshots_are_kept_than_there_is_room_for() -> None:
    machine = machine_of("a")
    said: list[Command] = []
    for step in range(protection.SNAPSHOTS_MAX + 1):
        said = feed(machine, SliceHeld(part(SnapshotId(step, 1), 0)))
    assert DropSlices(SnapshotId(protection.SNAPSHOTS_MAX, 1)) in said


# Whole groups ------------------------------------------------------------------------------------------------------


class Cluster:
    """All machines of a group, with everything that is on its way between them in one heap of deeds."""

    def __init__(self, k: int, m: int) -> None:
        self.group = ProtectionGroup(tuple(f"n{i}" for i in range(k + m)), k, m)
        self.nodes = self.group.nodes
        self.slices = {node: (index,) for index, node in enumerate(self.nodes)}
        self.now, self.generation, self.step = 0.0, 1, 0
        self.starts = dict.fromkeys(self.nodes, 0)
        self.machines = {node: ProtectionMachine(PLENTY) for node in self.nodes}
        self.captured: dict[str, list[SnapshotId]] = {node: [] for node in self.nodes}
        self.parities: dict[str, set[tuple[SnapshotId, int]]] = {node: set() for node in self.nodes}
        self.sets: dict[str, set[SnapshotId]] = {node: set() for node in self.nodes}
        self.protected: dict[str, set[SnapshotId]] = {node: set() for node in self.nodes}
        self.under_way: list[tuple[str, Command]] = []
        self.before_step = 0
        for node in self.nodes:
            self.give(node, WorldCame(self.world(node)))

    def world(self, node: str) -> World:
        peers = {name: f"tcp://{name}:{self.starts[name]}" for name in self.nodes}
        return World(self.generation, node, peers, self.slices, (self.group,))

    def slice(self, node: str, snapshot: SnapshotId) -> Slice:
        index = self.slices[node][0]
        return Slice(snapshot, index, len(self.nodes), 10 * index, 10 * (index + 1), 10 * len(self.nodes), 5, 1, 1)

    def give(self, node: str, event: Event) -> None:
        for command in self.machines[node].step(event, self.now):
            match command:
                case AskTable() | Notify():
                    self.under_way.append((node, command))
                case WriteParity(snapshot):
                    self.sets[node].add(snapshot)
                    self.under_way.append((node, command))
                case StopWriting(snapshot):
                    self.under_way = [
                        (who, what)
                        for who, what in self.under_way
                        if not (who == node and isinstance(what, WriteParity) and what.snapshot == snapshot)
                    ]
                case DropParity(snapshot):
                    self.sets[node].discard(snapshot)
                    self.parities[node] = {held for held in self.parities[node] if held[0] != snapshot}
                case Protected(snapshot):
                    self.protected[node].add(snapshot)
                case Vulnerable(snapshot):
                    self.protected[node].discard(snapshot)

    def deliver(self, number: int) -> None:
        node, command = self.under_way.pop(number % len(self.under_way))
        match command:
            case AskTable(other, snapshot):
                machine = self.machines[other]
                self.give(other, PeerAsked(node, snapshot))
                standing = machine.standing(snapshot)
                if standing is Standing.READY:
                    self.give(node, TableCame(other, snapshot, machine.table(snapshot), machine.written(snapshot)))
                else:
                    self.give(node, TableWithheld(other, snapshot, standing is Standing.GONE, standing.value))
            case Notify(other, snapshot, stripe):
                if (snapshot, stripe) in self.parities[node]:
                    self.give(other, ParityHeld(node, snapshot, stripe))
            case WriteParity(snapshot, _, stripe):
                standings = {self.machines[other].standing(snapshot) for other, _ in stripe.data}
                if standings == {Standing.READY}:
                    self.parities[node].add((snapshot, stripe.number))
                    self.give(node, ParityWritten(snapshot, stripe.number))
                else:
                    self.give(node, ParityFailed(snapshot, stripe.number, Standing.GONE in standings, "not there"))

    def lose_message(self, number: int) -> None:
        """A notice or a question is lost; the shell says of a question that it was not answered."""
        node, command = self.under_way[number % len(self.under_way)]
        if isinstance(command, Notify):
            self.under_way.pop(number % len(self.under_way))
        elif isinstance(command, AskTable):
            self.under_way.pop(number % len(self.under_way))
            self.give(node, TableWithheld(command.node, command.snapshot, False, "it does not answer"))

    @property
    def has_memory(self) -> bool:
        """Whether the workers can capture one more."""
        now = [sum(s.generation == self.generation for s in snapshots) for snapshots in self.captured.values()]
        return max(now) < BUFFERS

    def capture(self, absent: str = "") -> None:
        """All workers capture a step; the node `absent` drops it."""
        self.step += 1
        for node in self.nodes:
            if node != absent:
                self.hold(node, SnapshotId(self.step, self.generation))

    def hold(self, node: str, snapshot: SnapshotId) -> None:
        self.captured[node].append(snapshot)
        self.give(node, SliceHeld(self.slice(node, snapshot)))

    def tick(self) -> None:
        self.now += POLL_S
        for node in self.nodes:
            self.give(node, Tick())

    def settle_stable(self) -> None:
        """What the verdict does: the newest snapshot of this world that every node says is protected becomes stable."""
        newest = [
            max((s.step for s in self.protected[node] if s.generation == self.generation), default=0)
            for node in self.nodes
        ]
        self.before_step = max(self.before_step, min(newest))
        for node in self.nodes:
            self.captured[node] = [s for s in self.captured[node] if s.step >= self.before_step]
            self.give(node, Forgotten(self.before_step))

    def restart(self, node: str) -> None:
        """A keeper dies and is started again: its parity is gone, its slices are handed over once more."""
        self.starts[node] += 1
        self.machines[node] = ProtectionMachine(PLENTY)
        self.parities[node], self.sets[node], self.protected[node] = set(), set(), set()
        self.under_way = [(who, what) for who, what in self.under_way if who != node]
        self.give(node, Forgotten(self.before_step))
        for other in self.nodes:
            self.give(other, WorldCame(self.world(other)))
        for snapshot in self.captured[node]:
            self.give(node, SliceHeld(self.slice(node, snapshot)))

    def new_world(self) -> None:
        self.generation += 1
        for node in self.nodes:
            self.give(node, WorldCame(self.world(node)))

    def check(self) -> None:
        for node in self.nodes:
            assert len(self.sets[node]) <= SETS_MAX
            for snapshot in self.protected[node]:
                if snapshot.step >= self.before_step:
                    for stripe in self.group.stripes():
                        if node in [name for name, _ in stripe.data] and snapshot.generation == self.generation:
                            for holder in stripe.parity:
                                assert (snapshot, stripe.number) in self.parities[holder], (node, holder, snapshot)


@settings(max_examples=60, deadline=None)
@given(
    code=st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 2), (3, 2)]),
    deeds=st.lists(
        st.tuples(
            st.sampled_from(
                ["deliver"] * 10 + ["capture", "absent", "tick", "tick", "stable", "lose", "restart", "world"]
            ),
            st.integers(0, 1 << 16),
        ),
        min_size=40,  # it takes some before there is anything to lose
        max_size=120,
    ),
)
@example(  # two snapshots protected, neither of them known to be stable, and then another world
    code=(2, 1), deeds=[*[("deliver", 0)] * 60, ("capture", 0), *[("deliver", 0)] * 60, ("world", 0)]
)
def test_whatever_the_order_protected_is_true_and_in_the_end_everything_is(
    code: tuple[int, int], deeds: list[tuple[str, int]]
) -> None:
    cluster = Cluster(*code)
    cluster.capture()
    for deed, number in deeds:
        node = cluster.nodes[number % len(cluster.nodes)]
        match deed:
            case "capture" if cluster.has_memory:
                cluster.capture()
            case "absent" if cluster.has_memory:
                cluster.capture(absent=node)
            case "tick":
                cluster.tick()
            case "stable":
                cluster.settle_stable()
            case "restart":
                cluster.restart(node)
            case "world":
                cluster.new_world()
            case "lose" if cluster.under_way:
                cluster.lose_message(number)
            case "deliver" if cluster.under_way:
                cluster.deliver(number)
        cluster.check()
    cluster.capture()
    newest = SnapshotId(cluster.step, cluster.generation)
    for _ in range(400):
        while cluster.under_way:
            cluster.deliver(0)
            cluster.check()
        cluster.settle_stable()
        cluster.tick()
        if all(newest in cluster.protected[node] for node in cluster.nodes):
            return
    pytest.fail(f"{newest} was never protected")
